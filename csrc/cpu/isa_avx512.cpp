#include "cpu/kernel_table.h"
#include "cpu/simd_avx512.h"

namespace maskmoe {
const Kernels kAvx512 = kernels_of<avx512::Isa>(MASKMOE_ISA("avx512"));
}
