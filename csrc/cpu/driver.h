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

// --- Networks (networks.cpp) ---------------------------------------------------------------------

// What a network computes with; `biases` is empty or has one a layer.
struct NetworkInputs {
  const Chain& chain;
  Dtype dtype;
  Activation activation;
  std::vector<Part> parts;
  std::vector<int64_t> table_rows;  // of each part; 0: columns of x
  std::vector<const void*> weights, biases;
  int64_t rows;
  const uint8_t* mask;  // of samples; null: all count
};

// Tiles of a batch; the same for a forward and its backward.
struct Tiling {
  int64_t rows, count;
};
Tiling tiles_of(const NetworkInputs& in);
// Floats a tile of its activations takes; 0: the backward had better compute them again.
int64_t worth_keeping(const NetworkInputs& in, const Kernels& k, const Tiling& tiling);

// Null results, or none, are not computed: gradients of x or of tables only, of weights.
struct NetworkGradients {
  Dtype dtype;                // of them all: the input's, or float32
  Matrix x;                   // (rows, its columns), in the order of the features
  std::vector<void*> tables;  // one a part, null where it has none
  std::vector<void*> weights, biases;
};

void network_forward(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                     const Matrix& logits, float* saved);
void network_mixture(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                     const Mixture& mixture);
void network_backward(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                      const Matrix& grad_logits, const float* saved,
                      const NetworkGradients& grads);

enum class Normalize : int { kNone, kSample, kExpert, kBatch };

// Loss and all gradients in one pass over the batch; in two where a sum over the batch has to be
// known before gradients of several experts meet in one of an input.
float network_gem(const NetworkInputs& in, const Kernels& k, const Tiling& tiling, Gem gem,
                  Normalize normalize, const NetworkGradients& grads);

}  // namespace maskmoe
