"""Tensors in unusual places: several devices, another default device, no storage, devices that cannot serve.

No GPU is needed: meta tensors and recorders stand in for what lies elsewhere. ``python -m bench.gpu`` has the same
cases on the device.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from dba_kernels import DBAAdamW, GlobalGradient, backends, collect_global_gradient, plan, use_backend
from dba_kernels.backends import BACKENDS, why_not
from dba_kernels.kernels import accumulate
from dba_kernels.kernels.tables import address_of
from dba_kernels.sums import GradientSums

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"a.weight": (64, 64), "b.weight": (40, 77), "norm.weight": (96,)}
CPU, META = torch.device("cpu"), torch.device("meta")


def make(devices: dict[str, str] | None = None, **options: Any) -> tuple[dict[str, torch.nn.Parameter], DBAAdamW]:
    devices = devices or dict.fromkeys(SHAPES, "cpu")
    params = {n: torch.nn.Parameter(torch.randn(shape, device=devices[n])) for n, shape in SHAPES.items()}
    usual = {"lr": 1e-4, "total_steps": 50, "max_grad_norm": 1.0}
    return params, DBAAdamW(params.items(), **usual | options)


def step(params: dict[str, torch.nn.Parameter], optimizer: DBAAdamW, names: tuple[str, ...] = tuple(SHAPES)) -> None:
    for name, param in params.items():
        param.grad = torch.full_like(param, 1e-2) if name in names else None
    optimizer.step()


def global_gradient() -> GlobalGradient:
    return GlobalGradient.from_tensors({name: torch.randn(shape) for name, shape in SHAPES.items()})


# --- several devices --------------------------------------------------------------------------------------------------


class Elsewhere:
    """Stands in for a tensor on ``device``: remembers where it was copied, and whether the host waited for it."""

    def __init__(self, device: str) -> None:
        self.device, self.copies = torch.device(device), []

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        self.copies.append((device.type, non_blocking))
        return torch.zeros(2, 2)

    def __getitem__(self, index: Any) -> Elsewhere:
        return self


@pytest.mark.parametrize(
    ("here", "there", "non_blocking"), [("cuda", "cpu", False), ("cpu", "cuda", True), ("cuda:0", "cuda:1", True)]
)
def test_copies_towards_the_cpu_are_waited_for(here, there, non_blocking):
    """Protects mixed CPU and CUDA models from stale coefficients: the host reads such a copy at once."""
    laid_out: Any = object.__new__(plan.Plan)
    laid_out.device, laid_out.coefficients = torch.device(here), Elsewhere(here)
    laid_out.coefficients_on(SimpleNamespace(device=torch.device(there)))
    scale = Elsewhere(here)
    laid_out.device = torch.device(there)
    laid_out.here(scale)
    kind = torch.device(there).type
    assert laid_out.coefficients.copies == scale.copies == [(kind, non_blocking)]
    assert laid_out.here(None) is None


def test_sums_come_to_a_cpu_plan_before_they_are_read():
    """Protects the similarity of mixed models: the sums that a GPU has reduced are waited for."""
    laid_out: Any = object.__new__(plan.Plan)
    sums = Elsewhere("cuda")
    laid_out.device, laid_out.sums = CPU, torch.ones(2, 2)
    laid_out._sums_elsewhere = {sums.device: sums}
    laid_out.sharding = SimpleNamespace(communicates=False)
    tensors = [SimpleNamespace(index=0), SimpleNamespace(index=1)]
    laid_out.gather_sums(SimpleNamespace(parts=[SimpleNamespace(device=sums.device, tensors=tensors)]))
    assert sums.copies == [("cpu", False)]
    assert torch.equal(laid_out.sums, torch.zeros(2, 2))


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_a_grad_scalers_tensors_come_to_the_tables(monkeypatch, backend):
    """Protects models spread over devices: scale and found_inf lie where the loss is, the kernel is elsewhere."""
    moved = []
    monkeypatch.setattr(plan.Plan, "here", lambda self, scalar: moved.append(scalar) or torch.ones(()))
    params, optimizer = make(global_gradient=global_gradient(), backend=backend)
    optimizer.grad_scale, optimizer.found_inf = scalars = torch.full((), 2.0), torch.zeros(())
    step(params, optimizer)
    assert moved == list(scalars)
    assert optimizer.metrics()["skipped_steps"] == 1  # what ``here`` returned was used: found_inf 1


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_is_elsewhere_is_refused_by_name(backend):
    """Protects the process: the address of host memory in a device's table is an illegal access."""
    params, optimizer = make(backend=backend, state_format="int8")
    step(params, optimizer)
    own = optimizer.state[params["a.weight"]]
    own["exp_avg_scale"] = own["exp_avg_scale"].to(META)
    with pytest.raises(
        ValueError, match=r"exp_avg_scale of 'a\.weight': expected contiguous .* on cpu.* on meta; make"
    ):
        step(params, optimizer)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.T.contiguous().T], ids=["dtype", "strides"])
def test_state_in_another_form_is_refused_by_name(change):
    """Protects the weights: a kernel would read such a tensor as what it is not."""
    params, optimizer = make(backend="triton", param_format="master")
    step(params, optimizer)
    own = optimizer.state[params["a.weight"]]
    own["exp_avg_sq"] = change(own["exp_avg_sq"])
    if own["exp_avg_sq"].dtype == torch.float64:
        step(params, optimizer)  # loaded moments are brought into the wanted format
        assert own["exp_avg_sq"].dtype == torch.float32
        return
    with pytest.raises(ValueError, match=r"exp_avg_sq of 'a\.weight': expected contiguous"):
        step(params, optimizer)


