"""DBAAdamW as a user meets it: a drop-in for torch.optim.AdamW, the order of its step, its state, its refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from dba_kernels import DBAAdamW, GlobalGradient, annealing_schedule, ops
from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS
from dba_kernels.reference import remainder

from .support.params import COMPRESSED, SHAPES, dba, gradient, make_global, make_params, train

# --- drop-in ----------------------------------------------------------------------------------------------------------


def groups_of(params: dict) -> list[dict]:
    first, *rest = params.items()
    return [{"params": [first], "lr": 1e-2, "weight_decay": 0.1}, {"params": rest, "betas": (0.8, 0.95), "eps": 1e-6}]


def trajectory(cls: type, dtype: torch.dtype, tensor_lr: bool, **kwargs) -> dict[str, torch.Tensor]:
    """200 steps over two groups, weight decay, warm-up from 0, and a parameter that often has no gradient."""
    params = make_params(torch.float32)
    for param in params.values():
        param.data = param.data.to(dtype)
    groups = groups_of(params)
    lr = torch.tensor(1e-3, dtype=dtype) if tensor_lr else 1e-3
    if tensor_lr:
        groups[0]["lr"] = torch.tensor(1e-2, dtype=dtype)
    optimizer = cls(groups, lr=lr, **kwargs)
    scheduler = LambdaLR(optimizer, lambda t: min(t / 10, 1.0) * (1 - t / 250))
    train(params, optimizer, range(200), scheduler)
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_adamw_in_fp64(tensor_lr: bool, maximize: bool) -> None:
    """Without a global gradient DBAAdamW is torch's AdamW, to 1e-12 over 200 steps."""
    ours = trajectory(DBAAdamW, torch.float64, tensor_lr, maximize=maximize)
    theirs = trajectory(torch.optim.AdamW, torch.float64, tensor_lr, maximize=maximize)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_follows_adamw_in_fp32(backend: str) -> None:
    """To fp32 rounding: no further from the fp64 trajectory than torch's own fp32 AdamW is."""
    exact = trajectory(torch.optim.AdamW, torch.float64, False)
    theirs = trajectory(torch.optim.AdamW, torch.float32, False)
    ours = trajectory(DBAAdamW, torch.float32, False, backend=backend)
    # The gradients are rounded to fp32 in both fp32 runs, so both carry that error beside their arithmetic's.
    error, limit = (torch.cat([(run[n].double() - exact[n]).flatten() for n in SHAPES]) for run in (ours, theirs))
    assert error.norm() <= 1.1 * limit.norm()
    assert error.abs().max() <= 2.0 * limit.abs().max() < 1e-4


@pytest.mark.parametrize("rate", [0.0, 0, 0.05, torch.tensor(0.0), torch.tensor(0.05)], ids=str)
def test_a_rate_given_anew_counts_at_once(rate: float | torch.Tensor) -> None:
    """Protects schedules by hand: numbers, tensors, and one in the other's place reach the next step."""
    for first in (0.1, torch.tensor(0.1)):
        moved = []
        for given in ([first, first, rate, rate, first], [0.1, 0.1, float(rate), float(rate), 0.1]):
            param = torch.nn.Parameter(torch.zeros(8))
            optimizer = DBAAdamW([param], weight_decay=0.0)
            for lr in given:
                before, param.grad = param.detach().clone(), torch.ones(8)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                moved.append((before - param.detach()).max().item())
        assert moved[:5] == moved[5:]
        assert moved[2] == pytest.approx(float(rate), rel=1e-5) and moved[4] == pytest.approx(0.1, rel=1e-5)


def test_another_beta_is_told_apart_from_adamw() -> None:
    """Negative control of the two tests above."""
    exact = trajectory(torch.optim.AdamW, torch.float64, False)
    wrong = trajectory(lambda groups, lr, **k: DBAAdamW(groups, lr=lr, betas=(0.9, 0.9991), **k), torch.float64, False)
    assert (wrong["embed.weight"] - exact["embed.weight"]).abs().max() > 1e-5


