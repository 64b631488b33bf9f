// One step of generalised EM for a tile: weights from the logits, losses, gradients of the logits.
//
// Everything stays in shared memory, (experts, kR) with rows side by side. Sums over the batch
// are kept by the block, sample by sample in order.
#pragma once

#include "cuda/masked_mlp.h"

namespace maskmoe::fused {

// The floats of a tile: (experts, kR) each, then one a row.
struct Cells {
  float* logit;  // then its gradient
  float* own;    // g, then the weight; objective only
  float* rest;   // 1 - g, then the weighted loss
  float* live;   // 1: the row counts
  float* target;
  float* total;
  float* sums;   // (2 experts + 1,): losses, weights and samples of all the block's tiles

  MASKMOE_DEVICE Cells(float* floats, int experts, int rows, bool objective) {
    const int cells = experts * rows;
    logit = floats;
    live = logit + cells;
    target = live + rows;
    total = target + rows;
    own = total + rows;
    rest = own + cells;
    sums = rest + cells;
    if (!objective) target = total = own = rest = sums = nullptr;
  }
};

// Which rows of a tile count, and their targets.
template <int kR>
MASKMOE_DEVICE void load_rows(const Call& c, const Cells& cells, int64_t first) {
  each_thread([&](int thread) {
    if (thread >= kR) return;
    const int64_t row = first + thread;
    const uint8_t* mask = c.objective.mask;
    const bool counts = row < c.rows && (mask == nullptr || mask[row] != 0);
    cells.live[thread] = counts ? 1.0f : 0.0f;
    if (cells.target != nullptr) cells.target[thread] = counts ? c.objective.target[row] : 0.0f;
  });
}

// w of every expert (section 3.3.2), its loss, and the gradient of its logit (eq. 4, eq. 7).
template <class T, int kR>
MASKMOE_DEVICE void objective(const Call& c, const Cells& cells) {
  const Objective& o = c.objective;
  const int experts = c.tables.experts, count = kR * experts;
  auto each_cell = [&](const auto& f) {
    each_thread([&](int thread) {
      for (int n = thread; n < count; n += kThreads) f(n, n % kR, n / kR);
    });
    barrier();
  };
  each_cell([&](int n, int row, int) {  // products over strict subsets, in order
    if (cells.live[row] == 0.0f) {
      cells.own[n] = 0.0f;
      return;
    }
    const int expert = n / kR;
    float weight = o.own ? cells.own[n] : 1.0f;
    for (int a = 0; a < o.above_count[expert]; ++a) {
      weight *= cells.rest[o.above[expert * experts + a] * kR + row];
    }
    cells.own[n] = weight;
  });
  if (o.sample) {
    each_thread([&](int thread) {
      if (thread >= kR) return;
      float total = 0.0f;
      for (int i = 0; i < experts; ++i) total += cells.own[i * kR + thread];
      cells.total[thread] = total == 0.0f ? 1.0f : total;
    });
    barrier();
  }
  each_cell([&](int n, int row, int expert) {
    const float z = cells.logit[n];
    const float weight = o.sample ? cells.own[n] / cells.total[row] : cells.own[n];
    const Loss loss = cross_entropy(z, cells.target[row]);
    const bool counts = cells.live[row] != 0.0f;
    float grad = counts ? 2.0f * weight * loss.error : 0.0f;
    if (o.scale != nullptr) grad *= o.scale[expert];
    cells.logit[n] = grad;
    cells.own[n] = weight;
    cells.rest[n] = counts ? weight * loss.value : 0.0f;
  });
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
