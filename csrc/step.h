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
            for (int j = 0; j < GROUP; j += S::W) {
                typename S::F boosted = S::splat(a) * Float<S, D>::load(grad, j);
                if constexpr (G != GLOBAL_NONE) {
                    typename S::F stored = Global<S, G>::load(codes, j);
                    if constexpr (global_is_grouped(G)) stored = stored * S::splat(scale);
                    boosted = S::fma(S::splat(b), stored, boosted);
                }
                S::store(out + at + j, boosted);
            }
        });
        for (int i = n; i % GROUP; ++i) out[i] = 0.0f;
    }
};

// --- state formats ----------------------------------------------------------------------------------------------------

template <class S, int64_t Format> struct State;

template <class S> struct State<S, STATE_FP32> {
    static constexpr bool GROUPED = false;
    static typename S::F load_exp_avg(bytes_t p, int j) { return S::load(p + 4 * j); }
    static typename S::F load_exp_avg_sq(bytes_t p, int j) { return S::load(p + 4 * j); }
    static void store_exp_avg(uint8_t* p, int j, typename S::F x) { S::store(p + 4 * j, x); }
    static void store_exp_avg_sq(uint8_t* p, int j, typename S::F x, typename S::U) { S::store(p + 4 * j, x); }
};

template <class S> struct State<S, STATE_BF16> {
    using Plain = Float<S, BF16>;
    static constexpr bool GROUPED = false;
    static typename S::F load_exp_avg(bytes_t p, int j) { return Plain::load(p, j); }
    static typename S::F load_exp_avg_sq(bytes_t p, int j) { return Plain::load(p, j); }
    static void store_exp_avg(uint8_t* p, int j, typename S::F x) { Plain::store(p, j, x); }
    // Stochastic: rounded to nearest, v could never decay, because 1 - beta2 is less than half a bf16 ulp.
    static void store_exp_avg_sq(uint8_t* p, int j, typename S::F x, typename S::U random) {
        S::store_low16(p + 2 * j, (S::bits(x) + (random & 0xFFFFu)) >> 16);
    }
};

