"""States that change hands: between formats, dtypes and optimizers; what is not this optimizer's is refused by name."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dba_kernels import DBAAdamW, fp32_state_dict, load_fp32_state_dict
from dba_kernels.reference import remainder

FORMATS = ("native", "split16", "split8", "master")
HALVES = (torch.bfloat16, torch.float16)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 5)).to(dtype)


def trained(model: nn.Module, steps: int = 4, **options: Any) -> DBAAdamW:
    optimizer = DBAAdamW(model.named_parameters(), lr=1e-3, **options)
    go_on(model, optimizer, range(steps))
    return optimizer


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the step alone, rounded to bf16."""
    for t in steps:
        generator = torch.Generator().manual_seed(100 + t)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).bfloat16()
            param.grad = grad.to(param.dtype)
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def exact(model: nn.Module, optimizer: DBAAdamW) -> dict[str, torch.Tensor]:
    return {
        name: remainder.join(p.detach(), optimizer.state[p]["remainder"], optimizer.options.param_format)
        for name, p in model.named_parameters()
    }


# --- torch's AdamW ----------------------------------------------------------------------------------------------------


TORCH: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, one by one": (torch.optim.AdamW, {"foreach": False}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "RAdam, one by one": (torch.optim.RAdam, {"foreach": False}),
}


@pytest.mark.parametrize("mine", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", TORCH)
def test_compressed_state_is_refused_by_torch(kind: str, mine: dict[str, Any]) -> None:
    """Protects from codes taken for numbers: no torch optimizer steps on int8 state, and nothing has moved."""
    make, options = TORCH[kind]
    model = model_of()
    state = trained(model, state_format="int8", **mine).state_dict()
    assert "exp_avg_scale" in state["state"][0] and "exp_avg_scale" not in state["state"][1]  # the others are fp32
    before = values(model)
    theirs = make([list(model.parameters())[i] for i in (3, 1, 2, 0)], **options)  # uncompressed ones come first
    order = {"params": state["param_groups"][0]["params"]}
    state["state"] = {i: state["state"][j] for i, j in enumerate((3, 1, 2, 0))}
    state["param_groups"][0] |= order
    with pytest.raises((KeyError, AssertionError), match=r"max_exp_avg_sq|mu_product|don't support autograd"):
        theirs.load_state_dict(state)
        go_on(model, theirs, range(4, 5))
    assert all(torch.equal(values(model)[name], before[name]) for name in before)
    if kind.startswith("Adam"):
        control = make(model.parameters(), **options)  # negative control: uncompressed state is torch's own
        control.load_state_dict(trained(model_of(), **mine).state_dict())
        go_on(model, control, range(4, 5))


def test_the_lock_is_only_in_what_is_saved() -> None:
    """Protects the user's settings: no live group holds the lock, before or after loading; real amsgrad is refused."""
    model = model_of()
    optimizer = trained(model, state_format="int8")
    for made in (optimizer, DBAAdamW(model.named_parameters()), DBAAdamW(model.named_parameters(), fused=True)):
        made.load_state_dict(optimizer.state_dict())
        go_on(model, made, range(4, 5))
        group = made.param_groups[0]
        assert (group["amsgrad"], group["foreach"], group["differentiable"]) == (False, None, False)
    saved = trained(model_of()).state_dict()
    assert not saved["param_groups"][0]["amsgrad"] and set(saved) == {"state", "param_groups"}
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
def test_exported_state_continues_in_torch(state_format: str) -> None:
    """Protects the export: torch's AdamW continues from it as from the decoded moments, to their rounding."""
    model = model_of()
    optimizer = trained(model, state_format=state_format)
    exported = optimizer.state_dict(format="torch")
    assert all(
        value.dtype == torch.float32 and (key == "step" or value.shape == param.shape)
        for param, state in zip(model.parameters(), exported["state"].values(), strict=True)
        for key, value in state.items()
    )
    assert not {"global_gradient", "steps_done", "steps_skipped"} & set(exported["param_groups"][0])
    other = copy.deepcopy(model)
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(exported)
    go_on(other, theirs, range(4, 5))
    go_on(model, optimizer, range(4, 5))
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=1e-5, atol=2e-7)
    back = DBAAdamW(model.named_parameters(), state_format=state_format)
    back.load_state_dict(theirs.state_dict())  # and back again
    go_on(model, back, range(5, 6))


