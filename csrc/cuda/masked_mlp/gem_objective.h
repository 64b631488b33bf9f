// The objective of a generalised-EM step for a tile: from the logits to the experts' weights, their
// losses, and the gradients of the logits.
//
// A thread block adds up sums over the batch sample by sample, in order: deterministic.
#pragma once

#include "cuda/masked_mlp/selection.h"

namespace maskmoe::fused {

// Adds a tile's losses, weights and samples to `cells.sums`.
template <int kR>
MASKMOE_DEVICE void add_loss_sums(const LogitTile& cells, int experts) {
  each_thread([&](int thread) {
    for (int n = thread; n < 2 * experts + 1; n += num_threads()) {
      const float* from = n < experts       ? cells.complement + n * kR
                          : n < 2 * experts ? cells.weight + (n - experts) * kR
                                            : cells.row_mask;
      float sum = 0.0f;
      MASKMOE_UNROLL_8
      for (int row = 0; row < kR; ++row) sum += from[row];
      cells.sums[n] += sum;
    }
  });
}

// The weight of every expert (section 3.3.2) into `weight`, its weighted loss into `complement`,
// the gradient of its logit (eq. 4, eq. 7) into `logit`.
template <int kR>
MASKMOE_DEVICE void gem_objective(const Call& c, const LogitTile& cells) {
  const GemObjective& gem = c.gem;
  select<kR>(c, cells);
  barrier();
  if (gem.normalize_sample) {
    sum_weights<kR>(c, cells);
    barrier();
  }
  each_cell<kR>(c, [&](int n, int row, int expert) {
    const float z = cells.logit[n];
    float weight = cells.weight[n];
    const float times = cells.row_mask[row];
    weight = (gem.normalize_sample ? quotient(weight, cells.total[row]) : weight) * times;
    if (gem.divisor != nullptr) weight = quotient(weight, gem.divisor[expert]);
    const Loss loss = cross_entropy(z, cells.target[row]);
    const bool counts = times != 0.0f;
    float grad = counts ? 2.0f * weight * loss.error : 0.0f;
    if (gem.scale != nullptr) grad *= gem.scale[expert];
    cells.logit[n] = grad * gem.loss_scale;
    cells.weight[n] = weight;
    cells.complement[n] = counts ? weight * loss.value : 0.0f;
  });
  barrier();
  if (gem.sums != nullptr) add_loss_sums<kR>(cells, c.plan.experts);
}

}  // namespace maskmoe::fused
