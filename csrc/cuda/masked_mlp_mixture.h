// Prediction with its attribution: the network forward, selection and the mixture (eq. 1) of a tile.
//
//   x, ids      : read once
//   probability : (rows,); alpha, share : (rows, experts), float32; each written once
//   grid        : persistent; block b takes tiles b, b + blocks, ...
#pragma once

#include "cuda/selection.h"

namespace maskmoe::fused {

// Shares of the experts, alike where nobody has any confidence, and what each adds to the
// prediction, in the logits' place. Written as they lie: experts side by side.
template <int kR>
MASKMOE_DEVICE void share_out(const Call& c, const Cells& cells, int64_t first) {
  const int experts = c.tables.experts;
  each_thread([&](int thread) {
    for (int at = thread; at < kR * experts; at += kThreads) {
      const int row = at / experts, n = at % experts * kR + row;
      if (first + row >= c.rows) continue;
      const float alpha = cells.own[n], total = cells.total[row], z = cells.logit[n];
      const float share = total == 0.0f ? 1.0f / static_cast<float>(experts) : alpha / total;
      c.mixture.alpha[first * experts + at] = alpha;
      c.mixture.share[first * experts + at] = share;
      cells.logit[n] = share * odds_of(z).own;
    }
  });
}

template <class T, int kR>
struct Mix {
  using Arguments = Call;
  static constexpr int kResident = Forward<T, kR>::kResident;

  static MASKMOE_DEVICE void run(const Call& c, const Place& place) {
    const int experts = c.tables.experts;
    const Tile<T> tile(c, place);
    const Cells cells(tile.floats, experts, kR);
    for (int64_t n = place.block; n * kR < c.rows; n += place.blocks) {
      const int64_t first = n * kR;
      load_rows<kR>(c, cells, first);
      barrier();
      units_forward<T, kR>(c, tile, first, cells.live);
      confident_logits<T, kR>(c, tile, cells);
      barrier();
      select<kR>(c, cells);
      barrier();
      total<kR>(c, cells);
      barrier();
      share_out<kR>(c, cells, first);
      barrier();
      each_row<kR>([&](int row) {
        if (first + row >= c.rows) return;
        float sum = 0.0f;
        for (int i = 0; i < experts; ++i) sum += cells.logit[i * kR + row];
        c.mixture.probability[first + row] = least(sum, 1.0f);  // shares may sum to 1 and a rounding
      });
    }
  }
};

}  // namespace maskmoe::fused
