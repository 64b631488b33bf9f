// The kernels for float16.

#include "cuda/kernels.h"

namespace maskmoe::fused {

MASKMOE_MAKE_ALL(Float16)

}  // namespace maskmoe::fused
