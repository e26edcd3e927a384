#include "instantiate.h"
#include "simd_scalar.h"

namespace dba {

constexpr Kernels made = make_kernels<Scalar>();
extern const Kernels scalar_kernels = made;

}  // namespace dba
