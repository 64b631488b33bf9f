// Gradients of weights and biases: the sums of all thread blocks of Backward, added up and packed.
#pragma once

#include "cuda/masked_mlp/arguments.h"
#include "cuda/mma.h"

namespace maskmoe::fused {

// The sum of values begin to end of a column, in order. `step`: from one to the next. Eight loads
// are on their way at a time.
template <class Sum>
MASKMOE_DEVICE Sum sum_in_order(const float* column, int64_t step, int64_t begin, int64_t end) {
  Sum sum = 0;
  int64_t n = begin;
  for (; n + 8 <= end; n += 8) {
    float loaded[8];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) loaded[m] = column[(n + m) * step];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) sum += loaded[m];
  }
  for (; n < end; ++n) sum += column[n * step];
  return sum;
}

//   sums         : (num_sums, sums_size) float32
//   weights      : of each layer, T, as the layout packs them; biases: likewise
//   grid         : grid_size(warps * sums_size); a block computes 32 values at a time, one a lane,
//                  and each warp adds an eighth of num_sums, so that few values use many threads
//   shared memory: (warps, 32) float32
// A value is added up by eight threads and then by one, in a fixed order: deterministic.
template <class T>
struct ReduceGradients {
  using Arguments = ReduceArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int64_t kShared = kThreads * sizeof(float);

  static MASKMOE_DEVICE void run(const ReduceArguments& g, const GridPosition& grid) {
    float* parts = reinterpret_cast<float*>(grid.shared);  // (kWarps, 32)
    const int64_t count = first_bias_sum(g.plan) + g.plan.num_biases;
    const int64_t share = (g.num_sums + kWarps - 1) / kWarps;
    for (int64_t first = 32 * grid.block; first < count; first += 32 * grid.num_blocks) {
      each_thread([&](int thread) {
        const int64_t n = first + thread % 32, begin = thread / 32 * share;
        const int64_t end = begin + share < g.num_sums ? begin + share : g.num_sums;
        parts[thread] =
            n < count ? sum_in_order<float>(g.sums + n, g.sums_size, begin, end) : 0.0f;
      });
      barrier();
      each_thread([&](int thread) {
        if (thread >= 32 || first + thread >= count) return;
        float sum = 0.0f;
        MASKMOE_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) sum += parts[32 * warp + thread];
        store(g, first + thread, sum);
      });
      barrier();
    }
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