def test_state_of_an_older_version_is_loaded() -> None:
    """Protects old checkpoints: without lock, and without the dtypes that remainders complete."""
    model = model_of(torch.bfloat16)
    optimizer = trained(model, state_format="int8")
    new = copy.deepcopy(optimizer.state_dict())
    unlocked = {"amsgrad": False, "foreach": None, "differentiable": False}
    old = {"state": new["state"], "param_groups": [group | unlocked for group in new["param_groups"]]}
    assert new["remainder_dtypes"] == dict.fromkeys(range(4), "bf16") and new["param_groups"][0]["amsgrad"]
    results = []
    for state in (old, new):
        copied = copy.deepcopy(model)
        resumed = DBAAdamW(copied.named_parameters(), state_format="int8")
        resumed.load_state_dict(state)
        go_on(copied, resumed, range(4, 7))
        results.append(exact(copied, resumed))
    go_on(model, optimizer, range(4, 7))
    for name, value in exact(model, optimizer).items():
        assert torch.equal(results[0][name], value) and torch.equal(results[1][name], value)


def test_a_state_on_its_way_between_dtypes_can_be_saved_again() -> None:
    """Protects a checkpoint right after a load: what waits for the first step still says which dtype it completes."""
    model = model_of(torch.bfloat16)
    optimizer = trained(model)
    wide = copy.deepcopy(model).float()
    waiting = DBAAdamW(wide.named_parameters())
    waiting.load_state_dict(optimizer.state_dict())
    saved, first = waiting.state_dict(), optimizer.state_dict()
    assert saved["remainder_dtypes"] == first["remainder_dtypes"] == dict.fromkeys(range(4), "bf16")
    for i, state in first["state"].items():
        assert set(state) == set(saved["state"][i]) and torch.equal(state["remainder"], saved["state"][i]["remainder"])


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "param_format"), list(itertools.product(HALVES, FORMATS)))
def test_state_of_a_half_model_fits_its_fp32_copy(dtype: torch.dtype, param_format: str) -> None:
    """Protects the way up: the fp32 weight is weight and remainder together, whichever format held them."""
    model = model_of(dtype)
    optimizer = trained(model, param_format=param_format)
    expected = fp32_state_dict(model, optimizer)
    wide = copy.deepcopy(model).float()
    other = DBAAdamW(wide.named_parameters(), lr=0.0, weight_decay=0.0)
    other.load_state_dict(optimizer.state_dict())
    for group in other.param_groups:
        group["lr"] = 0.0
    go_on(wide, other, range(4, 5))
    for name, value in values(wide).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])
    assert not any(key.startswith("remainder") for state in other.state.values() for key in state)
    if param_format != "native":
        assert any((value != value.to(dtype).float()).any() for value in expected.values())  # there was one


@pytest.mark.parametrize("param_format", ["split16", "master"])
def test_fp32_and_back_is_the_fp32_run(param_format: str) -> None:
    """Protects both ways: bf16, then fp32, then bf16 again ends with the bits of fp32 all along."""
    reference = model_of(torch.bfloat16).float()
    whole = trained(reference, steps=9)
    model = model_of(torch.bfloat16)
    optimizer = trained(model, steps=3, param_format=param_format)
    wide = copy.deepcopy(model).float()
    middle = DBAAdamW(wide.named_parameters(), lr=1e-3)
    middle.load_state_dict(optimizer.state_dict())
    go_on(wide, middle, range(3, 6))
    again = copy.deepcopy(model)
    last = DBAAdamW(again.named_parameters(), lr=1e-3, param_format=param_format)
    last.load_state_dict(middle.state_dict())
    load_fp32_state_dict(again, last, fp32_state_dict(wide, middle))
    go_on(again, last, range(6, 9))
    for name, value in fp32_state_dict(reference, whole).items():
        assert torch.equal(fp32_state_dict(again, last)[name], value)


def test_exact_fp32_weights_are_not_joined_twice() -> None:
    """Protects weights that were loaded exactly before the state: their remainders are in them already."""
    model = model_of(torch.bfloat16)
    optimizer = trained(model)
    expected = fp32_state_dict(model, optimizer)
    wide = model_of()
    wide.load_state_dict(expected)
    other = DBAAdamW(wide.named_parameters(), lr=0.0)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.0
    go_on(wide, other, range(4, 5))
    assert all(torch.equal(values(wide)[name], value) for name, value in expected.items())


def test_bf16_state_in_an_fp16_model_is_converted_or_refused() -> None:
    """Protects the way across: the value stays, to fp16's own remainder; weights beyond its range are refused."""
    model = model_of(torch.bfloat16)
    optimizer = trained(model)
    expected = fp32_state_dict(model, optimizer)
    half = copy.deepcopy(model).half()
    other = DBAAdamW(half.named_parameters(), lr=0.0)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.0
    go_on(half, other, range(4, 5))
    for name, value in fp32_state_dict(half, other).items():
        assert (value - expected[name]).abs().max() <= 2.0**-40
    with torch.no_grad():
        model[0].weight[3, 5] = 1e30
    large = copy.deepcopy(model).half()
    refused = DBAAdamW(large.named_parameters())
    refused.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter '0.weight': expected values within the range of torch.float16"):
        go_on(large, refused, range(4, 5))


