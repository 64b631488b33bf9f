// The kernels for float32 in memory with TF32 products.

#include "cuda/kernel_launch.h"

namespace maskmoe::fused {

MASKMOE_INSTANTIATE_TILES(Tf32)

}  // namespace maskmoe::fused