def test_an_address_is_of_the_tables_device():
    """Protects every launch: what lies elsewhere, or has no storage, does not enter a table."""
    with pytest.raises(ValueError, match="grads: expected a tensor on cpu, got one on meta"):
        address_of("grads", torch.empty(3, device=META), CPU)
    with pytest.raises(ValueError, match="grads: expected a tensor with storage of its own"):
        address_of("grads", torch.empty(3, device=META), META)
    with pytest.raises(ValueError, match="grads: expected contiguous storage"):
        address_of("grads", torch.empty(3, 4).T, CPU)


def wrapped() -> torch.Tensor:
    return TwoTensor(torch.randn(64, 64), torch.randn(64, 64))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_tensors_without_storage_are_refused_by_name(backend):
    """Protects the process: weights that wrap other tensors have no address, and were a segmentation fault."""
    weight = torch.nn.Parameter(wrapped())
    weight.grad = wrapped()
    with pytest.raises(ValueError, match=r"'odd\.weight': expected a tensor with storage .*TwoTensor"):
        DBAAdamW([("odd.weight", weight)], backend=backend).step()
    plain = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = DBAAdamW([("odd.weight", plain)], backend=backend)
    plain.grad = torch.randn(64, 64)
    optimizer.step()
    plain.grad = wrapped()  # from one step to the next
    with pytest.raises(ValueError, match=r"grad of 'odd\.weight': expected a tensor with storage .*TwoTensor"):
        optimizer.step()


# --- another default device -------------------------------------------------------------------------------------------


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_device(tmp_path, meta_by_default, backend):
    """Protects scripts that set a default device: collect, save, load, step; what is the host's stays there."""
    if (reason := why_not(backend)) is not None:
        pytest.skip(reason)
    with use_backend(backend):
        model = torch.nn.Linear(64, 64, device="cpu")
        batches = [torch.randn(4, 64, device="cpu") for _ in range(2)]
        gg = collect_global_gradient(model, batches, loss_fn=lambda m, b: m(b).square().mean(), format="int8")
        path = gg.save(tmp_path / "gg.safetensors")
        optimizer = DBAAdamW(
            model.named_parameters(),
            lr=1e-4,
            global_gradient=path,
            total_steps=9,
            max_grad_norm=1.0,
            state_format="int8",
        )
        before = model.weight.detach().clone()
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(before, model.weight.detach())
    assert {value.device for own in optimizer.state.values() for value in own.values()} == {CPU}


# --- devices that cannot serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_other_devices_are_refused_with_the_reason(device, backend):
    """Protects Apple's and Intel's users from a recommendation that is refused next: no backend serves them."""
    with pytest.raises(RuntimeError, match=f"{device} tensors are served by none: the tables of a step are float64"):
        backends.select(backend, device, torch.float32)


def test_a_refused_device_is_told_at_construction(monkeypatch):
    """Protects the time before the first step: the optimizer says it when it is made."""
    monkeypatch.setattr(backends, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\]: cpu tensors are served by none"):
        make()


# --- alternating sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_alternating_sets_of_gradients_make_one_plan(monkeypatch, backend):
    """Protects mixtures of experts: neither the plan nor the stored gradients are made anew when the set changes."""
    plans, uploads = [], []
    real_init, real_stored = plan.Plan.__init__, GlobalGradient.stored
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, *a: (plans.append(1), real_init(self, *a))[1])
    monkeypatch.setattr(GlobalGradient, "stored", lambda self, *a: (uploads.append(1), real_stored(self, *a))[1])
    params, optimizer = make(global_gradient=global_gradient(), backend=backend)
    sets = [("a.weight", "norm.weight"), ("b.weight", "norm.weight"), tuple(SHAPES), ("a.weight",)]
    for t in range(12):
        step(params, optimizer, sets[t % 4])
    assert (len(plans), len(uploads)) == (1, len(SHAPES))
    assert [float(optimizer.state[p]["step"]) for p in params.values()] == [9.0, 6.0, 9.0]


# --- the collector's tables -------------------------------------------------------------------------------------------


def test_tables_belong_to_the_sums(monkeypatch):
    """Protects large models: from the second micro-batch on no table is made, and they die with the sums."""
    made = []
    real = accumulate.GradTables
    monkeypatch.setattr(accumulate, "GradTables", lambda *a: made.append(weakref.ref(found := real(*a))) or found)
    monkeypatch.setattr(accumulate, "reduce_kernel", _Nothing())
    monkeypatch.setattr(accumulate, "finish_kernel", _Nothing())
    monkeypatch.setattr(accumulate, "add_kernel", _Nothing())
    count = 1100
    params = {f"{i}.weight": torch.zeros(4) for i in range(count)}
    with use_backend("triton"):
        sums = GradientSums(params)
        for _ in range(2):
            for i in range(count):
                sums.add(i, torch.ones(4), 1.0)
    assert len(made) == count
    del sums
    gc.collect()
    assert not any(tables() for tables in made)


class _Nothing:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


# --- the tests themselves ---------------------------------------------------------------------------------------------


def test_tests_run_in_the_interpreter_beside_a_gpu():
    """Protects the test command on a machine with a GPU: kernels get CPU tensors in tests, always."""
    code = "import torch; torch.cuda.is_available = lambda: True; import tests.support.backends, os; "
    code += "print(os.environ['TRITON_INTERPRET'])"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.stdout.strip() == "1", result.stderr[-1000:]
