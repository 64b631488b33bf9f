// One layer, split over torch's threads. Knows tensors only as matrices.
#pragma once

#include "cpu/execution_plan.h"
#include "cpu/kernels.h"

namespace maskmoe {

void masked_linear(const ExecutionPlan& plan, const Kernels& k, const Matrix& x, const void* weight,
                   const void* bias, const Matrix& y, const Matrix& z, Activation activation,
                   int64_t rows);

// Null results are not computed.
struct Gradients {
  void *x, *weight, *bias;
};

void masked_linear_backward(const ExecutionPlan& plan, const Kernels& k, const Matrix& grad_y,
                            const Matrix& saved, const Matrix& x, const void* weight,
                            const Gradients& grads, Activation activation, int64_t rows);

}  // namespace maskmoe
