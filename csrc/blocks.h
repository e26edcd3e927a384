// How kernels walk over a run of elements: blocks of whole groups, and a ragged last group staged through padded copies,
// so that no kernel needs masks and no access leaves a tensor.
#pragma once

#include "codecs.h"
#include "kernels.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <int64_t D, int64_t G> GradSource advanced(const GradSource& in, int64_t i) {
    return {in.grad + i * dtype_bytes(D), in.codes + global_bytes(G, i),
            in.scales + (global_is_grouped(G) ? i / GROUP : 0)};
}

// Fewer elements than a group, from the i-th on, as a zero-padded copy.
template <int64_t D, int64_t G> struct PaddedGroup {
    alignas(64) uint8_t grad[GROUP * 4] = {}, codes[GROUP * 4] = {};
    const float* scale;
    PaddedGroup(const GradSource& in, int64_t i, int n)
        : scale(global_is_grouped(G) ? in.scales + i / GROUP : nullptr) {
        __builtin_memcpy(grad, in.grad + i * dtype_bytes(D), n * dtype_bytes(D));
        if (G != GLOBAL_NONE) __builtin_memcpy(codes, in.codes + global_bytes(G, i), global_bytes(G, n));
    }
    GradSource source() const { return {grad, codes, scale}; }
};

// body(grad, codes, scale, first element) for every group of the first n elements; the last may be a zero-padded copy.
template <int64_t D, int64_t G, class Body> inline void each_group(const GradSource& in, int n, Body&& body) {
    auto scale = [&](int i) { return global_is_grouped(G) ? in.scales[i / GROUP] : 1.0f; };
    int i = 0;
    for (; i + GROUP <= n; i += GROUP) body(in.grad + i * dtype_bytes(D), in.codes + global_bytes(G, i), scale(i), i);
    if (i == n) return;
    const PaddedGroup<D, G> last(in, i, n - i);
    body(static_cast<bytes_t>(last.grad), static_cast<bytes_t>(last.codes), scale(i), i);
}

}  // namespace
}  // namespace dba
