// One optimizer step of a run of elements: boost (eq. 3), moments (eq. 7), corrected AdamW update (eq. 8).
//
// Two stages with a block of fp32 in the first-level cache between them, so that the number of compiled kernels is
// (gradient dtypes x global formats) + (parameter formats x state formats) and not their product.
#pragma once

#include <type_traits>

#include "blocks.h"
#include "kernels.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

// --- eq. 3: g_B = a * g_D + b * g_G -----------------------------------------------------------------------------------

template <class S, int64_t D, int64_t G> struct Boost {
    // out: fp32, n elements and zeros up to the end of the last group.
    static void run(const GradSource& in, float a, float b, int n, float* out) {
        each_group<D, G>(in, n, [&](bytes_t grad, bytes_t codes, float scale, int at) {
            const typename S::F wa = S::splat(a), wb = S::splat(b * scale);
            for (int j = 0; j < GROUP; j += S::W) {
                typename S::F boosted = wa * Float<S, D>::load(grad, j);
                if constexpr (G != GLOBAL_NONE) boosted = S::fma(wb, Global<S, G>::load(codes, j), boosted);
                S::store(out + at + j, boosted);
            }
        });
        for (int i = n; i % GROUP; ++i) out[i] = 0.0f;
    }
};

// --- state formats ----------------------------------------------------------------------------------------------------

template <class S, int64_t Format> struct State {  // fp32, bf16
    using Plain = Float<S, Format == STATE_FP32 ? FP32 : BF16>;
    static constexpr bool GROUPED = false;
    static typename S::F load_exp_avg(bytes_t p, typename S::F, int j) { return Plain::load(p, j); }
    static typename S::F load_exp_avg_sq(bytes_t p, typename S::F, int j) { return Plain::load(p, j); }
    static void store_exp_avg(uint8_t* p, int j, typename S::F x) { Plain::store(p, j, x); }
    static void store_exp_avg_sq(uint8_t* p, int j, typename S::F x) { Plain::store(p, j, x); }
};

template <class S> struct State<S, STATE_INT8> {
    static constexpr bool GROUPED = true;
    using F = typename S::F;
    static constexpr int N = GROUP / S::W;

    static F load_exp_avg(bytes_t p, F scale, int j) {
        F code = S::to_float(S::load_i8(p + j));
        return code * S::abs(code) * scale;
    }
    static F load_exp_avg_sq(bytes_t p, F scale, int j) {
        F code = S::to_float((typename S::I)S::load_u8(p + j)), square = code * code;
        return square * square * scale;
    }
    static F absmax(const F* x) {
        F most = S::abs(x[0]);
        for (int k = 1; k < N; ++k) most = S::max(most, S::abs(x[k]));
        return S::splat(S::largest(most));
    }
    static void store_exp_avg(uint8_t* p, float* scale, const F* m) {
        Scale s(S::largest(absmax(m)), EXP_AVG_ABSMAX_VALUE);
        *scale = s.scale;
        for (int k = 0; k < N; ++k) {
            F magnitude = S::sqrt(S::abs(m[k]) * S::splat(s.inverse));
            typename S::U sign = S::bits(m[k]) & 0x80000000u;
            S::store_low8(p + k * S::W, (typename S::U)S::to_int(S::from_bits(S::bits(magnitude) | sign)));
        }
    }
    static void store_exp_avg_sq(uint8_t* p, float* scale, const F* v) {
        Scale s(S::largest(absmax(v)), EXP_AVG_SQ_MAX_VALUE);
        *scale = s.scale;
        for (int k = 0; k < N; ++k) {
            F scaled = v[k] * S::splat(s.inverse), zero = S::splat(0.0f);
            F code = S::sqrt(S::sqrt(scaled));
            code = scaled > zero ? S::max(code, S::splat(1.0f)) : code;
            S::store_low8(p + k * S::W, (typename S::U)S::to_int(code));
        }
    }
};

// --- eqs. 7 and 8 -----------------------------------------------------------------------------------------------------

template <class S> struct Constants {
    typename S::F beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, eps, decay;
    explicit Constants(const StepScalars& s)
        : beta1(S::splat(s.beta1)), one_minus_beta1(S::splat(s.one_minus_beta1)), beta2(S::splat(s.beta2)),
          one_minus_beta2(S::splat(s.one_minus_beta2)), step_size(S::splat(s.step_size)),
          inv_sqrt_bias_correction2(S::splat(s.inv_sqrt_bias_correction2)), eps(S::splat(s.eps)),
          decay(S::splat(s.lr_weight_decay)) {}
};

// Random bits in [0, 255] of element i of the whole parameter, a function of (seed, step, i) alone.
inline uint32_t noise_key(const StepScalars& s, uint64_t i) {
    return mix32(s.seed + s.step * 0x9E3779B9u + static_cast<uint32_t>(i >> 32) * 0x85EBCA6Bu);
}