@pytest.mark.parametrize("first, second", [(torch.optim.AdamW, DBAAdamW), (DBAAdamW, torch.optim.AdamW)])
def test_state_dicts_load_both_ways(first: type, second: type) -> None:
    """A run begun with one class and finished with the other equals a run of torch's AdamW throughout, to 1e-12."""
    reference, params = make_params(torch.float64), make_params(torch.float64)
    whole = torch.optim.AdamW(groups_of(reference))
    train(reference, whole, range(30))
    begun = first(groups_of(params))
    train(params, begun, range(15))
    finished = second(groups_of(params))
    finished.load_state_dict(begun.state_dict())
    train(params, finished, range(15, 30))
    for name in SHAPES:
        torch.testing.assert_close(params[name], reference[name], rtol=0, atol=1e-12)
    assert float(finished.state[params["norm.weight"]]["step"]) == 20  # only steps with a gradient count


def test_state_keys_are_adamws() -> None:
    """Uncompressed state has torch's keys, shapes and dtypes, so other tools can read it."""
    params, theirs = make_params(), make_params()
    ours, adamw = DBAAdamW(params.items()), torch.optim.AdamW(theirs.items())
    train(params, ours, range(2))
    train(theirs, adamw, range(2))
    for mine, other in zip(ours.state_dict()["state"].values(), adamw.state_dict()["state"].values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(mine[k].shape == other[k].shape and mine[k].dtype == other[k].dtype for k in mine)


def test_closure_runs_with_gradients() -> None:
    """step(closure) returns the loss and differentiates it, as torch's does."""
    params = make_params()

    def closure() -> torch.Tensor:
        loss = sum(p.square().sum() for p in params.values())
        loss.backward()
        return loss

    before = params["head.weight"].detach().clone()
    optimizer = DBAAdamW(params.values(), lr=0.1)
    assert optimizer.step(closure) > 0
    assert (params["head.weight"] - before).abs().min() > 0.09


# --- the order of the step --------------------------------------------------------------------------------------------


def expected_first_step(
    params: dict, grads: dict, gg: GlobalGradient, gamma: float, max_norm: float, lr: float
) -> dict[str, torch.Tensor]:
    """The first step written out in float64: clip by ‖g_D‖, boost, moments, corrected update; no weight decay."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    clip = min(1.0, max_norm / (norm + 1e-6))
    result = {}
    for name, param in params.items():
        g, g_global = clip * grads[name].double(), gg[name].double()
        alpha = 1.0 - float((g * g_global).sum() / (g.norm() * g_global.norm()))
        boosted = gamma * g_global + (1 - gamma) * g
        # k = 1: m̂ = g_B and v̂ = g_B², whatever β₁ and β₂ are.
        result[name] = param.double() - lr * alpha * boosted / (boosted.abs() + 1e-8)
    return result


def one_step(**kwargs) -> tuple[dict, dict]:
    params = make_params()
    grads = {name: gradient(name, 3, torch.float32, scale=5.0) for name in SHAPES}
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = dba(params, weight_decay=0.0, lr=1e-2, boost=0.3, max_grad_norm=1.0, **kwargs)
    for name, param in params.items():
        param.grad = grads[name].clone()
    optimizer.step()
    want = expected_first_step(before, grads, optimizer.global_gradient, gamma=0.3, max_norm=1.0, lr=1e-2)
    return {name: p.detach().double() for name, p in params.items()}, want


@pytest.mark.filterwarnings("ignore:lr", "ignore:boost")
def test_clip_comes_before_boost() -> None:
    """The norm that clips is that of the domain gradient, before the boost; eq. 3 uses the clipped gradient."""
    got, want = one_step()
    for name in SHAPES:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:lr", "ignore:boost")
@pytest.mark.parametrize("wrong", [dict(correction="none"), dict(boost_max=0.25), dict(correction_bounds=(1.0, 1.0))])
def test_a_wrong_factor_is_noticed(wrong: dict) -> None:
    """Negative control: another γ or α fails the comparison above."""
    got, want = one_step(**wrong)
    assert max((got[name] - want[name]).abs().max() for name in SHAPES) > 1e-5


def test_clipping_inside_equals_clip_grad_norm() -> None:
    """max_grad_norm=x is torch's clip_grad_norm_(x) before the step, without its pass over memory."""
    inside, outside = make_params(), make_params()
    ours = DBAAdamW(inside.values(), max_grad_norm=0.7, backend="reference")
    theirs = DBAAdamW(outside.values(), backend="reference")
    for step in range(5):
        for name in SHAPES:
            inside[name].grad = gradient(name, step, torch.float32)
            outside[name].grad = gradient(name, step, torch.float32)
        norm = torch.nn.utils.clip_grad_norm_(outside.values(), 0.7)
        ours.step()
        theirs.step()
        assert ours.metrics()["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(inside[name], outside[name], rtol=0, atol=1e-6)


def test_non_finite_gradient_skips_the_whole_step() -> None:
    """One NaN anywhere: no parameter, no state and no count but the skip changes; γ's clock stands still."""
    params = make_params()
    optimizer = dba(params)
    train(params, optimizer, range(1, 3))
    before = copy.deepcopy([p.detach() for p in params.values()])
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for name, param in params.items():
        param.grad = gradient(name, 5, torch.float32)
    params["head.weight"].grad[3, 4] = math.nan
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params.values(), strict=True))
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[k], state[key][k]) for k in entry)
    assert optimizer.metrics()["skipped_steps"] == 1 and optimizer.metrics()["steps"] == 2
    params["head.weight"].grad.nan_to_num_(0.0)
    optimizer.step()
    assert optimizer.metrics()["steps"] == 3
    assert optimizer.metrics()["gamma"] == pytest.approx(0.2 * (1 - 2 / 1000))


