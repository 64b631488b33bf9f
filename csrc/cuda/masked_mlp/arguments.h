// The arguments of the kernels: one structure a launch, passed by value.
#pragma once

#include "cuda/masked_mlp/activations.h"
#include "cuda/masked_mlp/confidence.h"
#include "cuda/smem_layout.h"

namespace maskmoe::fused {

// A part of the input: columns of a matrix, or rows of a table that ids choose.
struct PartSource {
  const void* data;
  const int64_t* ids;  // null: sample r reads row r
  int64_t stride;      // elements from row to row
  int64_t rows;        // of a table
};

// Where the gradient of a part is written, sample by sample. data null: it is not needed.
struct PartGradient {
  void* data;
  int64_t stride;
};

// How much each expert counts (section 3.3.2).
struct Selection {
  const int16_t* subsets;        // (experts, experts): row i lists the proper subsets of expert i
  const int32_t* num_subsets;    // (experts,): how many row i lists
  const uint8_t* has_superset;   // (experts,): is expert i a proper subset of another?
  float sharpness;
  Confidence confidence;
  Weighting weighting;
};

// The loss of a GEM step.
struct GemObjective {
  const float* target;   // (rows,); null: there is no loss, the gradient of the logits is given
  const uint8_t* mask;   // (rows,); null: every sample counts
  const float* sample_weight;  // (rows,): how often each counts; null: once
  const float* scale;    // (experts,): of the gradients; null: not known before this launch
  const float* divisor;  // (experts,): of the weights; null: none
  const int32_t* rerun;  // the launch does nothing if this is 0; null: it always runs
  float loss_scale;      // a power of two that scales all gradients in the kernel, not the results
  float* sums;           // (thread blocks, 2 experts + 1): losses, weights, samples; null: unused
  bool normalize_sample;  // divide the weights of a sample by their sum over the experts
};

struct Mixture {
  float* probability;    // (rows,)
  float *alpha, *share;  // (rows, experts)
};

// Of the kernels that compute a tile: Forward, Mix and Backward.
struct Call {
  ExecutionPlan plan;
  SmemLayout smem;
  Activation activation;
  int64_t rows;
  const void* weights;        // (blocks, 256), in the order of Mma<T>
  const float* head_weights;  // (num_head, 16)
  const float* biases;        // (num_biases,), padded
  void* logits;               // (rows, experts); of a backward: their gradient, which is read
  float* gradient_sums;       // (thread blocks, sums_size); null: not needed
  int64_t sums_size;          // sums of a thread block: of weight blocks, of the head, of biases
  bool need_grad_inputs;
  bool float32_grad_inputs;  // whatever the number type is
  float grad_input_scale;          // factor of the inputs' gradients
  const float* grad_input_factor;  // another one, on the device; null: 1
  PartSource parts[kMaxParts];
  PartGradient grad_parts[kMaxParts];
  Selection selection;
  GemObjective gem;
  Mixture mixture;
};

// Of PackWeights.
struct PackArguments {
  ExecutionPlan plan;
  const void* weights[kMaxLayers];
  const void* biases[kMaxLayers];  // null: none
  void* packed;                    // (num_blocks, 256)
  float* head;                     // (num_head, 16)
  float* padded_biases;            // (num_biases,)
  int32_t num_blocks;
  const uint8_t* is_proper_subset;  // (experts, experts): [i, j]: j of i; null: no selection
  int16_t* subsets;                 // the next three: see Selection
  int32_t* num_subsets;
  uint8_t* has_superset;
};

// Of ReduceGradients.
struct ReduceArguments {
  ExecutionPlan plan;
  const float* sums;  // (num_sums, sums_size)
  int64_t sums_size, num_sums;
  const float* scale;  // (experts,); null: 1
  float factor;        // of all gradients
  void* weights[kMaxLayers];
  void* biases[kMaxLayers];  // null: none
};

// Of CountSamples.
struct CountArguments {
  const uint8_t* mask;  // (rows,)
  int64_t rows;
  float* inverse;  // 1 / number of samples that count
};

// Of ReduceLoss.
struct LossArguments {
  const float* sums;  // (num_sums, 2 experts + 1)
  int64_t num_sums;
  int32_t experts;
  Normalization normalization;
  float* scale;       // (experts,): of the gradients
  float* divisor;     // (experts,): of the weights, where their sum is below min_divisor; else 1
  int32_t* rerun;     // is there such a sum?
  float min_divisor;
  bool known;         // scale, divisor and rerun are inputs: this is the second sweep
  float* loss;
};

// Devices take so many bytes of arguments.
static_assert(sizeof(Call) <= 4096 && sizeof(PackArguments) <= 4096 &&
              sizeof(ReduceArguments) <= 4096);

// A thread block's sums of gradients: of weight blocks, then of the head, then of biases.
MASKMOE_HOST_DEVICE int64_t first_head_sum(const ExecutionPlan& plan) {
  return int64_t{kBlockSize} * plan.forward_blocks;
}
MASKMOE_HOST_DEVICE int64_t first_bias_sum(const ExecutionPlan& plan) {
  return first_head_sum(plan) + int64_t{kChunk} * plan.num_head;
}

}  // namespace maskmoe::fused
