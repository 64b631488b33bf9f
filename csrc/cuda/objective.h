// One step of generalised EM for a tile: weights from the logits, losses, gradients of the logits.
//
// Sums over the batch are kept by the block, sample by sample in order.
#pragma once

#include "cuda/selection.h"

namespace maskmoe::fused {

// w of every expert (section 3.3.2), its loss, and the gradient of its logit (eq. 4, eq. 7).
template <int kR>
MASKMOE_DEVICE void objective(const Call& c, const Cells& cells) {
  const Objective& o = c.objective;
  const int experts = c.tables.experts;
  select<kR>(c, cells);
  barrier();
  if (o.sample) {
    total<kR>(c, cells);
    barrier();
  }
  each_cell<kR>(c, [&](int n, int row, int expert) {
    const float z = cells.logit[n];
    float weight = cells.own[n];
    if (o.sample) weight = quotient(weight, cells.total[row]);
    if (o.divisor != nullptr) weight = quotient(weight, o.divisor[expert]);
    const Loss loss = cross_entropy(z, cells.target[row]);
    const bool counts = cells.live[row] != 0.0f;
    float grad = counts ? 2.0f * weight * loss.error : 0.0f;
    if (o.scale != nullptr) grad *= o.scale[expert];
    cells.logit[n] = grad * o.gain;
    cells.own[n] = weight;
    cells.rest[n] = counts ? weight * loss.value : 0.0f;
  });
  barrier();
  if (o.sums == nullptr) return;
  each_thread([&](int thread) {
    for (int n = thread; n < 2 * experts + 1; n += kThreads) {
      const float* from = n < experts       ? cells.rest + n * kR
                          : n < 2 * experts ? cells.own + (n - experts) * kR
                                            : cells.live;
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += from[row];
      cells.sums[n] += sum;
    }
  });
}

}  // namespace maskmoe::fused