def test_without_reduction_nan_behaves_as_in_torch() -> None:
    """With neither a global gradient nor clipping nothing inspects the gradient: NaN goes where torch sends it."""
    params = make_params()
    params["head.weight"].grad = torch.full((64, 64), math.nan)
    optimizer = DBAAdamW(params.values())
    optimizer.step()
    assert params["head.weight"].isnan().all()


def test_grad_scaler_unscales_inside_the_step() -> None:
    """GradScaler hands over scale and found_inf: same weights as unscaled gradients; an inf skips and is counted."""
    plain, scaled = make_params(), make_params()
    ours, reference = dba(scaled, max_grad_norm=1.0), dba(plain, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        for name in SHAPES:
            plain[name].grad = gradient(name, step, torch.float32)
        scaler.scale(sum((p * gradient(n, step, torch.float32)).sum() for n, p in scaled.items())).backward()
        scaler.step(ours)
        scaler.update()
        reference.step()
        ours.zero_grad()
    for name in SHAPES:
        torch.testing.assert_close(scaled[name], plain[name], rtol=0, atol=1e-9)
    assert ours.metrics()["grad_norm"] == pytest.approx(reference.metrics()["grad_norm"], rel=1e-6)
    scaler.scale(sum((p * math.inf).sum() for p in scaled.values())).backward()
    scaler.step(ours)
    assert ours.metrics()["skipped_steps"] == 1 and ours.metrics()["steps"] == 3


def test_boost_of_zero_at_and_after_total_steps() -> None:
    """γ = 0 for t ≥ T: the run may go on, unboosted."""
    params = make_params()
    optimizer = dba(params, total_steps=2, boost=0.4)
    seen = []
    for step in range(1, 5):
        train(params, optimizer, range(step, step + 1))
        seen.append(optimizer.metrics()["gamma"])
    assert seen == pytest.approx([0.4, 0.2, 0.0, 0.0])


def warnings_of(make: Callable[[], object]) -> list[str]:
    """What is said, and that it points at the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert all(w.filename in (__file__, dba.__code__.co_filename) for w in caught)
    return [str(w.message) for w in caught]


def test_boost_max_clamps_with_one_warning() -> None:
    """A short run has k₀ = 200/T > 0.5: clamped, and said once. boost='auto' stays below by itself, silently."""
    params = make_params()
    made: list[DBAAdamW] = []
    (said,) = warnings_of(lambda: made.append(dba(params, total_steps=100, boost="paper")))
    assert said.startswith("boost: gamma starts at k0 = 2 and is clamped to boost_max = 0.5")
    assert warnings_of(lambda: train(params, made[0], range(1, 4))) == []
    assert made[0].metrics()["gamma"] == 0.5
    assert warnings_of(lambda: dba(make_params(), total_steps=100, boost="auto", boost_max=0.2)) == []


def later(**options: Any) -> None:
    dba(make_params(), total_steps="later", **options).set_total_steps(1000)


SMALL_BOOSTS: list[dict[str, Any]] = [
    dict(boost="auto"), dict(boost=0.01), dict(boost=lambda step, total: 0.1), dict(boost=0.0), dict(correction="agem")
]  # fmt: skip


@pytest.mark.parametrize("make", [lambda **o: dba(make_params(), **o), later])
def test_large_learning_rate_warns_once(make: Callable[..., object]) -> None:
    """Above lr = 1e-4, when T is known, whatever the boost; plain AdamW never, and no later change of T again."""
    for options in SMALL_BOOSTS:
        (said,) = warnings_of(lambda options=options: make(lr=2e-4, **options))
        assert said.startswith("lr: 0.0002 is large")
        assert warnings_of(lambda options=options: make(lr=1e-4, **options)) == []
    assert warnings_of(lambda: DBAAdamW(make_params().items(), lr=1e-3)) == []
    made: list[DBAAdamW] = []
    warnings_of(lambda: made.append(dba(make_params(), lr=2e-4, boost="auto")))
    (said,) = warnings_of(lambda: made[0].set_total_steps(2000))
    assert said.startswith("total_steps: changed")


@pytest.mark.parametrize("make", [lambda **o: dba(make_params(), **o), later])
def test_a_boost_too_large_for_the_learning_rate_warns_once(make: Callable[..., object]) -> None:
    """A boost of the user's where k₀ · T · lr exceeds what boost='auto' allows, and what that would begin with."""
    for boost, shown in (("paper", "0.2"), (0.4, "0.4")):
        (said,) = warnings_of(lambda boost=boost: make(lr=9e-5, boost=boost))
        assert said.startswith(f"boost: {shown} is large for lr = 9e-05") and said.endswith("would begin at 0.0333")
        assert warnings_of(lambda boost=boost: make(lr=7e-6, boost=boost)) == []


def test_auto_boost_starts_from_the_learning_rate_that_was_given() -> None:
    """k₀ comes from the largest group's rate at construction, not from what a warm-up makes of it before T is known."""
    names = list(SHAPES)
    params = make_params()
    groups = [{"params": [(n, params[n])], "lr": 1e-4 if n == names[0] else 1e-5} for n in names]
    gg = make_global(params)
    optimizer = DBAAdamW(groups, lr=1e-6, global_gradient=gg, total_steps="later", backend="reference")
    annealing_schedule(optimizer, total_steps=200, warmup_steps=9)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-5)
    optimizer.set_total_steps(200)
    assert optimizer.method.settings.boost == pytest.approx(0.15)
    assert copy.deepcopy(optimizer).method.initial_lr == 1e-4


