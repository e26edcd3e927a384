"""The production variants of the Triton kernels, compiled ahead of time for any GPU: one list for tests and tables.

Compiling needs a process without the interpreter: ``TRITON_INTERPRET`` must not be set when this module is imported.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS, STORAGE_FORMATS
from dba_kernels.kernels import accumulate, coefficients, quantize, similarity, step
from dba_kernels.kernels.common import LAUNCH, THREADS
from dba_kernels.kernels.tables import TRITON_DTYPES, access, vector_elements

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    Args:
        name: unique; the first word is the stem.
        kernel: a ``triton.jit`` function.
        arguments: Triton type of each run-time argument, in order; None for an absent optional one.
        constants: the compile-time arguments.
        bytes_per_parameter: bytes that the launch reads and writes per element, scales of full groups included.
        bytes_read: the part of it that is read, scales not included.
    """

    name: str
    kernel: Any
    arguments: dict[str, str | None]
    constants: dict[str, Any]
    bytes_per_parameter: float
    bytes_read: float = 0.0


def _stored_bytes(format: str) -> float:
    return 0.0 if format == "none" else STORAGE_FORMATS[format].bytes_per_parameter


def named(name: str, path: str) -> str:
    return name if path == "aligned" else f"{name}, {path}"


def step_variant(
    param: torch.dtype, grad: torch.dtype, kind: str, state: str, stored: str, path: str = "aligned"
) -> Variant:
    """The update of parameters of one dtype and format combination."""
    rest, moments = PARAM_FORMATS[kind].remainder, STATE_FORMATS[state]
    dtypes = [param, grad, moments.exp_avg] + [rest] * (rest is not None)
    if stored != "none":
        dtypes.append(STORAGE_FORMATS[stored].dtype)
    kept = param.itemsize + PARAM_FORMATS[kind].bytes_per_parameter
    codes = moments.exp_avg.itemsize + moments.exp_avg_sq.itemsize
    constants = {
        "PARAM_DTYPE": TRITON_DTYPES[param],
        "GRAD_DTYPE": TRITON_DTYPES[grad],
        "PARAM_FORMAT": kind,
        "STATE_FORMAT": state,
        "GLOBAL_FORMAT": stored,
        **access(path, vector_elements(*dtypes)),
    }
    not_read = param.itemsize if kind == "master" else 0  # the weight of a master copy is only written
    return Variant(
        named(f"step {_short(param)} {kind}, {_short(grad)} grad, {state} state, {stored} ĝ", path),
        step.step_kernel,
        {"pointers_ptr": "*i64", "grads_ptr": "*i64", "chunks_ptr": "*i32", "table_ptr": "*fp64"},
        constants,
        2 * (kept + moments.bytes_per_parameter) - not_read + grad.itemsize + _stored_bytes(stored),
        kept + codes - not_read + grad.itemsize + (0.0 if stored == "none" else STORAGE_FORMATS[stored].bits / 8),
    )


def similarity_variant(grad: torch.dtype, stored: str, path: str = "aligned") -> Variant:
    """The reduction before the update."""
    codes = [] if stored == "none" else [STORAGE_FORMATS[stored].dtype]
    return Variant(
        named(f"similarity {_short(grad)} grad, {stored} ĝ", path),
        similarity.reduce_kernel,
        {"partials_ptr": "*fp32", "pointers_ptr": "*i64", "grads_ptr": "*i64", "chunks_ptr": "*i32"},
        {"GRAD_DTYPE": TRITON_DTYPES[grad], "GLOBAL_FORMAT": stored, **access(path, vector_elements(grad, *codes))},
        grad.itemsize + _stored_bytes(stored),
        grad.itemsize + (0.0 if stored == "none" else STORAGE_FORMATS[stored].bits / 8),
    )


def quantize_variant(decode: bool, format: str, dense: torch.dtype) -> Variant:
    """A dense tensor into a stored one, or back."""
    chosen = STORAGE_FORMATS[format]
    return Variant(
        f"decode {format} to {_short(dense)}" if decode else f"encode {_short(dense)} to {format}",
        quantize.quantize_kernel,
        {"pointers_ptr": "*i64", "chunks_ptr": "*i32"},
        {**quantize.constants(decode, format, dense), **access("aligned", vector_elements(dense, chosen.dtype))},
        dense.itemsize + chosen.bytes_per_parameter,
        chosen.bits / 8 if decode else dense.itemsize,
    )


