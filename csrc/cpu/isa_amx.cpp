#include "cpu/amx/products.h"
#include "cpu/bfloat16/kernel_table.h"

namespace maskmoe {
const Kernels kAmx = Bfloat16Kernels<amx::Products>::table(MASKMOE_ISA("amx"));
}
