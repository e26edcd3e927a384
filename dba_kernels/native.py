"""The native CPU backend: finds and binds the C++ library built from ``csrc/``; the four operations over it.

Plain C interface through ctypes, which releases the GIL. One call serves a whole model: a table of descriptors per
batch, int64 words, laid out as ``Tensor`` in ``csrc/api.h`` and kept in ``batch.cache`` between steps.

Arguments and semantics of :func:`accumulate`, :func:`encode`, :func:`decode`, :func:`similarity`, :func:`coefficients`
and :func:`step` are those of :mod:`dba_kernels.reference`. The number of threads is ``torch.get_num_threads()`` and
changes no bit of any result. ``DBA_KERNELS_ISA`` (``scalar``, ``avx2``, ``avx512``) forces an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from .formats import (
    PARAM_FORMATS,
    STATE_FORMATS,
    STORAGE_FORMATS,
    EncodedTensor,
    check_name,
    matrix_shape,
    scales_shape,
    storage_format,
)
from .stepdata import CORRECTIONS, Coefficient, Hyper, StepSettings, StepTables, Summary, TensorBatch

LIBRARY = "libdba_native.so"
ABI = 1  # of csrc/api.cpp
ISAS = ("scalar", "avx2", "avx512")
ISA_VARIABLE = "DBA_KERNELS_ISA"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GLOBAL_FORMATS = ("none", "fp32", "bf16", "fp16", "fp8_e4m3", "int8", "int4")
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}

REBUILD = "reinstall with a C++17 compiler (g++ or clang++) at hand: pip install --force-reinstall --no-deps ."


# --- the library ------------------------------------------------------------------------------------------------------


def _candidates() -> list[Path]:
    """Beside this file (wheel, in-place build); else where the distribution was installed: an editable install, or a
    checkout whose ``dba_kernels/`` shadows the installed one."""
    places = [Path(__file__).parent / LIBRARY]
    with suppress(metadata.PackageNotFoundError):
        places.append(Path(str(metadata.distribution("dba-kernels").locate_file(f"{__package__}/{LIBRARY}"))))
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
    """None if the backend can run here, else the reason and the mend."""
    try:
        load()
        isa()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _execution() -> tuple[int, int]:
    return ISAS.index(isa()), torch.get_num_threads()


# --- descriptors ------------------------------------------------------------------------------------------------------


class _Field:
    """Words of one row of a batch's table: ``Tensor`` in csrc/api.h."""

    ROWS, COLS, INDEX, GRAD_DTYPE, GRAD, PARAM, REMAINDER, EXP_AVG, EXP_AVG_SQ = range(9)
    EXP_AVG_SCALES, EXP_AVG_SQ_SCALES, GLOBAL_CODES, GLOBAL_SCALES, SEED, OFFSET, COUNT = range(9, 16)


class _Batch(ctypes.Structure):
    """``Batch`` in csrc/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "dtype", "param_format", "state_format", "global_format")),
        ("tensors", ctypes.c_void_p),
    ]


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int:
    """Address of a tensor that the library may read or write as contiguous ``dtype``."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        got = f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
        raise ValueError(f"{name}: expected contiguous {dtype} on the CPU, got {got}; use backend='reference'")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return tensor.data_ptr()


