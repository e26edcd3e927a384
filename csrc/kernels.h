// The kernels of one instruction set, as a table of function pointers: the boundary between api.cpp, which is compiled
// for the baseline machine, and isa_*.cpp, which are not.
#pragma once

#include "formats.h"

namespace dba {

constexpr int BLOCK = 512;  // elements that pass through the first-level cache at a time: 2 KiB of fp32
static_assert(BLOCK % GROUP == 0);

// Gradient and stored global gradient.
struct GradSource {
    const uint8_t *grad, *codes;
    const float* scales;  // null where the format has none
};

struct Sums {
    double dot, grad_sq;
};

// One row of the coefficient table in fp32, and what keys the stochastic rounding.
struct StepScalars {
    float grad_weight, global_weight, beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, inv_sqrt_bias_correction2, eps, lr_weight_decay;
    uint32_t step, seed;
};

// What a step updates: pointers to one element, which starts a group of its row.
struct StepTarget {
    uint8_t *param, *remainder, *exp_avg, *exp_avg_sq;
    float *exp_avg_scale, *exp_avg_sq_scale;  // null unless the state is int8
};

// A null entry: no such combination.
struct Kernels {
    // Boosts elements i .. i + n of the run, at most BLOCK, and writes zeros up to the end of the last group.
    using Boost = void(const GradSource& in, int64_t i, float a, float b, int n, float* out);
    // Updates n elements of one row, which start a group.
    using Step = void(const StepTarget&, const GradSource&, Boost*, const StepScalars&, uint64_t element, int64_t n);
    using Similarity = void(const GradSource& in, int64_t n, Sums& sums);
    using Accumulate = void(const uint8_t* grad, float* total, float weight, int64_t n);
    using Encode = void(const uint8_t* source, uint8_t* codes, float* scales, int64_t n);
    using Decode = void(const uint8_t* codes, const float* scales, uint8_t* out, int64_t n);
    using Displacement = void(const uint8_t* param, const uint8_t* remainder, const uint8_t* origin, float* out,
                              int64_t n);

    Boost* boost[DTYPES][GLOBAL_FORMATS];
    Step* two_stage[PARAM_FORMATS][DTYPES][STATE_FORMATS];                            // any gradient, through Boost
    Step* one_stage[PARAM_FORMATS][DTYPES][STATE_FORMATS][DTYPES][GLOBAL_FORMATS];  // by gradient; Boost is not called
    Similarity* similarity[DTYPES][GLOBAL_FORMATS];
    Accumulate* accumulate[DTYPES];
    Encode* encode[DTYPES][GLOBAL_FORMATS];
    Decode* decode[GLOBAL_FORMATS][DTYPES];
    Displacement* displacement[PARAM_FORMATS][DTYPES];
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace dba
