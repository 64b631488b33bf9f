// bfloat16 on AMX. Everything else uses AVX-512.
#include "cpu/amx/masked_linear.h"
#include "cpu/amx/masked_mlp.h"

namespace maskmoe {

#ifdef MASKMOE_EMULATE
constexpr const char* kName = "amx-emulated";
#else
constexpr const char* kName = "amx";
#endif

const Kernels kAmx = {kName,
                      amx::L,
                      amx::pack,
                      amx::FloatWeights::unpack,
                      amx::forward_scratch,
                      amx::forward,
                      amx::backward_scratch,
                      amx::backward,
                      amx::E::add,
                      amx::E::load,
                      amx::E::store,
                      amx::MaskedMlp::saved,
                      amx::MaskedMlp::units,
                      amx::MaskedMlp::scratch,
                      amx::MaskedMlp::run};

}  // namespace maskmoe
