"""Shared fixtures. The Triton interpreter must be chosen before any kernel is imported, hence the first lines."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # small tensors: threads only cost

import importlib
from types import ModuleType, SimpleNamespace

import pytest

STEMS = {
    "accumulate": ("accumulate",),
    "quantize": ("encode", "decode"),
    "similarity": ("similarity", "coefficients"),
    "step": ("step",),
}
BACKENDS = ("triton", "native")


def _triton() -> SimpleNamespace:
    functions = {}
    for stem, names in STEMS.items():
        module = importlib.import_module(f"dba_kernels.kernels.{stem}")
        functions.update({name: getattr(module, name) for name in names})
    return SimpleNamespace(name="triton", **functions)


def _native() -> ModuleType:
    try:
        module = importlib.import_module("dba_kernels.native")
    except ImportError as error:
        pytest.skip(f"native: {error}")
    if module.why_not() is not None:
        pytest.skip(f"native: {module.why_not()}")
    return module


def pytest_configure(config: pytest.Config) -> None:
    # numpy announces the NaN and infinities that some tests feed on purpose
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> object:
    """A backend under test: an object with the functions named in ``STEMS``."""
    return _triton() if request.param == "triton" else _native()


@pytest.fixture
def native() -> object:
    """The native backend alone: compiled, so it can take the long matrices."""
    return _native()
