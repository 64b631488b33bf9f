#include "cpu/kernel_table.h"
#include "cpu/simd_avx2.h"

namespace maskmoe {
const Kernels kAvx2 = kernels_of<avx2::Isa>("avx2");
}