def accumulate_variant(grad: torch.dtype) -> Variant:
    """The sum of stage 1."""
    return Variant(
        f"accumulate {_short(grad)} grad",
        accumulate.add_kernel,
        {
            **dict.fromkeys(("pointers_ptr", "grads_ptr"), "*i64"),
            "chunks_ptr": "*i32",
            "squared_norms_ptr": "*fp64",
            "weight": "fp32",
        },
        {"GRAD_DTYPE": TRITON_DTYPES[grad], **access("aligned", vector_elements(grad, FP32))},
        8 + grad.itemsize,
        4 + grad.itemsize,
    )


def coefficients_variant() -> Variant:
    """The scalars of a step, as fp16 training with a GradScaler asks for them."""
    pointers = {
        **dict.fromkeys(("table_ptr",), "*fp64"),
        "steps_ptr": "*fp32",
        "bias_ptr": "*fp64",
        "counters_ptr": "*i64",
        **dict.fromkeys(("report_ptr", "summary_ptr", "sums_ptr", "global_sq_ptr", "hyper_ptr"), "*fp64"),
        **dict.fromkeys(("group_ptr", "active_ptr"), "*i64"),
        **dict.fromkeys(("loss_scale_ptr", "found_inf_ptr"), "*fp32"),
        **dict.fromkeys(("gamma_ptr", "alpha_ptr"), None),
        "n_active": "i32",
    }
    settings = {"BOOST": 0.2, "TOTAL_STEPS": 1000.0, "BOOST_MAX": 0.5, "CORRECTION": "cosine", "GLOBAL_SCOPE": False}
    settings |= {"LOW": 0.0, "HIGH": 2.0, "MAX_GRAD_NORM": 1.0, "REDUCE": True, "BLOCK": 256}
    return Variant("coefficients cosine, clipped", coefficients.coefficients_kernel, pointers, settings, 0.0)


def _short(dtype: torch.dtype) -> str:
    names = {FP32: "fp32", BF16: "bf16", FP16: "fp16", torch.int8: "i8", torch.uint8: "u8"}
    return names[dtype]


VARIANTS = [
    step_variant(FP32, FP32, "native", "fp32", "none"),
    step_variant(FP32, FP32, "native", "fp32", "fp32"),
    step_variant(FP32, BF16, "native", "fp32", "int8"),
    step_variant(FP32, BF16, "native", "int8", "int8"),
    step_variant(BF16, BF16, "native", "int8", "none"),
    step_variant(BF16, BF16, "split16", "fp32", "fp32"),
    step_variant(BF16, BF16, "split16", "bf16", "int8"),
    step_variant(BF16, BF16, "split16", "int8", "none"),
    step_variant(BF16, BF16, "split16", "int8", "int8"),
    step_variant(BF16, BF16, "split16", "int8", "bf16"),
    step_variant(BF16, BF16, "split8", "int8", "none"),
    step_variant(BF16, BF16, "split8", "int8", "int8"),
    step_variant(BF16, BF16, "split8", "int8", "int4"),
    step_variant(BF16, BF16, "master", "fp32", "int8"),
    step_variant(FP16, FP16, "split16", "int8", "int8"),
    step_variant(FP16, FP16, "split8", "int8", "fp8_e4m3"),
    similarity_variant(BF16, "none"),
    similarity_variant(BF16, "int8"),
    similarity_variant(BF16, "int4"),
    similarity_variant(FP32, "fp32"),
    accumulate_variant(BF16),
    quantize_variant(False, "int8", FP32),
    quantize_variant(False, "bf16", FP32),
    quantize_variant(True, "int4", BF16),
    coefficients_variant(),
]


OTHER_PATHS = [
    *(
        step_variant(*formats, path)
        for formats in (
            (FP32, BF16, "native", "fp32", "int8"),
            (BF16, BF16, "split16", "int8", "int8"),
            (BF16, BF16, "split8", "int8", "int4"),
        )
        for path in ("narrow", "masked")
    ),
    *(similarity_variant(BF16, stored, path) for stored in ("int8", "int4") for path in ("narrow", "masked")),
]
"""What ragged tensors and misaligned gradients run, of the formats that people run."""


def compile_variant(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel, for a GPU that need not be there.

    Raises:
        RuntimeError: in a process that runs the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1; the interpreter replaces the compiler, unset it")
    constants = dict(variant.constants)
    signature = {}
    for name, kind in variant.arguments.items():
        signature[name] = "constexpr" if kind is None else kind
        if kind is None:
            constants[name] = None
    signature |= dict.fromkeys(variant.constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(variant.arguments.values()) if kind and "*" in kind
    }
    source = ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**LAUNCH, "num_warps": THREADS // TARGETS[target].warp_size}
        return triton.compile(source, target=TARGETS[target], options=options)
