// Who counts in a tile: confidences from the logits, and products over strict subsets.
//
// Everything stays in shared memory, (experts, kR) with rows side by side.
#pragma once

#include "cuda/masked_mlp.h"

namespace maskmoe::fused {

// The floats of a tile: (experts, kR) each, or one a row. A backward of given gradients has room
// for the first two, a mixture for all but the last.
struct Cells {
  float* logit;   // then its gradient, or what its expert adds to the prediction
  float* live;    // 1: the row counts
  float* target;
  float* total;
  float* own;     // g, then alpha or the weight
  float* rest;    // 1 - g, then the weighted loss
  float* sums;    // (2 experts + 1,): losses, weights and samples of all the block's tiles

  MASKMOE_DEVICE Cells(float* floats, int experts, int rows) {
    const int cells = experts * rows;
    logit = floats;
    live = logit + cells;
    target = live + rows;
    total = target + rows;
    own = total + rows;
    rest = own + cells;
    sums = rest + cells;
  }
};

// f(n, row, expert) for every cell n of a tile.
template <int kR, class F>
MASKMOE_DEVICE void each_cell(const Call& c, const F& f) {
  const int count = kR * c.tables.experts;
  each_thread([&](int thread) {
    for (int n = thread; n < count; n += kThreads) f(n, n % kR, n / kR);
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
MASKMOE_DEVICE void load_rows(const Call& c, const Cells& cells, int64_t first) {
  each_row<kR>([&](int at) {
    const int64_t row = first + at;
    const uint8_t* mask = c.objective.mask;
    const bool counts = row < c.rows && (mask == nullptr || mask[row] != 0);
    cells.live[at] = counts ? 1.0f : 0.0f;
    if (c.objective.target != nullptr) {
      cells.target[at] = counts ? c.objective.target[row] : 0.0f;
    }
  });
}

// The logits of a tile with their confidences.
template <class T, int kR>
MASKMOE_DEVICE void confident_logits(const Call& c, const Tile<T>& tile, const Cells& cells) {
  const Selection& s = c.selection;
  last_forward<T, kR>(c, tile, [&](int row, int expert, float z) {
    const int n = expert * kR + row;
    Pair pair = z == z ? confidence_of(z, s.confidence) : Pair{z, z};
    if (s.sharpness != 1.0f && s.larger[expert]) pair = sharpened(pair, s.sharpness);
    cells.logit[n] = z;
    cells.own[n] = pair.own;
    cells.rest[n] = pair.rest;
  });
}

// alpha of every expert, or without its own confidence, in `own` (section 3.3.2): products over
// strict subsets, in order. Zero in rows that do not count.
template <int kR>
MASKMOE_DEVICE void select(const Call& c, const Cells& cells) {
  const Selection& s = c.selection;
  each_cell<kR>(c, [&](int n, int row, int expert) {
    if (cells.live[row] == 0.0f) {
      cells.own[n] = 0.0f;
      return;
    }
    float weight = s.own ? cells.own[n] : 1.0f;
    for (int a = 0; a < s.above_count[expert]; ++a) {
      weight *= cells.rest[s.above[expert * c.tables.experts + a] * kR + row];
    }
    cells.own[n] = weight;
  });
}

// The sum of `own` over a tile's experts, row by row, in `total`.
template <int kR>
MASKMOE_DEVICE void total(const Call& c, const Cells& cells) {
  each_row<kR>([&](int row) {
    float sum = 0.0f;
    for (int i = 0; i < c.tables.experts; ++i) sum += cells.own[i * kR + row];
    cells.total[row] = sum;
  });
}

}  // namespace maskmoe::fused
