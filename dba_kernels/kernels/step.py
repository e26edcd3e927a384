"""One optimizer step of every tensor of a batch, in one launch (eqs. 3, 7, 8).

Bytes per parameter with bf16 gradients: fp32 θ, m, v and int8 ĝ_G 27; bf16 split16, int8 m and v, int8 ĝ_G 15; split8
13; one less with int4 ĝ_G, and none of it without; scales add 4 / GROUP per grouped tensor read or written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..stepdata import TensorBatch
from . import columns as col
from .codecs import decode_exp_avg, decode_exp_avg_sq, encode_exp_avg, encode_exp_avg_sq, load_global, stored_dtype
from .common import (
    GROUP,
    LAUNCH,
    chunk_range,
    group_offsets,
    load,
    pointer,
    store,
    store_scale,
    tile_of,
    tile_offsets,
)
from .remainder import join, random_words, split, stochastic_bf16
from .tables import TRITON_DTYPES, on_device, tables_of, vector_elements


@triton.jit
def load_coefficients(row):
    """The scalars of a tensor's row of the table, in fp32; the count as uint32."""
    return (
        tl.load(row + col.GRAD_WEIGHT).to(tl.float32),
        tl.load(row + col.GLOBAL_WEIGHT).to(tl.float32),
        tl.load(row + col.BETA1).to(tl.float32),
        tl.load(row + col.ONE_MINUS_BETA1).to(tl.float32),
        tl.load(row + col.BETA2).to(tl.float32),
        tl.load(row + col.ONE_MINUS_BETA2).to(tl.float32),
        tl.load(row + col.STEP_SIZE).to(tl.float32),
        tl.load(row + col.INV_SQRT_BIAS_CORRECTION2).to(tl.float32),
        tl.load(row + col.EPS).to(tl.float32),
        tl.load(row + col.LR_WEIGHT_DECAY).to(tl.float32),
        tl.load(row + col.STEP).to(tl.int64).to(tl.uint32),
    )


