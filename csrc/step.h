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
            typename S::F grads[GROUP / S::W];
            Float<S, D>::load_group(grad, grads);
            for (int k = 0; k < GROUP / S::W; ++k) {
                typename S::F boosted = S::splat(a) * grads[k];
                if constexpr (G != GLOBAL_NONE) {
                    typename S::F stored = Global<S, G>::load(codes, k * S::W);
                    if constexpr (global_is_grouped(G)) stored = stored * S::splat(scale);
                    boosted = S::fma(S::splat(b), stored, boosted);
                }
                S::store(out + at + k * S::W, boosted);
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
        S::store_low16(p + 2 * j, (finite_or_quiet<S>(x) + (random & 0xFFFFu)) >> 16);
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
    static void store_exp_avg_sq(uint8_t* p, const float* root, float inverse_root) {
        typename S::U codes[GROUP / S::W];
        for (int k = 0; k < GROUP / S::W; ++k) codes[k] = S::code_from_one(S::load(root + k * S::W) * S::splat(inverse_root));
        S::store_group_u8(p, codes);
    }
};

// --- eqs. 7 and 8 -----------------------------------------------------------------------------------------------------

template <class S> struct Constants {
    typename S::F beta1, one_minus_beta1, beta2, one_minus_beta2, root_weight, eps, decay;
    explicit Constants(const StepScalars& s)
        : beta1(S::splat(s.beta1)), one_minus_beta1(S::splat(s.one_minus_beta1)), beta2(S::splat(s.beta2)),
          one_minus_beta2(S::splat(s.one_minus_beta2)), root_weight(S::splat(s.inv_sqrt_bias_correction2)),
          eps(S::splat(s.eps)), decay(S::splat(s.lr_weight_decay)) {
        // The step size divides the denominator: one product less per element. One that moves no weight (a learning rate
        // of 0) becomes an infinite denominator.
        const bool moves = s.step_size > 0x1p-100f;
        if (moves) root_weight = root_weight / S::splat(s.step_size);
        eps = moves ? eps / S::splat(s.step_size) : S::splat(__builtin_inff());
    }
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

// Reciprocals of the largest codes' values, as a block's scales lie side by side: exp_avg, then exp_avg_sq.
struct StateUnits {
    alignas(64) float unit[2 * Pending::GROUPS] = {};
    constexpr StateUnits() {
        for (int g = 0; g < Pending::GROUPS; ++g) {
            unit[g] = static_cast<float>(1.0 / EXP_AVG_ABSMAX_VALUE);
            unit[Pending::GROUPS + g] = static_cast<float>(1.0 / EXP_AVG_SQ_MAX_VALUE);
        }
    }
};
constexpr StateUnits STATE_UNITS;

static_assert(Pending::GROUPS == 8, "GroupOps::largest_of_each takes eight");

template <class S> struct EncodeMoments {
    static void run(const StepTarget& at, const Pending& pending, int n) {
        for (int i = 0; i + GROUP <= n; i += GROUP) {
            const int g = i / GROUP;
            State<S, STATE_INT8>::store_exp_avg(at.exp_avg + i, pending.exp_avg + i, pending.exp_avg_inverse[g]);
            State<S, STATE_INT8>::store_exp_avg_sq(at.exp_avg_sq + i, pending.root + i, pending.root_inverse[g]);
        }
    }
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

    // The largest magnitudes of each group of a block, lane by lane.
    struct Most {
        F exp_avg[Pending::GROUPS], exp_avg_sq[Pending::GROUPS];
        Most() {
            for (int i = 0; i < Pending::GROUPS; ++i) exp_avg[i] = exp_avg_sq[i] = S::splat(0.0f);
        }
    };

    static void run(const StepTarget& at, const float* grad, const StepScalars& scalars, uint64_t element, int n,
                    Pending& pending) {
        const Constants<S> c(scalars);
        Most most;
        int i = 0;
        for (; i + GROUP <= n; i += GROUP)
            group(advanced(at, i), grad + i, c, scalars, element + i, pending, most, i / GROUP);
        if constexpr (Moments::GROUPED) settle_scales(at, pending, most, i / GROUP);
        if (i < n) ragged(advanced(at, i), grad + i, c, scalars, element + i, n - i);
    }

    static void group(const StepTarget& at, const float* grad, const Constants<S>& c, const StepScalars& scalars,
                      uint64_t element, Pending& pending, Most& most, int g_index) {
        std::conditional_t<P == SPLIT8 || M == STATE_BF16, Noise<S>, NoNoise<S>> noise(scalars, element);
        F m_most = S::splat(0.0f), v_most = S::splat(0.0f), beta1 = c.beta1, beta2 = c.beta2, params[N];
        if constexpr (Moments::GROUPED) {
            beta1 = beta1 * S::splat(*at.exp_avg_scale);
            beta2 = beta2 * S::splat(*at.exp_avg_sq_scale);
        }
        Parameter::load_group(at.param, at.remainder, params);
        for (int k = 0; k < N; ++k) {
            const int j = k * S::W;
            F g = S::load(grad + j);
            F m = S::fma(beta1, Moments::load_exp_avg(at.exp_avg, j), c.one_minus_beta1 * g);  // eq. 7
            F v = S::fma(beta2, Moments::load_exp_avg_sq(at.exp_avg_sq, j), c.one_minus_beta2 * (g * g));
            F root = S::sqrt(v);
            F denominator = S::fma(root, c.root_weight, c.eps);  // over the step size
            F change = S::fma(c.decay, params[k], m / denominator);  // eq. 8
            params[k] = params[k] - change;
            if constexpr (Moments::GROUPED) {
                S::store(pending.exp_avg + g_index * GROUP + j, m);
                S::store(pending.root + g_index * GROUP + j, root);
                m_most = S::max(m_most, S::abs(m));
                v_most = S::max(v_most, v);
            } else {
                Moments::store_exp_avg(at.exp_avg, j, m);
                Moments::store_exp_avg_sq(at.exp_avg_sq, j, v, noise.words[k]);
            }
        }
        Parameter::store_group(at.param, at.remainder, params, noise.words);
        if constexpr (Moments::GROUPED) {
            most.exp_avg[g_index] = m_most;
            most.exp_avg_sq[g_index] = v_most;
        }
    }

    // New scales of the groups of a block, and in pending what encoding multiplies by.
    static void settle_scales(const StepTarget& at, Pending& pending, const Most& most, int groups) {
        constexpr int EACH = Pending::GROUPS, BOTH = 2 * EACH;  // those of exp_avg, then those of exp_avg_sq
        alignas(64) float largest[BOTH], scale[BOTH], inverse[BOTH], inverse_root[BOTH];
        GroupOps<S>::largest_of_each(most.exp_avg, largest);
        GroupOps<S>::largest_of_each(most.exp_avg_sq, largest + EACH);
        for (int g = 0; g < EACH; ++g) {  // a group whose second moment has left fp32 starts anew: an infinite scale is NaN
            const bool fits = largest[EACH + g] < __builtin_inff();
            largest[g] = fits ? largest[g] : 0.0f;
            largest[EACH + g] = fits ? largest[EACH + g] : 0.0f;
        }
        for (int i = 0; i < BOTH; i += S::W) {
            const Scale<S> s(S::load(largest + i), S::load(STATE_UNITS.unit + i));
            S::store(scale + i, s.scale);
            S::store(inverse + i, s.inverse);
            S::store(inverse_root + i, S::sqrt(s.inverse));
        }
        __builtin_memcpy(pending.exp_avg_inverse, inverse, sizeof pending.exp_avg_inverse);
        __builtin_memcpy(pending.root_inverse, inverse_root + EACH, sizeof pending.root_inverse);
        for (int g = 0; g < groups; ++g) {
            at.exp_avg_scale[g] = scale[g];
            at.exp_avg_sq_scale[g] = scale[EACH + g];
        }
    }

    // The last n < GROUP elements of a row, through zero-padded copies.
    __attribute__((noinline)) static void ragged(const StepTarget& at, const float* grad, const Constants<S>& c,
                                                 const StepScalars& scalars, uint64_t element, int n) {
        alignas(64) uint8_t param[GROUP * 4] = {}, remainder[GROUP * 4] = {}, m[GROUP * 4] = {}, v[GROUP * 4] = {};
        StepTarget copy = {param, remainder, m, v, at.exp_avg_scale, at.exp_avg_sq_scale};
        copy_elements(copy, at, n);
        Pending pending;
        Most most;
        group(copy, grad, c, scalars, element, pending, most, 0);
        if constexpr (Moments::GROUPED) {
            settle_scales(copy, pending, most, 1);
            EncodeMoments<S>::run(copy, pending, GROUP);
        }
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
