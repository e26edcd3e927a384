"""Contract sheet: what each operation takes, checks and returns, and which backend runs it.

Eager calls go straight to the backend. The same operations are registered with torch.library over flat tensor lists
(``torch.ops.dba_kernels.*``) with fake implementations, for tracing and for fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .backends import implementation, select
from .formats import (
    STORAGE_FORMATS,
    EncodedTensor,
    LowRankTensor,
    StoredTensor,
    check_name,
    matrix_shape,
    scales_shape,
    storage_format,
)
from .stepdata import UPDATED_PARTS, ParamTensors, StepSettings, StepTables, TensorBatch

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _traced(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or torch.compiler.is_compiling()


# --- accumulate -------------------------------------------------------------------------------------------------------


def accumulate(
    totals: list[torch.Tensor],
    grads: list[torch.Tensor],
    weight: float,
    squared_norms: torch.Tensor,
    backend: str = "auto",
) -> None:
    """``total += weight · grad`` for every pair, and ‖grad‖² of each (eq. 1's sum). A non-finite gradient adds nothing.

    Args:
        totals: fp32 sums, updated in place.
        grads: fp32, bf16 or fp16, shapes and device of ``totals``.
        weight: weight of this micro-batch.
        squared_norms: float64 ``[n]``, overwritten; non-finite where the gradient was.

    Raises:
        ValueError: on differing shapes or on dtypes outside the above.
    """
    for i, (total, grad) in enumerate(zip(totals, grads, strict=True)):
        if total.shape != grad.shape:
            raise ValueError(f"grads[{i}]: expected shape {tuple(total.shape)}, got {tuple(grad.shape)}")
        if total.dtype == torch.float32 and grad.dtype not in GRAD_DTYPES:
            raise ValueError(f"grads[{i}]: expected float32, bfloat16 or float16, got {grad.dtype}")
    if not totals:
        return
    run = torch.ops.dba_kernels.accumulate if _traced(totals[0]) else _accumulate
    run(totals, grads, float(weight), squared_norms, backend)


def _accumulate(
    totals: list[torch.Tensor], grads: list[torch.Tensor], weight: float, squared_norms: torch.Tensor, backend: str
) -> None:
    chosen = select(backend, totals[0].device, totals[0].dtype)
    implementation(chosen, "accumulate").accumulate(totals, grads, weight, squared_norms)


_accumulate_op = torch.library.custom_op(
    "dba_kernels::accumulate", _accumulate, mutates_args=("totals", "squared_norms")
)


@_accumulate_op.register_fake
def _(totals, grads, weight, squared_norms, backend) -> None:
    return None


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
    if not tensors:
        return []
    if _traced(tensors[0]):
        return [_encode_traced(tensor, format, backend) for tensor in tensors]
    tensors = [tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in tensors]
    module = implementation(select(backend, tensors[0].device, tensors[0].dtype), "quantize")
    if hasattr(module, "encode_all"):
        return module.encode_all(tensors, format)
    return [module.encode(tensor, format) for tensor in tensors]


def _encode_traced(tensor: torch.Tensor, format: str, backend: str) -> EncodedTensor:
    chosen = storage_format(format, tuple(tensor.shape))
    codes, scales = torch.ops.dba_kernels.encode(tensor, chosen.name, backend)
    return EncodedTensor(chosen.name, tuple(tensor.shape), codes, scales if chosen.grouped else None)


@torch.library.custom_op("dba_kernels::encode", mutates_args=())
def _encode_op(tensor: torch.Tensor, format: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = encode(tensor, format, backend)
    return encoded.codes, tensor.new_empty(0, dtype=torch.float32) if encoded.scales is None else encoded.scales


@_encode_op.register_fake
def _(tensor: torch.Tensor, format: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, shape = STORAGE_FORMATS[format], tuple(tensor.shape)
    codes = tensor.new_empty(chosen.codes_shape(shape), dtype=chosen.dtype)
    return codes, tensor.new_empty(scales_shape(shape) if chosen.grouped else (0,), dtype=torch.float32)


def decode(stored: StoredTensor, backend: str = "auto") -> torch.Tensor:
    """The fp32 tensor that is stored."""
    if isinstance(stored, LowRankTensor):
        u, v = decode_all([stored.u, stored.v], backend)
        return ((u * stored.sigma) @ v.T).reshape(stored.shape)
    return decode_all([stored], backend)[0]


def decode_all(encoded: list[EncodedTensor], backend: str = "auto") -> list[torch.Tensor]:
    """The fp32 tensors that are stored; on GPUs in one launch for every format."""
    if not encoded:
        return []
    if _traced(encoded[0].codes):
        run = torch.ops.dba_kernels.decode
        return [run(stored.codes, stored.scales, list(stored.shape), stored.format, backend) for stored in encoded]
    module = implementation(select(backend, encoded[0].device, torch.float32), "quantize")
    if hasattr(module, "decode_all"):
        return module.decode_all(encoded)
    return [module.decode(stored) for stored in encoded]


@torch.library.custom_op("dba_kernels::decode", mutates_args=())
def _decode_op(
    codes: torch.Tensor, scales: torch.Tensor | None, shape: list[int], format: str, backend: str
) -> torch.Tensor:
    decoded = decode(EncodedTensor(format, tuple(shape), codes, scales), backend)
    return decoded.clone() if decoded.data_ptr() == codes.data_ptr() else decoded  # an op must not return its input


@_decode_op.register_fake
def _(codes: torch.Tensor, scales: torch.Tensor | None, shape: list[int], format: str, backend: str) -> torch.Tensor:
    return codes.new_empty(shape, dtype=torch.float32)


def factorize(tensor: torch.Tensor, rank: int, format: str) -> LowRankTensor:
    """Truncated SVD of ``tensor.flatten(1)`` with factors in ``format``; torch's linear algebra on every backend.

    Raises:
        ValueError: fewer than two dimensions, or a rank outside 1 … min(rows, cols).
    """
    check_name("format", format, STORAGE_FORMATS)
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
    for part, part_grads in _dense_parts(batch, grads, backend):
        if _traced(sums):
            codes, scales = _flat_global_grads(part)
            flat = (part.all("param"), part_grads, codes, scales, part.all("index"), sums, part.global_format, backend)
            torch.ops.dba_kernels.similarity(*flat)
        else:
            _implementation(part, backend, "similarity").similarity(part, part_grads, sums)


@torch.library.custom_op("dba_kernels::similarity", mutates_args=("sums",))
def _similarity_op(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    index: list[int],
    sums: torch.Tensor,
    global_format: str,
    backend: str,
) -> None:
    stored = _stored(global_format, params, codes, scales)
    batch = TensorBatch("native", "fp32", global_format, _records(index=index, param=params, global_grad=stored))
    _implementation(batch, backend, "similarity").similarity(batch, grads, sums)


@_similarity_op.register_fake
def _(params, grads, codes, scales, index, sums, global_format, backend) -> None:
    return None


def coefficients(
    tables: StepTables,
    settings: StepSettings,
    *,
    loss_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    gamma_override: torch.Tensor | None = None,
    alpha_override: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Sums → coefficient table, skip flag and counters (eqs. 2, 4, 5); see ``reference.similarity.coefficients``."""
    overrides = (loss_scale, found_inf, gamma_override, alpha_override)
    if _traced(tables.table):
        tensors = (getattr(tables, field.name) for field in fields(tables))
        scalars = (settings.boost, settings.total_steps, settings.boost_max, settings.correction, settings.scope)
        limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        torch.ops.dba_kernels.coefficients(
            *tensors, *overrides, *scalars, *settings.bounds, limit, settings.reduce, backend
        )
        return
    names = ("loss_scale", "found_inf", "gamma_override", "alpha_override")
    module = implementation(select(backend, tables.table.device, torch.float32), "similarity")
    module.coefficients(tables, settings, **dict(zip(names, overrides, strict=True)))


@torch.library.custom_op(
    "dba_kernels::coefficients",
    mutates_args=("steps", "bias_corrections", "counters", "table", "report", "summary"),
)
def _coefficients_op(
    sums: torch.Tensor,
    global_sq: torch.Tensor,
    hyper: torch.Tensor,
    group: torch.Tensor,
    active: torch.Tensor,
    steps: torch.Tensor,
    bias_corrections: torch.Tensor,
    counters: torch.Tensor,
    table: torch.Tensor,
    report: torch.Tensor,
    summary: torch.Tensor,
    loss_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    gamma_override: torch.Tensor | None,
    alpha_override: torch.Tensor | None,
    boost: float,
    total_steps: int,
    boost_max: float,
    correction: str,
    scope: str,
    alpha_min: float,
    alpha_max: float,
    max_grad_norm: float,
    reduce: bool,
    backend: str,
) -> None:
    bounds, limit = (alpha_min, alpha_max), None if math.isinf(max_grad_norm) else max_grad_norm
    coefficients(
        StepTables(sums, global_sq, hyper, group, active, steps, bias_corrections, counters, table, report, summary),
        StepSettings(boost, total_steps, boost_max, correction, scope, bounds, limit, reduce),
        loss_scale=loss_scale,
        found_inf=found_inf,
        gamma_override=gamma_override,
        alpha_override=alpha_override,
        backend=backend,
    )


@_coefficients_op.register_fake
def _(*args) -> None:
    return None


# --- step -------------------------------------------------------------------------------------------------------------


def step(batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor, backend: str = "auto") -> None:
    """Boost, moments and corrected AdamW update of every parameter of the batch, in place (eqs. 3, 7, 8).

    Args:
        grads: as for :func:`similarity`.
        table: coefficient table, float64 ``[n_params, Coefficient.COUNT]``.
    """
    for part, part_grads in _dense_parts(batch, grads, backend):
        if _traced(table):
            codes, scales = _flat_global_grads(part)
            torch.ops.dba_kernels.step(
                *(part.all(name) for name in UPDATED_PARTS),
                *(part_grads, codes, scales, table, *(part.all(name) for name in ("index", "seed", "offset"))),
                *(part.param_format, part.state_format, part.global_format, backend),
            )
        else:
            _implementation(part, backend, "step").step(part, part_grads, table)


@torch.library.custom_op(
    "dba_kernels::step",
    mutates_args=("params", "remainders", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"),
)
def _step_op(
    params: list[torch.Tensor],
    remainders: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    exp_avg_scales: list[torch.Tensor],
    exp_avg_sq_scales: list[torch.Tensor],
    grads: list[torch.Tensor],
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    table: torch.Tensor,
    index: list[int],
    seeds: list[int],
    offsets: list[int],
    param_format: str,
    state_format: str,
    global_format: str,
    backend: str,
) -> None:
    updated = (params, remainders, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    records = _records(
        **dict(zip(UPDATED_PARTS, updated, strict=True)),
        global_grad=_stored(global_format, params, codes, scales),
        index=index,
        seed=seeds,
        offset=offsets,
    )
    batch = TensorBatch(param_format, state_format, global_format, records)
    _implementation(batch, backend, "step").step(batch, grads, table)


@_step_op.register_fake
def _(*args) -> None:
    return None


def fuses(batches: list[tuple[TensorBatch, list[torch.Tensor]]], backend: str) -> bool:
    """Whether :func:`fused_step` can take all of these batches: one call of a backend that has it, nothing traced."""
    return all(
        batch.global_format != "lowrank"
        and not _traced(batch.tensors[0].param)
        and hasattr(_implementation(batch, backend, "step"), "fused_step")
        for batch, _ in batches
    )


def fused_step(
    batches: list[tuple[TensorBatch, list[torch.Tensor]]],
    tables: StepTables,
    settings: StepSettings,
    *,
    backend: str = "auto",
    **overrides: torch.Tensor | None,
) -> None:
    """:func:`similarity`, :func:`coefficients` and :func:`step` of a whole model in one call, bit for bit the same.

    Args:
        batches: all active parameters with their gradients; :func:`fuses` said yes to them.
        tables, settings, overrides: those of :func:`coefficients`.
    """
    parts, grads = [batch for batch, _ in batches], [its_grads for _, its_grads in batches]
    _implementation(parts[0], backend, "step").fused_step(parts, grads, tables, settings, **overrides)


# --- shared -----------------------------------------------------------------------------------------------------------


def _implementation(batch: TensorBatch, backend: str, stem: str) -> ModuleType:
    return implementation(select(backend, batch.device, batch.tensors[0].param.dtype), stem)


def _records(**columns: list[Any]) -> list[ParamTensors]:
    """One record per parameter from one list per part; an empty list where the formats have no such part."""
    columns = {name: values for name, values in columns.items() if values}
    return [ParamTensors(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _flat_global_grads(batch: TensorBatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    stored = batch.all("global_grad")
    return [s.codes for s in stored], [s.scales for s in stored if s.scales is not None]


def _stored(
    format: str, params: list[torch.Tensor], codes: list[torch.Tensor], scales: list[torch.Tensor]
) -> list[StoredTensor]:
    per_tensor: list[torch.Tensor | None] = [*scales] or [None] * len(codes)
    return [
        EncodedTensor(format, tuple(p.shape), c, s)
        for p, c, s in zip(params, codes, per_tensor, strict=False)  # no codes at all without a global gradient
    ]


def _dense_parts(
    batch: TensorBatch, grads: list[torch.Tensor], backend: str
) -> Iterator[tuple[TensorBatch, list[torch.Tensor]]]:
    """The batch itself; for low rank its parameters one by one, each with ĝ_G rebuilt into one reused buffer.

    A rank-r global gradient is never dense for more than one tensor. The buffer is bf16 on GPUs, where bandwidth is
    what counts, and fp32 on CPUs, where bf16 matmul is slow.
    """
    if batch.global_format != "lowrank":
        yield batch, grads
        return
    stored = batch.all("global_grad")
    if "lowrank" not in batch.cache:
        name = "bf16" if batch.device.type == "cuda" else "fp32"
        longest = max(math.prod(low.shape) for low in stored)
        buffer = torch.empty(longest, dtype=STORAGE_FORMATS[name].dtype, device=batch.device)
        dense = [EncodedTensor(name, low.shape, buffer[: math.prod(low.shape)].view(low.shape)) for low in stored]
        batch.cache["lowrank"] = [
            replace(batch, global_format=name, tensors=[replace(tensor, global_grad=rebuilt)], cache={})
            for tensor, rebuilt in zip(batch.tensors, dense, strict=True)
        ]
    for single, low, grad in zip(batch.cache["lowrank"], stored, grads, strict=True):
        matrix = single.tensors[0].global_grad.codes.flatten(1)
        u, v = decode_all([low.u, low.v], backend)  # [rows, r], [cols, r]
        torch.matmul((u * low.sigma).to(matrix.dtype), v.to(matrix.dtype).T, out=matrix)
        yield single, [grad]
