"""Shared fixtures. The Triton interpreter must be chosen before any kernel is imported, hence the first lines."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # small tensors: threads only cost

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dba_kernels.backends import implementation, why_not

STEMS = {
    "accumulate": ("accumulate",),
    "quantize": ("encode", "decode"),
    "similarity": ("similarity",),
    "coefficients": ("coefficients",),
    "step": ("step",),
}
BACKENDS = ("triton", "native")


def backend_named(name: str) -> Any:
    """An object with the functions named in ``STEMS``.

    Raises:
        RuntimeError: the backend cannot run here; says why.
    """
    if (reason := why_not(name)) is not None:
        raise RuntimeError(f"{name}: {reason}")
    functions = {}
    for stem, names in STEMS.items():
        module = implementation(name, stem)
        functions.update({function: getattr(module, function) for function in names})
    return SimpleNamespace(name=name, **functions)


def _backend_or_skip(name: str) -> Any:
    try:
        return backend_named(name)
    except RuntimeError as error:
        pytest.skip(str(error))


def pytest_configure(config: pytest.Config) -> None:
    # numpy announces the NaN and infinities that some tests feed on purpose
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    """A backend under test."""
    return _backend_or_skip(request.param)


@pytest.fixture
def native() -> Any:
    """The native backend alone: compiled, so it can take the long matrices."""
    return _backend_or_skip("native")


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the global gradient of the small Llama."""
    from .tiny_llama import make_global

    return make_global().save(tmp_path_factory.mktemp("stored") / "global_gradient.safetensors")


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and accumulation of the process' last run; this forgets them afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
