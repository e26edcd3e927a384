"""A collection that is what it says: weights that stay, data and settings that are the same, work that is not lost."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dba_kernels import GlobalGradient, GlobalGradientCollector, collect_global_gradient
from dba_kernels.identity import describe_function, digest_batch, tells_apart


def batches_of(count: int = 12, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 16, generator=generator) for _ in range(count)]


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 4).to(dtype)


def square_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x.to(model.weight.dtype)).square().mean()


# --- weights that change ----------------------------------------------------------------------------------------------


def in_place(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.add_(1e-2)


def fused_step(model: nn.Linear) -> None:
    model.weight.grad = torch.ones_like(model.weight)
    torch.optim.AdamW([model.weight], lr=1e-2, fused=True).step()
    model.weight.grad = None


def through_data(model: nn.Linear) -> None:
    model.weight.data.add_(1e-2)


def one_bit(model: nn.Linear) -> None:
    model.weight.data.view(torch.int32)[3, 5] ^= 1


def exchanged_rows(model: nn.Linear) -> None:
    model.weight.data.copy_(model.weight.data[[1, 0, 2, 3]])


def data_replaced(model: nn.Linear) -> None:
    model.weight.data = model.weight.data + 1e-2


def replaced(model: nn.Linear) -> None:
    model.weight = nn.Parameter(model.weight.detach() + 1e-2)


def assigned(model: nn.Linear) -> None:
    model.load_state_dict({key: value + 1e-2 for key, value in model.state_dict().items()}, assign=True)


def added(model: nn.Linear) -> None:
    model.register_parameter("more", nn.Parameter(torch.ones(1)))


def frozen_bias(model: nn.Linear) -> None:
    model.bias.data.add_(1e-2)


WAYS = (in_place, fused_step, through_data, one_bit, exchanged_rows, data_replaced, replaced, assigned, added)


@pytest.mark.parametrize("at", [2, 11])
@pytest.mark.parametrize("way", [*WAYS, frozen_bias], ids=lambda way: way.__name__)
def test_changed_weights_are_noticed(way: Callable[[nn.Linear], None], at: int) -> None:
    """Protects "the weights changed meanwhile": whichever way, early or with the last batch, frozen ones too."""
    model = linear()
    model.bias.requires_grad_(way is not frozen_bias)
    calls = []

    def loss(model: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            way(model)
        return square_loss(model, x)

    with pytest.raises(RuntimeError, match=r"parameter '(weight|bias|more)': expected .* meanwhile"):
        collect_global_gradient(model, batches_of(), loss, "fp32")
    assert len(calls) > at


def test_weights_that_stay_are_not_reported() -> None:
    """Negative control: reading weights, writing them as they are, and new gradients change nothing."""

    def loss(model: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        model.weight.data.copy_(model.weight.detach().clone())
        return square_loss(model, x)

    assert collect_global_gradient(linear(), batches_of(), loss, "fp32").provenance.batches == 12


def test_changed_weights_do_not_reach_the_snapshot(tmp_path: Path) -> None:
    """Protects the snapshot: gradients at other weights are not saved, and those before are still there."""
    path, calls = tmp_path / "sums.safetensors", []

    def loss(model: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            through_data(model)
        return square_loss(model, x)

    with pytest.raises(RuntimeError, match="expected untouched weights"):
        collect_global_gradient(linear(), batches_of(), loss, "fp32", snapshot_path=path, snapshot_every=4)
    collector = GlobalGradientCollector(linear(), snapshot_path=path)
    assert collector.consumed == 4


def test_weights_changed_between_two_passes_are_noticed() -> None:
    """Protects a loop of one's own that leaves and enters again, or steps an optimizer before it finishes."""
    model = linear()
    collector = GlobalGradientCollector(model)
    with collector:
        collector.backward(square_loss(model, batches_of()[0]))
    through_data(model)
    with pytest.raises(RuntimeError, match="expected untouched weights"), collector:
        pass
    with pytest.raises(RuntimeError, match="expected untouched weights"):
        collector.finish("fp32")


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 5, 10])
def test_finished_collection_is_extended_to_the_same_bits(tmp_path: Path, first: int) -> None:
    """Protects the advice "more batches are worth it": batches given later count as if they had been given at once."""
    path = tmp_path / "sums.safetensors"
    collect = functools.partial(collect_global_gradient, loss_fn=square_loss, format="fp32")
    keep = {"snapshot_path": path, "snapshot_every": 4}
    short = collect(linear(), batches_of(12)[:first], **keep)
    assert short.provenance.batches == first
    seen = []
    model = linear()
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    extended, whole = collect(model, batches_of(12), **keep), collect(linear(), batches_of(12))
    assert len(seen) == 12 - first and extended.digest == whole.digest != short.digest
    assert extended.save(tmp_path / "a.safetensors").read_bytes() == whole.save(tmp_path / "b.safetensors").read_bytes()
    assert path.stat().st_size < 4 * 68 + 5000  # as promised: 4 bytes per parameter, and the description


