// Codecs of whole tensors: the stored global gradient in 8 and 4 bits, and any stored format back to a float dtype.
#pragma once

#include "blocks.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

// A run of n elements that starts at a group boundary of its row; source dtype D.
template <class S, int64_t D, int64_t G> struct Encode {
    static void run(bytes_t source, uint8_t* codes, float* scales, int64_t n) {
        for (int64_t i = 0; i < n; i += GROUP) {
            const int count = static_cast<int>(n - i < GROUP ? n - i : GROUP);
            alignas(64) uint8_t padded[GROUP * 4] = {}, out[GROUP];
            __builtin_memcpy(padded, source + i * dtype_bytes(D), count * dtype_bytes(D));
            group(padded, out, scales + i / GROUP);
            __builtin_memcpy(codes + global_bytes(G, i), out, global_bytes(G, count));
        }
    }

    static void group(bytes_t x, uint8_t* out, float* scale) {
        typename S::F most = S::splat(0.0f);
        for (int j = 0; j < GROUP; j += S::W) most = S::max(most, S::abs(Float<S, D>::load(x, j)));
        const Scale<S> s(S::splat(S::largest(most)), S::splat(static_cast<float>(1.0 / Global<S, G>::LARGEST)));
        float scales[S::W];
        S::store(scales, s.scale);
        *scale = scales[0];
        for (int j = 0; j < GROUP; j += S::W) {
            S::store_low8(out + j, Global<S, G>::encode(Float<S, D>::load(x, j) * s.inverse));
        }
        if constexpr (G == GLOBAL_INT4)
            for (int k = 0; k < GROUP / 2; ++k)
                out[k] = static_cast<uint8_t>((out[2 * k] & 0xF) | (out[2 * k + 1] << 4));
    }
};

template <class S, int64_t G, int64_t D> struct Decode {
    static void run(bytes_t codes, const float* scales, uint8_t* out, int64_t n) {
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP)
            group(codes + global_bytes(G, i), scale(scales, i), out + i * dtype_bytes(D));
        if (i == n) return;
        alignas(64) uint8_t padded[GROUP * 4] = {}, last[GROUP * 4];
        __builtin_memcpy(padded, codes + global_bytes(G, i), global_bytes(G, n - i));
        group(padded, scale(scales, i), last);
        __builtin_memcpy(out + i * dtype_bytes(D), last, (n - i) * dtype_bytes(D));
    }
    static float scale(const float* scales, int64_t i) { return global_is_grouped(G) ? scales[i / GROUP] : 1.0f; }
    static void group(bytes_t codes, float scale, uint8_t* out) {
        for (int j = 0; j < GROUP; j += S::W) {
            typename S::F value = Global<S, G>::load(codes, j);
            Float<S, D>::store(out, j, global_is_grouped(G) ? value * S::splat(scale) : value);
        }
    }
};

}  // namespace
}  // namespace dba
