// The kernels for float32 in memory with products of TF32.

#include "cuda/kernels.h"

namespace maskmoe::fused {

MASKMOE_MAKE_PRODUCTS(Tf32)

}  // namespace maskmoe::fused
