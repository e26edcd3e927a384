// The vector interface of simd_scalar.h in eight lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "formats.h"
#include "simd_pair.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

struct Avx2 {
    static constexpr int W = 8;
    using F = __m256;
    using I = int32_t __attribute__((vector_size(32)));
    using U = uint32_t __attribute__((vector_size(32)));

    static F splat(float x) { return _mm256_set1_ps(x); }
    static U splat_bits(uint32_t x) { return (U)_mm256_set1_epi32(static_cast<int>(x)); }
    static U iota() { return (U)_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static U bits(F x) { return (U)x; }
    static F from_bits(U u) { return (F)u; }

    static __m128i half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static __m128i quarter(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

    static F load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
    static void store(void* p, F x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
    static U load_bits(const void* p) { return (U)_mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static I load_i8(const void* p) { return (I)_mm256_cvtepi8_epi32(quarter(p)); }
    static U load_u8(const void* p) { return (U)_mm256_cvtepu8_epi32(quarter(p)); }
    static I load_i16(const void* p) { return (I)_mm256_cvtepi16_epi32(half(p)); }
    static U load_u16(const void* p) { return (U)_mm256_cvtepu16_epi32(half(p)); }
    static void store_low8(void* p, U x) {
        const __m256i pick = _mm256_set1_epi32(0x0C080400);  // lowest byte of each lane
        __m256i packed = _mm256_shuffle_epi8((__m256i)x, pick);
        __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
        _mm_storel_epi64(static_cast<__m128i*>(p), both);
    }
    static void store_low16(void* p, U x) {
        const __m256i pick = _mm256_set1_epi64x(0x0D0C090805040100);  // lowest two bytes of each lane
        __m256i packed = _mm256_shuffle_epi8((__m256i)x, pick);
        __m128i both = _mm_unpacklo_epi64(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
        _mm_storeu_si128(static_cast<__m128i*>(p), both);
    }
    static I load_nibbles(const uint8_t* row, int64_t j) {
        int four;
        __builtin_memcpy(&four, row + j / 2, 4);
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i twice = _mm256_shuffle_epi32(bytes, 0xA0);  // byte in both 32-bit halves
        return (I)_mm256_srai_epi32(_mm256_sllv_epi32(twice, _mm256_setr_epi32(28, 24, 28, 24, 28, 24, 28, 24)), 28);
    }
    static F load_f16(const void* p) { return _mm256_cvtph_ps(half(p)); }
    static void store_f16(void* p, F x) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    static F round_f16(F x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

    static F to_float(I x) { return _mm256_cvtepi32_ps((__m256i)x); }
    static I to_int(F x) { return (I)_mm256_cvtps_epi32(x); }
    static F floor(F x) { return _mm256_floor_ps(x); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F sqrt(F x) { return _mm256_sqrt_ps(x); }
    static F quick_root(F x) { return _mm256_sqrt_ps(x); }
    static U code_from_one(F x) { return (U)to_int(x > 0.0f ? max(quick_root(x), splat(1.0f)) : x); }
    // The lowest bytes of 32 integers.
    static void store_32(uint8_t* p, const U* x) {
        const U low = splat_bits(0xFF);
        const __m256i left = _mm256_packus_epi32((__m256i)(x[0] & low), (__m256i)(x[1] & low));
        const __m256i right = _mm256_packus_epi32((__m256i)(x[2] & low), (__m256i)(x[3] & low));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(left, right), order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
    }
    static void store_group_i8(uint8_t* p, const U* x) {
        for (int k = 0; k < GROUP / W; k += 4) store_32(p + k * W, x + k);
    }
    static void store_group_u8(uint8_t* p, const U* x) { store_group_i8(p, x); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F abs(F x) { return from_bits(bits(x) & 0x7FFFFFFFu); }
    static float sum(F x) {
        __m128 s = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
        s = s + _mm_movehl_ps(s, s);
        return _mm_cvtss_f32(s + _mm_movehdup_ps(s));
    }
    static float largest(F x) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }
    static void largest_of_each(const F* x, float* out) {
        for (int i = 0; i < 8; ++i) out[i] = largest(x[i]);
    }
};

// Packing and unpacking work on each half of a register apart: quarters 0 2 1 3 on one side of them are 0 1 2 3 on the other.
template <> struct PairOps<Avx2> {
    using U = Avx2::U;
    static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
    static __m256i swapped(__m256i x) { return _mm256_permute4x64_epi64(x, 0xD8); }  // the middle quarters
    static __m256i words(__m256i x, __m256i y) { return swapped(_mm256_packus_epi32(x, y)); }  // of lanes below 2^16

    static void load_high(const void* p, U* out) {
        const __m256i high = swapped(load(p)), zero = _mm256_setzero_si256();
        out[0] = (U)_mm256_unpacklo_epi16(zero, high);
        out[1] = (U)_mm256_unpackhi_epi16(zero, high);
    }
    template <int BITS> static void join(const void* high, const void* low, U* out) {
        __m256i rest = BITS == 16 ? load(low) : _mm256_cvtepi8_epi16(Avx2::half(low));
        const __m256i borrow = _mm256_srai_epi16(rest, 15);  // -1 where low is negative
        const __m256i top = swapped(_mm256_add_epi16(load(high), borrow));
        rest = swapped(BITS == 16 ? rest : _mm256_slli_epi16(rest, 8));
        out[0] = (U)_mm256_unpacklo_epi16(rest, top);
        out[1] = (U)_mm256_unpackhi_epi16(rest, top);
    }
    template <int BITS> static void split(const U* x, void* high, void* low) {
        store(high, words((__m256i)((x[0] + 0x8000u) >> 16), (__m256i)((x[1] + 0x8000u) >> 16)));
        if constexpr (BITS == 16) {
            store(low, words((__m256i)(x[0] & 0xFFFFu), (__m256i)(x[1] & 0xFFFFu)));
        } else {
            const __m256i rest = words((__m256i)((x[0] >> 8) & 0xFFu), (__m256i)((x[1] >> 8) & 0xFFu));
            const __m128i upper = _mm256_extracti128_si256(rest, 1);
            _mm_storeu_si128(static_cast<__m128i*>(low), _mm_packus_epi16(_mm256_castsi256_si128(rest), upper));
        }
    }
};

}  // namespace
}  // namespace dba