def test_exported_weights_round_trip() -> None:
    """Protects export and import of weights: buffers, tied parameters and frozen ones included."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(70, 64, bias=False), nn.Linear(70, 64, bias=False)
            self.b.weight = self.a.weight
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_buffer("count", torch.tensor([3]))

    torch.manual_seed(0)
    model = Tied().bfloat16()
    optimizer = DBAAdamW([model.a.weight], lr=1e-3)
    for t in range(3):
        model.a.weight.grad = torch.randn(64, 70, generator=torch.Generator().manual_seed(t)).bfloat16()
        optimizer.step()
    exported = fp32_state_dict(model, optimizer)
    assert set(exported) == set(model.state_dict()) and torch.equal(exported["a.weight"], exported["b.weight"])
    assert exported["count"].dtype == torch.int64 and exported["frozen"].dtype == torch.bfloat16
    assert (exported["a.weight"] != model.a.weight.float()).any()
    fresh = Tied().bfloat16()
    other = DBAAdamW([fresh.a.weight])
    load_fp32_state_dict(fresh, other, exported)
    assert all(torch.equal(fp32_state_dict(fresh, other)[name], value) for name, value in exported.items())
    for broken, message in (
        ({k: v for k, v in exported.items() if k != "count"}, "'count' is missing"),
        (exported | {"c": torch.ones(1)}, "'c' is none"),
        (exported | {"frozen": torch.ones(4)}, r"state_dict\['frozen'\]: expected shape \(3,\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_fp32_state_dict(fresh, other, broken)
    with pytest.raises(TypeError, match="optimizer: expected DBAAdamW, got SGD"):
        fp32_state_dict(model, torch.optim.SGD(model.parameters(), lr=0.1))


# --- other optimizers -------------------------------------------------------------------------------------------------


def foreign(kind: str, model: nn.Module) -> dict[str, Any]:
    """State dicts that somebody else wrote."""
    classes: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "Adam": torch.optim.Adam,
        "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
        "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True),
        "Adamax": torch.optim.Adamax,
        "RMSprop": torch.optim.RMSprop,
        "Adagrad": torch.optim.Adagrad,
    }
    if kind in classes:
        theirs = classes[kind](model.parameters())
        go_on(model, theirs, range(1))
        return theirs.state_dict()
    state = copy.deepcopy(trained(model).state_dict())
    first = state["state"][0]
    changes: dict[str, Any] = {
        "codes without scales": {"exp_avg": first["exp_avg"].to(torch.int8)},
        "unsigned codes": {"exp_avg": first["exp_avg"].to(torch.uint8), "exp_avg_sq": first["exp_avg_sq"].byte()},
        "negative second moments": {"exp_avg_sq": -first["exp_avg_sq"] - 1e-3},
        "step of another kind": {"step": torch.tensor(2.5)},
        "negative step": {"step": torch.tensor(-1.0)},
        "a list for a moment": {"exp_avg": [1.0]},
    }
    if kind == "one moment":
        del first["exp_avg_sq"]
    elif kind == "no step":
        del first["step"]
    elif kind == "no mapping":
        state["state"][0] = [1, 2]
    else:
        first.update(changes[kind])
    return state


FOREIGN = {
    "SGD": "expected AdamW's hyperparameters, got no 'betas'",
    "SGD with momentum": "expected AdamW's hyperparameters, got no 'betas'",
    "Adam": "decoupled_weight_decay",
    "amsgrad": "amsgrad",
    "NAdam": r"state of '0.weight': .* got 'mu_product' too",
    "Adamax": r"state of '0.weight': .* got 'exp_inf' too",
    "RMSprop": "got no 'betas'",
    "Adagrad": "got no 'betas'",
    "codes without scales": "expected floating-point numbers as exp_avg, got torch.int8",
    "unsigned codes": "expected floating-point numbers as exp_avg, got torch.uint8",
    "negative second moments": "expected second moments >= 0",
    "step of another kind": "expected a number of steps, got step = 2.5",
    "negative step": "expected a number of steps, got step = -1",
    "a list for a moment": "as exp_avg, got list",
    "one moment": "expected 'exp_avg_sq', got only",
    "no step": "expected 'step', got only",
    "no mapping": "expected a mapping, got list",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_states_are_refused_whole(kind: str) -> None:
    """Protects a resumed run: a state that is not AdamW's is refused by name, and nothing of it is taken."""
    model = model_of()
    optimizer = trained(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=FOREIGN[kind]):
        optimizer.load_state_dict(foreign(kind, model_of()))
    after = optimizer.state_dict()
    for i, state in before["state"].items():
        assert all(torch.equal(after["state"][i][key], value) for key, value in state.items())
    assert after["param_groups"] == before["param_groups"]
    optimizer.load_state_dict(before)  # negative control
