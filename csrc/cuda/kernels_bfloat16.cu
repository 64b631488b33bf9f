// The kernels for bfloat16.

#include "cuda/kernel_launch.h"

namespace maskmoe::fused {

MASKMOE_INSTANTIATE_ALL(Bfloat16)

}  // namespace maskmoe::fused
