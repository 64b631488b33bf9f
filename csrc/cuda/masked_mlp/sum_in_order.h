// Columns of float32 added up in a fixed order, with several loads on their way at a time.
#pragma once

#include "cuda/number_types.h"

namespace maskmoe::fused {

// The sum of values begin to end of a column, in order. `step`: from one to the next.
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

constexpr int64_t kColumnsShared = kThreads * sizeof(float);  // bytes, of add_columns

// store(n, sum) for each of `count` columns of `values`, (rows, step).
//   grid         : grid_size(warps * count); a block computes 32 columns at a time, one a lane, and
//                  each warp adds an eighth of the rows, so that few columns use many threads
//   shared memory: (warps, 32) float32
// A column is added up by eight threads and then by one, in a fixed order: deterministic.
template <class F>
MASKMOE_DEVICE void add_columns(const GridPosition& grid, const float* values, int64_t count,
                                int64_t step, int64_t rows, const F& store) {
  float* parts = reinterpret_cast<float*>(grid.shared);
  const int64_t share = (rows + kWarps - 1) / kWarps;
  for (int64_t first = 32 * grid.block; first < count; first += 32 * grid.num_blocks) {
    each_thread([&](int thread) {
      const int64_t n = first + thread % 32, begin = thread / 32 * share;
      const int64_t end = begin + share < rows ? begin + share : rows;
      parts[thread] = n < count ? sum_in_order<float>(values + n, step, begin, end) : 0.0f;
    });
    barrier();
    each_thread([&](int thread) {
      if (thread >= 32 || first + thread >= count) return;
      float sum = 0.0f;
      MASKMOE_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) sum += parts[32 * warp + thread];
      store(first + thread, sum);
    });
    barrier();
  }
}

}  // namespace maskmoe::fused
