"""similarity and coefficients: every backend against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dba_kernels.formats import Coefficient, StepTables
from dba_kernels.reference import quantize
from dba_kernels.reference import similarity as reference

from .cases import FEW_SIZES, FLAT_SIZES, GLOBAL_FORMATS, GRAD_DTYPES, SIZES, Case, Misaligned, build
from .coefficient_cases import ACTIVE, BASE, OPTIONS, VARIANTS, arguments, assert_same_coefficients
from .tolerances import TOLERANCES

CASES = [
    Case(torch.float32, "native", "fp32", stored, GRAD_DTYPES[k % 3], FEW_SIZES, seed=k)
    for k, stored in enumerate(GLOBAL_FORMATS)
] + [
    Case(torch.bfloat16, "split16", "int8", "int4", torch.bfloat16, SIZES, seed=10),
    Case(torch.bfloat16, "native", "fp32", "int8", torch.float32, SIZES, seed=11),
    Case(torch.float32, "native", "fp32", "fp32", torch.float32, FLAT_SIZES, seed=12),
]


def sums_of(similarity: object, batch: object, grads: list[torch.Tensor]) -> torch.Tensor:
    sums = torch.full((len(grads) + 2, 2), float("nan"), dtype=torch.float64)
    similarity(batch, grads, sums)
    return sums


def assert_same_sums(similarity: object, case: Case, place: object = torch.clone, mutate: object = None) -> None:
    """Sums within their tolerance of Σ|terms|, rows that belong to no tensor untouched."""
    batch, grads, _ = build(case)
    expected = sums_of(reference.similarity, batch, grads)
    placed, placed_grads, _ = build(case, place)
    if mutate is not None:
        mutate(placed, placed_grads)
    actual = sums_of(similarity, placed, placed_grads)
    written = batch.index.tolist()
    for row in range(len(actual)):
        if row not in written:
            assert actual[row].isnan().all(), f"row {row} belongs to no tensor and was written"
            continue
        i = written.index(row)
        grad = grads[i].double()
        stored = quantize.decode(batch.global_grads[i]).double() if batch.global_grads else torch.zeros_like(grad)
        terms = torch.stack(((grad * stored).abs().sum(), grad.square().sum()))
        error = (actual[row] - expected[row]).abs()
        assert (error <= TOLERANCES["sum"].bound * terms).all(), f"row {row}: {actual[row]}, expected {expected[row]}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(backend, case):
    assert_same_sums(backend.similarity, case)


@pytest.mark.parametrize("case", CASES[7:9], ids=str)
def test_misaligned_storage(backend, case):
    place = Misaligned()
    assert_same_sums(backend.similarity, case, place)
    place.check()


def test_same_input_twice_gives_the_same_bits(backend):
    batch, grads, _ = build(CASES[8])
    once, twice = sums_of(backend.similarity, batch, grads), sums_of(backend.similarity, batch, grads)
    assert torch.equal(once.nan_to_num(-1), twice.nan_to_num(-1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient(backend, poison):
    batch, grads, _ = build(CASES[8])
    position = next(i for i, grad in enumerate(grads) if grad.numel() == 1025)
    grads[position].view(-1)[-1] = poison
    finite = torch.isfinite(sums_of(backend.similarity, batch, grads)[batch.index, 1])
    assert finite.tolist() == [i != position for i in range(len(grads))]


def _one_element(batch, grads):
    grads[-1].view(-1)[-1] += 1.0


def _neighbours_scale(batch, grads):
    scales = batch.global_grads[-1].scales
    scales.copy_(scales.roll(1, dims=1))


@pytest.mark.parametrize("spoil", [_one_element, _neighbours_scale])
def test_control_sums(spoil):
    with pytest.raises(AssertionError):
        assert_same_sums(reference.similarity, CASES[8], mutate=spoil)


# --- coefficients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_coefficients(backend, name):
    assert_same_coefficients(backend.coefficients, dataclasses.replace(BASE, **VARIANTS[name]), arguments())


@pytest.mark.parametrize("name", OPTIONS)
def test_optional_inputs(backend, name):
    assert_same_coefficients(backend.coefficients, BASE, arguments(), OPTIONS[name])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_sum_skips(backend, poison):
    inputs = arguments()
    inputs["sums"][3, 1] = poison
    assert_same_coefficients(backend.coefficients, BASE, inputs)
    backend.coefficients(StepTables(**inputs), BASE)
    assert inputs["counters"].tolist() == [11, 3]
    assert inputs["table"][ACTIVE, Coefficient.SKIP].tolist() == [1.0] * len(ACTIVE)


def test_non_finite_sum_of_an_inactive_parameter_is_ignored(backend):
    inputs = arguments()
    inputs["sums"][1] = float("nan")
    backend.coefficients(StepTables(**inputs), BASE)
    assert inputs["counters"].tolist() == [12, 2]


def test_more_parameters_than_one_block(backend):
    n = 700
    inputs = {name: tensor.clone() for name, tensor in arguments().items()}
    for name in ("sums", "global_sq", "group", "steps", "bias_corrections", "table", "report"):
        tensor = inputs[name]
        inputs[name] = tensor.repeat(100, *[1] * (tensor.dim() - 1))
    inputs["active"] = torch.arange(n - 1, -1, -1)
    assert_same_coefficients(backend.coefficients, BASE, inputs)


def test_zero_norms_mean_no_correction(backend):
    inputs = arguments()
    inputs["sums"][5], inputs["global_sq"][0] = 0.0, 0.0
    inputs["sums"][0, 0] = 0.0
    backend.coefficients(StepTables(**inputs), BASE)
    assert inputs["report"][[5, 0]].tolist() == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"boost": 0.3001},
        {"total_steps": 31},
        {"correction": "none"},
        {"correction": "agem"},
        {"scope": "global"},
        {"bounds": (0.1, 1.3)},
        {"max_grad_norm": 0.3701},
        {"reduce": False},
    ],
    ids=str,
)
def test_control_coefficients(wrong):
    with pytest.raises(AssertionError):
        assert_same_coefficients(reference.coefficients, BASE, arguments(), **wrong)
