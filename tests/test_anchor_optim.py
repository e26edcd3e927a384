"""The anchor in the optimizer: collected, saved, bound, stepped, resumed; a memory that holds where the weights go."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dba_kernels import DBAAdamW, GlobalGradient, captured, collect_global_gradient, ops
from dba_kernels.formats import STORAGE_FORMATS
from dba_kernels.reference import anchor

from .support.linear_maps import WORDS, Batch, Tiny, batches_of, copy_of, loss_of

STEPS = 6


def collected(model: Tiny, **options: object) -> GlobalGradient:
    return collect_global_gradient(model, batches_of(), loss_of, **{"format": "fp32", "curvature": 4, **options})


def make(model: nn.Module, gg: GlobalGradient | None, **options: object) -> DBAAdamW:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the learning rate is large, to see something in few steps
        return DBAAdamW(
            model.named_parameters(),
            lr=1e-2,
            global_gradient=gg,
            total_steps=None if gg is None else STEPS,
            **{"anchor_every": 1, **options},
        )


def train(model: Tiny, optimizer: DBAAdamW, first: int = 0, last: int = STEPS) -> Tiny:
    batches = batches_of(STEPS + 9)[9:]  # not those of the collection
    for batch in batches[first:last]:
        optimizer.zero_grad()
        loss_of(model, batch)[0].backward()
        optimizer.step()
    return model


def trained(gg: GlobalGradient | None, dtype: torch.dtype = torch.float32, **options: object) -> Tiny:
    model = Tiny().to(dtype)
    return train(model, make(model, gg, **options))


def test_without_an_anchor_nothing_changes() -> None:
    """Protects today's DBA: with anchor=0, and with no curvature collected, every bit is as before."""
    base = Tiny()
    plain, with_curvature = collected(base, curvature=None), collected(base)
    expected = trained(plain).state_dict()
    for found in (trained(plain, anchor=0.0), trained(with_curvature, anchor=0.0)):
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert not all(torch.equal(v, expected[n]) for n, v in trained(with_curvature).state_dict().items())


def test_an_anchor_may_act_in_every_kth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects anchor_every: k λ H δ in every k-th call of step(), plain DBA in between, a resumed run included."""
    gg = collected(Tiny())
    model = Tiny()
    optimizer = make(model, gg, anchor=2.0, anchor_every=3)
    twin = Tiny()
    by_hand = make(twin, gg, anchor=6.0)
    never = 10**6
    for step in range(STEPS):
        every = 1 if step in (2, 5) else never
        by_hand.method.settings = dataclasses.replace(by_hand.method.settings, anchor=6.0 / every, anchor_every=every)
        train(model, optimizer, step, step + 1)
        train(twin, by_hand, step, step + 1)
        assert all(torch.equal(v, twin.state_dict()[n]) for n, v in model.state_dict().items())
        if step == 3:  # a new object goes on in the same rhythm
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make(model, gg, anchor=2.0, anchor_every=3)
            optimizer.load_state_dict(saved)
    control = trained(gg, anchor=2.0, anchor_every=4)
    assert not all(torch.equal(v, control.state_dict()[n]) for n, v in trained(gg, anchor=2.0).state_dict().items())
    monkeypatch.setattr(captured, "capturing", lambda device: True)
    with pytest.raises(ValueError, match="anchor_every: expected 1 while a CUDA graph is captured"):
        train(model, optimizer, STEPS - 1)
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises((TypeError, ValueError), match="anchor_every"):
            make(Tiny(), gg, anchor_every=wrong)


def following(count: int, seed: int, factor: int) -> list[Batch]:
    """Batches of a rule that can be learned: the next word is ``factor`` times this one, and one more."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, WORDS, (8, 8), generator=generator) for _ in range(count)]
    return [(words, (factor * words + 1) % WORDS) for words in ids]


