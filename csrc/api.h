// The C interface of the library, bound by dba_kernels/native. One call serves a whole model: arrays of descriptors,
// every field eight bytes. Pointers are to contiguous row-major CPU memory; nothing is retained after a call returns.
#pragma once

#include "coefficients.h"
#include "formats.h"

namespace dba {

struct Tensor {
    int64_t rows, cols;  // of tensor.flatten(1)
    int64_t index;       // row of the coefficient table
    int64_t grad_dtype;
    const uint8_t* grad;
    uint8_t *param, *remainder, *exp_avg, *exp_avg_sq;
    float *exp_avg_scales, *exp_avg_sq_scales;  // [rows, ceil(cols / GROUP)]
    const uint8_t* global_codes;
    const float* global_scales;  // [rows, ceil(cols / GROUP)]
    uint64_t seed, offset;       // stochastic rounding: seed, position of element 0 in the whole parameter
};

struct Batch {
    int64_t count, dtype, param_format, state_format, global_format;
    const Tensor* tensors;
};

}  // namespace dba

#define DBA_EXPORT __attribute__((visibility("default")))

extern "C" {

// Increased with every change of this file; dba_kernels/native/library.py refuses another.
DBA_EXPORT int64_t dba_abi(void);
// 0 scalar, 1 avx2, 2 avx512; whether this machine can run it.
DBA_EXPORT int64_t dba_isa_usable(int64_t isa);

// total += weight * grad for every tensor whose gradient is finite; squared_norms [count] is overwritten.
// A tensor's total is in `param`.
DBA_EXPORT void dba_accumulate(int64_t isa, int64_t threads, const dba::Tensor* tensors, int64_t count, double weight,
                               double* squared_norms);
DBA_EXPORT void dba_encode(int64_t isa, int64_t threads, int64_t dtype, int64_t format, int64_t rows, int64_t cols,
                           const uint8_t* source, uint8_t* codes, float* scales);
DBA_EXPORT void dba_decode(int64_t isa, int64_t threads, int64_t dtype, int64_t format, int64_t rows, int64_t cols,
                           const uint8_t* codes, const float* scales, uint8_t* out);
// sums [n, 2]: rows `index` of every tensor are overwritten.
DBA_EXPORT void dba_similarity(int64_t isa, int64_t threads, const dba::Batch* batches, int64_t count, double* sums);
// out = parameter - origin, n elements; origin has the parameter's dtype, out is fp32.
DBA_EXPORT void dba_displacement(int64_t isa, int64_t threads, int64_t dtype, int64_t param_format, int64_t n,
                                 const uint8_t* param, const uint8_t* remainder, const uint8_t* origin, float* out);
DBA_EXPORT void dba_coefficients(const dba::CoefficientArguments* arguments);
DBA_EXPORT void dba_step(int64_t isa, int64_t threads, const dba::Batch* batches, int64_t count, const double* table);
// Similarity, coefficients and step of a whole model in one call; the tensors of all batches are the active parameters.
DBA_EXPORT void dba_fused_step(int64_t isa, int64_t threads, const dba::Batch* batches, int64_t count,
                               const dba::CoefficientArguments* arguments);
}
