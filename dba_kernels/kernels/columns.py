"""Columns of every table that the kernels read, as the compile-time constants that Triton can use."""

from __future__ import annotations

import triton.language as tl

from ..stepdata import Coefficient, Hyper, Summary

# Pointer table, int64 [n_tensors, POINTERS].
PARAM = tl.constexpr(0)
REMAINDER = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
EXP_AVG_SCALE = tl.constexpr(4)
EXP_AVG_SQ_SCALE = tl.constexpr(5)
GLOBAL_GRAD = tl.constexpr(6)
GLOBAL_SCALE = tl.constexpr(7)
ROWS = tl.constexpr(8)
COLS = tl.constexpr(9)
TABLE_ROW = tl.constexpr(10)
SEED = tl.constexpr(11)
OFFSET = tl.constexpr(12)
FIRST_SLOT = tl.constexpr(13)  # of its partial sums
N_SLOTS = tl.constexpr(14)
POINTERS = tl.constexpr(16)  # a row of 128 bytes

# Chunk table, int32 [n_chunks, CHUNKS].
CHUNK_TENSOR = tl.constexpr(0)  # row of the pointer table
CHUNK_FIRST = tl.constexpr(1)  # tile
CHUNK_TILES = tl.constexpr(2)
CHUNK_SLOT = tl.constexpr(3)  # row of the partial sums
CHUNKS = tl.constexpr(4)

# Coefficient table, float64 [n_params, COEFFICIENTS].
GRAD_WEIGHT = tl.constexpr(Coefficient.GRAD_WEIGHT)
GLOBAL_WEIGHT = tl.constexpr(Coefficient.GLOBAL_WEIGHT)
BETA1 = tl.constexpr(Coefficient.BETA1)
ONE_MINUS_BETA1 = tl.constexpr(Coefficient.ONE_MINUS_BETA1)
BETA2 = tl.constexpr(Coefficient.BETA2)
ONE_MINUS_BETA2 = tl.constexpr(Coefficient.ONE_MINUS_BETA2)
STEP_SIZE = tl.constexpr(Coefficient.STEP_SIZE)
INV_SQRT_BIAS_CORRECTION2 = tl.constexpr(Coefficient.INV_SQRT_BIAS_CORRECTION2)
EPS = tl.constexpr(Coefficient.EPS)
LR_WEIGHT_DECAY = tl.constexpr(Coefficient.LR_WEIGHT_DECAY)
STEP = tl.constexpr(Coefficient.STEP)
SKIP = tl.constexpr(Coefficient.SKIP)
COEFFICIENTS = tl.constexpr(Coefficient.COUNT)

# Hyperparameter table, float64 [n_groups, HYPERS].
HYPER_LR = tl.constexpr(Hyper.LR)
HYPER_BETA1 = tl.constexpr(Hyper.BETA1)
HYPER_BETA2 = tl.constexpr(Hyper.BETA2)
HYPER_EPS = tl.constexpr(Hyper.EPS)
HYPER_WEIGHT_DECAY = tl.constexpr(Hyper.WEIGHT_DECAY)
HYPER_SIGN = tl.constexpr(Hyper.SIGN)
HYPERS = tl.constexpr(Hyper.COUNT)

# Summary, float64.
GAMMA = tl.constexpr(Summary.GAMMA)
CLIP_FACTOR = tl.constexpr(Summary.CLIP_FACTOR)
GRAD_NORM = tl.constexpr(Summary.GRAD_NORM)
GLOBAL_NORM = tl.constexpr(Summary.GLOBAL_NORM)