template <class S> struct Noise {
    typename S::U bytes[GROUP / S::W];
    Noise(const StepScalars& s, uint64_t first) {
        uint32_t low = static_cast<uint32_t>(first);
        if (low > UINT32_MAX - (GROUP - 1)) {
            straddle(s, first);
            return;
        }
        typename S::U key = S::splat_bits(noise_key(s, first)), index = S::iota() + S::splat_bits(low);
        for (int k = 0; k < GROUP / S::W; ++k) bytes[k] = mix32((index + k * uint32_t{S::W}) ^ key) >> 24;
    }
    void straddle(const StepScalars& s, uint64_t first) {  // the group in which the upper half of the index changes
        uint32_t each[GROUP];
        for (int j = 0; j < GROUP; ++j) each[j] = mix32(static_cast<uint32_t>(first + j) ^ noise_key(s, first + j)) >> 24;
        for (int k = 0; k < GROUP / S::W; ++k) bytes[k] = S::load_bits(each + k * S::W);
    }
};
template <class S> struct NoNoise {
    typename S::U bytes[GROUP / S::W] = {};
    NoNoise(const StepScalars&, uint64_t) {}
};

template <class S, int64_t P, int64_t D, int64_t M> struct Update {
    using F = typename S::F;
    using Parameter = Param<S, P, D>;
    using Moments = State<S, M>;
    static constexpr int N = GROUP / S::W;

    static StepTarget advanced(const StepTarget& at, int64_t i) {
        const int64_t group = Moments::GROUPED ? i / GROUP : 0;
        return {at.param + i * dtype_bytes(D),  at.remainder + i * remainder_bytes(P), at.exp_avg + i * state_bytes(M),
                at.exp_avg_sq + i * state_bytes(M), at.exp_avg_scale + group, at.exp_avg_sq_scale + group};
    }

    // grad: boosted, n elements and zeros up to the end of the last group.
    static void run(const StepTarget& at, const float* grad, const StepScalars& scalars, uint64_t element, int n) {
        const Constants<S> c(scalars);
        int i = 0;
        for (; i + GROUP <= n; i += GROUP) group(advanced(at, i), grad + i, c, scalars, element + i);
        if (i < n) ragged(advanced(at, i), grad + i, c, scalars, element + i, n - i);
    }

    static void group(const StepTarget& at, const float* grad, const Constants<S>& c, const StepScalars& scalars,
                      uint64_t element) {
        std::conditional_t<P == SPLIT8, Noise<S>, NoNoise<S>> noise(scalars, element);
        F m_scale = S::splat(0.0f), v_scale = S::splat(0.0f), m[N], v[N];
        if constexpr (Moments::GROUPED) m_scale = S::splat(*at.exp_avg_scale), v_scale = S::splat(*at.exp_avg_sq_scale);
        for (int k = 0; k < N; ++k) {
            const int j = k * S::W;
            F g = S::load(grad + j);
            m[k] = S::fma(c.beta1, Moments::load_exp_avg(at.exp_avg, m_scale, j), c.one_minus_beta1 * g);  // eq. 7
            v[k] = S::fma(c.beta2, Moments::load_exp_avg_sq(at.exp_avg_sq, v_scale, j), c.one_minus_beta2 * (g * g));
            F denominator = S::fma(S::sqrt(v[k]), c.inv_sqrt_bias_correction2, c.eps);
            F param = Parameter::load(at.param, at.remainder, j);
            F change = S::fma(c.decay, param, S::divide(c.step_size * m[k], denominator));  // eq. 8
            Parameter::store(at.param, at.remainder, j, param - change, noise.bytes[k]);
            if constexpr (!Moments::GROUPED) {
                Moments::store_exp_avg(at.exp_avg, j, m[k]);
                Moments::store_exp_avg_sq(at.exp_avg_sq, j, v[k]);
            }
        }
        if constexpr (Moments::GROUPED) {
            Moments::store_exp_avg(at.exp_avg, at.exp_avg_scale, m);
            Moments::store_exp_avg_sq(at.exp_avg_sq, at.exp_avg_sq_scale, v);
        }
    }

    // The last n < GROUP elements of a row, through zero-padded copies.
    __attribute__((noinline)) static void ragged(const StepTarget& at, const float* grad, const Constants<S>& c,
                                                 const StepScalars& scalars, uint64_t element, int n) {
        alignas(64) uint8_t param[GROUP * 4] = {}, remainder[GROUP * 4] = {}, m[GROUP * 4] = {}, v[GROUP * 4] = {};
        StepTarget copy = {param, remainder, m, v, at.exp_avg_scale, at.exp_avg_sq_scale};
        copy_elements(copy, at, n);
        group(copy, grad, c, scalars, element);
        copy_elements(at, copy, n);
    }
    static void copy_elements(const StepTarget& to, const StepTarget& from, int n) {
        __builtin_memcpy(to.param, from.param, n * dtype_bytes(D));
        if (P != NATIVE) __builtin_memcpy(to.remainder, from.remainder, n * remainder_bytes(P));
        __builtin_memcpy(to.exp_avg, from.exp_avg, n * state_bytes(M));
        __builtin_memcpy(to.exp_avg_sq, from.exp_avg_sq, n * state_bytes(M));
    }
};

}  // namespace
}  // namespace dba
