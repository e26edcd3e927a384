// One optimizer step of a run of elements: boost (eq. 3), moments (eq. 7), corrected AdamW update (eq. 8).
//
// In one stage where people use the combination: the boosted gradient stays in registers. For the rest in two, with a
// block of boosted gradients in the first-level cache between them, so that the number of compiled kernels is (gradient
// dtypes x global formats) + (parameter formats x state formats) and not their product. Both run the same code.
#pragma once

#include <type_traits>
#include <utility>

#include "blocks.h"
#include "kernels.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

// --- eq. 3: g_B = a * g_D + b * g_G -----------------------------------------------------------------------------------

template <class S, int64_t D, int64_t G>
inline void boosted_pair(bytes_t grad, bytes_t codes, float scale, float a, float b, int j, typename S::F* out) {
    Float<S, D>::load_pair(grad, j, out);
    for (int k = 0; k < 2; ++k) {
        out[k] = S::splat(a) * out[k];
        if constexpr (G != GLOBAL_NONE) {
            typename S::F stored = Global<S, G>::load(codes, j + k * S::W);
            if constexpr (global_is_grouped(G)) stored = stored * S::splat(scale);
            out[k] = S::fma(S::splat(b), stored, out[k]);
        }
    }
}

template <class S, int64_t D, int64_t G> struct Boost {
    static void run(const GradSource& in, int64_t i, float a, float b, int n, float* out) {
        each_group<D, G>(advanced<D, G>(in, i), n, [&](bytes_t grad, bytes_t codes, float scale, int at) {
            for (int j = 0; j < GROUP; j += 2 * S::W) {
                typename S::F boosted[2];
                boosted_pair<S, D, G>(grad, codes, scale, a, b, j, boosted);
                for (int k = 0; k < 2; ++k) S::store(out + at + j + k * S::W, boosted[k]);
            }
        });
        for (int k = n; k % GROUP; ++k) out[k] = 0.0f;
    }
};

// Where the update gets boosted gradients from, pair by pair: prepare() announces the next block, group() one of its groups.

// One stage.
template <class S, int64_t D, int64_t G> class Boosted {
public:
    struct Group {
        bytes_t grad, codes;
        float scale, a, b;
        void pair(int j, typename S::F* out) const { boosted_pair<S, D, G>(grad, codes, scale, a, b, j, out); }
    };
    Boosted(const GradSource& in, Kernels::Boost*, const StepScalars& s)
        : in_(in), a_(s.grad_weight), b_(s.global_weight) {}
    void prepare(int64_t, int) {}
    Group group(int64_t i) const {
        const GradSource at = advanced<D, G>(in_, i);
        return {at.grad, at.codes, global_is_grouped(G) ? *at.scales : 1.0f, a_, b_};
    }
    // The last, ragged group: body(its group).
    template <class Body> void ragged(int64_t i, int n, Body&& body) {
        const PaddedGroup<D, G> padded(in_, i, n);
        body(Group{padded.grad, padded.codes, global_is_grouped(G) ? *padded.scale : 1.0f, a_, b_});
    }

private:
    const GradSource& in_;
    float a_, b_;
};

