// Fills a Kernels table for one vector interface. Included by isa_*.cpp, each compiled for its own instruction set.
#pragma once

#include <type_traits>
#include <utility>

#include "accumulate.h"
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
    k.update[P][D][STATE_FP32] = Update<S, P, D, STATE_FP32>::run;
    k.update[P][D][STATE_BF16] = Update<S, P, D, STATE_BF16>::run;
    k.update[P][D][STATE_INT8] = Update<S, P, D, STATE_INT8>::run;
}

template <class S> constexpr Kernels make_kernels() {
    Kernels k{};
    add_grad<S, FP32>(k);
    add_grad<S, BF16>(k);
    add_grad<S, FP16>(k);
    k.encode_moments[STATE_INT8] = EncodeMoments<S>::run;
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
    return k;
}

}  // namespace
}  // namespace dba
