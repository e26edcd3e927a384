// How elements are widened on load and narrowed on store, in terms of a vector interface S (simd_*.h).
// Every codec sees pointers to the first element of a group and an element index j inside the group, a multiple of W.
#pragma once

#include "formats.h"
#include "simd_pair.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

using bytes_t = const uint8_t*;

// --- plain floating point -----------------------------------------------------------------------------------------

template <class S, int64_t D> struct Float;

// Two vectors at once: one by one here, better for some formats below.
template <class S, class Codec> struct PairLoad {
    static void load_pair(bytes_t p, int j, typename S::F* out) {
        for (int k = 0; k < 2; ++k) out[k] = Codec::load(p, j + k * S::W);
    }
};

template <class S> struct Float<S, FP32> : PairLoad<S, Float<S, FP32>> {
    static typename S::F load(bytes_t p, int j) { return S::load(p + 4 * j); }
    static typename S::F rounded(typename S::F x) { return x; }
    static void store(uint8_t* p, int j, typename S::F x) { S::store(p + 4 * j, x); }
};

template <class S> struct Float<S, BF16> {
    static void load_pair(bytes_t p, int j, typename S::F* out) {
        typename S::U patterns[2];
        PairOps<S>::load_high(p + 2 * j, patterns);
        for (int k = 0; k < 2; ++k) out[k] = S::from_bits(patterns[k]);
    }
    static typename S::F load(bytes_t p, int j) { return S::from_bits(S::load_u16(p + 2 * j) << 16); }
    static typename S::U nearest_even(typename S::F x) {
        typename S::U u = S::bits(x);
        return (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    }
    static typename S::F rounded(typename S::F x) { return S::from_bits(nearest_even(x) << 16); }
    static void store(uint8_t* p, int j, typename S::F x) {
        S::store_low16(p + 2 * j, x == x ? nearest_even(x) : S::splat_bits(0x7FC0));
    }
};

template <class S> struct Float<S, FP16> : PairLoad<S, Float<S, FP16>> {
    static typename S::F load(bytes_t p, int j) { return S::load_f16(p + 2 * j); }
    static typename S::F rounded(typename S::F x) { return S::round_f16(x); }
    static void store(uint8_t* p, int j, typename S::F x) { S::store_f16(p + 2 * j, x); }
};

// --- the stored global gradient: load() gives code values; grouped formats still want the group's scale ---------------

// Grouped formats also have LARGEST, the value of their largest code, and encode(), from values in units of the scale.

template <class S, int64_t G> struct Global;

template <class S> struct Global<S, GLOBAL_FP32> : Float<S, FP32> {};
template <class S> struct Global<S, GLOBAL_BF16> : Float<S, BF16> {};
template <class S> struct Global<S, GLOBAL_FP16> : Float<S, FP16> {};

// Signed quadratic companding of integer codes: value = scale * c|c|.
template <class S> typename S::F expand(typename S::I code) {
    typename S::F c = S::to_float(code);
    return c * S::abs(c);
}
template <class S> typename S::U compress(typename S::F scaled, typename S::F root_of_magnitude) {
    typename S::U sign = S::bits(scaled) & 0x80000000u;
    return (typename S::U)S::to_int(S::from_bits(S::bits(root_of_magnitude) | sign));
}
template <class S> struct Quadratic {
    static typename S::U encode(typename S::F scaled) { return compress<S>(scaled, S::sqrt(S::abs(scaled))); }
};

template <class S> struct Global<S, GLOBAL_INT8> : Quadratic<S> {
    static constexpr double LARGEST = 127.0 * 127.0;
    static typename S::F load(bytes_t p, int j) { return expand<S>(S::load_i8(p + j)); }
};

template <class S> struct Global<S, GLOBAL_INT4> : Quadratic<S> {
    static constexpr double LARGEST = 7.0 * 7.0;
    static typename S::F load(bytes_t p, int j) { return expand<S>(S::load_nibbles(p, j)); }
};

template <class S> struct Global<S, GLOBAL_FP8> {
    static constexpr double LARGEST = 448.0;
    static typename S::F load(bytes_t p, int j) {
        typename S::U code = S::load_u8(p + j), magnitude = code & 0x7Fu;
        typename S::F subnormal = S::to_float((typename S::I)magnitude) * S::splat(0x1p-9f);
        typename S::F value = magnitude < 8u ? subnormal : S::from_bits((magnitude << 20) + (120u << 23));
        value = magnitude == 0x7Fu ? S::from_bits(S::splat_bits(0x7FC00000)) : value;
        return S::from_bits(S::bits(value) | ((code & 0x80u) << 24));
    }
    // e4m3 code of x, |x| <= 448 up to rounding, ties to even.
    static typename S::U encode(typename S::F x) {
        typename S::U magnitude = S::bits(x) & 0x7FFFFFFFu, sign = (S::bits(x) >> 24) & 0x80u;
        typename S::U normal = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
        typename S::F shifted = S::from_bits(magnitude) + S::splat(16384.0f);  // ulp(2^14) = 2^-9, the subnormals' unit
        typename S::U subnormal = S::bits(shifted) - S::bits(S::splat(16384.0f));
        return (magnitude < (121u << 23) ? subnormal : normal) | sign;
    }
};

// --- parameters: a weight, and a remainder that together hold more than the weight's dtype ----------------------------
//
// Weights are written from outside between steps. A remainder that cannot be the weight's own is dropped on load.

// Each store takes one random 32-bit word per element; split8 rounds with its top byte.

// 32-bit integer hash with full avalanche ("lowbias32" of C. Wellons' hash prospector).
template <class U> inline U mix32(U x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// Formats without a better way go vector by vector: Codec has load() and store().
template <class S, class Codec> struct ParamPair {
    static void load_pair(bytes_t weight, bytes_t remainder, int j, typename S::F* out) {
        for (int k = 0; k < 2; ++k) out[k] = Codec::load(weight, remainder, j + k * S::W);
    }
    static void store_pair(uint8_t* weight, uint8_t* remainder, int j, const typename S::F* x,
                           const typename S::U* random) {
        for (int k = 0; k < 2; ++k) Codec::store(weight, remainder, j + k * S::W, x[k], random[k]);
    }
};

template <class S, int64_t Format, int64_t D> struct Param;

template <class S, int64_t D> struct Param<S, NATIVE, D> : ParamPair<S, Param<S, NATIVE, D>> {
    static typename S::F load(bytes_t weight, bytes_t, int j) { return Float<S, D>::load(weight, j); }
    static void store(uint8_t* weight, uint8_t*, int j, typename S::F x, typename S::U) {
        Float<S, D>::store(weight, j, x);
    }
};

template <class S, int64_t D> struct Param<S, MASTER, D> : ParamPair<S, Param<S, MASTER, D>> {
    static typename S::F load(bytes_t weight, bytes_t master, int j) {
        typename S::F wide = S::load(master + 4 * j), written = Float<S, D>::load(weight, j);
        return Float<S, D>::rounded(wide) == written ? wide : written;
    }
    static void store(uint8_t* weight, uint8_t* master, int j, typename S::F x, typename S::U) {
        Float<S, D>::store(weight, j, x);
        S::store(master + 4 * j, x);
    }
};

// The pattern of x with any NaN made the quiet one: others overflow when they are rounded, to 0.
template <class S> typename S::U number_or_quiet(typename S::F x) {
    return x == x ? S::bits(x) : S::splat_bits(0x7FC00000);
}

// What a joined pattern stands for. Where that is a NaN (of zero, by a borrow, of infinity, or of a NaN): its high half.
template <class S> typename S::F number_or_high(typename S::U joined) {
    const typename S::F value = S::from_bits(joined);
    return value == value ? value : S::from_bits((joined + 0x8000u) & 0xFFFF0000u);
}

// bf16 weight = the fp32 pattern rounded to 16 bits, ties up; the remainder is what that left. With 16 bits of it the
// pattern is whole; with 8, the pattern was first rounded stochastically to a multiple of 2^8.
template <class S, int BITS> struct Bf16AndRemainder {
    static constexpr int BYTES = BITS / 8;
    static void load_pair(bytes_t weight, bytes_t low, int j, typename S::F* out) {
        typename S::U patterns[2];
        PairOps<S>::template join<BITS>(weight + 2 * j, low + BYTES * j, patterns);
        for (int k = 0; k < 2; ++k) out[k] = number_or_high<S>(patterns[k]);
    }
    static void store_pair(uint8_t* weight, uint8_t* low, int j, const typename S::F* x, const typename S::U* random) {
        typename S::U patterns[2];
        for (int k = 0; k < 2; ++k) {
            patterns[k] = number_or_quiet<S>(x[k]);
            if constexpr (BITS == 8) patterns[k] = patterns[k] + (random[k] >> 24);
        }
        PairOps<S>::template split<BITS>(patterns, weight + 2 * j, low + BYTES * j);
    }
};
template <class S> struct Param<S, SPLIT16, BF16> : Bf16AndRemainder<S, 16> {};
template <class S> struct Param<S, SPLIT8, BF16> : Bf16AndRemainder<S, 8> {};

// fp16: the remainder counts units of ulp(weight) * 2^(1 - BITS), rounded to nearest (16 bits) or stochastically (8).
template <class S, int BITS> struct Fp16AndRemainder : ParamPair<S, Fp16AndRemainder<S, BITS>> {
    using F = typename S::F;
    using U = typename S::U;
    static U unit_exponent(U half) {  // biased
        U field = (half >> 10) & 31u;
        field = field == 0u ? S::splat_bits(1) : field;
        return field + (127u - 15u - 10u - (BITS - 1));
    }
    static F load(bytes_t weight, bytes_t low, int j) {
        const F remainder = S::to_float(BITS == 16 ? S::load_i16(low + 2 * j) : S::load_i8(low + j));
        const U half = S::load_u16(weight + 2 * j);
        const F outward = S::from_bits(S::bits(remainder) ^ ((half & 0x8000u) << 16));
        // The lower neighbour of a power of two is only half an ulp away.
        const auto foreign = ((half & 0x3FFu) == 0u) & ((half & 0x7FFFu) >= 0x800u) &
                             (outward < S::splat(-static_cast<float>(1 << (BITS - 3))));
        const F own = foreign ? S::splat(0.0f) : remainder;
        return S::load_f16(weight + 2 * j) + own * S::from_bits(unit_exponent(half) << 23);
    }
    static void store(uint8_t* weight, uint8_t* low, int j, F x, U random) {
        S::store_f16(weight + 2 * j, x);
        const F rest = x - S::load_f16(weight + 2 * j);
        const F units = rest * S::from_bits((254u - unit_exponent(S::load_u16(weight + 2 * j))) << 23);
        if constexpr (BITS == 16) {
            S::store_low16(low + 2 * j, (U)S::to_int(units));
        } else {
            const F dithered = S::floor(units + S::to_float((typename S::I)(random >> 24)) * S::splat(0x1p-8f));
            S::store_low8(low + j, (U)S::to_int(dithered));
        }
    }
};
template <class S> struct Param<S, SPLIT16, FP16> : Fp16AndRemainder<S, 16> {};
template <class S> struct Param<S, SPLIT8, FP16> : Fp16AndRemainder<S, 8> {};

// --- scales of grouped codecs -----------------------------------------------------------------------------------------

template <class S> struct Scale {
    typename S::F scale, inverse;  // value of code 1 and its reciprocal; both 0 where the scale would be subnormal
    // unit: reciprocal of the largest code's value.
    Scale(typename S::F absmax, typename S::F unit) {
        const typename S::F wanted = absmax * unit, zero = S::splat(0.0f);
        const auto usable = wanted >= S::splat(SMALLEST_SCALE);
        scale = usable ? wanted : zero;
        inverse = usable ? S::splat(1.0f) / wanted : zero;
    }
};

}  // namespace
}  // namespace dba
