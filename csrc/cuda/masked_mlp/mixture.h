// The mixture kernel: an MLP's prediction and its attribution to the experts (eq. 1).
#pragma once

#include "cuda/masked_mlp/selection.h"

namespace maskmoe::fused {

// Writes alpha and the experts' shares, equal shares where all alphas are 0; leaves what each
// expert adds to the prediction in `logit`. Neighbouring threads write neighbouring elements of
// (rows, experts).
template <int kR>
MASKMOE_DEVICE void store_shares(const Call& c, const LogitTile& cells, int64_t first) {
  const int experts = c.plan.experts;
  each_thread([&](int thread) {
    for (int at = thread; at < kR * experts; at += num_threads()) {
      const int row = at / experts, n = at % experts * kR + row;
      if (first + row >= c.rows) continue;
      const float alpha = cells.weight[n], total = cells.total[row], z = cells.logit[n];
      const float share = total == 0.0f ? 1.0f / static_cast<float>(experts) : alpha / total;
      c.mixture.alpha[first * experts + at] = alpha;
      c.mixture.share[first * experts + at] = share;
      cells.logit[n] = share * probability_of(z).value;
    }
  });
}

//   x, ids, weights: as for Forward
//   probability  : (rows,) float32; alpha, share: (rows, experts) float32. Each element is written
//                  once, by one thread, after sums in a fixed order: deterministic
//   grid         : the blocks that the device runs at a time; block b computes tiles b, b + blocks,
//                  b + 2 blocks, ...
//   shared memory: the inputs of two layers and a LogitTile; see smem_layout
template <class T, int kR>
struct Mix {
  using Arguments = Call;
  static constexpr int kBlocksPerMultiprocessor = 1, kMostThreads = 32 * kMostWarps;

  static MASKMOE_DEVICE void run(const Call& c, const GridPosition& grid) {
    const int experts = c.plan.experts;
    const Tile<T> tile(c, grid);
    const LogitTile cells(tile.floats, experts, kR);
    for (int64_t n = grid.block; n * kR < c.rows; n += grid.num_blocks) {
      const int64_t first = n * kR;
      load_rows<kR>(c, cells, first);
      barrier();
      hidden_layers_forward<T, kR>(c, tile, first, cells.row_mask);
      confident_logits<T, kR>(c, tile, cells);
      barrier();
      select<kR>(c, cells);
      barrier();
      sum_weights<kR>(c, cells);
      barrier();
      store_shares<kR>(c, cells, first);
      barrier();
      each_row<kR>([&](int row) {
        if (first + row >= c.rows) return;
        float sum = 0.0f;
        for (int i = 0; i < experts; ++i) sum += cells.logit[i * kR + row];
        c.mixture.probability[first + row] = least(sum, 1.0f);  // rounded shares may add up to more
      });
    }
  }
};

}  // namespace maskmoe::fused
