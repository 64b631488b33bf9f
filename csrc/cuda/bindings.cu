// Registers the ops for CUDA tensors.

#include "cuda/bindings.h"
#include "cuda/gpu.h"

STABLE_TORCH_LIBRARY_IMPL(maskmoe, CUDA, m) {
  using Bindings = maskmoe::fused::Bindings<maskmoe::fused::Gpu>;
  m.impl("masked_mlp", TORCH_BOX(&Bindings::forward));
  m.impl("masked_mlp_backward", TORCH_BOX(&Bindings::backward));
  m.impl("masked_mlp_mixture", TORCH_BOX(&Bindings::mixture));
  m.impl("masked_mlp_gem", TORCH_BOX(&Bindings::gem));
}
