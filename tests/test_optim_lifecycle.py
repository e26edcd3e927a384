"""What frameworks and users do to a live optimizer: swap, move, regroup, read early, load the wrong thing, copy."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.plan import CACHED_ACTIVE_SETS

from .support.params import COMPRESSED, SHAPES, dba, gradient, make_global, make_params, train

BACKENDS = ("reference", "native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_freed_by_zero_grad(backend: str) -> None:
    """The optimizer keeps no gradient alive: one that did would cost a second copy of all of them at the peak."""
    params = make_params()
    optimizer = dba(params, backend=backend)
    train(params, optimizer, range(1, 3))
    gradients = [weakref.ref(p.grad) for p in params.values()]
    assert all(ref() is not None for ref in gradients)
    optimizer.zero_grad()
    gc.collect()
    assert all(ref() is None for ref in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_changed_in_place_is_looked_at_again(backend: str) -> None:
    """``grad.data = other`` between steps: other strides give the right weights, another shape is refused by name."""
    weight = torch.nn.Parameter(torch.arange(32.0).reshape(4, 8))
    other = weight.detach().clone().requires_grad_()
    ours = DBAAdamW([("weight", weight)], lr=1e-2, backend=backend)
    theirs = torch.optim.AdamW([other], lr=1e-2)
    weight.grad, other.grad = torch.ones(4, 8), torch.ones(4, 8)
    ours.step(), theirs.step()
    turned = torch.arange(32.0).reshape(8, 4).T
    weight.grad.data, other.grad.data = turned, turned
    ours.step(), theirs.step()
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)
    before = weight.detach().clone()
    for shape in ((2, 2), (1, 8)):  # torch would spread the second over the rows
        weight.grad.data = torch.ones(shape)
        with pytest.raises(ValueError, match="grad of 'weight': expected its parameter's shape"):
            ours.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "remainder"])
def test_state_may_be_swapped(backend: str, key: str) -> None:
    """New tensors under a key, or new storage under a tensor, are used by the next step: offloading does both."""
    params, plain = make_params(torch.bfloat16), make_params(torch.bfloat16)
    optimizer, untouched = (dba(p, backend=backend, state_format="int8") for p in (params, plain))
    for step in (1, 2, 4, 5):
        train(params, optimizer, range(step, step + 1))
        train(plain, untouched, range(step, step + 1))
        entry = optimizer.state[params[COMPRESSED]]
        if step < 3:
            entry[key] = entry[key].clone()
        else:
            entry[key].data = entry[key].data.clone()
    assert all(torch.equal(params[name], plain[name]) for name in SHAPES)


def test_only_a_change_of_the_tensors_makes_a_new_plan() -> None:
    """The cheap check of every step may be too careful, never blind: what it doubts, a slower one decides."""
    params = make_params()
    optimizer = DBAAdamW(params.items(), backend="reference")
    train(params, optimizer, range(1, 3))
    plan, entry = optimizer._plan, optimizer.state[params[COMPRESSED]]
    entry["note"] = "of somebody else"
    train(params, optimizer, range(3, 4))
    assert optimizer._plan is plan
    del entry["note"]
    entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"]
    train(params, optimizer, range(4, 5))
    assert optimizer._plan is not plan


@pytest.mark.parametrize("reset", [lambda o: o.state.clear(), lambda o: setattr(o, "state", defaultdict(dict))])
def test_cleared_state_starts_again(reset) -> None:
    """As in torch: a parameter without state is at its first step, and what is saved is what is used."""
    params = make_params()
    optimizer = DBAAdamW(params.items(), backend="reference")
    train(params, optimizer, range(1, 4))
    reset(optimizer)
    train(params, optimizer, range(4, 5))
    assert all(float(entry["step"]) == 1 for entry in optimizer.state_dict()["state"].values())
    assert len(optimizer.state) == len(SHAPES)


def test_parameters_may_move_between_groups() -> None:
    """A parameter moved to a group of another learning rate is updated by that one."""
    params = make_params()
    optimizer = DBAAdamW(
        [{"params": list(params.values())[:2], "lr": 1e-1}, {"params": list(params.values())[2:], "lr": 1e-6}],
        weight_decay=0.0,
        backend="reference",
    )
    train(params, optimizer, range(1, 2))
    moved = optimizer.param_groups[0]["params"].pop(0)
    optimizer.param_groups[1]["params"].insert(0, moved)
    before = moved.detach().clone()
    train(params, optimizer, range(2, 3))
    assert (moved - before).abs().max() < 2e-6


def test_reading_state_before_the_first_step_does_no_harm() -> None:
    """Protects the first step: state that was looked up, and so created empty, is still allocated."""
    params = make_params()
    optimizer = DBAAdamW(params.items(), backend="reference")
    assert optimizer.state[params[COMPRESSED]] == {}
    train(params, optimizer, range(1, 2))
    assert float(optimizer.state[params[COMPRESSED]]["step"]) == 1


def test_schedules_of_beta_follow_adamw() -> None:
    """OneCycleLR cycles β₁ by default: bias corrections are torch's then, too."""
    trajectories = []
    for cls in (DBAAdamW, torch.optim.AdamW):
        params = make_params(torch.float64)
        optimizer = cls(params.values(), lr=1e-3)
        train(params, optimizer, range(40), OneCycleLR(optimizer, max_lr=1e-2, total_steps=50))
        trajectories.append(params)
    for name in SHAPES:
        torch.testing.assert_close(trajectories[0][name], trajectories[1][name], rtol=0, atol=1e-12)


