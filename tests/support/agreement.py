"""What a backend computes, compared with the reference within the table of tolerances: one comparison per operation.

``place`` puts the compared backend's tensors somewhere else in memory; ``mutate`` spoils them for a negative control.
"""

from __future__ import annotations

import dataclasses

import torch

from dba_kernels.formats import STORAGE_FORMATS, EncodedTensor
from dba_kernels.reference import accumulate, coefficients, quantize, similarity
from dba_kernels.stepdata import Coefficient, Hyper, StepOverrides, StepScalars, StepSettings, Summary

from .cases import Case, build, plain, random_tensor
from .tolerances import TOLERANCES, assert_codes, assert_fp32

# --- accumulate -------------------------------------------------------------------------------------------------------

TOTAL_SHAPES = ((0,), (1,), (63,), (64,), (1023,), (1025,), (), (40, 128), (7, 777))
POISONED = TOTAL_SHAPES.index((1025,))


def totals_and_gradients(dtype: torch.dtype, place: object = plain) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    totals = [place(random_tensor(shape, generator)) for shape in TOTAL_SHAPES]
    return totals, [place(random_tensor(shape, generator).to(dtype)) for shape in TOTAL_SHAPES]


def assert_same_totals(
    backend_accumulate: object, dtype: torch.dtype, place: object = plain, poison: float | None = None
) -> None:
    """Three micro-batches of different weight; the second one has a non-finite element if ``poison`` is given."""
    totals, grads = totals_and_gradients(dtype)
    expected = [total.clone() for total in totals]
    actual, placed = totals_and_gradients(dtype, place)
    for k, weight in enumerate((1.0, 0.3, 7.0)):
        if k == 1 and poison is not None:
            grads[POISONED][-1] = placed[POISONED][-1] = poison
        elif poison is not None:
            grads[POISONED][-1] = placed[POISONED][-1] = 1.0
        norms, expected_norms = (torch.full((len(TOTAL_SHAPES),), float("nan"), dtype=torch.float64) for _ in range(2))
        terms = [torch.maximum(t.abs(), weight * g.float().abs()) for t, g in zip(expected, grads, strict=True)]
        accumulate.accumulate(expected, grads, weight, expected_norms)
        backend_accumulate(actual, placed, weight, norms)
        finite = torch.isfinite(expected_norms)
        assert torch.equal(torch.isfinite(norms), finite)
        assert ((norms - expected_norms).abs()[finite] <= TOLERANCES["sum"].bound * expected_norms[finite]).all()
        for total, want, largest in zip(actual, expected, terms, strict=True):
            assert_fp32("total", total, want, largest.nan_to_num(0.0, posinf=0.0))


# --- quantize ---------------------------------------------------------------------------------------------------------

GROUPED = tuple(name for name, format in STORAGE_FORMATS.items() if format.grouped)


def unpacked(encoded: EncodedTensor) -> torch.Tensor:
    """Codes as integers that lie in the order of their values."""
    chosen = STORAGE_FORMATS[encoded.format]
    if chosen.bits == 4:
        return quantize.unpack_int4(encoded.codes, encoded.codes.shape[1] * 2)
    if chosen.floating is not None:
        magnitude = (encoded.codes & 0x7F).to(torch.int16)
        return torch.where(encoded.codes > 0x7F, -magnitude, magnitude)
    return encoded.codes


def assert_same_encoding(encode: object, tensor: torch.Tensor, format: str, place: object = plain) -> None:
    expected, actual = quantize.encode(tensor, format), encode(place(tensor), format)
    assert (actual.format, actual.shape) == (expected.format, expected.shape)
    assert (actual.codes.dtype, actual.codes.shape) == (expected.codes.dtype, expected.codes.shape)
    if expected.scales is None:
        assert actual.scales is None
        assert torch.equal(actual.codes, expected.codes)
        return
    torch.testing.assert_close(actual.scales, expected.scales, rtol=2.0**-22, atol=0.0)
    assert_codes(format, unpacked(actual), unpacked(expected))


