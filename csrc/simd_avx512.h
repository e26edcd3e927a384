// The vector interface of simd_scalar.h in sixteen lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "formats.h"
#include "simd_pair.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

struct Avx512 {
    static constexpr int W = 16;
    using F = __m512;
    using I = int32_t __attribute__((vector_size(64)));
    using U = uint32_t __attribute__((vector_size(64)));

    static F splat(float x) { return _mm512_set1_ps(x); }
    static U splat_bits(uint32_t x) { return (U)_mm512_set1_epi32(static_cast<int>(x)); }
    static U iota() { return (U)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static U bits(F x) { return (U)x; }
    static F from_bits(U u) { return (F)u; }

    static __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static __m128i quarter(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

    static F load(const void* p) { return _mm512_loadu_ps(p); }
    static void store(void* p, F x) { _mm512_storeu_ps(p, x); }
    static U load_bits(const void* p) { return (U)_mm512_loadu_si512(p); }
    static I load_i8(const void* p) { return (I)_mm512_cvtepi8_epi32(quarter(p)); }
    static U load_u8(const void* p) { return (U)_mm512_cvtepu8_epi32(quarter(p)); }
    static I load_i16(const void* p) { return (I)_mm512_cvtepi16_epi32(half(p)); }
    static U load_u16(const void* p) { return (U)_mm512_cvtepu16_epi32(half(p)); }
    static void store_low8(void* p, U x) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
    }
    static void store_low16(void* p, U x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
    }
    static I load_nibbles(const uint8_t* row, int64_t j) {
        __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + j / 2));
        __m512i twice = _mm512_shuffle_epi32(_mm512_cvtepu8_epi64(eight), _MM_PERM_CCAA);  // byte in both halves
        return (I)_mm512_srai_epi32(_mm512_sllv_epi32(twice, _mm512_set1_epi64((24LL << 32) | 28)), 28);
    }
    static F load_f16(const void* p) { return _mm512_cvtph_ps(half(p)); }
    static void store_f16(void* p, F x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    static F round_f16(F x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

    static F to_float(I x) { return _mm512_cvtepi32_ps((__m512i)x); }
    static I to_int(F x) { return (I)_mm512_cvtps_epi32(x); }
    static F floor(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F sqrt(F x) { return _mm512_sqrt_ps(x); }
    // Root of finite x >= 0 within 2 ulps, NaN for 0: a 14-bit estimate and one Newton step. vsqrtps would keep the divider
    // busy for ten cycles; of the three roots and one quotient of a step with int8 state, two roots are taken here.
    static F estimated_root(F x) {
        F estimate = _mm512_rsqrt14_ps(x), root = x * estimate;
        F half = from_bits(bits(estimate) - (1u << 23));
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, x), half, root);
    }
    static F quick_root(F x) { return estimated_root(_mm512_max_ps(x, splat(0x1p-100f))); }
    // NaN, where x is 0, is vmaxps's second operand and its result; it becomes INT_MIN, which is packed to 0.
    static U code_from_one(F x) { return (U)to_int(_mm512_max_ps(splat(1.0f), estimated_root(x))); }

    // 64 integers to bytes, saturated.
    static __m512i pack(const U* x) { return _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]); }
    static void store_packed(void* p, __m512i lanes) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, lanes));
    }
    static void store_group_i8(void* p, const U* x) { store_packed(p, _mm512_packs_epi16(pack(x), pack(x + 2))); }
    static void store_group_u8(void* p, const U* x) { store_packed(p, _mm512_packus_epi16(pack(x), pack(x + 2))); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F x) { return _mm512_abs_ps(x); }
    static float sum(F x) { return _mm512_reduce_add_ps(x); }
    static float largest(F x) { return _mm512_reduce_max_ps(x); }
    // Halves of two vectors side by side, then quarters of four, and so on: each step joins two results in one vector.
    static void largest_of_each(const __m512* x, float* out) {
        __m512 two[4], four[2];
        for (int i = 0; i < 4; ++i)
            two[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                                   _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xEE));  // quarters 0 0 1 1
        for (int i = 0; i < 2; ++i)
            four[i] = _mm512_max_ps(_mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0x88),
                                    _mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0xDD));  // a quarter each
        __m512 eight =
            _mm512_max_ps(_mm512_shuffle_ps(four[0], four[1], 0x44), _mm512_shuffle_ps(four[0], four[1], 0xEE));
        eight =
            _mm512_max_ps(eight, _mm512_shuffle_ps(eight, eight, 0xB1));  // lanes 0 and 2 of each quarter hold results
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, eight)));
    }
};

// Permutations of 16-bit words do in one instruction what a widening or narrowing conversion and a shift do in two.
template <> struct PairOps<Avx512> {
    using U = Avx512::U;
    static __m512i load(const void* p) { return _mm512_loadu_si512(p); }

    // The index of a permutation: words EVEN, EVEN + STEP, ... at even places, ODD, ODD + STEP, ... at odd places.
    template <int EVEN, int ODD, int STEP> struct Index {
        alignas(64) uint16_t word[32] = {};
        constexpr Index() {
            for (int i = 0; i < 32; ++i) word[i] = static_cast<uint16_t>((i % 2 ? ODD : EVEN) + i / 2 * STEP);
        }
    };
    template <int EVEN, int ODD, int STEP> static __m512i words() {
        static constexpr Index<EVEN, ODD, STEP> index;
        return _mm512_load_si512(index.word);
    }
    // Word pairs (low[i], high[i]) of i = 0 .. 15 and 16 .. 31.
    static void zip(__m512i low, __m512i high, U* out) {
        out[0] = (U)_mm512_permutex2var_epi16(low, words<0, 32, 1>(), high);
        out[1] = (U)_mm512_permutex2var_epi16(low, words<16, 48, 1>(), high);
    }
    // The words of two vectors: those at even places, or those at odd places.
    static __m512i even(const U* x) {
        return _mm512_permutex2var_epi16((__m512i)x[0], words<0, 2, 4>(), (__m512i)x[1]);
    }
    static __m512i odd(U x, U y) { return _mm512_permutex2var_epi16((__m512i)x, words<1, 3, 4>(), (__m512i)y); }

    static void load_high(const void* p, U* out) {
        const __m512i high = load(p);
        out[0] = (U)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, words<0, 0, 1>(), high);
        out[1] = (U)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, words<16, 16, 1>(), high);
    }
    template <int BITS> static void join(const void* high, const void* low, U* out) {
        const __m512i rest = BITS == 16 ? load(low) : _mm512_cvtepi8_epi16(Avx512::half(low));
        const __m512i borrow = _mm512_srai_epi16(rest, 15);  // -1 where low is negative
        zip(BITS == 16 ? rest : _mm512_slli_epi16(rest, 8), _mm512_add_epi16(load(high), borrow), out);
    }
    template <int BITS> static void split(const U* x, void* high, void* low) {
        _mm512_storeu_si512(high, odd(x[0] + 0x8000u, x[1] + 0x8000u));
        const __m512i rest = even(x);
        if constexpr (BITS == 16) _mm512_storeu_si512(low, rest);
        else _mm256_storeu_si256(static_cast<__m256i*>(low), _mm512_cvtepi16_epi8(_mm512_srli_epi16(rest, 8)));
    }
};

}  // namespace
}  // namespace dba