def test_a_changing_set_of_gradients_allocates_no_state_anew() -> None:
    """Experts come and go, in more sets than are kept: their state exists, and is not made again to be compared."""
    params = {f"{i}.weight": torch.nn.Parameter(torch.randn(64, 64)) for i in range(CACHED_ACTIVE_SETS + 2)}
    optimizer = DBAAdamW(params.items(), lr=1e-5, state_format="int8")

    def zeros_in_a_step(without: int) -> int:
        for i, param in enumerate(params.values()):
            param.grad = None if i == without else torch.ones_like(param)
        with torch.profiler.profile(record_shapes=True) as profile:
            optimizer.step()
        made = [event.input_shapes for event in profile.events() if event.name == "aten::zero_"]
        return sum(shapes[:1] == [[64, 64]] for shapes in made)

    assert zeros_in_a_step(-1) == 2 * len(params)  # control: the first step makes both moments
    assert [zeros_in_a_step(i) for i in range(len(params))] == [0] * len(params)


def test_errors_at_a_learning_rate_of_zero_have_names() -> None:
    """A warm-up's first step passes by what only allocates."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    param.ds_id, param.grad = 0, torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"parameter 'layer.weight': expected the model's own tensor"):
        DBAAdamW([("layer.weight", param)], lr=0.0).step()


def test_state_of_swapped_names_is_refused() -> None:
    """Equal shapes in another order would otherwise take each other's state and global gradient."""
    params = {"a.weight": make_params()[COMPRESSED], "b.weight": make_params(seed=1)[COMPRESSED]}
    optimizer = DBAAdamW(params.items(), backend="reference")
    saved = optimizer.state_dict()
    other = DBAAdamW(reversed(params.items()), backend="reference")
    with pytest.raises(ValueError, match=r"param_names: expected 'b.weight', the state was saved with 'a.weight'"):
        other.load_state_dict(saved)


