// The vector interface of simd_scalar.h in eight lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "formats.h"

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
    static void store_group_i8(uint8_t* p, const U* x) {
        for (int k = 0; k < GROUP / W; ++k) store_low8(p + k * W, x[k]);
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
};

}  // namespace
}  // namespace dba