@pytest.fixture(scope="module")
def learned() -> Tiny:
    """A model that has learned its general data, nearly."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in following(80, seed=3, factor=2):
        optimizer.zero_grad()
        loss_of(model, batch)[0].backward()
        optimizer.step()
    return copy_of(model)


@pytest.mark.parametrize("options", [{}, {"state_format": "int8"}], ids=["fp32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_anchor_keeps_the_general_loss(learned: Tiny, dtype: torch.dtype, options: dict) -> None:
    """Protects what it is for: trained on another rule, the general loss rises less the larger λ is."""
    base, general = copy_of(learned).to(dtype), following(20, seed=4, factor=2)
    gg = collect_global_gradient(base, general, loss_of, format=None, curvature=8)
    losses = []
    for strength in (0.0, 0.3, 3.0):
        model = copy_of(base)
        optimizer = make(model, gg, anchor=strength, **options)
        for batch in following(STEPS, seed=5, factor=3):
            optimizer.zero_grad()
            loss_of(model, batch)[0].backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(sum(float(loss_of(model, batch)[0]) for batch in general) / len(general))
    assert losses[2] < losses[1] < losses[0]


def test_one_step_is_eq_10(tmp_path: Path) -> None:
    """Protects the wiring: from weights off θ₀, the moments after a step are (1−β)(g + λHδ), H from the saved file."""
    base = Tiny()
    gg = GlobalGradient.load(collected(base, format=None).save(tmp_path / "general.safetensors"))
    model = copy_of(base)
    optimizer = make(model, gg, anchor=5.0, betas=(0.0, 0.999))
    train(model, optimizer, 0, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    batch = batches_of(STEPS + 9)[10]
    loss_of(model, batch)[0].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, param in model.named_parameters():
        if name in grads:
            delta = before[name] - base.get_parameter(name).detach()
            want = anchor.anchored_gradient(grads[name].double(), gg.curvature(name), delta.double(), 5.0)
            torch.testing.assert_close(
                optimizer.state[param]["exp_avg"].double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max())
            )


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"state_format": "int8"}),
        (torch.bfloat16, {"param_format": "split8", "state_format": "bf16"}),
        (torch.bfloat16, {"param_format": "master"}),
        (torch.bfloat16, {"param_format": "native"}),
    ],
    ids=["fp32", "split16-int8", "split8-bf16", "master", "native"],
)
def test_resumes_to_the_same_bits(dtype: torch.dtype, options: dict, tmp_path: Path) -> None:
    """Protects θ₀ in the state: a run saved half-way and resumed ends in the bits of one that went through."""
    gg = collected(Tiny().to(dtype))
    whole = trained(gg, dtype, **options)
    model = Tiny().to(dtype)
    optimizer = make(model, gg, **options)
    train(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt")
    resumed = Tiny(seed=1).to(dtype)
    resumed.load_state_dict(saved["model"])
    again = make(resumed, gg, **options)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 3)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_run_begun_without_an_anchor_cannot_go_on_with_one() -> None:
    """Protects θ₀: weights that have moved are not taken for the base model's."""
    gg = collected(Tiny())
    model = Tiny()
    optimizer = make(model, gg, anchor=0.0)
    train(model, optimizer, 0, 2)
    other = make(model, gg, anchor=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"anchor of '.*': expected the weights before the first step"):
        train(model, other, 2, 3)


def test_metrics_name_the_predicted_rise() -> None:
    """Protects metrics(): the ratio of the pull to the gradient, and κ·½⟨δ, Hδ⟩ of the weights."""
    base = Tiny()
    gg = collected(base)
    model = copy_of(base)
    optimizer = make(model, gg, anchor=2.0)
    train(model, optimizer, 0, 3)
    rise = pull = 0.0
    for name, param in model.named_parameters():
        if param.requires_grad:
            delta = (param - base.get_parameter(name)).detach().double()
            rise += float(anchor.predicted_rise(gg.curvature(name), delta))
            pull += float((2.0 * anchor.hessian_product(gg.curvature(name), delta)).square().sum())
    figures = optimizer.metrics()
    assert figures["predicted_rise"] == pytest.approx(gg.calibration * rise, rel=1e-4)
    assert figures["anchor_ratio"] == pytest.approx(pull**0.5 / figures["grad_norm"], rel=1e-4)
    assert "predicted_rise" not in make(model, gg, anchor=0.0).metrics()