template <class S> struct State<S, STATE_INT8> {
    static constexpr bool GROUPED = true;
    using F = typename S::F;
    // In units of the group's scale.
    static F load_exp_avg(bytes_t p, int j) { return expand<S>(S::load_i8(p + j)); }
    static F load_exp_avg_sq(bytes_t p, int j) {
        F code = S::to_float((typename S::I)S::load_u8(p + j)), square = code * code;
        return square * square;
    }
    static void store_exp_avg(uint8_t* p, const float* m, float inverse) {
        typename S::U codes[GROUP / S::W];
        for (int k = 0; k < GROUP / S::W; ++k) {
            F value = S::load(m + k * S::W);
            codes[k] = compress<S>(value, S::quick_root(S::abs(value) * S::splat(inverse)));
        }
        S::store_group_i8(p, codes);
    }
    // root: of v. (v / scale)^(1/4) = sqrt(sqrt(v) * sqrt(1 / scale)); at least 1 where v > 0.
    static void store_exp_avg_sq(uint8_t* p, const float* root, float inverse) {
        const F inverse_root = S::splat(__builtin_sqrtf(inverse));
        typename S::U codes[GROUP / S::W];
        for (int k = 0; k < GROUP / S::W; ++k) codes[k] = S::code_from_one(S::load(root + k * S::W) * inverse_root);
        S::store_group_u8(p, codes);
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

// Random words: element i of the whole parameter draws mix32(low half of i ^ key), a function of (seed, step, i) alone.
inline uint32_t noise_key(const StepScalars& s, uint64_t i) {
    return mix32(s.seed + s.step * 0x9E3779B9u + static_cast<uint32_t>(i >> 32) * 0x85EBCA6Bu);
}

template <class S> struct Noise {
    typename S::U words[GROUP / S::W];
    Noise(const StepScalars& s, uint64_t first) {
        uint32_t low = static_cast<uint32_t>(first);
        if (low > UINT32_MAX - (GROUP - 1)) {
            straddle(s, first);
            return;
        }
        typename S::U key = S::splat_bits(noise_key(s, first)), index = S::iota() + S::splat_bits(low);
        for (int k = 0; k < GROUP / S::W; ++k) words[k] = mix32((index + k * uint32_t{S::W}) ^ key);
    }
    void straddle(const StepScalars& s, uint64_t first) {  // the group in which the upper half of the index changes
        uint32_t each[GROUP];
        for (int j = 0; j < GROUP; ++j) each[j] = mix32(static_cast<uint32_t>(first + j) ^ noise_key(s, first + j));
        for (int k = 0; k < GROUP / S::W; ++k) words[k] = S::load_bits(each + k * S::W);
    }
};
template <class S> struct NoNoise {
    typename S::U words[GROUP / S::W] = {};
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

    // What a block of int8 state holds back until the scales of its groups are known.
    struct Pending {
        alignas(64) float exp_avg[BLOCK], root[BLOCK];
        float exp_avg_absmax[BLOCK / GROUP], exp_avg_sq_max[BLOCK / GROUP];
    };

    // grad: boosted, n <= BLOCK elements and zeros up to the end of the last group.
    static void run(const StepTarget& at, const float* grad, const StepScalars& scalars, uint64_t element, int n) {
        const Constants<S> c(scalars);
        Pending pending;
        int i = 0;
        for (; i + GROUP <= n; i += GROUP) group(advanced(at, i), grad + i, c, scalars, element + i, pending, i);
        if constexpr (Moments::GROUPED) store_pending(at, pending, i);
        if (i < n) ragged(advanced(at, i), grad + i, c, scalars, element + i, n - i);
    }

    static void group(const StepTarget& at, const float* grad, const Constants<S>& c, const StepScalars& scalars,
                      uint64_t element, Pending& pending, int i) {
        std::conditional_t<P == SPLIT8 || M == STATE_BF16, Noise<S>, NoNoise<S>> noise(scalars, element);
        F m_most = S::splat(0.0f), v_most = S::splat(0.0f), beta1 = c.beta1, beta2 = c.beta2;
        if constexpr (Moments::GROUPED) {
            beta1 = beta1 * S::splat(*at.exp_avg_scale);
            beta2 = beta2 * S::splat(*at.exp_avg_sq_scale);
        }
        for (int k = 0; k < N; ++k) {
            const int j = k * S::W;
            F g = S::load(grad + j);
            F m = S::fma(beta1, Moments::load_exp_avg(at.exp_avg, j), c.one_minus_beta1 * g);  // eq. 7
            F v = S::fma(beta2, Moments::load_exp_avg_sq(at.exp_avg_sq, j), c.one_minus_beta2 * (g * g));
            F root = S::sqrt(v);
            F denominator = S::fma(root, c.inv_sqrt_bias_correction2, c.eps);
            F param = Parameter::load(at.param, at.remainder, j);
            F change = S::fma(c.decay, param, c.step_size * m / denominator);  // eq. 8
            Parameter::store(at.param, at.remainder, j, param - change, noise.words[k]);
            if constexpr (Moments::GROUPED) {
                S::store(pending.exp_avg + i + j, m);
                S::store(pending.root + i + j, root);
                m_most = S::max(m_most, S::abs(m));
                v_most = S::max(v_most, v);
            } else {
                Moments::store_exp_avg(at.exp_avg, j, m);
                Moments::store_exp_avg_sq(at.exp_avg_sq, j, v, noise.words[k]);
            }
        }
        if constexpr (Moments::GROUPED) {
            pending.exp_avg_absmax[i / GROUP] = S::largest(m_most);
            pending.exp_avg_sq_max[i / GROUP] = S::largest(v_most);
        }
    }

    static void store_pending(const StepTarget& first, const Pending& pending, int n) {
        for (int i = 0; i < n; i += GROUP) {
            const StepTarget at = advanced(first, i);
            const Scale m(pending.exp_avg_absmax[i / GROUP], EXP_AVG_ABSMAX_VALUE);
            const Scale v(pending.exp_avg_sq_max[i / GROUP], EXP_AVG_SQ_MAX_VALUE);
            *at.exp_avg_scale = m.scale;
            *at.exp_avg_sq_scale = v.scale;
            Moments::store_exp_avg(at.exp_avg, pending.exp_avg + i, m.inverse);
            Moments::store_exp_avg_sq(at.exp_avg_sq, pending.root + i, v.inverse);
        }
    }

    // The last n < GROUP elements of a row, through zero-padded copies.
    __attribute__((noinline)) static void ragged(const StepTarget& at, const float* grad, const Constants<S>& c,
                                                 const StepScalars& scalars, uint64_t element, int n) {
        alignas(64) uint8_t param[GROUP * 4] = {}, remainder[GROUP * 4] = {}, m[GROUP * 4] = {}, v[GROUP * 4] = {};
        StepTarget copy = {param, remainder, m, v, at.exp_avg_scale, at.exp_avg_sq_scale};
        copy_elements(copy, at, n);
        Pending pending;
        group(copy, grad, c, scalars, element, pending, 0);
        if constexpr (Moments::GROUPED) store_pending(copy, pending, GROUP);
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
