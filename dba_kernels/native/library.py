"""Finds and binds the C++ library; what every call of it needs.

A plain C interface through ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch

from ..formats import STORAGE_FORMATS, check_name

LIBRARY = "libdba_native.so"
ABI = 2  # of csrc/api.cpp
ISAS = ("scalar", "avx2", "avx512")
ISA_VARIABLE = "DBA_KERNELS_ISA"

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GLOBAL_FORMATS = ("none", *STORAGE_FORMATS)
"""dtypes and formats by their numbers in csrc/formats.h."""

REBUILD = "reinstall with a C++17 compiler (g++ or clang++) at hand: pip install --force-reinstall --no-deps ."


def _candidates() -> list[Path]:
    """In this package (wheel, in-place build); else where the distribution was installed: an editable install, or a
    checkout whose ``dba_kernels/`` shadows the installed one."""
    package = Path(__file__).parent.parent
    places = [package / LIBRARY]
    with suppress(metadata.PackageNotFoundError):
        places.append(Path(str(metadata.distribution("dba-kernels").locate_file(f"{package.name}/{LIBRARY}"))))
    return list(dict.fromkeys(places))


@functools.cache
def load() -> ctypes.CDLL:
    """The bound library.

    Raises:
        OSError: not built, not loadable, or built from other sources; the message says what to do.
    """
    places = _candidates()
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise OSError(f"{LIBRARY} was not built (looked for {', '.join(map(str, places))}); {REBUILD}")
    library = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    signatures = {
        "dba_isa_usable": [integer],
        "dba_accumulate": [integer, integer, pointer, integer, ctypes.c_double, pointer],
        "dba_encode": [integer] * 6 + [pointer] * 3,
        "dba_decode": [integer] * 6 + [pointer] * 3,
        "dba_similarity": [integer, integer, pointer, integer, pointer],
        "dba_displacement": [integer] * 5 + [pointer] * 4,
        "dba_coefficients": [pointer],
        "dba_step": [integer, integer, pointer, integer, pointer],
        "dba_fused_step": [integer, integer, pointer, integer, pointer],
    }
    library.dba_abi.restype = library.dba_isa_usable.restype = integer
    if library.dba_abi() != ABI:
        raise OSError(f"{path}: expected interface version {ABI}, got {library.dba_abi()}; {REBUILD}")
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    return library


def usable_isas() -> tuple[str, ...]:
    """Instruction sets that the library has and this machine can run, slowest first."""
    return tuple(name for code, name in enumerate(ISAS) if load().dba_isa_usable(code))


@functools.cache
def _default_isa() -> str:
    usable = usable_isas()
    wanted = os.environ.get(ISA_VARIABLE, usable[-1])
    if wanted not in usable:
        expected = f"expected one of {', '.join(usable)} on this machine"
        raise RuntimeError(f"{ISA_VARIABLE}: {expected}, got {wanted!r}; unset it")
    return wanted


_forced_isa: list[str] = []


def isa() -> str:
    """The instruction set in use."""
    return _forced_isa[-1] if _forced_isa else _default_isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set within the block (process-wide: for tests and benchmarks)."""
    _forced_isa.append(check_name("isa", name, usable_isas()))
    try:
        yield
    finally:
        _forced_isa.pop()


def why_not() -> str | None:
    """None if the backend can run here, else the reason and the fix."""
    try:
        load()
        isa()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def execution() -> tuple[int, int]:
    """Instruction set and number of threads, the first arguments of every call."""
    return ISAS.index(isa()), torch.get_num_threads()


def address(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int:
    """Address of a tensor that the library may read or write as contiguous ``dtype``."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        got = f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
        raise ValueError(f"{name}: expected contiguous {dtype} on the CPU, got {got}; use backend='reference'")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    place = tensor.data_ptr()
    if place == 0 and tensor.numel() > 0:
        raise ValueError(f"{name}: expected a tensor with storage of its own, got {type(tensor).__name__}; unwrap it")
    return place