@pytest.mark.parametrize("format", [None, "fp32"])
def test_auto_follows_from_the_rate(format: str | None) -> None:
    """Protects "auto": λ = 0.04/η₀, at least κ, with ĝ_G and without; 0 where the file has no curvature."""

    def strength(gg: GlobalGradient, lr: float, **options: object) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = DBAAdamW(Tiny().named_parameters(), lr=lr, global_gradient=gg, total_steps=9, **options)
        return optimizer.method.settings.anchor

    gg = collected(Tiny(), format=format)
    assert gg.calibration is not None
    gg.calibration = 5.0
    assert strength(gg, 3e-5) == pytest.approx(0.04 / 3e-5) and strength(gg, 1e-3) == pytest.approx(40.0)
    assert strength(gg, 0.1) == strength(gg, 0.0) == 5.0  # κ; at a rate of 0 nothing moves
    assert strength(gg, 1e-3, anchor=7.0) == 7.0
    gg.calibration = None
    assert strength(gg, 1e-3) == pytest.approx(40.0) and strength(gg, 0.1) == 1.0
    assert strength(collected(Tiny(), curvature=None), 1e-3) == 0


def test_shrinkage_weighs_the_global_gradient() -> None:
    """Protects eq. 13 in the step: a run with shrink is one whose file holds s ĝ_G; an anchor asks for it."""
    gg = collected(Tiny(), curvature=None)
    factors = {name: anchor.shrinkage(r.signal, r.noise) for name, r in gg.records.items()}
    assert any(0 < s < 1 for s in factors.values())
    scaled = GlobalGradient.from_tensors({name: s * gg[name] for name, s in factors.items()}, "fp32")
    got = trained(gg, shrink=True, correction="none", boost=0.3)
    want = trained(scaled, correction="none", boost=0.3)
    for name, param in got.named_parameters():
        torch.testing.assert_close(param, want.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert make(Tiny(), collected(Tiny())).shrink and not make(Tiny(), gg).shrink


@pytest.mark.parametrize("format", [*STORAGE_FORMATS, "lowrank"])
def test_every_stored_format_can_be_weighed(format: str) -> None:
    """Protects s ĝ_G in every format: what is decoded is s times what was, and the original is left alone."""
    tensor = torch.randn(80, 96, generator=torch.Generator().manual_seed(0))
    options = ("int8", 4) if format == "lowrank" else (format, None)
    stored = GlobalGradient.from_tensors({"weight": tensor}, *options).stored("weight")
    before = ops.decode(stored).clone()
    torch.testing.assert_close(ops.decode(stored.scaled(0.25)), 0.25 * before, rtol=1e-6, atol=0)
    assert torch.equal(ops.decode(stored), before)


def test_the_automatic_boost_gives_way_to_the_anchor() -> None:
    """Protects what the study measured: with an anchor "auto" is no boost, and a boost that is asked for is one."""
    gg = collected(Tiny())
    assert make(Tiny(), gg).method.settings.boost == 0 < make(Tiny(), gg, anchor=0.0).method.settings.boost
    assert make(Tiny(), gg, boost=0.2).method.settings.boost == 0.2


def test_curvature_alone_needs_no_length_of_the_run() -> None:
    """Protects the file without ĝ_G: nothing depends on T, and the boost and the correction are off."""
    gg = collected(Tiny(), format=None)
    optimizer = DBAAdamW(Tiny().named_parameters(), lr=1e-3, global_gradient=gg)
    assert not optimizer.awaits_total_steps
    assert optimizer.method.settings.correction == "none" and optimizer.method.settings.boost == 0


def test_arguments_are_checked() -> None:
    """Protects the surface: what cannot be is refused by name."""
    without = collected(Tiny(), curvature=None)
    with pytest.raises(ValueError, match="anchor: expected a global gradient collected with curvature"):
        make(Tiny(), without, anchor=1.0)
    with pytest.raises(ValueError, match="anchor: expected a name or a number >= 0"):
        make(Tiny(), without, anchor=-1.0)
    with pytest.raises(ValueError, match="anchor: expected one of"):
        make(Tiny(), without, anchor="strong")
    with pytest.raises(ValueError, match="curvature: expected at least 1"):
        collected(Tiny(), curvature=0)
    with pytest.raises(ValueError, match="format: expected a name, got None and no curvature"):
        collected(Tiny(), curvature=None, format=None)
    with pytest.raises(ValueError, match="tokens: expected the number of target tokens"):
        collect_global_gradient(Tiny(), batches_of(1), lambda m, b: loss_of(m, b)[0], curvature=2)


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fp32", "int8", "int4", None])
def test_files_keep_the_curvature(format: str | None, tmp_path: Path) -> None:
    """Protects the file: what is loaded is what was saved, with and without ĝ_G, its digest a part of the whole's."""
    gg = collected(Tiny(), format=format)
    loaded = GlobalGradient.load(gg.save(tmp_path / "general.safetensors"))
    loaded.verify()
    assert loaded.calibration == gg.calibration
    assert loaded.digest == gg.digest != collected(Tiny(), format=format or "fp32", curvature=None).digest
    assert list(loaded.curvature_records) == [n for n, p in Tiny().named_parameters() if p.requires_grad]
    assert loaded.nbytes == gg.nbytes and loaded.curvature_nbytes == gg.curvature_nbytes > 0
    assert (len(loaded) == 0) == (format is None)
    delta = torch.randn(15, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        anchor.hessian_product(loaded.curvature("up.weight"), delta),
        anchor.hessian_product(gg.curvature("up.weight"), delta),
    )


def test_a_file_without_curvature_is_as_ever(tmp_path: Path) -> None:
    """Protects old files and old readers: nothing in the file speaks of curvature where there is none."""
    path = collected(Tiny(), curvature=None).save(tmp_path / "general.safetensors")
    assert b"curvature" not in path.read_bytes() and GlobalGradient.load(path).curvature("up.weight") is None


def test_a_changed_factor_is_noticed(tmp_path: Path) -> None:
    """Protects the digest: one flipped bit in a factor is refused when it is read."""
    path = collected(Tiny()).save(tmp_path / "general.safetensors")
    gg = GlobalGradient.load(path)
    content = bytearray(path.read_bytes())
    sigma = gg.curvature("up.weight").terms[0].left.sigma.numpy().tobytes()
    content[content.index(sigma)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"curvature of 'up.weight'.*corrupt"):
        GlobalGradient.load(path).curvature("up.weight")


def test_interrupted_collection_goes_on_to_the_same_file(tmp_path: Path) -> None:
    """Protects snapshots: an interrupted collection ends in the bytes of one that was not."""
    whole = collected(Tiny()).save(tmp_path / "whole.safetensors")

    def interrupted() -> object:
        yield from batches_of()[:3]
        raise KeyboardInterrupt

    options = dict(format="fp32", curvature=4, snapshot_path=tmp_path / "snapshot.safetensors", snapshot_every=1)
    with pytest.raises(KeyboardInterrupt):
        collect_global_gradient(Tiny(), interrupted(), loss_of, **options)
    resumed = collect_global_gradient(Tiny(), batches_of(), loss_of, **options).save(tmp_path / "resumed.safetensors")
    assert resumed.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match="another curvature"):
        collect_global_gradient(Tiny(), batches_of(), loss_of, **options | {"curvature": 5})
