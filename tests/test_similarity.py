"""similarity and coefficients: every backend against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dba_kernels.reference import quantize
from dba_kernels.reference import similarity as reference
from dba_kernels.stepdata import CORRECTIONS, Coefficient, Hyper, StepSettings, StepTables, Summary

from .cases import FEW_SIZES, FLAT_SIZES, GLOBAL_FORMATS, GRAD_DTYPES, SIZES, Case, Misaligned, build
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
    finite = torch.isfinite(sums_of(backend.similarity, batch, grads)[batch.all("index"), 1])
    assert finite.tolist() == [i != position for i in range(len(grads))]


def _one_element(batch, grads):
    grads[-1].view(-1)[-1] += 1.0


def _neighbours_scale(batch, grads):
    scales = batch.tensors[-1].global_grad.scales
    scales.copy_(scales.roll(1, dims=1))


@pytest.mark.parametrize("spoil", [_one_element, _neighbours_scale])
def test_control_sums(spoil):
    with pytest.raises(AssertionError):
        assert_same_sums(reference.similarity, CASES[8], mutate=spoil)


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
OUTPUTS = ("steps", "bias_corrections", "counters", "table", "report", "summary")


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
        "table": torch.full((N, Coefficient.COUNT), float("nan"), dtype=torch.float64),
        "report": torch.full((N, 2), float("nan"), dtype=torch.float64),
        "summary": torch.full((Summary.COUNT,), float("nan"), dtype=torch.float64),
    }


def assert_same_coefficients(
    coefficients: object, settings: StepSettings, inputs: dict, optional: dict | None = None, **spoiled: object
) -> None:
    """Everything that ``coefficients`` writes, NaN where the reference leaves NaN."""
    optional = optional or {}
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    actual = {name: tensor.clone() for name, tensor in inputs.items()}
    reference.coefficients(StepTables(**expected), settings, **optional)
    coefficients(StepTables(**actual), dataclasses.replace(settings, **spoiled), **optional)
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


VARIANTS = {
    **{
        f"{mode}-{scope}": {"correction": mode, "scope": scope}
        for mode in CORRECTIONS
        for scope in ("tensor", "global")
    },
    "no clip": {"max_grad_norm": None},
    "loose clip": {"max_grad_norm": 1e3},
    "no reduction": {"reduce": False, "correction": "none", "max_grad_norm": None, "boost": 0.0, "total_steps": 0},
    "past the end": {"total_steps": 5},
    "clamped boost": {"boost": 9.0, "boost_max": 0.3},
    "tight bounds": {"bounds": (0.9, 1.1)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_coefficients(backend, name):
    assert_same_coefficients(backend.coefficients, dataclasses.replace(BASE, **VARIANTS[name]), arguments())


OPTIONS = {
    "loss scale": {"loss_scale": torch.tensor(1024.0)},
    "found inf": {"loss_scale": torch.tensor(1024.0), "found_inf": torch.tensor(1.0)},
    "found none": {"found_inf": torch.tensor(0.0)},
    "gamma": {"gamma_override": torch.tensor(0.123)},
    "alpha": {"alpha_override": torch.linspace(0.2, 1.9, N)},
}


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
