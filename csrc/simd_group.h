// What a vector interface S does to a whole group of elements at once: the general way, in terms of S. An instruction set
// that has better specialises it.
#pragma once

#include "formats.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <class S> struct GroupOps {
    static constexpr int N = GROUP / S::W;
    using U = typename S::U;
    static const uint8_t* at(const void* p, int k, int bytes) { return static_cast<const uint8_t*>(p) + k * S::W * bytes; }
    static uint8_t* at(void* p, int k, int bytes) { return static_cast<uint8_t*>(p) + k * S::W * bytes; }

    // out = p << 16, for 16-bit p.
    static void load_high(const void* p, U* out) {
        for (int k = 0; k < N; ++k) out[k] = S::load_u16(at(p, k, 2)) << 16;
    }
    // A joined pattern, or, where that is a NaN, its high half alone: of zero, by a borrow, of infinity, or of a NaN.
    static U number_or_high(U joined) {
        const typename S::F value = S::from_bits(joined);
        return value == value ? joined : (joined + 0x8000u) & 0xFFFF0000u;
    }
    // out = (high << 16) + low, for 16-bit high and signed 16-bit low.
    static void join16(const void* high, const void* low, U* out) {
        for (int k = 0; k < N; ++k) {
            out[k] = number_or_high((S::load_u16(at(high, k, 2)) << 16) + (U)S::load_i16(at(low, k, 2)));
        }
    }
    // The inverse: high is x rounded to a multiple of 2^16 (ties up).
    static void split16(const U* x, void* high, void* low) {
        for (int k = 0; k < N; ++k) {
            S::store_low16(at(high, k, 2), (x[k] + 0x8000u) >> 16);
            S::store_low16(at(low, k, 2), x[k]);  // the low half, read back as signed, is the remainder
        }
    }
    // out = (high << 16) + (low << 8), for 16-bit high and signed 8-bit low.
    static void join8(const void* high, const void* low, U* out) {
        for (int k = 0; k < N; ++k) {
            out[k] = number_or_high((S::load_u16(at(high, k, 2)) << 16) + ((U)S::load_i8(at(low, k, 1)) << 8));
        }
    }
    // The inverse for multiples of 2^8; lower bits of x are ignored.
    static void split8(const U* x, void* high, void* low) {
        for (int k = 0; k < N; ++k) {
            S::store_low16(at(high, k, 2), (x[k] + 0x8000u) >> 16);
            S::store_low8(at(low, k, 1), x[k] >> 8);
        }
    }
    // The largest lane of each of eight vectors: as many as a block has groups.
    static void largest_of_each(const typename S::F* x, float* out) {
        for (int i = 0; i < 8; ++i) out[i] = S::largest(x[i]);
    }
};

}  // namespace
}  // namespace dba
