#include "cpu/bfloat16/dot_products.h"
#include "cpu/bfloat16/kernel_table.h"

namespace maskmoe {

#ifdef MASKMOE_EMULATE
constexpr const char* kName = "avx512bf16-emulated";
#else
constexpr const char* kName = "avx512bf16";
#endif

const Kernels kAvx512Bf16 = Bfloat16Kernels<avx512bf16::DotProducts>::table(kName);

}  // namespace maskmoe
