#include "cpu/bfloat16/dot_products.h"
#include "cpu/bfloat16/kernel_table.h"

namespace maskmoe {
const Kernels kAvx512Bf16 =
    Bfloat16Kernels<avx512bf16::DotProducts>::table(MASKMOE_ISA("avx512bf16"));
}
