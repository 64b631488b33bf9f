// The kernels for bfloat16.

#include "cuda/kernels.h"

namespace maskmoe::fused {

MASKMOE_MAKE_ALL(Bfloat16)

}  // namespace maskmoe::fused