def test_boost_and_correction_may_be_functions() -> None:
    """boost=f(step, T) and correction=f(dot, grad_sq, global_sq) written as eqs. 2 and 5 give the built-in step."""
    built_in, custom = make_params(), make_params()
    train(built_in, dba(built_in, boost=0.2, correction_scope="global"), range(1, 6))
    optimizer = dba(
        custom,
        boost=lambda t, total: 0.2 * (1 - t / total),
        correction=lambda dot, grad_sq, global_sq: 1 - dot / (grad_sq * global_sq).sqrt(),
        correction_scope="global",
    )
    train(custom, optimizer, range(1, 6))
    for name in SHAPES:
        torch.testing.assert_close(custom[name], built_in[name], rtol=0, atol=1e-9)
    assert optimizer.metrics()["gamma"] == pytest.approx(0.2 * (1 - 4 / 1000))


@pytest.mark.parametrize("mode", ["agem", "pcgrad"])
def test_projection_modes_need_no_total_steps(mode: str) -> None:
    """A conflicting gradient is projected: ⟨g', ĝ_G⟩ = 0 under A-GEM, seen in the first moment."""
    params = make_params()
    optimizer = dba(params, correction=mode, total_steps=None, lr=1e-6, betas=(0.0, 0.999))
    gg = optimizer.global_gradient
    for name, param in params.items():
        param.grad = gradient(name, 7, torch.float32) - 0.5 * gg[name]
    optimizer.step()
    for name, param in params.items():
        moment, stored = optimizer.state[param]["exp_avg"].double(), gg[name].double()
        along = (moment * stored).sum() / (moment.norm() * stored.norm())
        assert abs(along) < 1e-6 if mode == "agem" else along > 0.1
    assert "gamma" not in optimizer.metrics()


