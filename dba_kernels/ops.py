"""Contract sheet: what each operation takes, checks and returns, and which backend runs it.

Eager calls go straight to the backend, calls that are traced or on fake tensors through :mod:`.operators`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import operators
from .backends import BACKENDS, implementation, serving, why_not
from .contracts import (
    check_accumulation,
    check_batch,
    check_dense,
    check_encoded,
    check_list,
    check_scalars,
    check_stored,
)
from .formats import (
    STORAGE_FORMATS,
    EncodedTensor,
    LowRankTensor,
    StoredTensor,
    check_integer,
    check_name,
    matrix_shape,
)
from .stepdata import NO_OVERRIDES, Coefficient, Factors, StepOverrides, StepScalars, StepSettings, TensorBatch


def check_backend(backend: str) -> str:
    """``backend``, if it is ``"auto"`` or the name of one."""
    return check_name("backend", backend, ("auto", *BACKENDS))


def check_devices(name: str, tensors: list[torch.Tensor]) -> None:
    """Refuse a device that no backend serves, before a run begins.

    Raises:
        ValueError: naming the tensor and the reason.
    """
    for i, tensor in enumerate(tensors):
        if (reason := why_not("reference", tensor.device)) is not None:
            raise ValueError(f"{name}[{i}]: {reason}")


def _traced(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or torch.compiler.is_compiling()


# --- accumulate -------------------------------------------------------------------------------------------------------


def accumulate(
    totals: list[torch.Tensor],
    grads: list[torch.Tensor],
    weight: float,
    squared_norms: torch.Tensor,
    backend: str = "auto",
    cache: dict[str, Any] | None = None,
) -> None:
    """``total += weight · grad`` for every pair, and ‖grad‖² of each (eq. 1's sum). A non-finite gradient adds nothing.

    Args:
        totals: fp32 sums, updated in place.
        grads: fp32, bf16 or fp16, shapes and device of ``totals``.
        weight: weight of this micro-batch.
        squared_norms: float64 ``[n]``, overwritten; non-finite where the gradient was.
        cache: scratch that a backend keeps for these sums between calls, keyed by the backend.

    Raises:
        TypeError, ValueError: naming the argument that is not so.
    """
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_accumulation(totals, grads, weight, squared_norms)
    if not totals:
        return
    if _traced(totals[0]):
        operators.accumulate(totals, grads, float(weight), squared_norms, backend)
        return
    module = serving(backend, "accumulate", totals[0].device, totals[0].dtype)
    module.accumulate(totals, grads, float(weight), squared_norms, cache)


# --- quantize ---------------------------------------------------------------------------------------------------------


def encode(tensor: torch.Tensor, format: str, backend: str = "auto") -> EncodedTensor:
    """:func:`encode_all` of one tensor."""
    return encode_all([tensor], format, backend)[0]


def encode_all(tensors: list[torch.Tensor], format: str, backend: str = "auto") -> list[EncodedTensor]:
    """Store dense tensors of one device in one of ``STORAGE_FORMATS`` (1-D and tiny tensors: fp32).

    On GPUs in one launch for every dtype, whatever the number of tensors.

    Args:
        tensors: floating point, finite, any shapes.

    Raises:
        ValueError: unknown format.
    """
    check_name("format", format, STORAGE_FORMATS)
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_dense("tensors", tensors)
    if not tensors:
        return []
    if _traced(tensors[0]):
        return [operators.encode(tensor, format, backend) for tensor in tensors]
    tensors = [tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in tensors]
    module = serving(backend, "quantize", tensors[0].device, tensors[0].dtype)
    if hasattr(module, "encode_all"):
        encoded: list[EncodedTensor] = module.encode_all(tensors, format)
        return encoded
    return [module.encode(tensor, format) for tensor in tensors]


def decode(stored: StoredTensor, backend: str = "auto") -> torch.Tensor:
    """The fp32 tensor that is stored."""
    if not torch.compiler.is_compiling():
        check_stored("stored", stored)
    if isinstance(stored, LowRankTensor):
        u, v = decode_all([stored.u, stored.v], backend)
        return ((u * stored.sigma) @ v.T).reshape(stored.shape)
    return decode_all([stored], backend)[0]


def decode_all(encoded: list[EncodedTensor], backend: str = "auto") -> list[torch.Tensor]:
    """The fp32 tensors that are stored; on GPUs in one launch for every format."""
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_list("encoded", encoded)
        for i, stored in enumerate(encoded):
            check_encoded(f"encoded[{i}]", stored, encoded[0].device if i else None)
    if not encoded:
        return []
    if _traced(encoded[0].codes):
        return [operators.decode(stored, backend) for stored in encoded]
    module = serving(backend, "quantize", encoded[0].device, torch.float32)
    if hasattr(module, "decode_all"):
        decoded: list[torch.Tensor] = module.decode_all(encoded)
        return decoded
    return [module.decode(stored) for stored in encoded]


def factorize(tensor: torch.Tensor, rank: int, format: str) -> LowRankTensor:
    """Truncated SVD of ``tensor.flatten(1)`` with factors in ``format``; torch's linear algebra on every backend.

    Raises:
        ValueError: fewer than two dimensions, or a rank outside 1 … min(rows, cols).
    """
    check_name("format", format, STORAGE_FORMATS)
    check_dense("tensor", [tensor])
    check_integer("rank", rank, 1)
    rows, cols = matrix_shape(tuple(tensor.shape))
    if tensor.dim() < 2 or not 1 <= rank <= min(rows, cols):
        raise ValueError(f"rank: expected 1 <= rank <= {min(rows, cols)} for shape {tuple(tensor.shape)}, got {rank}")
    left, sigma, right = implementation("reference", "quantize").truncated_svd(tensor, rank)
    u, v = encode_all([left, right], format)
    return LowRankTensor(tuple(tensor.shape), u, sigma, v)


# --- similarity -------------------------------------------------------------------------------------------------------


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor, backend: str = "auto") -> None:
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch, one read-only pass over both (inputs of eq. 4).

    Args:
        grads: fp32, bf16 or fp16 (fp64 for fp64 parameters), contiguous, one per parameter.
        sums: float64 ``[n_params, 2]``; the batch's rows are overwritten. A non-finite gradient makes its ‖g_D‖²
            non-finite.
    """
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_batch(batch, grads, "sums", sums, 2, steps=False)
    for part, part_grads in _dense_parts(batch, grads, backend):
        if _traced(sums):
            operators.similarity(part, part_grads, sums, backend)
        else:
            _module(part, backend, "similarity").similarity(part, part_grads, sums)


# --- coefficients -----------------------------------------------------------------------------------------------------


def coefficients(
    scalars: StepScalars, settings: StepSettings, overrides: StepOverrides = NO_OVERRIDES, backend: str = "auto"
) -> None:
    """Sums → coefficients, skip flag and counters (eqs. 2, 4, 5); see ``reference.coefficients``."""
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_scalars(scalars, settings, overrides)
    if _traced(scalars.coefficients):
        operators.coefficients(scalars, settings, overrides, backend)
    else:
        module = serving(backend, "coefficients", scalars.coefficients.device, torch.float32)
        module.coefficients(scalars, settings, overrides)


# --- step -------------------------------------------------------------------------------------------------------------


def step(batch: TensorBatch, grads: list[torch.Tensor], coefficients: torch.Tensor, backend: str = "auto") -> None:
    """Boost, moments and corrected AdamW update of every parameter of the batch, in place (eqs. 3, 7, 8).

    Args:
        grads: as for :func:`similarity`.
        coefficients: float64 ``[n_params, Coefficient.COUNT]``.
    """
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_batch(batch, grads, "coefficients", coefficients, Coefficient.COUNT, steps=True)
    for part, part_grads in _dense_parts(batch, grads, backend):
        if _traced(coefficients):
            operators.step(part, part_grads, coefficients, backend)
        else:
            _module(part, backend, "step").step(part, part_grads, coefficients)


def fuses(batches: list[tuple[TensorBatch, list[torch.Tensor]]], backend: str) -> bool:
    """Whether :func:`fused_step` can take all of these batches: one call of a backend that has it, nothing traced."""
    return all(
        batch.global_format != "lowrank"
        and not _traced(batch.tensors[0].param)
        and hasattr(_module(batch, backend, "step"), "fused_step")
        for batch, _ in batches
    )


def fused_step(
    batches: list[tuple[TensorBatch, list[torch.Tensor]]],
    scalars: StepScalars,
    settings: StepSettings,
    overrides: StepOverrides = NO_OVERRIDES,
    backend: str = "auto",
) -> None:
    """:func:`similarity`, :func:`coefficients` and :func:`step` of a whole model in one call, bit for bit the same.

    Args:
        batches: all active parameters with their gradients; :func:`fuses` said yes to them.
        scalars, settings, overrides: those of :func:`coefficients`.
    """
    check_backend(backend)
    check_list("batches", batches)
    check_scalars(scalars, settings, overrides)
    for batch, batch_grads in batches:
        check_batch(batch, batch_grads, "scalars.coefficients", scalars.coefficients, Coefficient.COUNT, steps=True)
    parts, grads = [batch for batch, _ in batches], [batch_grads for _, batch_grads in batches]
    _module(parts[0], backend, "step").fused_step(parts, grads, scalars, settings, overrides)


# --- shared -----------------------------------------------------------------------------------------------------------


def _module(batch: TensorBatch, backend: str, stem: str) -> ModuleType:
    return serving(backend, stem, batch.device, batch.tensors[0].param.dtype)


def bind(stored: StoredTensor, device: torch.device, backend: str = "auto") -> StoredTensor | Factors:
    """A stored global gradient where a step wants it, low-rank factors decoded: done once, not at every step."""
    stored = stored.to(device)
    return _factors(stored, backend) if isinstance(stored, LowRankTensor) else stored


def _factors(stored: LowRankTensor, backend: str) -> Factors:
    dtype = torch.bfloat16 if stored.device.type == "cuda" else torch.float32
    u, v = decode_all([stored.u, stored.v], backend)  # [rows, r], [cols, r]
    return Factors(stored.shape, (u * stored.sigma).to(dtype), v.to(dtype).T)


def _dense_parts(
    batch: TensorBatch, grads: list[torch.Tensor], backend: str
) -> Iterator[tuple[TensorBatch, list[torch.Tensor]]]:
    """The batch itself; for low rank its parameters one by one, each with ĝ_G rebuilt into one reused buffer.

    A rank-r global gradient is never dense for more than one tensor. Per parameter and use: one matmul, no allocation.
    """
    if batch.global_format != "lowrank":
        yield batch, grads
        return
    if "lowrank" not in batch.cache:
        batch.cache["lowrank"] = _rebuilt(batch, backend)
    for (single, factors, dense), grad in zip(batch.cache["lowrank"], grads, strict=True):
        torch.mm(factors.left, factors.right, out=dense)
        yield single, [grad]


def _rebuilt(batch: TensorBatch, backend: str) -> list[tuple[TensorBatch, Factors, torch.Tensor]]:
    """Per parameter a batch of its own whose global gradient lies in the shared buffer, the factors, that matrix."""
    stored = batch.all("global_grad")
    bound = [low if isinstance(low, Factors) else _factors(low.to(batch.device), backend) for low in stored]
    buffer = bound[0].left.new_empty(max(math.prod(low.shape) for low in bound))
    name = "bf16" if buffer.dtype == torch.bfloat16 else "fp32"
    rebuilt = []
    for tensor, factors in zip(batch.tensors, bound, strict=True):
        dense = buffer[: math.prod(factors.shape)]
        encoded = EncodedTensor(name, factors.shape, dense.view(factors.shape))
        single = replace(batch, global_format=name, tensors=[replace(tensor, global_grad=encoded)], cache={})
        rebuilt.append((single, factors, dense.view(matrix_shape(factors.shape))))
    return rebuilt
