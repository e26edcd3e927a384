#include "instantiate.h"
#include "simd_avx2.h"

namespace dba {

constexpr Kernels made = make_kernels<Avx2>();
extern const Kernels avx2_kernels = made;

}  // namespace dba
