"""The backends under test. Triton's interpreter must be chosen before any kernel is imported: hence the first lines."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # small tensors: threads only cost

from types import SimpleNamespace
from typing import Any

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
