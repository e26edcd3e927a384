// What the anchor multiplies (eq. 10): theta - theta_0 of the exact parameter, remainder included, in fp32.
#pragma once

#include "codecs.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <class S, int64_t P, int64_t D> struct Displacement {
    static void run(bytes_t param, bytes_t remainder, bytes_t origin, float* out, int64_t n) {
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP)
            group(param + i * dtype_bytes(D), remainder + i * remainder_bytes(P), origin + i * dtype_bytes(D), out + i);
        if (i == n) return;
        alignas(64) uint8_t params[GROUP * 4] = {}, remainders[GROUP * 4] = {}, origins[GROUP * 4] = {};
        alignas(64) float last[GROUP];
        __builtin_memcpy(params, param + i * dtype_bytes(D), (n - i) * dtype_bytes(D));
        if (P != NATIVE) __builtin_memcpy(remainders, remainder + i * remainder_bytes(P), (n - i) * remainder_bytes(P));
        __builtin_memcpy(origins, origin + i * dtype_bytes(D), (n - i) * dtype_bytes(D));
        group(params, remainders, origins, last);
        __builtin_memcpy(out + i, last, (n - i) * sizeof(float));
    }
    static void group(bytes_t param, bytes_t remainder, bytes_t origin, float* out) {
        for (int j = 0; j < GROUP; j += 2 * S::W) {
            typename S::F now[2], then[2];
            Param<S, P, D>::load_pair(param, remainder, j, now);
            Float<S, D>::load_pair(origin, j, then);
            for (int k = 0; k < 2; ++k) S::store(out + j + k * S::W, now[k] - then[k]);
        }
    }
};

}  // namespace
}  // namespace dba
