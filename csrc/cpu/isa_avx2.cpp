#include "masked_linear.h"
#include "simd_avx2.h"

namespace maskmoe {
const Kernels kAvx2 = MaskedLinear<avx2::Isa>::kernels("avx2");
}
