// One call, shared out over torch's threads. Knows tensors only as matrices.
#pragma once

#include "kernels.h"

namespace maskmoe {

// The kernels that run: the best the machine has, or those that set_isa named.
const Kernels* kernels();
// Names of what this build has and this machine can run, widest first, null at the end.
const char* const* isas();
// "" goes back to the best. False: no such kernels here.
bool set_isa(const char* name);

void masked_linear(const Plan& plan, const Kernels& k, const Matrix& x, const void* weight,
                   const void* bias, const Matrix& y, const Matrix& z, Activation activation,
                   int64_t rows);

// Null results are not computed.
struct Gradients {
  void *x, *weight, *bias;
};

void masked_linear_backward(const Plan& plan, const Kernels& k, const Matrix& grad_y,
                            const Matrix& saved, const Matrix& x, const void* weight,
                            const Gradients& grads, Activation activation, int64_t rows);

}  // namespace maskmoe
