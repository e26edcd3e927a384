"""Which implementation runs: availability with reasons, selection, and a context manager to force one.

Implementations are imported when first used, never by this module.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from .formats import check_name

BACKENDS = ("reference", "triton", "native")
DEVICES = ("cpu", "cuda", "meta")
"""Types of device that a backend may serve; meta tensors are those of a model that has not been materialised yet."""
STEMS = ("accumulate", "quantize", "similarity", "coefficients", "step")
_FOLDERS = {"reference": "reference", "triton": "kernels", "native": "native"}

_forced: ContextVar[str | None] = ContextVar("dba_kernels_backend", default=None)


@functools.cache  # every step asks
def implementation(backend: str, stem: str) -> ModuleType:
    """The module that implements ``stem`` for ``backend``; every backend has the same function names."""
    return importlib.import_module(f"{__package__}.{_FOLDERS[backend]}.{stem}")


def serving(requested: str, stem: str, device: torch.device | str, dtype: torch.dtype) -> ModuleType:
    """The module that runs ``stem`` for tensors of ``dtype`` on ``device``."""
    return implementation(select(requested, device, dtype), stem)


@functools.cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'triton>=3.6'"
    return None


def why_not(backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """None if ``backend`` can serve tensors of ``dtype`` on ``device``, else the reason and the fix."""
    check_name("backend", backend, BACKENDS)
    device = torch.device(device)
    if device.type not in DEVICES:
        return (
            f"{device.type} tensors are served by none: the tables of a step are float64, which not every device has; "
            "train on a CPU, on CUDA or on ROCm"
        )
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 is served by the reference alone; use backend='reference' or 'auto'"
    if backend == "triton":
        missing = _triton_missing()
        if missing is None and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"{device.type} tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        return missing
    if device.type != "cpu":
        return f"native runs on CPU tensors, these are on {device}; use backend='triton' or 'auto'"
    reason: str | None = implementation("native", "library").why_not()
    return reason


@functools.cache
def _warn_fallback(backend: str, reason: str) -> None:
    warnings.warn(f"dba_kernels: backend {backend!r} is not usable, running the slow reference: {reason}", stacklevel=3)


def select(requested: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that runs.

    ``"auto"``: triton on CUDA and ROCm, native on the CPU; the reference for float64, and where the fast one is missing
    (one warning names the reason). :func:`use_backend` turns ``"auto"`` into its own choice.

    Raises:
        RuntimeError: an explicitly requested backend cannot serve, or none can; the message says why and what to do.
    """
    if requested == "auto":
        requested = _forced.get() or "auto"
    if requested != "auto":
        reason = why_not(requested, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {requested!r}: {reason}")
        return requested
    if (reason := why_not("reference", device, dtype)) is not None:
        raise RuntimeError(f"backend 'auto': {reason}")
    if dtype == torch.float64:
        return "reference"
    preferred = "triton" if torch.device(device).type == "cuda" else "native"
    reason = why_not(preferred, device, dtype)
    if reason is not None:
        _warn_fallback(preferred, reason)
        return "reference"
    return preferred


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block and its thread, ``"auto"`` means ``backend``.

    Example:
        >>> with use_backend("reference"):
        ...     select("auto", "cpu", torch.float32)
        'reference'
    """
    token = _forced.set(check_name("backend", backend, ("auto", *BACKENDS)))
    try:
        yield
    finally:
        _forced.reset(token)
