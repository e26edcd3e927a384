"""Wrong arguments end in an error that names them, and never in a crash; another default device changes nothing."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dba_kernels
from dba_kernels import DBAAdamW, GlobalGradient, collect_global_gradient, ops

from .support import wrong_arguments

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = 600


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    """Protects the caller: other types, shapes, dtypes, layouts and devices raise ValueError or TypeError by name."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.support.wrong_arguments", str(EXAMPLES), str(log)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{log.read_text()} {done.stderr[-3000:]}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[-1] == {"done": EXAMPLES} and lines[:-1] == []


def test_every_public_function_is_tried(tmp_path: Path) -> None:
    """Protects the test above: nothing public is left out of its table."""
    tried = set(wrong_arguments.calls(tmp_path))
    public = {name for name in dba_kernels.__all__ if name != "GlobalGradient"}  # its constructor is for records
    assert public | {"from_tensors", "load", "save"} <= tried
    operations = {
        name
        for name, value in vars(ops).items()
        if inspect.isfunction(value) and value.__module__ == ops.__name__ and not name.startswith("_")
    }
    inner = {"check_backend", "check_devices", "fuses", "fused_step", "bind"}  # the optimizer's own
    assert operations - inner == {name.removeprefix("ops.") for name in tried if name.startswith("ops.")}


def test_a_wrong_error_is_noticed(tmp_path: Path) -> None:
    """Negative control: errors without the name, of another type, or none of them where the value is right."""
    for error, noticed in ((ValueError("x: bad"), False), (ValueError("bad"), True), (RuntimeError("x: bad"), True)):

        def raising(x: object, error: Exception = error) -> None:
            raise error

        call = wrong_arguments.Call(raising, lambda: {"x": 1})
        assert (wrong_arguments.finding("f", call, "x", 2) is not None) == noticed


def whole_run(folder: Path, options: dict[str, str], default: str) -> dict[str, torch.Tensor]:
    """Collect, save, load, train, save and load state under this default device; what has come of it."""
    model = wrong_arguments.model()
    half = copy.deepcopy(model).bfloat16()
    batches = list(torch.randn(4, 3, wrong_arguments.COLS, generator=torch.Generator().manual_seed(0)))
    with torch.device(default):
        gg = collect_global_gradient(model, batches, lambda m, x: (m(x).square().mean(), 3), "int8")
        loaded = GlobalGradient.load(gg.save(folder / "gg.safetensors"))
        method = {"global_gradient": loaded, "total_steps": 100, "max_grad_norm": 1.0}
        optimizer = DBAAdamW(half.named_parameters(), lr=1e-5, **method, **options)
        for _ in range(3):
            for param in half.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        exact = dba_kernels.fp32_state_dict(half, optimizer)
        return {**exact, **{f"{name} of the gradient": loaded[name] for name in loaded}}


@pytest.mark.parametrize("options", [{}, {"state_format": "int8", "param_format": "split8"}], ids=["split16", "int8"])
@pytest.mark.filterwarnings("ignore:boost:UserWarning")
def test_another_default_device_changes_nothing(tmp_path: Path, options: dict[str, str]) -> None:
    """Protects callers under ``torch.device("meta")`` (deferred initialisation): devices come from the tensors."""
    expected, got = (whole_run(tmp_path, options, default) for default in ("cpu", "meta"))
    assert got.keys() == expected.keys() and len(got) == 4
    for name, value in expected.items():
        assert not got[name].is_meta and torch.equal(got[name], value), name
