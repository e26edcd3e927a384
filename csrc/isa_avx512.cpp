#include "instantiate.h"
#include "simd_avx512.h"

namespace dba {

constexpr Kernels made = make_kernels<Avx512>();
extern const Kernels avx512_kernels = made;

}  // namespace dba