def _set_grads(table: np.ndarray, grads: list[torch.Tensor], shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Enter the gradients into ``table``; returns what must stay alive until the call is over."""
    kept = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    for i, (grad, shape) in enumerate(zip(kept, shapes, strict=True)):
        if grad.dtype not in _DTYPE_CODE or grad.shape != shape or grad.device.type != "cpu":
            raise ValueError(
                f"grads[{i}]: expected float32, bfloat16 or float16 of shape {tuple(shape)} on the CPU, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )
    table[:, _Field.GRAD_DTYPE] = [_DTYPE_CODE[grad.dtype] for grad in kept]
    table[:, _Field.GRAD] = [grad.data_ptr() for grad in kept]
    return kept


def _table(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    table = np.zeros((len(shapes), _Field.COUNT), dtype=np.int64)
    table[:, [_Field.ROWS, _Field.COLS]] = np.array([matrix_shape(shape) for shape in shapes]).reshape(-1, 2)
    return table


def _encoded_addresses(name: str, stored: EncodedTensor, format: str) -> tuple[int, int]:
    if stored.format != format:
        raise ValueError(f"{name}: expected format {format!r}, got {stored.format!r}")
    chosen = STORAGE_FORMATS[format]
    codes = _address(f"{name}.codes", stored.codes, chosen.dtype, chosen.codes_shape(stored.shape))
    if stored.scales is None:
        return codes, 0
    return codes, _address(f"{name}.scales", stored.scales, torch.float32, scales_shape(stored.shape))


_FIELD_OF = {
    "param": _Field.PARAM,
    "remainder": _Field.REMAINDER,
    "exp_avg": _Field.EXP_AVG,
    "exp_avg_sq": _Field.EXP_AVG_SQ,
    "exp_avg_scale": _Field.EXP_AVG_SCALES,
    "exp_avg_sq_scale": _Field.EXP_AVG_SQ_SCALES,
}


class _Descriptors:
    """The table of a batch, filled once; :meth:`enter` enters what changes from step to step."""

    def __init__(self, batch: TensorBatch, with_state: bool):
        self.shapes: list[tuple[int, ...]] = [tuple(tensor.param.shape) for tensor in batch.tensors]
        self.params = [tensor.param.data_ptr() for tensor in batch.tensors]
        self.table = _table(self.shapes)
        self.table[:, _Field.INDEX] = [tensor.index for tensor in batch.tensors]
        self.struct = _Batch(count=len(self.params), tensors=self.table.ctypes.data)
        self.struct.global_format = GLOBAL_FORMATS.index(batch.global_format)
        self._enter_global_grads(batch)
        if with_state:
            self._enter_state(batch)

    def _enter_global_grads(self, batch: TensorBatch) -> None:
        for i, stored in enumerate(batch.all("global_grad")):
            if stored.shape != self.shapes[i]:
                raise ValueError(f"tensors[{i}].global_grad: expected shape {self.shapes[i]}, got {stored.shape}")
            addresses = _encoded_addresses(f"tensors[{i}].global_grad", stored, batch.global_format)
            self.table[i, _Field.GLOBAL_CODES], self.table[i, _Field.GLOBAL_SCALES] = addresses

    def _enter_state(self, batch: TensorBatch) -> None:
        dtype = batch.tensors[0].param.dtype
        state, kept = STATE_FORMATS[batch.state_format], PARAM_FORMATS[batch.param_format]
        if dtype not in _DTYPE_CODE:
            raise ValueError(f"param: expected float32, bfloat16 or float16, got {dtype}; use backend='reference'")
        if kept.name in ("split16", "split8") and dtype == torch.float32:
            raise ValueError(f"param_format: expected 'native' or 'master' for float32, got {kept.name!r}")
        self.struct.dtype = _DTYPE_CODE[dtype]
        self.struct.param_format = list(PARAM_FORMATS).index(kept.name)
        self.struct.state_format = list(STATE_FORMATS).index(state.name)
        for i, (tensor, shape) in enumerate(zip(batch.tensors, self.shapes, strict=True)):
            wanted = {"param": (shape, dtype), **state.parts(shape)}
            if kept.remainder is not None:
                wanted["remainder"] = (shape, kept.remainder)
            for part, (part_shape, part_dtype) in wanted.items():
                address = _address(f"tensors[{i}].{part}", getattr(tensor, part), part_dtype, part_shape)
                self.table[i, _FIELD_OF[part]] = address
        if kept.stochastic or state.stochastic:
            self.table[:, _Field.SEED] = [tensor.seed & 0xFFFFFFFF for tensor in batch.tensors]
            self.table[:, _Field.OFFSET] = [tensor.offset for tensor in batch.tensors]

    @staticmethod
    def enter(batch: TensorBatch, grads: list[torch.Tensor], with_state: bool) -> tuple[_Batch, list[torch.Tensor]]:
        """The struct to pass, and what must stay alive until the call is over."""
        key = "native" if with_state else "native.similarity"
        known = batch.cache.get(key)
        if known is None or known.params != [tensor.param.data_ptr() for tensor in batch.tensors]:
            known = batch.cache[key] = _Descriptors(batch, with_state)
        return known.struct, _set_grads(known.table, grads, known.shapes)


def _structs(
    batches: list[TensorBatch], grads: list[list[torch.Tensor]], with_state: bool
) -> tuple[ctypes.Array, list]:
    """The structs to pass, and what must stay alive until the call is over."""
    entered = [
        _Descriptors.enter(batch, part, with_state) for batch, part in zip(batches, grads, strict=True) if batch.tensors
    ]
    return (_Batch * len(entered))(*(struct for struct, _ in entered)), entered


# --- accumulate -------------------------------------------------------------------------------------------------------


def accumulate(
    totals: list[torch.Tensor], grads: list[torch.Tensor], weight: float, squared_norms: torch.Tensor
) -> None:
    """``total += weight · grad`` for every pair (eq. 1's sum), ‖grad‖² to ``squared_norms``. 10 B/param for bf16
    gradients of tensors that fit in the cache, 12 beyond."""
    if not totals:
        return
    shapes = [tuple(total.shape) for total in totals]
    table = _table(shapes)
    table[:, _Field.INDEX] = np.arange(len(totals))
    table[:, _Field.PARAM] = [
        _address(f"totals[{i}]", total, torch.float32, shape)
        for i, (total, shape) in enumerate(zip(totals, shapes, strict=True))
    ]
    kept = _set_grads(table, grads, shapes)
    norms = _address("squared_norms", squared_norms, torch.float64, (len(totals),))
    load().dba_accumulate(*_execution(), table.ctypes.data, len(kept), float(weight), norms)


# --- quantize ---------------------------------------------------------------------------------------------------------


def encode(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """Store a dense tensor; 1-D and small tensors as fp32 whatever ``format`` says."""
    shape = tuple(tensor.shape)
    chosen = storage_format(format, shape)
    tensor = tensor.detach()
    if not chosen.grouped:
        return EncodedTensor(chosen.name, shape, tensor.to(chosen.dtype, copy=True).contiguous())
    source = (tensor if tensor.dtype in _DTYPE_CODE else tensor.float()).contiguous()
    codes = torch.empty(chosen.codes_shape(shape), dtype=chosen.dtype)
    scales = torch.empty(scales_shape(shape), dtype=torch.float32)
    load().dba_encode(
        *_execution(),
        _DTYPE_CODE[source.dtype],
        GLOBAL_FORMATS.index(chosen.name),
        *matrix_shape(shape),
        source.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return EncodedTensor(chosen.name, shape, codes, scales)


def decode(encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that is stored, in fp32, or written to ``out`` (fp32, bf16 or fp16, contiguous, same shape)."""
    out = torch.empty(encoded.shape, dtype=torch.float32) if out is None else out
    if out.dtype not in _DTYPE_CODE:
        raise ValueError(f"out: expected float32, bfloat16 or float16, got {out.dtype}; use backend='reference'")
    codes, scales = _encoded_addresses("encoded", encoded, encoded.format)
    load().dba_decode(
        *_execution(),
        _DTYPE_CODE[out.dtype],
        GLOBAL_FORMATS.index(encoded.format),
        *matrix_shape(encoded.shape),
        codes,
        scales,
        _address("out", out, out.dtype, encoded.shape),
    )
    return out


# --- similarity -------------------------------------------------------------------------------------------------------


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch (eq. 4's sums); one pass, 3 B/param for bf16 and int8."""
    structs, kept = _structs([batch], [grads], with_state=False)
    load().dba_similarity(*_execution(), structs, len(kept), _address("sums", sums, torch.float64))


class _CoefficientArguments(ctypes.Structure):
    """``CoefficientArguments`` in csrc/coefficients.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "global_sq", "hyper", "group", "active")),
        ("active_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("steps", "bias_corrections", "counters", "table", "report", "summary")),
        *((name, ctypes.c_double) for name in ("boost", "total_steps", "boost_max", "alpha_min", "alpha_max")),
        ("max_grad_norm", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("correction", "global_scope", "reduce")),
        ("loss_scale", ctypes.c_double),
        ("found_inf", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gamma_override", "alpha_override")),
    ]


def _coefficient_arguments(
    tables: StepTables,
    settings: StepSettings,
    *,
    loss_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    gamma_override: torch.Tensor | None = None,
    alpha_override: torch.Tensor | None = None,
) -> tuple[_CoefficientArguments, list[torch.Tensor | None]]:
    """The struct to pass, and what must stay alive until the call is over."""
    n, wide, index = len(tables.steps), torch.float64, torch.int64
    gamma = None if gamma_override is None else gamma_override.to(wide).reshape(())
    alpha = None if alpha_override is None else alpha_override.to(wide).contiguous()
    arguments = _CoefficientArguments(
        sums=_address("sums", tables.sums, wide, (n, 2)),
        global_sq=_address("global_sq", tables.global_sq, wide, (n,)),
        hyper=_address("hyper", tables.hyper, wide, (len(tables.hyper), Hyper.COUNT)),
        group=_address("group", tables.group, index, (n,)),
        active=_address("active", tables.active, index, (len(tables.active),)),
        active_count=len(tables.active),
        steps=_address("steps", tables.steps, torch.float32),
        bias_corrections=_address("bias_corrections", tables.bias_corrections, wide, (n, 2)),
        counters=_address("counters", tables.counters, index, (2,)),
        table=_address("table", tables.table, wide, (n, Coefficient.COUNT)),
        report=_address("report", tables.report, wide, (n, 2)),
        summary=_address("summary", tables.summary, wide, (Summary.COUNT,)),
        boost=settings.boost,
        total_steps=settings.total_steps,
        boost_max=settings.boost_max,
        alpha_min=settings.bounds[0],
        alpha_max=settings.bounds[1],
        max_grad_norm=math.inf if settings.max_grad_norm is None else settings.max_grad_norm,
        correction=CORRECTIONS.index(settings.correction),
        global_scope=settings.scope == "global",
        reduce=settings.reduce,
        loss_scale=1.0 if loss_scale is None else loss_scale.item(),
        found_inf=found_inf is not None and bool((found_inf != 0).any()),
        gamma_override=None if gamma is None else gamma.data_ptr(),
        alpha_override=None if alpha is None else _address("alpha_override", alpha, wide, (n,)),
    )
    return arguments, [gamma, alpha]


def coefficients(tables: StepTables, settings: StepSettings, **overrides: torch.Tensor | None) -> None:
    """Sums → coefficient table, skip flag and counters (eqs. 2, 4, 5); see ``reference.similarity.coefficients``."""
    arguments, _kept = _coefficient_arguments(tables, settings, **overrides)
    load().dba_coefficients(ctypes.byref(arguments))


# --- step -------------------------------------------------------------------------------------------------------------


def step(batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor) -> None:
    """Boost, moments and corrected AdamW update of every parameter of the batch, in place (eqs. 3, 7, 8).

    One pass. With bf16 gradients and int8 ĝ_G: 27 B/param for fp32 parameters and state, 15 for bf16 split16 with int8
    state, 13 for split8; scales not counted.
    """
    structs, kept = _structs([batch], [grads], with_state=True)
    load().dba_step(*_execution(), structs, len(kept), _address("table", table, torch.float64))


def fused_step(
    batches: list[TensorBatch],
    grads: list[list[torch.Tensor]],
    tables: StepTables,
    settings: StepSettings,
    **overrides: torch.Tensor | None,
) -> None:
    """:func:`similarity`, :func:`coefficients` and :func:`step` of a whole model in one call; the same bits.

    The sums of all tensors come first, because one non-finite value anywhere must leave everything untouched: with bf16
    gradients and int8 ĝ_G 3 B/param before the update's 27 (fp32 state).

    Args:
        batches: all active parameters, each in exactly one batch.
        grads: as for :func:`step`, one list per batch.
        tables, settings, overrides: arguments of :func:`coefficients`.
    """
    structs, kept = _structs(batches, grads, with_state=True)
    arguments, kept_overrides = _coefficient_arguments(tables, settings, **overrides)
    load().dba_fused_step(*_execution(), structs, len(kept), ctypes.byref(arguments))
    del kept_overrides