// Two stages.
template <class S> class Staged {
public:
    struct Group {
        const float* grad;
        void pair(int j, typename S::F* out) const {
            for (int k = 0; k < 2; ++k) out[k] = S::load(grad + j + k * S::W);
        }
    };
    Staged(const GradSource& in, Kernels::Boost* boost, const StepScalars& s)
        : in_(in), boost_(boost), a_(s.grad_weight), b_(s.global_weight) {}
    void prepare(int64_t i, int n) { boost_(in_, first_ = i, a_, b_, n, block_); }
    Group group(int64_t i) const { return {block_ + (i - first_)}; }
    template <class Body> void ragged(int64_t i, int n, Body&& body) {
        prepare(i, n);
        body(group(i));
    }

private:
    const GradSource& in_;
    Kernels::Boost* boost_;
    float a_, b_;
    int64_t first_ = 0;
    alignas(64) float block_[BLOCK];
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
        S::store_low16(p + 2 * j, (number_or_quiet<S>(x) + (random & 0xFFFFu)) >> 16);
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
        for (int k = 0; k < GROUP / S::W; ++k)
            codes[k] = S::code_from_one(S::load(root + k * S::W) * S::splat(inverse_root));
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

template <class S> class Noise {
public:
    Noise(const StepScalars& s, uint64_t first)
        : straddles_(static_cast<uint32_t>(first) > UINT32_MAX - (GROUP - 1)), key_(S::splat_bits(noise_key(s, first))),
          index_(S::iota() + S::splat_bits(static_cast<uint32_t>(first))) {
        if (straddles_) straddle(s, first);
    }
    void pair(int j, typename S::U* out) const {
        for (int k = 0; k < 2; ++k, j += S::W)
            out[k] = __builtin_expect(straddles_, 0) ? S::load_bits(each_ + j)
                                                     : mix32((index_ + static_cast<uint32_t>(j)) ^ key_);
    }

private:
    __attribute__((noinline)) void straddle(const StepScalars& s, uint64_t first) {
        for (int j = 0; j < GROUP; ++j) each_[j] = mix32(static_cast<uint32_t>(first + j) ^ noise_key(s, first + j));
    }
    const bool straddles_;  // this is the group in which the upper half of the index changes
    const typename S::U key_, index_;
    uint32_t each_[GROUP];
};
template <class S> struct NoNoise {
    NoNoise(const StepScalars&, uint64_t) {}
    void pair(int, typename S::U* out) const { out[0] = out[1] = S::splat_bits(0); }
};

// Moments of a block of int8 state, waiting for the scales of their groups. Scales take a chain of slow operations: between
// settling them and encoding goes the next block's update, so that nothing waits for them.
struct Pending {
    static constexpr int GROUPS = BLOCK / GROUP;
    alignas(64) float exp_avg[BLOCK], root[BLOCK];  // root of exp_avg_sq
    float exp_avg_inverse[GROUPS], root_inverse[GROUPS];  // reciprocals of the scale, of the root of the scale
    StepTarget at;
    int n;
};
static_assert(Pending::GROUPS == 8, "S::largest_of_each takes eight");

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

// What becomes of new moments, group by group: floating-point ones are stored at once.
template <class S, int64_t M> class Moments {
    using F = typename S::F;

public:
    using Format = State<S, M>;
    static constexpr bool GROUPED = false;
    struct Group {
        const StepTarget& at;
        void keep(int j, F m, F v, F, typename S::U random) {
            Format::store_exp_avg(at.exp_avg, j, m);
            Format::store_exp_avg_sq(at.exp_avg_sq, j, v, random);
        }
    };
    void begin(const StepTarget&, int) {}
    Group open(const StepTarget& at, int) { return {at}; }
    void close(int, const Group&) {}
    void end() {}
    void finish() {}
};

// int8 ones wait for their scales, block by block.
template <class S> class Moments<S, STATE_INT8> {
    using F = typename S::F;

public:
    using Format = State<S, STATE_INT8>;
    static constexpr bool GROUPED = true;
    struct Group {
        float *exp_avg, *root;
        F most_exp_avg, most_exp_avg_sq;  // lane by lane
        void keep(int j, F m, F v, F its_root, typename S::U) {
            S::store(exp_avg + j, m);
            S::store(root + j, its_root);
            most_exp_avg = S::max(most_exp_avg, S::abs(m));
            most_exp_avg_sq = S::max(most_exp_avg_sq, v);
        }
    };
    Moments() { blocks_[0].n = blocks_[1].n = 0; }
    void begin(const StepTarget& at, int n) {
        now_->at = at;
        now_->n = n;
        for (int g = 0; g < Pending::GROUPS; ++g) most_exp_avg_[g] = most_exp_avg_sq_[g] = S::splat(0.0f);
    }
    Group open(const StepTarget&, int g) {
        return {now_->exp_avg + g * GROUP, now_->root + g * GROUP, S::splat(0.0f), S::splat(0.0f)};
    }
    void close(int g, const Group& group) {
        most_exp_avg_[g] = group.most_exp_avg;
        most_exp_avg_sq_[g] = group.most_exp_avg_sq;
    }
    void end() {
        settle_scales();
        encode(*before_);
        std::swap(now_, before_);
    }
    void finish() { encode(*before_); }

private:
    // New scales of the groups of the block, and what encoding multiplies by.
    void settle_scales() {
        constexpr int EACH = Pending::GROUPS, BOTH = 2 * EACH;  // those of exp_avg, then those of exp_avg_sq
        alignas(64) float largest[BOTH], scale[BOTH], inverse[BOTH], inverse_root[BOTH];
        S::largest_of_each(most_exp_avg_, largest);
        S::largest_of_each(most_exp_avg_sq_, largest + EACH);
        for (int g = 0; g < EACH;
             ++g) {  // a group whose second moment has left fp32 starts anew: an infinite scale is NaN
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
        __builtin_memcpy(now_->exp_avg_inverse, inverse, sizeof now_->exp_avg_inverse);
        __builtin_memcpy(now_->root_inverse, inverse_root + EACH, sizeof now_->root_inverse);
        for (int g = 0; g < now_->n / GROUP; ++g) {
            now_->at.exp_avg_scale[g] = scale[g];
            now_->at.exp_avg_sq_scale[g] = scale[EACH + g];
        }
    }
    static void encode(Pending& pending) {
        for (int i = 0; i < pending.n; i += GROUP) {
            const int g = i / GROUP;
            Format::store_exp_avg(pending.at.exp_avg + i, pending.exp_avg + i, pending.exp_avg_inverse[g]);
            Format::store_exp_avg_sq(pending.at.exp_avg_sq + i, pending.root + i, pending.root_inverse[g]);
        }
        pending.n = 0;
    }

    F most_exp_avg_[Pending::GROUPS], most_exp_avg_sq_[Pending::GROUPS];
    Pending blocks_[2];
    Pending *now_ = blocks_, *before_ = blocks_ + 1;
};

template <class S, int64_t P, int64_t D, int64_t M, class Grad> struct Step {
    using F = typename S::F;
    using Parameter = Param<S, P, D>;
    using NewMoments = Moments<S, M>;
    static constexpr int PAIR = 2 * S::W;
    using Random = std::conditional_t<P == SPLIT8 || M == STATE_BF16, Noise<S>, NoNoise<S>>;

    static StepTarget advanced(const StepTarget& at, int64_t i) {
        const int64_t group = NewMoments::GROUPED ? i / GROUP : 0;
        return {at.param + i * dtype_bytes(D),   at.remainder + i * remainder_bytes(P),
                at.exp_avg + i * state_bytes(M), at.exp_avg_sq + i * state_bytes(M),
                at.exp_avg_scale + group,        at.exp_avg_sq_scale + group};
    }

    static void run(const StepTarget& at, const GradSource& in, Kernels::Boost* boost, const StepScalars& scalars,
                    uint64_t element, int64_t n) {
        const Constants<S> c(scalars);
        Grad grad(in, boost, scalars);
        NewMoments moments;
        const int64_t whole = n / GROUP * GROUP;
        for (int64_t i = 0; i < whole; i += BLOCK) {
            const int count = static_cast<int>(whole - i < BLOCK ? whole - i : BLOCK);
            grad.prepare(i, count);
            moments.begin(advanced(at, i), count);
            for (int64_t k = i; k < i + count; k += GROUP)
                group(advanced(at, k), grad.group(k), c, Random(scalars, element + k), moments, (k - i) / GROUP);
            moments.end();
        }
        moments.finish();
        if (whole == n) return;
        const int rest = static_cast<int>(n - whole);
        grad.ragged(whole, rest, [&](const typename Grad::Group& its) {
            ragged(advanced(at, whole), its, c, Random(scalars, element + whole), rest);
        });
    }

    static void group(const StepTarget& at, const typename Grad::Group& grad, const Constants<S>& c,
                      const Random& random, NewMoments& moments, int g_index) {
        using Format = typename NewMoments::Format;
        F beta1 = c.beta1, beta2 = c.beta2;
        if constexpr (NewMoments::GROUPED) {
            beta1 = beta1 * S::splat(*at.exp_avg_scale);
            beta2 = beta2 * S::splat(*at.exp_avg_sq_scale);
        }
        auto kept = moments.open(at, g_index);
        for (int first = 0; first < GROUP; first += PAIR) {
            F g[2], m[2], root[2];
            typename S::U noise[2];
            grad.pair(first, g);
            random.pair(first, noise);
            for (int k = 0; k < 2; ++k) {
                const int j = first + k * S::W;
                m[k] = S::fma(beta1, Format::load_exp_avg(at.exp_avg, j), c.one_minus_beta1 * g[k]);  // eq. 7
                F v = S::fma(beta2, Format::load_exp_avg_sq(at.exp_avg_sq, j), c.one_minus_beta2 * (g[k] * g[k]));
                root[k] = S::sqrt(v);
                kept.keep(j, m[k], v, root[k], noise[k]);
            }
            if constexpr (!NewMoments::GROUPED) weights(at, first, c, m, root, noise);
        }
        moments.close(g_index, kept);
        // Moments that are kept anyway are read again: two short chains of dependent operations overlap better than a long one.
        if constexpr (NewMoments::GROUPED)
            for (int first = 0; first < GROUP; first += PAIR) {
                F m[2], root[2];
                typename S::U noise[2];
                random.pair(first, noise);
                for (int k = 0; k < 2; ++k) {
                    m[k] = S::load(kept.exp_avg + first + k * S::W);
                    root[k] = S::load(kept.root + first + k * S::W);
                }
                weights(at, first, c, m, root, noise);
            }
    }

    // eq. 8
    static void weights(const StepTarget& at, int first, const Constants<S>& c, const F* m, const F* root,
                        const typename S::U* noise) {
        F params[2];
        Parameter::load_pair(at.param, at.remainder, first, params);
        for (int k = 0; k < 2; ++k) {
            F denominator = S::fma(root[k], c.root_weight, c.eps);  // over the step size
            F change = S::fma(c.decay, params[k], m[k] / denominator);
            params[k] = params[k] - change;
        }
        Parameter::store_pair(at.param, at.remainder, first, params, noise);
    }

    // The last n < GROUP elements of a row, through zero-padded copies.
    __attribute__((noinline)) static void ragged(const StepTarget& at, const typename Grad::Group& grad,
                                                 const Constants<S>& c, const Random& random, int n) {
        alignas(64) uint8_t param[GROUP * 4] = {}, remainder[GROUP * 4] = {}, m[GROUP * 4] = {}, v[GROUP * 4] = {};
        StepTarget copy = {param, remainder, m, v, at.exp_avg_scale, at.exp_avg_sq_scale};
        copy_elements(copy, at, n);
        NewMoments moments;
        moments.begin(copy, GROUP);
        group(copy, grad, c, random, moments, 0);
        moments.end();
        moments.finish();
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
