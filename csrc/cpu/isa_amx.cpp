#include "cpu/amx/products.h"
#include "cpu/bfloat16/kernel_table.h"

namespace maskmoe {

#ifdef MASKMOE_EMULATE
constexpr const char* kName = "amx-emulated";
#else
constexpr const char* kName = "amx";
#endif

const Kernels kAmx = Bfloat16Kernels<amx::Products>::table(kName);

}  // namespace maskmoe
