// A whole MLP, split over torch's threads: each takes tiles of rows through all layers. Knows
// tensors only as matrices.
#pragma once

#include <vector>

#include "cpu/execution_plan.h"
#include "cpu/kernels.h"

namespace maskmoe {

// What an MLP computes with; `biases` is empty or has one a layer.
struct MlpInputs {
  const Chain& chain;
  Dtype dtype;
  Activation activation;
  std::vector<Part> parts;
  std::vector<int64_t> table_rows;  // of each part; 0: columns of x
  std::vector<const void*> weights, biases;
  int64_t rows;
  const uint8_t* mask;  // of samples; null: all count
};

int64_t weights_of(const MlpInputs& in);
// Floating-point operations of a call.
int64_t flops_of(const MlpInputs& in, bool forward, bool need_inputs, bool need_weights);

// Tiles of a batch; the same for a forward and its backward.
struct Tiling {
  int64_t rows, count;
};
Tiling tiles_of(const MlpInputs& in);
// The floats that a tile's activations take; 0: the backward had better compute them again.
int64_t worth_keeping(const MlpInputs& in, const Kernels& k, const Tiling& tiling);

constexpr int64_t kKeptBytes = 1 << 24;  // beyond, activations are cheaper computed than read

// Null results, or none, are not computed: gradients of x or of tables only, of weights.
struct MlpGradients {
  Dtype dtype;                // of them all: the input's, or float32
  Matrix x;                   // (rows, its columns), in the order of the features
  std::vector<void*> tables;  // one a part, null where it has none
  std::vector<void*> weights, biases;
};

void masked_mlp_forward(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                        const Matrix& logits, float* saved);
void masked_mlp_mixture(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                        const Mixture& mixture);
void masked_mlp_backward(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                         const Matrix& grad_logits, const float* saved, const MlpGradients& grads);

// Loss and all gradients in one pass over the batch; in two where a sum over the batch has to be
// known before gradients of several experts are added in one of an input.
float masked_mlp_gem(const MlpInputs& in, const Kernels& k, const Tiling& tiling, const Gem& gem,
                     Normalization normalization, const MlpGradients& grads);

}  // namespace maskmoe
