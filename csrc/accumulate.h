// Stage 1: total += weight * grad, in fp32 (eq. 1's sum).
#pragma once

#include "blocks.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <class S, int64_t D> struct Accumulate {
    static void run(bytes_t grad, float* total, float weight, int64_t n) {
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP) group(grad + i * dtype_bytes(D), total + i, weight);
        if (i == n) return;
        alignas(64) uint8_t grads[GROUP * 4] = {};
        alignas(64) float totals[GROUP] = {};
        __builtin_memcpy(grads, grad + i * dtype_bytes(D), (n - i) * dtype_bytes(D));
        __builtin_memcpy(totals, total + i, (n - i) * sizeof(float));
        group(grads, totals, weight);
        __builtin_memcpy(total + i, totals, (n - i) * sizeof(float));
    }
    static void group(bytes_t grad, float* total, float weight) {
        for (int j = 0; j < GROUP; j += S::W)
            S::store(total + j, S::fma(S::splat(weight), Float<S, D>::load(grad, j), S::load(total + j)));
    }
};

}  // namespace
}  // namespace dba