def test_metrics_name_what_happened() -> None:
    """Figures of the last step, against the same quantities computed here."""
    params = make_params()
    optimizer = dba(params, boost=0.25, max_grad_norm=1.0)
    assert optimizer.metrics() == {}
    for name, param in params.items():
        param.grad = gradient(name, 2, torch.float32)
    optimizer.step()
    gg, metrics = optimizer.global_gradient, optimizer.metrics()
    cosines = [float(torch.cosine_similarity(p.grad.flatten(), gg[n].flatten(), 0)) for n, p in params.items()]
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params.values()))
    stored = math.sqrt(sum(gg.global_sq(name) for name in SHAPES))
    assert metrics["grad_norm"] == pytest.approx(norm)
    assert metrics["clip_factor"] == pytest.approx(1 / norm, rel=1e-5)
    assert metrics["boost_ratio"] == pytest.approx(0.25 * stored / (0.75 * norm * metrics["clip_factor"]))
    assert metrics["cosine_mean"] == pytest.approx(sum(cosines) / 4, abs=1e-6)
    assert metrics["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert metrics["correction_max"] == pytest.approx(1 - min(cosines), abs=1e-6)


# --- state ------------------------------------------------------------------------------------------------------------


def every_format() -> list[tuple[torch.dtype, str, str]]:
    low = [(d, s, p) for d in (torch.bfloat16, torch.float16) for s in STATE_FORMATS for p in PARAM_FORMATS]
    return [(torch.float32, s, "native") for s in STATE_FORMATS] + [(torch.float64, "fp32", "native"), *low]


@pytest.mark.parametrize("dtype, state_format, param_format", every_format())
def test_state_round_trips_bit_exactly(dtype: torch.dtype, state_format: str, param_format: str) -> None:
    """Saved to bytes, loaded into a new optimizer and continued: the same bits as without the interruption."""
    whole, params = make_params(dtype), make_params(dtype)
    make = dict(state_format=state_format, param_format=param_format, max_grad_norm=1.0, lr=1e-5)
    one = dba(whole, **make)
    train(whole, one, range(1, 7))
    first = dba(params, **make)
    train(params, first, range(1, 4))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    second = dba(params, **make)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer))
    for mine, saved in zip(second.state_dict()["state"].values(), first.state_dict()["state"].values(), strict=True):
        assert mine.keys() == saved.keys()
        assert all(torch.equal(mine[k], saved[k]) and mine[k].dtype == saved[k].dtype for k in mine)
    train(params, second, range(4, 7))
    assert all(torch.equal(params[name], whole[name]) for name in SHAPES)
    assert second.metrics() == one.metrics()


def test_super_load_state_dict_alone_would_lose_bits() -> None:
    """Negative control: torch's own loader casts fp32 moments of a bf16 parameter to bf16."""
    params = make_params(torch.bfloat16)
    first = dba(params)
    train(params, first, range(1, 3))
    second = dba(params)
    torch.optim.Optimizer.load_state_dict(second, first.state_dict())
    assert second.state[params[COMPRESSED]]["exp_avg"].dtype == torch.bfloat16


def test_small_and_one_dimensional_tensors_keep_fp32_state() -> None:
    """Protects precision: small and 1-D tensors keep fp32 state when int8 is asked for."""
    params = make_params(torch.bfloat16)
    optimizer = dba(params, state_format="int8")
    train(params, optimizer, range(1, 2))
    dtypes = {name: optimizer.state[param]["exp_avg"].dtype for name, param in params.items()}
    assert dtypes == {
        "embed.weight": torch.int8,
        "norm.weight": torch.float32,
        "head.weight": torch.int8,
        "tiny.weight": torch.float32,
    }
    state = optimizer.state[params["embed.weight"]]
    assert state["exp_avg_scale"].shape == (70, 2) and state["remainder"].dtype == torch.int16


def test_uncompressed_state_loads_into_a_compressed_optimizer() -> None:
    """torch's AdamW state enters an int8 optimizer within the codec's bound, and leaves it again."""
    params = make_params()
    adamw = torch.optim.AdamW(params.items())
    train(params, adamw, range(1, 4))
    exact = adamw.state[params[COMPRESSED]]["exp_avg"].clone()
    compressed = DBAAdamW(params.items(), state_format="int8", backend="reference")
    compressed.load_state_dict(adamw.state_dict())
    train(params, compressed, range(4, 5))
    plain = DBAAdamW(params.items(), backend="reference")
    plain.load_state_dict(compressed.state_dict())
    params[COMPRESSED].grad = torch.zeros(64, 64)
    plain.step()
    decayed = 0.9 * (0.9 * exact + 0.1 * gradient(COMPRESSED, 4, torch.float32))
    absmax = decayed.abs().max()
    assert (plain.state[params[COMPRESSED]]["exp_avg"] - decayed).abs().max() < absmax / 50


