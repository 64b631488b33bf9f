// Gradients of weights and biases: the sums of all thread blocks of Backward, added up and packed.
#pragma once

#include "cuda/masked_mlp/arguments.h"
#include "cuda/masked_mlp/sum_in_order.h"
#include "cuda/mma.h"

namespace maskmoe::fused {

//   sums         : (num_sums, sums_size) float32
//   weights      : of each layer, T, as the layout packs them; biases: likewise
//   grid         : grid_size(warps * sums_size); see add_columns
//   shared memory: of add_columns
template <class T>
struct ReduceGradients {
  using Arguments = ReduceArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int64_t kShared = kColumnsShared;

  static MASKMOE_DEVICE void run(const ReduceArguments& g, const GridPosition& grid) {
    const int64_t count = first_bias_sum(g.plan) + g.plan.num_biases;
    add_columns(grid, g.sums, count, g.sums_size, g.num_sums,
                [&](int64_t n, float sum) { store(g, n, sum); });
  }

 private:
  // Scales sum n for its expert and writes it to its place in the packed gradients, if it has one:
  // padding has none.
  static MASKMOE_DEVICE void store(const ReduceArguments& g, int64_t n, float sum) {
    const ExecutionPlan& plan = g.plan;
    const int64_t head_begin = first_head_sum(plan), biases_begin = first_bias_sum(plan);
    void* to = nullptr;
    int64_t at = -1;
    int expert = 0;
    if (n < head_begin) {
      const WeightBlock block = plan.blocks[n / kBlockSize];
      const int within = static_cast<int>(n % kBlockSize), lane = within % 128 / 4;
      const int value = within / 128 * 4 + within % 4;
      const int k = accumulator_row(lane, value), unit = accumulator_column(lane, value);
      to = g.weights[block.layer];
      expert = block.expert;
      if (k < block.k && unit < block.n) at = block.from + int64_t{k} * block.step_k + unit;
    } else if (n < biases_begin) {
      const HeadWeights head = plan.head[(n - head_begin) / kChunk];
      const int k = static_cast<int>((n - head_begin) % kChunk);
      to = g.weights[plan.layers - 1];
      expert = head.expert;
      if (k < head.valid) at = head.from + k;
    } else {
      const PaddedBias bias = plan.biases[n - biases_begin];
      to = g.biases[bias.layer];
      expert = bias.expert;
      at = bias.index;
    }
    if (to == nullptr || at < 0) return;
    const float scaled = g.scale == nullptr ? sum : sum * g.scale[expert];
    static_cast<T*>(to)[at] = rounded<T>(scaled * g.factor);
  }
};

}  // namespace maskmoe::fused
