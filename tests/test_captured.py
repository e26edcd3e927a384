"""CUDA graphs, the host's side: what a captured step uses is its own, is kept, and never goes stale.

No graph can be captured here: ``capturing`` is made to say yes, the launches run in the interpreter all the same.
``python -m bench.gpu`` replays real graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dba_kernels import DBAAdamW, GlobalGradient, captured
from dba_kernels.kernels import tables
from dba_kernels.stepdata import Hyper


class Switch:
    """Whether a graph is being captured."""

    on = False


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Switch]:
    switch = Switch()
    monkeypatch.setattr(captured, "capturing", lambda device: switch.on)
    monkeypatch.setattr(captured, "_kept", [])
    yield switch


def make(lr: Any = 1e-4, **options: Any) -> tuple[torch.nn.Parameter, DBAAdamW]:
    param = torch.nn.Parameter(torch.randn(8, 8))
    gg = GlobalGradient.from_tensors({"weight": torch.randn(8, 8)})
    optimizer = DBAAdamW([("weight", param)], lr=lr, global_gradient=gg, total_steps=50, backend="triton", **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return param, optimizer


def kept() -> list[Any]:
    return captured._kept


def test_address_tables_belong_to_the_capture(capture):
    """Protects eager steps beside graphs: neither reads the gradients whose addresses the other entered."""
    first, second = [torch.ones(4)], [torch.ones(4)]
    addresses = tables.GradTables([tables.Entry((4,), grouped=False)], torch.device("cpu"))
    eager = addresses.refresh(first)
    capture.on = True
    graphed = addresses.refresh(second)
    other = addresses.refresh(second)
    capture.on = False
    assert addresses.refresh(first) is eager
    assert eager.tolist() == [first[0].data_ptr()]
    assert graphed.tolist() == other.tolist() == [second[0].data_ptr()]
    assert len({table.data_ptr() for table in (eager, graphed, other)}) == 3
    assert any(table is graphed for table in kept()) and any(table is other for table in kept())


def test_routes_of_a_capture_are_its_own(capture):
    """Protects eager steps after a capture: a list that only a replay fills is not used before one."""
    aligned, odd = [torch.ones(4096)], [torch.ones(4097)[1:]]
    made = tables.GradTables([tables.Entry((4096,), grouped=False)], torch.device("cpu"))
    made.refresh(aligned)
    capture.on = True
    made.refresh(odd)
    graphed = made.chunks
    capture.on = False
    made.refresh(aligned)
    assert list(graphed) == ["narrow"] and list(made.chunks) == ["aligned"]
    made.refresh(odd)
    assert list(made.chunks) == ["narrow"] and made.chunks["narrow"] is not graphed["narrow"]
    assert any(item is graphed["narrow"] for item in kept())


def test_what_a_capture_uses_outlives_the_plan(capture):
    """Protects replays after a state dict was loaded: plan, active set and host buffers are kept."""
    _, optimizer = make()
    capture.on = True
    optimizer.step()
    capture.on = False
    used = optimizer._plan
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._plan is not used
    assert any(item is used for item in kept()) and any(item is used.last for item in kept())


def test_nothing_is_kept_without_a_capture(capture):
    """Protects memory: an eager run keeps nothing."""
    _, optimizer = make()
    optimizer.step()
    assert kept() == []


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_cpu_tensor_in_a_capture_is_refused(capture, key):
    """Protects against a schedule that a replay never reads: the copy would come from memory long given back."""
    _, optimizer = make()
    optimizer.param_groups[0][key] = torch.tensor(1e-4)
    optimizer.step()
    capture.on = True
    with pytest.raises(ValueError, match=rf"{key} of group 0: expected a number or a tensor on .* while a CUDA graph"):
        optimizer.step()


def hyper_buffers() -> list[torch.Tensor]:
    return [item for item in kept() if torch.is_tensor(item) and item.shape == (1, Hyper.COUNT)]


def test_a_rate_that_changed_before_the_capture_is_kept(capture):
    """Protects replays: the captured copy reads its host buffer again, so that buffer stays."""
    _, optimizer = make()
    optimizer.param_groups[0]["lr"] = 5e-5
    capture.on = True
    optimizer.step()
    (buffer,) = hyper_buffers()
    assert buffer[0, Hyper.LR] == 5e-5


def test_an_eager_step_after_a_capture_has_its_own_rate(capture):
    """Protects eager steps between replays: a replay writes the captured rate, so every later step writes its own."""
    _, optimizer = make()
    capture.on = True
    optimizer.step()
    capture.on = False
    for _ in range(2):
        optimizer._plan.hyper[0, Hyper.LR] = 123.0  # what a replay leaves behind
        optimizer.step()
        assert optimizer._plan.hyper[0, Hyper.LR] == 1e-4


def test_without_captures_nothing_is_written_again(capture):
    """Negative control of the above: an eager run writes what changed, and nothing else."""
    _, optimizer = make()
    optimizer._plan.hyper[0, Hyper.LR] = 123.0
    optimizer.step()
    assert optimizer._plan.hyper[0, Hyper.LR] == 123.0