@triton.jit
def update_tile(
    tensors,
    extent,
    coefficients,
    start,
    PARAM_FORMAT: tl.constexpr,
    STATE_FORMAT: tl.constexpr,
    GLOBAL_FORMAT: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load, update and store the tile of one tensor that begins at position ``start``."""
    param_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, global_ptr, scale_ptrs = tensors
    m_scale_ptr, v_scale_ptr, global_scale_ptr = scale_ptrs
    rows, cols, seed, offset = extent
    a, b, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_c2, eps, decay, step = coefficients
    at = tile_offsets(start, rows, cols, GROUP, MASKED)
    at_group = group_offsets(start, rows, cols, MASKED)

    grad = load(grad_ptr, at, MASKED).to(tl.float32)
    weight = load(param_ptr, at, MASKED)
    exp_avg = load(exp_avg_ptr, at, MASKED)
    exp_avg_sq = load(exp_avg_sq_ptr, at, MASKED)
    remainder = load(remainder_ptr, at, MASKED) if PARAM_FORMAT != "native" else 0
    if STATE_FORMAT == "int8" and not MASKED:
        # ptxas puts a load off until its value is needed, which here is late: too few bytes would be in flight. It
        # moves no load across a barrier, nor this barrier back: the scales that come next are needed at once.
        tl.debug_barrier()
    boosted = a * grad
    if GLOBAL_FORMAT != "none":  # eq. 3
        boosted += load_global(global_ptr, global_scale_ptr, b, start, rows, cols, at, GLOBAL_FORMAT, MASKED)
    if STATE_FORMAT == "int8":
        decayed = decode_exp_avg(exp_avg, beta1 * load(m_scale_ptr, at_group, MASKED))
        decayed_sq = decode_exp_avg_sq(exp_avg_sq, beta2 * load(v_scale_ptr, at_group, MASKED))
    else:
        decayed, decayed_sq = beta1 * exp_avg.to(tl.float32), beta2 * exp_avg_sq.to(tl.float32)
    param = weight.to(tl.float32) if PARAM_FORMAT == "native" else join(weight, remainder, PARAM_FORMAT)

    exp_avg = decayed + one_minus_beta1 * boosted  # eq. 7
    exp_avg_sq = decayed_sq + one_minus_beta2 * (boosted * boosted)
    inverse_root = tl.rsqrt(tl.sqrt(exp_avg_sq) * inv_sqrt_c2 + eps)  # two approximate roots cost less than a division
    param -= decay * param + step_size * exp_avg * (inverse_root * inverse_root)  # eq. 8

    if PARAM_FORMAT == "split8" or STATE_FORMAT == "bf16":
        first, offsets, _ = at
        words = random_words(seed, step, offset + first, offsets, MASKED)
    else:
        words = 0
    if STATE_FORMAT == "int8":
        exp_avg, m_scale = encode_exp_avg(exp_avg)
        exp_avg_sq, v_scale = encode_exp_avg_sq(exp_avg_sq)
        fits = v_scale < float("inf")  # a group whose second moment has left fp32 starts anew, not as NaN
        m_scale, v_scale = tl.where(fits, m_scale, 0.0), tl.where(fits, v_scale, 0.0)
        store_scale(m_scale_ptr, start, rows, cols, m_scale, VECTOR, MASKED)
        store_scale(v_scale_ptr, start, rows, cols, v_scale, VECTOR, MASKED)
    if STATE_FORMAT == "bf16":  # to nearest, v could never decay: 1 − β₂ is less than half a bf16 ulp
        exp_avg_sq = stochastic_bf16(exp_avg_sq, words)
    store(exp_avg_ptr, at, exp_avg, MASKED)
    store(exp_avg_sq_ptr, at, exp_avg_sq, MASKED)
    if PARAM_FORMAT == "split16" or PARAM_FORMAT == "split8":
        weight, rest = split(param, words, weight.dtype, PARAM_FORMAT)
        store(param_ptr, at, weight, MASKED)
        store(remainder_ptr, at, rest, MASKED)
    else:
        store(param_ptr, at, param, MASKED)
        if PARAM_FORMAT == "master":
            store(remainder_ptr, at, param, MASKED)


@triton.jit
def step_kernel(
    pointers_ptr,
    grads_ptr,
    chunks_ptr,
    table_ptr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    PARAM_FORMAT: tl.constexpr,
    STATE_FORMAT: tl.constexpr,
    GLOBAL_FORMAT: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One chunk of one tensor. Nothing that changes between steps is an argument: all of it lies in the tables."""
    chunk = chunks_ptr + col.CHUNKS * tl.program_id(0)
    tensor = tl.load(chunk + col.CHUNK_TENSOR).to(tl.int64)
    pointers = pointers_ptr + tensor * col.POINTERS
    row = table_ptr + tl.load(pointers + col.TABLE_ROW) * col.COEFFICIENTS
    if tl.load(row + col.SKIP) != 0:
        return
    coefficients = load_coefficients(row)
    rows = tl.load(pointers + col.ROWS)
    cols = tl.load(pointers + col.COLS)
    extent = rows, cols, tl.load(pointers + col.SEED).to(tl.uint32), tl.load(pointers + col.OFFSET)
    STATE_SQ_FORMAT: tl.constexpr = "uint8" if STATE_FORMAT == "int8" else STATE_FORMAT
    REMAINDER_FORMAT: tl.constexpr = "master" if PARAM_FORMAT == "native" else PARAM_FORMAT
    STORED_FORMAT: tl.constexpr = "fp32" if GLOBAL_FORMAT == "none" else GLOBAL_FORMAT
    STORED_VECTOR: tl.constexpr = (VECTOR + 1) // 2 if GLOBAL_FORMAT == "int4" else VECTOR
    tensors = (
        pointer(pointers, col.PARAM, PARAM_DTYPE, VECTOR),
        pointer(pointers, col.REMAINDER, stored_dtype(REMAINDER_FORMAT), VECTOR),
        pointer(pointers, col.EXP_AVG, stored_dtype(STATE_FORMAT), VECTOR),
        pointer(pointers, col.EXP_AVG_SQ, stored_dtype(STATE_SQ_FORMAT), VECTOR),
        pointer(grads_ptr, tensor, GRAD_DTYPE, GRAD_VECTOR),
        pointer(pointers, col.GLOBAL_GRAD, stored_dtype(STORED_FORMAT), STORED_VECTOR),
        (
            pointer(pointers, col.EXP_AVG_SCALE, tl.float32, 1),
            pointer(pointers, col.EXP_AVG_SQ_SCALE, tl.float32, 1),
            pointer(pointers, col.GLOBAL_SCALE, tl.float32, 1),
        ),
    )
    first, end = chunk_range(chunk, rows, cols, MASKED)
    for start in range(first, end, tile_of(MASKED)):
        update_tile(tensors, extent, coefficients, start, PARAM_FORMAT, STATE_FORMAT, GLOBAL_FORMAT, VECTOR, MASKED)


@torch.no_grad()
def step(batch: TensorBatch, grads: list[torch.Tensor], coefficients: torch.Tensor) -> None:
    """Update every parameter of the batch and its state in place: boost, moments, corrected AdamW update.

    Args:
        batch: parameters, state and stored global gradients; its tables are built at the first call and kept in
            ``batch.cache``, so its tensors must stay where they are.
        grads: domain gradients g_D, fp32, bf16 or fp16, contiguous, one per parameter; they may move between steps.
        coefficients: float64 ``[n_params, Coefficient.COUNT]``.

    Raises:
        ValueError: storage that is not contiguous, or gradients of several dtypes.
    """
    if not grads:
        return
    tables = tables_of(batch)
    first: Any = batch.tensors[0]
    parts = [first.param, grads[0], first.remainder, first.exp_avg, first.exp_avg_sq]
    if first.global_grad is not None:
        parts.append(first.global_grad.codes)
    vector = vector_elements(*(part.dtype for part in parts if part is not None))
    with on_device(coefficients):
        where = tables.refresh(grads)
        for chunks, access in tables.launches(vector):
            step_kernel[(len(chunks),)](
                tables.pointers,
                where,
                chunks,
                coefficients,
                TRITON_DTYPES[first.param.dtype],
                TRITON_DTYPES[grads[0].dtype],
                batch.param_format,
                batch.state_format,
                batch.global_format,
                **access,
                **LAUNCH,
            )
