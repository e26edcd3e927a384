"""Selection of a backend: the fast one where it can serve, the reference with one warning where not, clear refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from dba_kernels import backends
from dba_kernels.backends import BACKENDS, STEMS, implementation, select, use_backend, why_not


def test_every_backend_has_every_function() -> None:
    """The same names everywhere, so that dispatch needs no table."""
    functions = {
        "accumulate": ("accumulate",),
        "quantize": ("encode", "decode"),
        "similarity": ("similarity",),
        "coefficients": ("coefficients",),
        "step": ("step",),
    }
    assert tuple(functions) == STEMS
    for backend in BACKENDS:
        for stem, names in functions.items():
            assert all(callable(getattr(implementation(backend, stem), name)) for name in names)


def test_auto_prefers_the_fast_backend() -> None:
    """Protects the default: Triton on CUDA, native on the CPU, the reference for fp64."""
    assert select("auto", "cpu", torch.float32) == ("native" if why_not("native") is None else "reference")
    assert select("auto", "cuda", torch.bfloat16) == "triton"
    assert select("auto", "cpu", torch.float64) == "reference"


def test_a_missing_backend_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the reason; it comes once."""
    real = backends.why_not
    monkeypatch.setattr(backends, "why_not", lambda name, *a: "no library" if name == "native" else real(name, *a))
    backends._warn_fallback.cache_clear()
    with pytest.warns(UserWarning, match="'native' is not usable, running the slow reference: no library"):
        assert select("auto", "cpu", torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select("auto", "cpu", torch.float32) == "reference"
    with pytest.raises(RuntimeError, match="backend 'native': no library"):
        select("native", "cpu", torch.float32)
    backends._warn_fallback.cache_clear()


@pytest.mark.parametrize(
    "backend, device, dtype, reason",
    [
        ("triton", "cpu", torch.float64, "float64 is served by the reference alone"),
        ("native", "cuda", torch.float32, "native runs on CPU tensors, these are on cuda"),
    ],
)
def test_an_explicit_backend_that_cannot_serve_raises(backend, device, dtype, reason) -> None:
    """Protects who asks for a backend: none is silently put in its place, and the error says why."""
    with pytest.raises(RuntimeError, match=reason):
        select(backend, device, dtype)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the message of Triton on a CPU: it names the variable that makes it run there."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before triton is imported"):
        select("triton", "cpu", torch.float32)


def test_use_backend_changes_auto_only_and_ends() -> None:
    """Protects ``use_backend``: it holds inside its block only, and refuses unknown names."""
    with use_backend("reference"):
        assert select("auto", "cpu", torch.float32) == "reference"
        assert select("auto", "cuda", torch.float32) == "reference"
    assert select("auto", "cuda", torch.float32) == "triton"
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference'"), use_backend("fast"):
        pass


def test_importing_the_package_imports_no_implementation() -> None:
    """Triton is a heavy import and compiles nothing on a CPU: it must wait until it is used."""
    code = "import sys, dba_kernels; print([m for m in sys.modules if 'dba_kernels.kernels' in m or m == 'triton'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
