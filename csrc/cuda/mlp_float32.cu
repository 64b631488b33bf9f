// The kernels for float32, and those that no number type concerns.

#include "cuda/kernels.h"

namespace maskmoe::fused {

MASKMOE_MAKE_ALL(float)
MASKMOE_MAKE(Count)
MASKMOE_MAKE(Finish)

}  // namespace maskmoe::fused