def test_split16_weight_and_remainder_are_the_fp32_trajectory() -> None:
    """bf16 + 16 bits is the fp32 master, bit for bit, and the weight is that value rounded."""
    split, master = make_params(torch.bfloat16), make_params(torch.bfloat16)
    one, two = dba(split, param_format="split16"), dba(master, param_format="master")
    train(split, one, range(1, 20))
    train(master, two, range(1, 20))
    for name in SHAPES:
        joined = remainder.join(split[name].detach(), one.state[split[name]]["remainder"], "split16")
        assert torch.equal(joined, two.state[master[name]]["remainder"])


def test_pickled_and_copied_optimizers_continue_identically() -> None:
    """Protects pickle and deepcopy: both continue with the same bits and metrics."""
    params = make_params()
    optimizer = dba(params)
    train(params, optimizer, range(1, 4))
    clone = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    train(params, optimizer, range(4, 6))
    for other in (clone, copied):
        others = dict(zip(SHAPES, [p for g in other.param_groups for p in g["params"]], strict=True))
        train(others, other, range(4, 6))
        assert all(torch.equal(others[name], params[name]) for name in SHAPES)
        assert other.metrics() == optimizer.metrics()


def test_checkpoint_libraries_can_allocate_state() -> None:
    """step() on empty state with lr 0 and zero gradients allocates and changes nothing, counters included."""
    params = make_params(torch.bfloat16)
    optimizer = dba(params, lr=0.0, weight_decay=0.5, state_format="int8")
    before = [p.detach().clone() for p in params.values()]
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params.values(), strict=True))
    assert all(float(entry["step"]) == 0 and not entry["exp_avg"].any() for entry in optimizer.state.values())
    assert len(optimizer.state) == len(params) and optimizer.metrics() == {}
    # Only in exactly that case: a gradient that is not zero is a step, and counts.
    optimizer = dba(params, lr=0.0)
    train(params, optimizer, range(1, 2))
    assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())


def test_parameters_may_be_swapped_after_a_step() -> None:
    """Frameworks replace storage and load new state under a live optimizer; the next step uses the new tensors."""
    params, reference = make_params(), make_params()
    optimizer, plain = dba(params), dba(reference)
    for step in (1, 2, 4):
        train(params, optimizer, range(step, step + 1))
        train(reference, plain, range(step, step + 1))
        for param in params.values():
            param.data = param.data.clone()
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    assert all(torch.equal(params[name], reference[name]) for name in SHAPES)
    assert optimizer.metrics()["steps"] == 3


