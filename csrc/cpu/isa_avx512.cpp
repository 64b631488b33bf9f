#include "cpu/kernel_table.h"
#include "cpu/simd_avx512.h"

namespace maskmoe {

#ifdef MASKMOE_EMULATE
constexpr const char* kName = "avx512-emulated";
#else
constexpr const char* kName = "avx512";
#endif

const Kernels kAvx512 = kernels_of<avx512::Isa>(kName);

}  // namespace maskmoe