def every_code(format: str) -> EncodedTensor:
    """All byte patterns that ``format`` can store, each under four scales."""
    codes, chosen = torch.arange(256, dtype=torch.uint8), STORAGE_FORMATS[format]
    if chosen.floating is not None:
        codes = codes[codes.view(chosen.floating).float().isfinite()]
    elif chosen.dtype == torch.int8:
        codes = codes[codes != 128]
    cols = codes.numel() * (2 if chosen.bits == 4 else 1)
    rows = codes.repeat(32, 1).view(chosen.dtype)
    scales = torch.tensor([1.0, 0.3, 2.0**-120, 1e30]).repeat(8)[:, None].repeat(1, -(-cols // 64))
    return EncodedTensor(format, (32, cols), rows.contiguous(), scales)


# --- similarity -------------------------------------------------------------------------------------------------------


def sums_of(backend_similarity: object, batch: object, grads: list[torch.Tensor]) -> torch.Tensor:
    sums = torch.full((len(grads) + 2, 2), float("nan"), dtype=torch.float64)
    backend_similarity(batch, grads, sums)
    return sums


def assert_same_sums(
    backend_similarity: object, case: Case, place: object = torch.clone, mutate: object = None
) -> None:
    """Sums within their tolerance of Σ|terms|, rows that belong to no tensor untouched."""
    batch, grads, _ = build(case)
    expected = sums_of(similarity.similarity, batch, grads)
    placed, placed_grads, _ = build(case, place)
    if mutate is not None:
        mutate(placed, placed_grads)
    actual = sums_of(backend_similarity, placed, placed_grads)
    written = batch.all("index")
    for row in range(len(actual)):
        if row not in written:
            assert actual[row].isnan().all(), f"row {row} belongs to no tensor and was written"
            continue
        i = written.index(row)
        grad = grads[i].double()
        kept = batch.tensors[i].global_grad
        stored = torch.zeros_like(grad) if kept is None else quantize.decode(kept).double()
        terms = torch.stack(((grad * stored).abs().sum(), grad.square().sum()))
        error = (actual[row] - expected[row]).abs()
        assert (error <= TOLERANCES["sum"].bound * terms).all(), f"row {row}: {actual[row]}, expected {expected[row]}"


# --- coefficients -----------------------------------------------------------------------------------------------------

N, GROUPS, ACTIVE = 7, 3, [5, 0, 3, 6, 2]
BASE = StepSettings(
    boost=0.3,
    total_steps=30,
    boost_max=0.7,
    correction="cosine",
    scope="tensor",
    bounds=(0.1, 1.7),
    max_grad_norm=0.37,
    reduce=True,
)
OUTPUTS = ("steps", "bias_corrections", "counters", "coefficients", "report", "summary")


def arguments(seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of ``coefficients``: 7 parameters in 3 groups, 5 of them active, one without a global gradient."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    grad_sq, global_sq = uniform(N) + 0.1, uniform(N) + 0.1
    sums = torch.stack(((2 * uniform(N) - 1) * (grad_sq * global_sq).sqrt(), grad_sq), dim=1)
    global_sq[3] = -1.0
    hyper = torch.empty(GROUPS, Hyper.COUNT, dtype=torch.float64)
    hyper[:, Hyper.LR] = 1e-3 * uniform(GROUPS)
    hyper[:, Hyper.BETA1] = 0.8 + 0.15 * uniform(GROUPS)
    hyper[:, Hyper.BETA2] = 0.99 + 0.009 * uniform(GROUPS)
    hyper[:, Hyper.EPS] = 1e-8 * uniform(GROUPS)
    hyper[:, Hyper.WEIGHT_DECAY] = 0.1 * uniform(GROUPS)
    hyper[:, Hyper.SIGN] = torch.tensor([1.0, -1.0, 1.0])
    return {
        "sums": sums,
        "global_sq": global_sq,
        "hyper": hyper,
        "group": torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        "active": torch.tensor(ACTIVE),
        "steps": torch.tensor([0.0, 4, 2, 7, 1, 0, 3]),
        "bias_corrections": uniform(N, 2) * 0.5,
        "counters": torch.tensor([11, 2]),
        "coefficients": torch.full((N, Coefficient.COUNT), float("nan"), dtype=torch.float64),
        "report": torch.full((N, 2), float("nan"), dtype=torch.float64),
        "summary": torch.full((Summary.COUNT,), float("nan"), dtype=torch.float64),
    }


def assert_same_coefficients(
    backend_coefficients: object, settings: StepSettings, inputs: dict, optional: dict | None = None, **spoiled: object
) -> None:
    """Everything that ``coefficients`` writes, NaN where the reference leaves NaN."""
    overrides = StepOverrides(**(optional or {}))
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    actual = {name: tensor.clone() for name, tensor in inputs.items()}
    coefficients.coefficients(StepScalars(**expected), settings, overrides)
    backend_coefficients(StepScalars(**actual), dataclasses.replace(settings, **spoiled), overrides)
    for name in OUTPUTS:
        limit = TOLERANCES["table"].bound
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=limit,
            atol=limit,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )
