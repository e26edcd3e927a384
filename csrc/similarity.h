// The read-only reduction before an update: <g_D, g_G> and |g_D|^2 (inputs of eq. 4).
//
// Products and sums of one block are fp32, block results are added in double. A block whose fp32 result is near the ends of
// the range (overflow, underflow, NaN, all zero) is done again in double.
#pragma once

#include "blocks.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

constexpr float SAFE_SMALL = 0x1p-70f, SAFE_LARGE = 0x1p100f;

inline bool in_safe_range(float x) { return x >= SAFE_SMALL && x <= SAFE_LARGE; }

inline bool all_zero(const float* x, int n) {
    bool nonzero = false;
    for (int i = 0; i < n; ++i) nonzero |= x[i] != 0.0f;  // a NaN counts as nonzero
    return !nonzero;
}

inline double exact_dot(const float* x, const float* y, int n) {
    if (all_zero(x, n) || all_zero(y, n)) return 0.0;  // embeddings: most rows of a gradient are zero
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
    return sum;
}

// Elements by which the sums read ahead: two light streams alone do not keep the hardware's prefetchers busy (a seventh of
// the pass on Zen 3; the update, with its four, gained nothing).
constexpr int64_t PREFETCHED = 1024;

// Dot and square of every group of one block in fp32.
template <class S, int64_t D, int64_t G> struct Similarity {
    using F = typename S::F;

    static void run(const GradSource& in, int64_t n, Sums& sums) {
        for (int64_t i = 0; i < n; i += BLOCK)
            block(advanced<D, G>(in, i), static_cast<int>(n - i < BLOCK ? n - i : BLOCK), sums);
    }

    static void block(const GradSource& in, int n, Sums& sums) {
        F dots = S::splat(0.0f), squares = S::splat(0.0f);
        each_group<D, G>(in, n, [&](bytes_t grad, bytes_t codes, float scale, int) {
            prefetch(grad, PREFETCHED * dtype_bytes(D), GROUP * dtype_bytes(D));
            if (G != GLOBAL_NONE) prefetch(codes, global_bytes(G, PREFETCHED), global_bytes(G, GROUP));
            group(grad, codes, scale, dots, squares);
        });
        float dot = S::sum(dots), square = S::sum(squares);
        bool safe = in_safe_range(square) && (G == GLOBAL_NONE || in_safe_range(__builtin_fabsf(dot)));
        if (!safe) return again(in, n, sums);
        sums.dot += dot;
        sums.grad_sq += square;
    }

    static void prefetch(bytes_t p, int64_t ahead, int64_t bytes) {  // as a number: it may lie beyond the tensor
        const uintptr_t start = reinterpret_cast<uintptr_t>(p) + ahead;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(start + i));
    }

    static void group(bytes_t grad, bytes_t codes, float scale, F& dots, F& squares) {
        F dot[2] = {S::splat(0.0f), S::splat(0.0f)}, square[2] = {S::splat(0.0f), S::splat(0.0f)};
        for (int j = 0; j < GROUP; j += 2 * S::W) {
            F g[2];
            Float<S, D>::load_pair(grad, j, g);
            for (int k = 0; k < 2; ++k) {
                if constexpr (G != GLOBAL_NONE) dot[k] = S::fma(g[k], Global<S, G>::load(codes, j + k * S::W), dot[k]);
                square[k] = S::fma(g[k], g[k], square[k]);
            }
        }
        if constexpr (G != GLOBAL_NONE) dots = S::fma(dot[0] + dot[1], S::splat(scale), dots);
        squares = squares + (square[0] + square[1]);
    }

    __attribute__((noinline)) static void again(const GradSource& in, int n, Sums& sums) {
        alignas(64) float g[BLOCK], h[BLOCK];
        each_group<D, G>(in, n, [&](bytes_t grad, bytes_t codes, float scale, int at) {
            for (int j = 0; j < GROUP; j += S::W) {
                S::store(g + at + j, Float<S, D>::load(grad, j));
                if constexpr (G != GLOBAL_NONE) S::store(h + at + j, Global<S, G>::load(codes, j) * S::splat(scale));
            }
        });
        if (G != GLOBAL_NONE) sums.dot += exact_dot(g, h, n);
        sums.grad_sq += exact_dot(g, g, n);
    }
};

}  // namespace
}  // namespace dba
