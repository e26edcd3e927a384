// Fills a Kernels table for one vector interface. Included by isa_*.cpp, each compiled for its own instruction set.
#pragma once

#include <type_traits>
#include <utility>

#include "accumulate.h"
#include "displacement.h"
#include "kernels.h"
#include "quantize.h"
#include "similarity.h"
#include "step.h"

namespace dba {
namespace {  // internal linkage: no instruction set may lend its code to another

template <class S, int64_t D, int64_t G> constexpr void add_global(Kernels& k) {
    k.boost[D][G] = Boost<S, D, G>::run;
    k.similarity[D][G] = Similarity<S, D, G>::run;
    if constexpr (G != GLOBAL_NONE) k.decode[G][D] = Decode<S, G, D>::run;
    if constexpr (global_is_grouped(G)) k.encode[D][G] = Encode<S, D, G>::run;
}

template <class S, int64_t D, int64_t... G>
constexpr void add_globals(Kernels& k, std::integer_sequence<int64_t, G...>) {
    (add_global<S, D, G>(k), ...);
}

template <class S, int64_t D> constexpr void add_grad(Kernels& k) {
    add_globals<S, D>(k, std::make_integer_sequence<int64_t, GLOBAL_FORMATS>());
    k.accumulate[D] = Accumulate<S, D>::run;
}

template <class S, int64_t P, int64_t D> constexpr void add_param(Kernels& k) {
    k.two_stage[P][D][STATE_FP32] = Step<S, P, D, STATE_FP32, Staged<S>>::run;
    k.two_stage[P][D][STATE_BF16] = Step<S, P, D, STATE_BF16, Staged<S>>::run;
    k.two_stage[P][D][STATE_INT8] = Step<S, P, D, STATE_INT8, Staged<S>>::run;
    k.displacement[P][D] = Displacement<S, P, D>::run;
}

template <class S, int64_t P, int64_t D, int64_t M> constexpr void add_one_stage(Kernels& k) {
    k.one_stage[P][D][M][D][GLOBAL_NONE] = Step<S, P, D, M, Boosted<S, D, GLOBAL_NONE>>::run;
    k.one_stage[P][D][M][D][GLOBAL_INT8] = Step<S, P, D, M, Boosted<S, D, GLOBAL_INT8>>::run;
    k.one_stage[P][D][M][D][GLOBAL_INT4] = Step<S, P, D, M, Boosted<S, D, GLOBAL_INT4>>::run;
}

// What most runs use, with gradients of the parameter's dtype.
template <class S> constexpr void add_hot(Kernels& k) {
    add_one_stage<S, NATIVE, FP32, STATE_FP32>(k);
    add_one_stage<S, NATIVE, FP32, STATE_INT8>(k);
    add_one_stage<S, SPLIT16, BF16, STATE_FP32>(k);
    add_one_stage<S, SPLIT16, BF16, STATE_INT8>(k);
    add_one_stage<S, SPLIT8, BF16, STATE_FP32>(k);
    add_one_stage<S, SPLIT8, BF16, STATE_INT8>(k);
}

template <class S> constexpr Kernels make_kernels() {
    Kernels k{};
    add_grad<S, FP32>(k);
    add_grad<S, BF16>(k);
    add_grad<S, FP16>(k);
    add_param<S, NATIVE, FP32>(k);
    add_param<S, NATIVE, BF16>(k);
    add_param<S, NATIVE, FP16>(k);
    add_param<S, SPLIT16, BF16>(k);
    add_param<S, SPLIT16, FP16>(k);
    add_param<S, SPLIT8, BF16>(k);
    add_param<S, SPLIT8, FP16>(k);
    add_param<S, MASTER, FP32>(k);
    add_param<S, MASTER, BF16>(k);
    add_param<S, MASTER, FP16>(k);
    add_hot<S>(k);
    return k;
}

}  // namespace
}  // namespace dba
