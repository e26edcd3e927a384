"""The test matrix: batches of tensors in every combination of dtypes and formats, built the same way for every backend.

A :class:`Case` names a combination; :func:`build` makes its tensors from a seed. ``place`` decides where each tensor
lies in memory (:func:`plain`, :class:`Misaligned`, or :class:`tests.support.guard_pages.GuardPages`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dba_kernels.formats import (
    MIN_COMPRESSED_NUMEL,
    STATE_FORMATS,
    STORAGE_FORMATS,
    EncodedTensor,
    scales_shape,
)
from dba_kernels.reference import quantize, remainder
from dba_kernels.stepdata import UPDATED_PARTS, Coefficient, ParamTensors, TensorBatch

Place = Callable[[torch.Tensor], torch.Tensor]

SIZES = ((1, 0), (0, 64), (1, 1), (1, 63), (2, 32), (3, 341), (5, 205), (2, 3, 50), (40, 128), (7, 777))
"""0, 0, 1, 63, 64, 1023, 1025 elements, a 3-D tensor, several blocks of full groups, several blocks of ragged rows."""

FEW_SIZES = ((1, 0), (1, 63), (5, 205), (40, 128))
"""For the long matrix: nothing, less than one group, ragged rows, more than one block of full groups."""

FLAT_SIZES = ((0,), (1,), (63,), (64,), (1023,), (1025,), (), (5000,))
"""Norms and biases: 1-D tensors and one 0-D, all with fp32 state and fp32 global gradient."""

PARAM_KINDS = (
    (torch.float32, "native"),
    (torch.bfloat16, "native"),
    (torch.float16, "native"),
    *itertools.product((torch.bfloat16, torch.float16), ("split16", "split8", "master")),
)
GRAD_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
GLOBAL_FORMATS = ("none", *STORAGE_FORMATS)


@dataclass(frozen=True)
class Case:
    """One combination of formats, and the shapes of the tensors that share it."""

    param_dtype: torch.dtype = torch.float32
    param_format: str = "native"
    state_format: str = "fp32"
    global_format: str = "int8"
    grad_dtype: torch.dtype = torch.float32
    shapes: tuple[tuple[int, ...], ...] = FEW_SIZES
    seed: int = 0

    def __str__(self) -> str:
        names = (str(self.param_dtype), self.param_format, self.state_format, self.global_format, str(self.grad_dtype))
        return "-".join(names).replace("torch.", "")


def full_matrix() -> list[Case]:
    """Every parameter kind × state format × format of the global gradient; gradient dtypes in rotation."""
    return [
        Case(dtype, kind, state, stored, GRAD_DTYPES[(i // 3 + j) % 3], seed=i + 10 * j + 100 * k)
        for (i, (dtype, kind)), (j, state), (k, stored) in itertools.product(
            enumerate(PARAM_KINDS), enumerate(STATE_FORMATS), enumerate(GLOBAL_FORMATS)
        )
    ]


def pairwise_matrix() -> list[Case]:
    """A third of :func:`full_matrix` in which every pair of formats still meets (for slow interpreters)."""
    return [case for case in full_matrix() if case.seed % 3 == 0]  # seed: the sum of the three positions, modulo 3


def size_cases() -> list[Case]:
    """All sizes for the combinations people run, the 1-D batch among them."""
    return [
        Case(torch.float32, "native", "fp32", "int8", torch.bfloat16, SIZES, seed=1),
        Case(torch.bfloat16, "split16", "int8", "int4", torch.bfloat16, SIZES, seed=2),
        Case(torch.bfloat16, "split8", "int8", "none", torch.bfloat16, SIZES, seed=3),
        Case(torch.float16, "split8", "bf16", "fp8_e4m3", torch.float16, SIZES, seed=4),
        Case(torch.float32, "native", "fp32", "fp32", torch.float32, FLAT_SIZES, seed=5),
        Case(torch.bfloat16, "split16", "fp32", "none", torch.bfloat16, FLAT_SIZES, seed=6),
    ]


# --- where tensors lie ------------------------------------------------------------------------------------------------


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Storage of its own, as the allocator aligns it."""
    return tensor.clone()


