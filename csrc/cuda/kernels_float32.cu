// The kernels for float32, and those that do not depend on a number type.

#include "cuda/kernel_launch.h"

namespace maskmoe::fused {

MASKMOE_INSTANTIATE_ALL(float)
MASKMOE_INSTANTIATE(CountSamples)
MASKMOE_INSTANTIATE(ReduceLoss)
MASKMOE_INSTANTIATE(NarrowIds<int16_t>)
MASKMOE_INSTANTIATE(NarrowIds<int32_t>)

}  // namespace maskmoe::fused