def test_global_gradient_stays_out_of_the_state() -> None:
    """The group holds its path and digest; resuming with another one is refused."""
    params = make_params()
    optimizer = dba(params)
    train(params, optimizer, range(1, 2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["global_gradient"]["digest"] == optimizer.global_gradient.digest
    other = DBAAdamW(params.items(), global_gradient=make_global(format="int4"), total_steps=500, lr=1e-5)
    with pytest.raises(ValueError, match=r"digest .* resume with the same file"):
        other.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:lr", "ignore:boost")
def test_resuming_checks_names_but_not_weights() -> None:
    """The fingerprint is for the start of a run: a resumed run has moved weights and must be let in."""
    params = make_params()
    gg = make_global(params)
    optimizer = dba(params, global_gradient=gg, lr=1e-1, total_steps=500)
    train(params, optimizer, range(1, 30))
    resumed = dba(params, global_gradient=gg, total_steps=500)
    resumed.load_state_dict(optimizer.state_dict())
    train(params, resumed, range(30, 31))
    with pytest.raises(ValueError, match="not the model that the global gradient was collected on"):
        train(params, dba(params, global_gradient=gg, total_steps=500), range(1, 2))


# --- backends ---------------------------------------------------------------------------------------------------------


def displacement_error(dtype: torch.dtype, backend: str, steps: int, spoil: float = 0.0, **formats: str) -> float:
    """‖Δθ − Δθ_ref‖ / ‖Δθ_ref‖ after ``steps`` steps of full DBA, both from the same start, on exact weights."""
    moved = {}
    names = ("head.weight", "norm.weight")  # one compressed, one not, the latter often without a gradient
    gg = GlobalGradient.from_tensors({name: gradient(name, 999_999, torch.float32) for name in names})
    for name in ("reference", backend):
        params = {n: p for n, p in make_params(dtype).items() if n in names}
        start = torch.cat([p.detach().double().flatten() for p in params.values()])
        beta1 = 0.9 - (spoil if name == backend else 0.0)
        common = dict(global_gradient=gg, total_steps=400, max_grad_norm=50.0, betas=(beta1, 0.99))
        optimizer = dba(params, backend=name, **common, **formats)
        train(params, optimizer, range(1, steps + 1))
        assert optimizer.metrics()["steps"] == steps
        joined = [joined_value(optimizer, p).double().flatten() for p in params.values()]
        moved[name] = torch.cat(joined) - start
    return float((moved[backend] - moved["reference"]).norm() / moved["reference"].norm())


def joined_value(optimizer: DBAAdamW, param: torch.nn.Parameter) -> torch.Tensor:
    if "remainder" not in optimizer.state[param]:
        return param.detach()
    return remainder.join(param.detach(), optimizer.state[param]["remainder"], optimizer.options.param_format)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    "dtype, formats, limit",
    [
        (torch.float32, dict(state_format="fp32"), 1e-5),
        (torch.bfloat16, dict(state_format="fp32", param_format="split16"), 1e-5),
        (torch.bfloat16, dict(state_format="int8", param_format="split16"), 1e-3),  # codes on a boundary may differ
        (torch.bfloat16, dict(state_format="int8", param_format="split8"), 1e-2),  # and then the rounding of a weight
    ],
    ids=["fp32", "split16", "int8-split16", "int8-split8"],
)
def test_every_backend_trains_like_the_reference(backend: str, dtype: torch.dtype, formats: dict, limit: float) -> None:
    """The whole method: boost, correction, clipping, a parameter that often has no gradient."""
    steps = 50 if backend == "native" or dtype == torch.float32 else 12  # the interpreter takes 0.2 s a step
    assert displacement_error(dtype, backend, steps, **formats) < limit


@pytest.mark.parametrize("state_format", ["fp32", "int8"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_one_fused_call_equals_three(scope: str, state_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend's single call gives the bits of similarity, coefficients and step called one by one."""
    results = []
    for fuses in (True, False):
        params = make_params(torch.bfloat16)
        optimizer = dba(params, backend="native", state_format=state_format, correction_scope=scope, max_grad_norm=1.0)
        with monkeypatch.context() as patch:
            if not fuses:
                patch.setattr(ops, "fuses", lambda *_: False)
            else:
                tensors, grads = active_params(params)
                assert ops.fuses(optimizer._activate(tensors, grads)[1].batches(grads), "native")
            train(params, optimizer, range(1, 6))
        results.append((params, optimizer.metrics()))
    (one, metrics), (three, its_metrics) = results
    assert all(torch.equal(one[name], three[name]) for name in SHAPES) and metrics == its_metrics


def active_params(params: dict[str, torch.nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    for name, param in params.items():
        param.grad = gradient(name, 1, param.dtype)
    return list(params.values()), [p.grad for p in params.values()]


def test_a_wrong_beta_is_noticed_by_the_comparison_of_backends() -> None:
    """Negative control: β₁ off by 0.01 fails the bounds above."""
    assert displacement_error(torch.float32, "reference", 12, spoil=0.0) == 0.0
    assert displacement_error(torch.bfloat16, "native", 50, spoil=0.01, param_format="split16") > 3e-3


# --- names and refusals -----------------------------------------------------------------------------------------------


def test_wrapped_names_bind_to_the_same_gradient() -> None:
    """module., _orig_mod. and checkpoint wrappers' prefixes make no difference."""
    bare, wrapped = make_params(), make_params()
    train(bare, dba(bare), range(1, 4))
    optimizer = DBAAdamW(
        [(f"module._orig_mod.{name}", p) for name, p in wrapped.items()],
        lr=1e-5,
        global_gradient=make_global(bare, "int8"),
        total_steps=1000,
        boost="paper",
        missing="error",
        backend="reference",
    )
    optimizer.global_gradient.fingerprint.clear()  # bare has moved; this test is about names
    train(wrapped, optimizer, range(1, 4))
    assert all(torch.equal(bare[name], wrapped[name]) for name in SHAPES)


@pytest.mark.filterwarnings("ignore:global_gradient")
def test_missing_adamw_trains_unknown_parameters_plainly() -> None:
    """missing='adamw': a parameter without a global gradient gets AdamW's update, the others DBA's."""
    params, plain = make_params(), make_params()
    tensors = {name: gradient(name, 999_999, torch.float32) for name in SHAPES if name != COMPRESSED}
    gg = GlobalGradient.from_tensors(tensors)
    train(params, dba(params, global_gradient=gg, missing="adamw"), range(1, 6))
    train(plain, DBAAdamW(plain.items(), lr=1e-5, backend="reference"), range(1, 6))
    assert torch.equal(params[COMPRESSED], plain[COMPRESSED])
    assert not torch.equal(params["embed.weight"], plain["embed.weight"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(state_format="int3"), "state_format: expected one of 'fp32', 'bf16', 'int8'; got 'int3'"),
        (dict(param_format="kahan"), "param_format: expected one of 'auto', 'native', 'split16'"),
        (dict(correction="angle"), "correction: expected one of 'cosine', 'none', 'agem', 'pcgrad'; got 'angle'"),
        (dict(correction_scope="row"), "correction_scope: expected one of 'tensor', 'global'"),
        (dict(correction_bounds=(1.0, 0.5)), "correction_bounds: expected 0 <= alpha_min <= alpha_max"),
        (dict(boost="max"), "boost: expected one of 'auto', 'paper'"),
        (dict(boost=-1.0), "boost: expected a name, k0 >= 0"),
        (dict(boost_max=1.5), r"boost_max: expected a number in \[0, 1\], got 1.5"),
        (dict(total_steps=None), "total_steps: expected the number of optimizer steps"),
        (dict(max_grad_norm=0.0), "max_grad_norm: expected a positive number"),
        (dict(missing="skip"), "missing: expected one of 'error', 'adamw'"),
        (dict(backend="cuda"), "backend: expected one of 'auto', 'reference', 'triton', 'native'; got 'cuda'"),
        (dict(lr=-1.0), "lr: expected a number >= 0"),
        (dict(betas=(0.9, 1.0)), r"betas\[1\]: expected a number in \[0, 1\)"),
        (dict(amsgrad=True), "amsgrad: expected False"),
        (dict(differentiable=True), "differentiable: expected False"),
    ],
)
def test_arguments_are_refused_by_name(arguments: dict, message: str) -> None:
    """Protects the user's time: each bad argument is refused with its name and what was expected."""
    with pytest.raises(ValueError, match=message):
        dba(make_params(), **arguments)


def test_parameters_without_names_are_refused() -> None:
    """Protects the binding by name: parameters without names are refused with the way to pass them."""
    with pytest.raises(ValueError, match=r"group 0 has no names.*pass model.named_parameters\(\)"):
        DBAAdamW(make_params().values(), global_gradient=make_global(), total_steps=500, lr=1e-5)


def test_missing_and_extra_tensors_are_refused_at_the_first_step() -> None:
    """Protects against a partial match: names that stand on one side only are refused."""
    params = make_params()
    fewer = {name: p for name, p in params.items() if name != "tiny.weight"}
    with pytest.raises(ValueError, match=r"tiny.weight.*expected a parameter of that name"):
        train(fewer, dba(fewer), range(1, 2))
    gg = GlobalGradient.from_tensors({name: p.detach() for name, p in fewer.items()})
    with pytest.raises(ValueError, match=r"tiny.weight.*expected a global gradient"):
        train(params, dba(params, global_gradient=gg), range(1, 2))


def test_unusable_gradients_name_the_parameter() -> None:
    """Protects the user's time: sparse gradients and strided parameters are refused by the parameter's name."""
    table = torch.nn.Embedding(70, 65, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"grad of 'weight': expected a dense tensor.*sparse=False"):
        DBAAdamW(table.named_parameters()).step()
    params = make_params()
    params["head.weight"].data = params["head.weight"].data.T
    params["head.weight"].grad = torch.zeros(64, 64)
    with pytest.raises(ValueError, match=r"parameter 'head.weight': expected real, contiguous storage"):
        DBAAdamW(params.items()).step()


def test_state_of_another_model_or_format_is_refused() -> None:
    """Protects a resumed run: state of another format or shape is refused before it is used."""
    params = make_params(torch.bfloat16)
    optimizer = dba(params, param_format="split16", state_format="int8")
    train(params, optimizer, range(1, 2))
    other = dba(params, param_format="split8", state_format="int8")
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"remainder of .*expected param_format 'split8'.* saved with 'split16'"):
        train(params, other, range(2, 3))
    wrong = optimizer.state_dict()
    wrong["state"][2] = {k: v[:10] if v.dim() else v for k, v in wrong["state"][2].items()}
    third = dba(params, param_format="split16", state_format="int8")
    third.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"exp_avg of 'head.weight': expected shape .* belongs to another model"):
        train(params, third, range(2, 3))