class Misaligned:
    """Places tensors one element past an aligned address, between margins that nobody may touch."""

    MARGIN = 64
    CANARY = 0x5A

    def __init__(self) -> None:
        self._margins: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        start = self.MARGIN + tensor.element_size()
        storage = torch.full((start + tensor.nbytes + self.MARGIN,), self.CANARY, dtype=torch.uint8)
        self._margins += [storage[:start], storage[start + tensor.nbytes :]]
        inside = storage[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        return inside

    def check(self) -> None:
        """Raise AssertionError if a margin changed."""
        assert all((margin == self.CANARY).all() for margin in self._margins), "a write left its tensor"


# --- tensors ----------------------------------------------------------------------------------------------------------


def encode_any_size(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """Encode ``tensor`` in ``format`` even where it is small, as a row shard of a large parameter is."""
    shape, chosen = tuple(tensor.shape), STORAGE_FORMATS[format]
    if format == "fp32":
        return EncodedTensor("fp32", shape, tensor.float())
    if tensor.numel() == 0:
        scales = torch.empty(scales_shape(shape)) if chosen.grouped else None
        return EncodedTensor(format, shape, torch.empty(chosen.codes_shape(shape), dtype=chosen.dtype), scales)
    copies = -(-MIN_COMPRESSED_NUMEL // tensor.numel())
    return quantize.encode(torch.cat([tensor] * copies), format).row_slice(0, shape[0])


def random_tensor(shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Normal values whose size varies over two decades from row to row, with a few zeros."""
    values = torch.randn(shape, generator=generator) * scale
    if len(shape) > 1:
        values *= 10.0 ** (2 * torch.rand((shape[0],) + (1,) * (len(shape) - 1), generator=generator) - 1)
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 0.0, values)


def coefficient_table(rows: int, generator: torch.Generator) -> torch.Tensor:
    """float64 ``[rows, Coefficient.COUNT]``: every row has values of its own, as groups and corrections give it."""
    u = torch.rand(rows, Coefficient.COUNT, generator=generator, dtype=torch.float64)
    table = torch.zeros_like(u)
    table[:, Coefficient.GRAD_WEIGHT] = 0.5 + 0.5 * u[:, 0]
    table[:, Coefficient.GLOBAL_WEIGHT] = 0.5 * u[:, 1]
    table[:, Coefficient.BETA1] = 0.85 + 0.1 * u[:, 2]
    table[:, Coefficient.BETA2] = 0.99 + 0.009 * u[:, 3]
    table[:, Coefficient.ONE_MINUS_BETA1] = 1 - table[:, Coefficient.BETA1]
    table[:, Coefficient.ONE_MINUS_BETA2] = 1 - table[:, Coefficient.BETA2]
    table[:, Coefficient.STEP_SIZE] = 1e-3 * (0.5 + u[:, 6])
    table[:, Coefficient.INV_SQRT_BIAS_CORRECTION2] = 1 + 4 * u[:, 7]
    table[:, Coefficient.EPS] = 1e-3 * (0.5 + u[:, 8])  # large enough to matter beside √v̂
    table[:, Coefficient.LR_WEIGHT_DECAY] = 1e-3 * (0.5 + u[:, 9])
    table[:, Coefficient.STEP] = torch.arange(1, rows + 1)
    return table


def _remainder(case: Case, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stored parameter and its remainder for the fp32 value ``exact``."""
    if case.param_format == "native":
        return exact.to(case.param_dtype), None
    return remainder.split(exact, case.param_dtype, case.param_format)


def clone(batch: TensorBatch) -> TensorBatch:
    """A copy of the batch with storage and cache of its own."""
    return with_parts(batch, lambda part: part.clone())


def with_parts(batch: TensorBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> TensorBatch:
    """The batch with ``change`` of every part that a step writes, and a cache of its own."""
    tensors = []
    for tensor in batch.tensors:
        parts = {part: getattr(tensor, part) for part in UPDATED_PARTS}
        changed = {part: change(value) for part, value in parts.items() if value is not None}
        tensors.append(dataclasses.replace(tensor, **changed))
    return dataclasses.replace(batch, tensors=tensors, cache={})


def written(batch: TensorBatch) -> list[torch.Tensor]:
    """Everything that a step writes, part by part."""
    return [tensor for part in UPDATED_PARTS for tensor in batch.all(part)]


def moments(state_format: str, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that stands for these moments, by the names of its parts."""
    chosen = STATE_FORMATS[state_format]
    if not chosen.grouped:
        return {"exp_avg": exp_avg.to(chosen.exp_avg), "exp_avg_sq": exp_avg_sq.to(chosen.exp_avg_sq)}
    codes, scale = quantize.encode_exp_avg(exp_avg)
    codes_sq, scale_sq = quantize.encode_exp_avg_sq(exp_avg_sq)
    return {"exp_avg": codes, "exp_avg_sq": codes_sq, "exp_avg_scale": scale, "exp_avg_sq_scale": scale_sq}


def build(case: Case, place: Place = plain) -> tuple[TensorBatch, list[torch.Tensor], torch.Tensor]:
    """``(batch, grads, table)`` of a case; the same case gives the same values wherever it is placed.

    The table has more rows than the batch has tensors, and the tensors name theirs out of order.
    """
    generator = torch.Generator().manual_seed(case.seed)
    n = len(case.shapes)
    batch, grads = TensorBatch(case.param_format, case.state_format, case.global_format, []), []
    for i, shape in enumerate(case.shapes):
        param, rest = _remainder(case, random_tensor(shape, generator, 0.05))
        parts = {"param": param} if rest is None else {"param": param, "remainder": rest}
        grads.append(place(random_tensor(shape, generator, 1e-2).to(case.grad_dtype)))
        exp_avg, exp_avg_sq = random_tensor(shape, generator, 1e-2), random_tensor(shape, generator, 1e-2).square()
        parts |= moments(case.state_format, exp_avg, exp_avg_sq)
        stored = None
        if case.global_format != "none":
            stored = encode_any_size(random_tensor(shape, generator, 3e-2), case.global_format)
            scales = None if stored.scales is None else place(stored.scales)
            stored = dataclasses.replace(stored, codes=place(stored.codes), scales=scales)
        offset = 0 if i % 2 == 0 else 2**32 - 100  # odd ones: shards that straddle 2**32
        placed = {part: place(value) for part, value in parts.items()}
        batch.tensors.append(ParamTensors(n - i, **placed, global_grad=stored, seed=1_000_003 * (i + 1), offset=offset))
    return batch, grads, coefficient_table(n + 2, generator)
