#include "masked_linear.h"
#include "simd_avx512.h"

namespace maskmoe {
const Kernels kAvx512 = MaskedLinear<avx512::Isa>::kernels("avx512");
}
