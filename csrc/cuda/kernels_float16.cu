// The kernels for float16.

#include "cuda/kernel_launch.h"

namespace maskmoe::fused {

MASKMOE_INSTANTIATE_ALL(Float16)

}  // namespace maskmoe::fused
