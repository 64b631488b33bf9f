// bfloat16 on AMX. Everything else uses AVX-512.
#include "amx_linear.h"
#include "amx_mlp.h"

namespace maskmoe {

#ifdef MASKMOE_EMULATE_AMX
constexpr const char* kName = "amx-emulated";
#else
constexpr const char* kName = "amx";
#endif

const Kernels kAmx = {kName,
                      amx::L,
                      amx::pack,
                      amx::Float::unpack,
                      amx::forward_scratch,
                      amx::forward,
                      amx::backward_scratch,
                      amx::backward,
                      amx::Float::add,
                      amx::Float::load,
                      amx::Float::store,
                      amx::MLP::saved,
                      amx::MLP::units,
                      amx::MLP::scratch,
                      amx::MLP::run};

}  // namespace maskmoe