def test_a_refused_load_changes_nothing() -> None:
    """Another global gradient's state is refused before anything is loaded, and refused again the second time."""
    params = make_params()
    optimizer = dba(params)
    train(params, optimizer, range(1, 4))
    foreign = optimizer.state_dict()
    other = dba(params, global_gradient=make_global(format="int4"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"digest .* resume with the same file"):
            other.load_state_dict(foreign)
    assert not other.state and other.param_groups[0]["steps_done"] is None


def test_losing_the_global_gradient_on_resume_is_refused() -> None:
    """Protects a resumed run: one without the global gradient it started with is refused."""
    params = make_params()
    saved = dba(params).state_dict()
    with pytest.raises(ValueError, match=r"this optimizer has none; resume with the same file"):
        DBAAdamW(params.items(), lr=1e-5).load_state_dict(saved)


def test_resuming_with_other_settings_warns() -> None:
    """Protects a resumed run: changed settings are named in a warning."""
    params = make_params()
    saved = dba(params, total_steps=1000).state_dict()
    with pytest.warns(UserWarning, match=r"resuming with other settings.*'total_steps': \(1000, 2000\)"):
        dba(params, total_steps=2000).load_state_dict(saved)


# --- total_steps="later" ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boost", ["auto", "paper", 0.3, lambda step, total: 0.5 - 0.1 * step / total])
def test_total_steps_may_come_later(boost) -> None:
    """T given by a method is T given to the constructor, to the bit, in weights and in what is saved."""
    params, others = make_params(), make_params()
    early = dba(params, total_steps=500, boost=boost)
    late = dba(others, total_steps="later", boost=boost)
    assert late.awaits_total_steps and not early.awaits_total_steps
    late.set_total_steps(500)
    train(params, early, range(1, 4))
    train(others, late, range(1, 4))
    assert all(torch.equal(params[name], others[name]) for name in SHAPES)
    assert early.state_dict()["param_groups"] == late.state_dict()["param_groups"]


def test_another_total_steps_is_told_apart() -> None:
    """Negative control of the test above."""
    params, others = make_params(), make_params()
    late = dba(others, total_steps="later")
    late.set_total_steps(501)
    train(params, dba(params, total_steps=500), range(1, 4))
    train(others, late, range(1, 4))
    assert not torch.equal(params[COMPRESSED], others[COMPRESSED])


def test_a_step_without_total_steps_is_refused_and_changes_nothing() -> None:
    """Protects γ_t: a step before T is known is refused and leaves weights and state alone."""
    params = make_params()
    optimizer = dba(params, total_steps="later")
    before = params[COMPRESSED].detach().clone()
    with pytest.raises(ValueError, match=r"total_steps: expected the number .* got 'later'; call .*set_total_steps"):
        train(params, optimizer, range(1, 2))
    assert torch.equal(params[COMPRESSED], before) and not optimizer.state
    with pytest.raises(ValueError, match="total_steps: expected at least 1 optimizer step, got 0"):
        optimizer.set_total_steps(0)
    with pytest.raises(ValueError, match="total_steps: expected at least 1 optimizer step, got 'soon'"):
        dba(params, total_steps="soon")


def test_a_loaded_state_brings_its_total_steps(recwarn: pytest.WarningsRecorder) -> None:
    """A framework that resumes sets T only after it has loaded the state: the same T is silent, another one is said."""
    params = make_params()
    optimizer = dba(params, total_steps=500)
    train(params, optimizer, range(1, 3))
    resumed = dba(params, total_steps="later")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.method.settings == optimizer.method.settings
    resumed.set_total_steps(500)
    assert not [w for w in recwarn if "total_steps" in str(w.message)]
    with pytest.warns(UserWarning, match="total_steps: changed from 500 to 600"):
        resumed.set_total_steps(600)
    assert resumed.method.settings.boost == 200 / 600


def test_a_loaded_state_brings_its_boost(recwarn: pytest.WarningsRecorder) -> None:
    """k₀ under boost='auto' comes from the learning rate that the run began with, not from the resuming script's."""
    params = make_params()
    optimizer = dba(params, lr=1e-4, total_steps=200, boost="auto")
    train(params, optimizer, range(1, 3))
    resumed = dba(params, lr=1e-5, total_steps="later", boost="auto")
    resumed.load_state_dict(optimizer.state_dict())
    resumed.set_total_steps(200)
    assert resumed.method.settings.boost == optimizer.method.settings.boost == pytest.approx(0.15)
    assert not list(recwarn)
    assert dba(params, lr=1e-5, total_steps=200, boost="auto").method.settings.boost == 0.5  # negative control


def test_total_steps_without_a_use_for_them() -> None:
    """Frameworks call the method on every optimizer of the class: plain AdamW and projections await nothing."""
    for optimizer in (DBAAdamW(make_params().items()), dba(make_params(), correction="agem", total_steps="later")):
        assert not optimizer.awaits_total_steps
        optimizer.set_total_steps(7)
        assert optimizer.method.settings.total_steps == 0


def test_other_kinds_of_adam_are_refused_wherever_they_come_from() -> None:
    """Protects the arithmetic: amsgrad and coupled decay are refused from arguments, groups and state dicts."""
    params = make_params()
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        DBAAdamW([{"params": list(params.values()), "amsgrad": True}])
    ours = DBAAdamW(params.values())
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        ours.load_state_dict(torch.optim.AdamW(params.values(), amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="decoupled_weight_decay: expected True"):
        ours.load_state_dict(torch.optim.Adam(params.values()).state_dict())
    with pytest.raises(ValueError, match="foreach, fused: expected at most one"):
        DBAAdamW(params.values(), foreach=True, fused=True)


def test_unbound_parameters_are_counted() -> None:
    """missing='adamw' with names that match nothing is plain AdamW; it must not be so in silence."""
    params = make_params()
    renamed = {f"backbone.{name}": param for name, param in params.items()}
    optimizer = dba(renamed, global_gradient=make_global(), missing="adamw")
    with pytest.warns(UserWarning, match="4 of 4 trainable parameters have none"):
        train({}, optimizer, range(0))
        for name, param in params.items():
            param.grad = gradient(name, 1, torch.float32)
        optimizer.step()


def test_a_correction_of_nan_is_one() -> None:
    """A user's formula divides 0 by 0 where a gradient is zero; eq. 4 calls that similarity 0."""
    params = make_params()
    optimizer = dba(params, correction=lambda dot, g, gg: 1 - dot / (g * gg).sqrt())
    train(params, optimizer, range(1, 2))
    for name, param in params.items():
        param.grad = torch.zeros_like(param) if name == COMPRESSED else gradient(name, 2, torch.float32)
    optimizer.step()
    assert all(param.isfinite().all() for param in params.values())
    assert math.isfinite(optimizer.metrics()["correction_mean"])


def test_an_optimizer_over_a_loaded_gradient_can_be_copied(tmp_path: Path) -> None:
    """The mapped file is opened anew by the copy."""
    params = make_params()
    optimizer = dba(params, global_gradient=make_global(params).save(tmp_path / "gg.safetensors"))
    train(params, optimizer, range(1, 3))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(params, optimizer, range(3, 5))
    for other in copies:
        others = dict(zip(SHAPES, [p for g in other.param_groups for p in g["params"]], strict=True))
        train(others, other, range(3, 5))
        assert all(torch.equal(others[name], params[name]) for name in SHAPES)
    assert isinstance(optimizer.global_gradient, GlobalGradient)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_step_counts_as_a_write(backend):
    """torch's checks that weights did not change (autograd's saved tensors, the collector's) see every step."""
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = DBAAdamW([("weight", param)], lr=1e-3, backend=backend)
    loss = (param.exp() * 2).sum()  # exp saves its result, * 2 nothing of param
    saved = (param * param).sum()  # saves param
    loss.backward()
    before = param._version
    optimizer.step()
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
