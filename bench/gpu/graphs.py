"""CUDA graphs: whole iterations captured and replayed, with eager steps between, bit for bit those taken one by one.

Without a GPU the iteration itself stands in for its graph; what can be refused on the host is refused there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient

from .device import DEVICE, SIMULATED, generator, synchronize

if TYPE_CHECKING:
    from .report import Report

SHAPES = {"a.weight": (64, 96), "b.weight": (40, 77), "norm.weight": (96,)}
if not SIMULATED:
    SHAPES |= {"c.weight": (1024, 1024)}


class Training:
    """A model whose gradients are elementwise, so that they have the same bits however they are launched."""

    def __init__(self, lr: Any = None, **options: Any):
        draw = generator(0)

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=draw, device=DEVICE) * 0.05

        self.params = {name: torch.nn.Parameter(normal(shape).bfloat16()) for name, shape in SHAPES.items()}
        self.data = {name: normal(shape).bfloat16() for name, shape in SHAPES.items()}
        gg = GlobalGradient.from_tensors({name: normal(shape) for name, shape in SHAPES.items()}, format="int8")
        self.lr = torch.full((), 1e-3, device=DEVICE) if lr is None else lr
        options = {"state_format": "int8", "max_grad_norm": 1.0, "total_steps": 100} | options
        self.optimizer = DBAAdamW(self.params.items(), lr=self.lr, global_gradient=gg, backend="triton", **options)

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum((param * self.data[name]).float().square().sum() for name, param in self.params.items())
        assert isinstance(loss, torch.Tensor)
        loss.backward()

    def iteration(self) -> None:
        self.backward()
        self.optimizer.step()

    def captured(self) -> Callable[[], Any]:
        """Its iteration as a graph of its own; the capture runs nothing."""
        if SIMULATED:
            return self.iteration
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.iteration()
        self.optimizer.zero_grad(set_to_none=True)  # the graph's gradients belong to the graph
        return graph.replay

    def everything(self) -> dict[str, torch.Tensor]:
        """Parameters and all state."""
        found = {name: param.detach() for name, param in self.params.items()}
        for name, param in self.params.items():
            for key, value in self.optimizer.state[param].items():
                if torch.is_tensor(value):
                    found[f"{key} of {name}"] = value
        return found


def assert_same(one: Training, other: Training) -> None:
    synchronize()
    mine, its = one.everything(), other.everything()
    assert mine.keys() == its.keys(), f"state differs: {mine.keys() ^ its.keys()}"
    for name, tensor in mine.items():
        assert torch.equal(tensor, its[name]), f"{name}: the graph and the steps taken one by one differ"


def pair(warmup: int = 2, **options: Any) -> tuple[Training, Training]:
    """Two trainings, equal, each some iterations old."""
    both = Training(**options), Training(**options)
    for training in both:
        for _ in range(warmup):
            training.iteration()
    return both


def check_iteration() -> None:
    """Five replays of a whole iteration; the learning rate is a tensor that changes between them."""
    graphed, eager = pair()
    before = {name: tensor.clone() for name, tensor in graphed.everything().items()}
    replay = graphed.captured()
    for _ in range(5):
        for training in (graphed, eager):
            training.lr.mul_(0.9)
        replay()
        eager.iteration()
    assert_same(graphed, eager)
    assert any(not torch.equal(before[name], tensor) for name, tensor in graphed.everything().items()), "nothing moved"


def check_eager_between() -> None:
    """Graph A, eager, A, eager, graph B, A, eager, B: each reads its own gradients."""
    graphed, eager = pair()
    first = graphed.captured()
    second: Callable[[], Any] | None = None
    for which in "AEAEBAEBAABE":
        if which == "B" and second is None:
            second = graphed.captured()
        {"A": first, "B": second, "E": graphed.iteration}[which]()  # type: ignore[misc]
        eager.iteration()
    assert_same(graphed, eager)


def check_plan_dropped() -> None:
    """A graph outlives the plan it was captured with: a state dict is loaded back in between."""
    graphed, eager = pair()
    replay = graphed.captured()
    replay()
    eager.iteration()
    for training in (graphed, eager):
        training.optimizer.state_dict()
    replay()
    eager.iteration()
    assert_same(graphed, eager)


def check_cpu_rate_refused() -> None:
    """A tensor on the CPU is read at capture and never again: refused, with what to do."""
    _needs_device()
    training = Training(lr=torch.tensor(1e-3))
    training.iteration()
    try:
        training.captured()
    except ValueError as error:
        assert "lr" in str(error), error
        return
    raise AssertionError("a CPU tensor as learning rate was captured")


def check_rate_changed() -> None:
    """A float learning rate that changed since the warm-up is the captured one at every replay."""
    graphed, eager = pair(lr=1e-3)
    for training in (graphed, eager):
        training.optimizer.param_groups[0]["lr"] = 5e-4
    replay = graphed.captured()
    garbage = [torch.zeros(64, pin_memory=not SIMULATED) for _ in range(64)]  # takes the place of a freed buffer
    for _ in range(3):
        replay()
        eager.iteration()
    del garbage
    assert_same(graphed, eager)
    graphed.iteration()  # and the eager step after it has that rate too
    eager.iteration()
    assert_same(graphed, eager)


def _needs_device() -> None:
    from .report import Absent

    if SIMULATED:
        raise Absent("nothing can be captured without a GPU")


def run(report: Report) -> None:
    report.attempt("a whole iteration", check_iteration)
    report.attempt("two graphs, eager steps between", check_eager_between)
    report.attempt("a state dict between replays", check_plan_dropped)
    report.attempt("a CPU tensor lr is refused", check_cpu_rate_refused)
    report.attempt("a float lr changed since the warm-up", check_rate_changed)