def test_interrupted_between_batches_keeps_what_was_done(tmp_path: Path) -> None:
    """Protects work since the last snapshot: Ctrl-C between two batches, or in the loss, loses none of it."""
    path, stop = tmp_path / "sums.safetensors", [True]

    def loss(model: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if stop and torch.equal(x, batches_of()[6]):
            raise KeyboardInterrupt
        return square_loss(model, x)

    with pytest.raises(KeyboardInterrupt):
        collect_global_gradient(linear(), batches_of(), loss, "fp32", snapshot_path=path, snapshot_every=100)
    assert GlobalGradientCollector(linear(), snapshot_path=path).consumed == 6
    options = {"snapshot_path": path, "format": "fp32"}
    with pytest.raises(ValueError, match="expected a snapshot with loss function"):
        collect_global_gradient(linear(), batches_of(), square_loss, **options)
    stop.clear()
    resumed = collect_global_gradient(linear(), batches_of(), loss, **options)
    assert resumed.digest == collect_global_gradient(linear(), batches_of(), square_loss, "fp32").digest


def test_interrupted_in_a_backward_pass_saves_nothing_half(tmp_path: Path) -> None:
    """Protects the sums: a backward pass that fails half-way leaves the snapshot of the micro-batch before."""
    path, model = tmp_path / "sums.safetensors", linear()
    calls = []

    def fail(grad: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    model.bias.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect_global_gradient(model, batches_of(), square_loss, "fp32", snapshot_path=path, snapshot_every=4)
    assert GlobalGradientCollector(linear(), snapshot_path=path).consumed == 4


class Batch:
    def __init__(self, x: torch.Tensor):
        self.x = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: torch.Tensor):
        self.x = x


class Bytes:
    """As an image shows itself."""

    def __init__(self, x: torch.Tensor):
        self.content = x

    def tobytes(self) -> bytes:
        return self.content.numpy().tobytes()


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "numpy": lambda x: x.numpy(),
    "numpy of objects": lambda x: np.array([x.numpy(), None], dtype=object),
    "object": Batch,
    "slots": Slotted,
    "bytes": Bytes,
    "nested": lambda x: {"a": [Batch({"x": x.numpy()})]},
    "set": lambda x: {float(x[0, 0])},
    "numpy number": lambda x: np.float32(x[0, 0]),
    "cycle": lambda x: (lambda b: setattr(b, "me", b) or b)(Batch(x)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_are_told_apart(kind: str) -> None:
    """Protects resuming: equal batches have equal digests, in objects of their own; others do not."""
    first, again, other = (KINDS[kind](batches_of(1, seed)[0].clone()) for seed in (0, 0, 1))
    assert digest_batch(first) == digest_batch(again) != digest_batch(other)
    assert tells_apart(first) is None


def test_digests_of_old_snapshots_stay() -> None:
    """Protects snapshots that older versions wrote: tensors, texts and containers have the digests that they had."""
    found = digest_batch({"input_ids": torch.arange(6).view(2, 3), "text": ["a", None, 2.5]}).hex()
    assert found == "c30207d1f8152f42f1307f6c63ec6e93109f842d61399cf74c5de3b0c63291ae"


def test_data_that_cannot_be_told_apart_are_announced(tmp_path: Path) -> None:
    """Protects from silence: before the first micro-batch, and only where there is a snapshot to go on from."""
    opaque = [object() for _ in range(2)]
    options: dict[str, Any] = {"loss_fn": lambda model, batch: model.weight.square().sum(), "format": "fp32"}
    with pytest.warns(UserWarning, match="an object of type object shows no tensors, arrays, numbers or texts"):
        collect_global_gradient(linear(), opaque, snapshot_path=tmp_path / "s.safetensors", **options)
    collect_global_gradient(linear(), opaque, **options)


def other_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).abs().mean()


def scaled(factor: float) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: square_loss(model, x) * factor


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"autocast_dtype": torch.bfloat16}, "autocast dtype torch.bfloat16, got None"),
        ({"loss_fn": other_loss}, r"loss function other_loss \w+, got scaled"),
        ({"loss_fn": scaled(2.0)}, r"loss function scaled.* got scaled"),
        ({"model": torch.bfloat16}, "weight dtypes 2 bfloat16, got 2 float32"),
    ],
)
def test_other_settings_are_refused_on_resume(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """Protects the sums: what was begun with one loss, autocast or weight dtype is not continued with another."""
    path = tmp_path / "sums.safetensors"
    options: dict[str, Any] = {"loss_fn": scaled(1.0), "format": "fp32", "snapshot_path": path}
    with torch.no_grad():
        start = linear()
        for param in start.parameters():
            param.copy_(param.bfloat16())  # so that only the dtype tells them apart
    collect_global_gradient(start, batches_of(3), **options)
    model = start.to(changed.pop("model", torch.float32))
    with pytest.raises(ValueError, match=message):
        collect_global_gradient(model, batches_of(6), **(options | changed))
    if "loss_fn" in changed or "autocast_dtype" in changed:
        assert collect_global_gradient(start, batches_of(6), **options).provenance.batches == 6  # negative control


def test_snapshot_of_an_older_version_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects old files: a snapshot that says nothing of settings is gone on from."""
    path = tmp_path / "sums.safetensors"
    with monkeypatch.context() as patch:
        from dba_kernels import sums

        header = sums.GradientSums._header
        patch.setattr(
            sums.GradientSums, "_header", lambda *args: {k: v for k, v in header(*args).items() if k != "settings"}
        )
        collect_global_gradient(linear(), batches_of(3), square_loss, "fp32", snapshot_path=path)
    extended = collect_global_gradient(linear(), batches_of(6), other_loss, "fp32", snapshot_path=path)
    assert extended.provenance.batches == 6


def test_functions_are_described_by_what_they_do() -> None:
    """Protects honest resumption: a function made anew is the same; lists that it fills do not matter."""
    assert describe_function(scaled(1.0)) == describe_function(scaled(1.0)) != describe_function(scaled(2.0))
    log: list[int] = []

    def logging(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        log.append(1)
        return square_loss(model, x)

    before = describe_function(logging)
    log.append(1)
    assert describe_function(logging) == before
    assert describe_function(functools.partial(scaled, 1.0)) != describe_function(functools.partial(scaled, 2.0))
    assert describe_function(None) == "None"


# --- the result's place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no folder", "a folder in its place", "not writable"])
def test_unwritable_result_is_refused_before_the_first_batch(tmp_path: Path, kind: str) -> None:
    """Protects hours of collection: ``save_to`` is tried first, and nothing is left of the trial."""
    path = tmp_path / "out" / "gg.safetensors"
    if kind == "a folder in its place":
        path.mkdir(parents=True)
    if kind == "not writable":
        path.parent.mkdir(mode=0o555)
        if os.access(path.parent, os.W_OK):
            path = Path("/proc/self/gg.safetensors")  # root may write anywhere but here
    calls = []
    with pytest.raises(OSError, match=r"cannot write .*gg.safetensors"):
        collect_global_gradient(linear(), batches_of(), lambda m, x: calls.append(1) or square_loss(m, x), save_to=path)
    assert calls == []


def test_trial_leaves_nothing(tmp_path: Path) -> None:
    """Protects the folder, and an older result until the new one is there."""
    path = tmp_path / "gg.safetensors"
    path.write_bytes(b"old")
    GlobalGradientCollector(linear()).check_destination(path)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"old"


def test_result_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the result: where writing it fails after all, the error carries it."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GlobalGradient, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        collect_global_gradient(linear(), batches_of(), square_loss, "fp32", save_to=tmp_path / "gg.safetensors")
    expected = collect_global_gradient(linear(), batches_of(), square_loss, "fp32")
    assert caught.value.global_gradient.digest == expected.digest
