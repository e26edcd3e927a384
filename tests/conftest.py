"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .support.backends import BACKENDS, backend_named


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
    from .support.tiny_llama import make_global

    return make_global().save(tmp_path_factory.mktemp("stored") / "global_gradient.safetensors")


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and accumulation of the process' last run; this forgets them afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
