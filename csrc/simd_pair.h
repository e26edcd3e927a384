// What a vector interface S does to a pair of vectors: 2 * S::W consecutive elements, which is as much as packing 32-bit
// lanes to 16 bits wants. Here the general way, in terms of S; an instruction set that has better specialises it.
#pragma once

#include "formats.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <class S> struct PairOps {
    using U = typename S::U;
    static const uint8_t* at(const void* p, int k, int bytes) {
        return static_cast<const uint8_t*>(p) + k * S::W * bytes;
    }
    static uint8_t* at(void* p, int k, int bytes) { return static_cast<uint8_t*>(p) + k * S::W * bytes; }

    // out = p << 16, for 16-bit p.
    static void load_high(const void* p, U* out) {
        for (int k = 0; k < 2; ++k) out[k] = S::load_u16(at(p, k, 2)) << 16;
    }
    // out = (high << 16) + (low << (16 - BITS)), for 16-bit high and signed low of 16 or 8 bits.
    template <int BITS> static void join(const void* high, const void* low, U* out) {
        for (int k = 0; k < 2; ++k) {
            const U top = S::load_u16(at(high, k, 2)) << 16;
            if constexpr (BITS == 16) out[k] = top + (U)S::load_i16(at(low, k, 2));
            else out[k] = top + ((U)S::load_i8(at(low, k, 1)) << 8);
        }
    }
    // The inverse for multiples of 2^(16 - BITS), lower bits of x are ignored: high is x rounded to a multiple of 2^16, ties
    // up, and low, the bits below, is the remainder when it is read back as signed.
    template <int BITS> static void split(const U* x, void* high, void* low) {
        for (int k = 0; k < 2; ++k) {
            S::store_low16(at(high, k, 2), (x[k] + 0x8000u) >> 16);
            if constexpr (BITS == 16) S::store_low16(at(low, k, 2), x[k]);
            else S::store_low8(at(low, k, 1), x[k] >> 8);
        }
    }
};

}  // namespace
}  // namespace dba
