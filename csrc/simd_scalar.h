// The vector interface with one lane, in plain C++: the portable baseline. simd_avx2.h and simd_avx512.h offer the same.
// F, I, U are float, int32 and uint32 lanes; + - * / & | ^ << >> ?: act per lane in all three.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

struct Scalar {
    static constexpr int W = 1;
    using F = float;
    using I = int32_t;
    using U = uint32_t;

    static F splat(float x) { return x; }
    static U splat_bits(uint32_t x) { return x; }
    static U iota() { return 0; }
    static U bits(F x) {
        U u;
        std::memcpy(&u, &x, 4);
        return u;
    }
    static F from_bits(U u) {
        F x;
        std::memcpy(&x, &u, 4);
        return x;
    }

    template <class T> static T read(const void* p) {
        T x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    template <class T> static void write(void* p, T x) { std::memcpy(p, &x, sizeof x); }

    static F load(const void* p) { return read<float>(p); }
    static void store(void* p, F x) { write(p, x); }
    static U load_bits(const void* p) { return read<uint32_t>(p); }
    static I load_i8(const void* p) { return read<int8_t>(p); }
    static U load_u8(const void* p) { return read<uint8_t>(p); }
    static I load_i16(const void* p) { return read<int16_t>(p); }
    static U load_u16(const void* p) { return read<uint16_t>(p); }
    static void store_low8(void* p, U x) { write(p, static_cast<uint8_t>(x)); }
    static void store_low16(void* p, U x) { write(p, static_cast<uint16_t>(x)); }

    // Elements j .. j + W of a row of packed nibbles, sign-extended.
    static I load_nibbles(const uint8_t* row, int64_t j) {
        uint32_t nibble = (row[j / 2] >> (4 * (j % 2))) & 0xF;
        return static_cast<int32_t>(nibble ^ 8) - 8;
    }

    static F load_f16(const void* p) {
        uint32_t h = read<uint16_t>(p), magnitude = h & 0x7FFF;
        F value = magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f
                                    : from_bits((magnitude << 13) + (magnitude < 0x7C00 ? 112u << 23 : 224u << 23));
        return from_bits(bits(value) | ((h & 0x8000) << 16));
    }
    static void store_f16(void* p, F x) {
        uint32_t sign = (bits(x) >> 16) & 0x8000, magnitude = bits(x) & 0x7FFFFFFF, h;
        if (magnitude > 0x7F800000) h = 0x7E00 | ((magnitude >> 13) & 0x3FF);  // NaN keeps its payload
        else if (magnitude >= 0x477FF000) h = 0x7C00;  // rounds to 65536 or more
        else if (magnitude < 0x38800000) h = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);  // ulp(0.5) = 2^-24
        else h = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        write(p, static_cast<uint16_t>(sign | h));
    }

    static F round_f16(F x) {
        uint16_t h;
        store_f16(&h, x);
        return load_f16(&h);
    }

    static F to_float(I x) { return static_cast<float>(x); }
    static I to_int(F x) { return static_cast<int32_t>(std::lrintf(x)); }  // nearest, ties to even
    static F floor(F x) { return std::floor(x); }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F sqrt(F x) { return std::sqrt(x); }
    static F quick_root(F x) { return std::sqrt(x); }
    static U code_from_one(F x) { return static_cast<U>(to_int(x > 0.0f ? max(quick_root(x), 1.0f) : x)); }  // 0 for 0
    static void store_group_i8(uint8_t* p, const U* x) {
        for (int k = 0; k < GROUP / W; ++k) store_low8(p + k * W, x[k]);
    }
    static void store_group_u8(uint8_t* p, const U* x) { store_group_i8(p, x); }
    static F max(F a, F b) { return a > b ? a : b; }
    static F abs(F x) { return from_bits(bits(x) & 0x7FFFFFFF); }
    static float sum(F x) { return x; }
    static float largest(F x) { return x; }
    static void largest_of_each(const F* x, float* out) {  // of eight vectors: as many as a block has groups
        for (int i = 0; i < 8; ++i) out[i] = x[i];
    }
};

}  // namespace
}  // namespace dba
