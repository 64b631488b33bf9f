// Selection for a tile: confidences of the logits, and their products over proper subsets.
//
// All values stay in shared memory as (experts, kR) float32, rows side by side.
#pragma once

#include "cuda/masked_mlp/forward.h"

namespace maskmoe::fused {

// The float32 of a tile: (experts, kR) or one a row. Backward with a given gradient has memory for
// the first two, Mix for all but `sums`; see smem_layout.
struct LogitTile {
  float* logit;       // later its gradient, or what its expert adds to the prediction
  float* row_mask;    // how often the row counts; 0: not at all
  float* target;
  float* total;       // of the weights
  float* weight;      // the confidence g, later the weight of the expert
  float* complement;  // 1 - g, later the weighted loss
  float* sums;        // (2 experts + 1,) of all tiles of the block: losses, weights, samples

  MASKMOE_DEVICE LogitTile(float* floats, int experts, int rows) {
    const int cells = experts * rows;
    logit = floats;
    row_mask = logit + cells;
    target = row_mask + rows;
    total = target + rows;
    weight = total + rows;
    complement = weight + cells;
    sums = complement + cells;
  }
};

// f(n, row, expert) for every value n of (experts, kR).
template <int kR, class F>
MASKMOE_DEVICE void each_cell(const Call& c, const F& f) {
  const int count = kR * c.plan.experts;
  each_thread([&](int thread) {
    for (int n = thread; n < count; n += num_threads()) f(n, n % kR, n / kR);
  });
}

// f(row) for every row of a tile, one thread each.
template <int kR, class F>
MASKMOE_DEVICE void each_row(const F& f) {
  each_thread([&](int thread) {
    if (thread < kR) f(thread);
  });
}

// Which rows of a tile count, and their targets.
template <int kR>
MASKMOE_DEVICE void load_rows(const Call& c, const LogitTile& cells, int64_t first) {
  each_row<kR>([&](int at) {
    const int64_t row = first + at;
    const uint8_t* mask = c.gem.mask;
    const bool counts = row < c.rows && (mask == nullptr || mask[row] != 0);
    const float* times = c.gem.sample_weight;
    cells.row_mask[at] = !counts ? 0.0f : times == nullptr ? 1.0f : times[row];
    if (c.gem.target != nullptr) {
      cells.target[at] = counts ? c.gem.target[row] : 0.0f;
    }
  });
}

// The logits of a tile and their confidences.
template <class T, int kR>
MASKMOE_DEVICE void confident_logits(const Call& c, const Tile<T>& tile, const LogitTile& cells) {
  const Selection& s = c.selection;
  head_forward<T, kR>(c, tile, [&](int row, int expert, float z) {
    const int n = expert * kR + row;
    cells.logit[n] = z;
    if (s.weighting == Weighting::kUniform) return;
    WithComplement g = z == z ? confidence_of(z, s.confidence) : WithComplement{z, z};
    if (s.sharpness != 1.0f && s.has_superset[expert]) g = sharpened(g, s.sharpness);
    cells.weight[n] = g.value;
    cells.complement[n] = g.complement;
  });
}

// alpha of every expert (section 3.3.2), or alpha without its own confidence, into `weight`:
// products over proper subsets, in order; or 1. 0 in rows that do not count.
template <int kR>
MASKMOE_DEVICE void select(const Call& c, const LogitTile& cells) {
  const Selection& s = c.selection;
  each_cell<kR>(c, [&](int n, int row, int expert) {
    if (cells.row_mask[row] == 0.0f) {
      cells.weight[n] = 0.0f;
      return;
    }
    float weight = s.weighting == Weighting::kSelection ? cells.weight[n] : 1.0f;
    const int factors = s.weighting == Weighting::kUniform ? 0 : s.num_subsets[expert];
    for (int a = 0; a < factors; ++a) {
      weight *= cells.complement[s.subsets[expert * c.plan.experts + a] * kR + row];
    }
    cells.weight[n] = weight;
  });
}

// The sum of `weight` over the experts, row by row, into `total`.
template <int kR>
MASKMOE_DEVICE void sum_weights(const Call& c, const LogitTile& cells) {
  each_row<kR>([&](int row) {
    float sum = 0.0f;
    for (int i = 0; i < c.plan.experts; ++i) sum += cells.weight[i * kR + row];
    cells.total[row] = sum;
  });
}

}  // namespace maskmoe::fused
