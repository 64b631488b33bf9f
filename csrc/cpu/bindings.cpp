// Registers the CPU implementation of ops, on processors that have kernels. On others an op keeps
// the implementation in Python that its schema has for every device.

#include "cpu/instruction_sets.h"
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(maskmoe, CPU, m) {
  using namespace maskmoe;
  if (kernels() == nullptr) return;
  m.impl("masked_linear", TORCH_BOX(&masked_linear_op));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward_op));
  m.impl("masked_mlp", TORCH_BOX(&masked_mlp_op));
  m.impl("masked_mlp_backward", TORCH_BOX(&masked_mlp_backward_op));
  m.impl("masked_mlp_gem", TORCH_BOX(&masked_mlp_gem_op));
  m.impl("masked_mlp_expert_loss", TORCH_BOX(&masked_mlp_expert_loss_op));
  m.impl("masked_mlp_mixture", TORCH_BOX(&masked_mlp_mixture_op));
  m.impl("rational_quadratic", TORCH_BOX(&rational_quadratic_op));
  m.impl("rational_quadratic_inverse", TORCH_BOX(&rational_quadratic_inverse_op));
  m.impl("rational_quadratic_backward", TORCH_BOX(&rational_quadratic_backward_op));
}
