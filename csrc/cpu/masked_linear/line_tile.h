// A tile of rows as the kernels read it, for one instruction set `I`.
//
// Inputs are first copied (and converted) to a tile of lines: line n holds slots nL .. nL + L - 1
// of all rows of the tile, row under row. A step then reads its rows at constant distances, which
// saves an address in every multiply, and no stride of the caller's can make rows fall on the same
// cache sets.
#pragma once

#include "cpu/masked_linear/elements.h"

namespace maskmoe {

template <class I>
struct LineTile {
  using E = Elements<I>;
  using V = typename I::V;
  static constexpr int L = I::kLanes;

  static int64_t lines(int64_t features) { return (features + L - 1) / L; }
  // Floats from line to line; never a multiple of a page, on which lines would collide.
  static int64_t line_stride(int64_t tile_rows) {
    const int64_t n = tile_rows * L;
    return n % 256 == 0 ? n + L : n;
  }

  static constexpr int64_t kTogether = 8;  // rows that are copied at a time

  // Copies `count` columns from `column` on, of rows [row, row + rows), to one line of a tile;
  // zeros after them. `then(values, row)` is what is stored.
  template <Dtype D, class F>
  static void load_line(float* to, const Matrix& m, int64_t row, int64_t rows, int64_t column,
                        int64_t count, const F& then) {
    const char* from = static_cast<const char*>(E::row_of(m, row));
    const int64_t step = m.stride * (D == Dtype::kFloat32 ? 4 : 2);
    if (D == Dtype::kFloat32 && m.order != nullptr && count == L) {
      int64_t at[L];  // in registers: a store could change what `order` points to
      for (int64_t k = 0; k < L; ++k) at[k] = m.order[column + k];
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        // A part of the next rows: over all columns, the whole.
        __builtin_prefetch(from + kTogether * step + column * 4);
        I::store(to, then(I::gather(reinterpret_cast<const float*>(from), at), r));
      }
    } else if (m.order != nullptr) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        I::store(to, then(E::template gather<D>(from, m.order + column, count), r));
      }
    } else if (count == L) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        // The same columns of the next rows.
        __builtin_prefetch(from + kTogether * step + column * (D == Dtype::kFloat32 ? 4 : 2));
        I::store(to, then(E::template load_as<D>(from, column), r));
      }
    } else {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        I::store(to, then(E::template load_tail<D>(from, column, count), r));
      }
    }
  }

  static void load_tile(float* tile, int64_t line, const Matrix& m, int64_t row, int64_t rows) {
    E::with_dtype(m.dtype, [&]<Dtype D>() {
      for (int64_t r = 0; r < rows; r += kTogether) {
        float* to = tile + r * L;
        for (int64_t n = 0; n < m.features; n += L, to += line) {
          load_line<D>(to, m, row + r, E::min(kTogether, rows - r), n,
                       E::min(L, m.features - n), [](V a, int64_t) { return a; });
        }
      }
    });
  }

  // Rows of results in block order, `stride` floats apart, to a matrix.
  static void store_rows(const Matrix& m, int64_t row, const float* from, int64_t stride,
                         int64_t rows) {
    if (m.rank == nullptr || m.dtype != Dtype::kFloat32) {
      for (int64_t r = 0; r < rows; ++r) {
        E::store(E::row_of(m, row + r), m.dtype, m.order, from + r * stride, m.features);
      }
      return;
    }
    // Written side by side: what is scattered is read, from a cache.
    for (int64_t begin = 0; begin < rows; begin += kTogether) {
      const int64_t some = E::min(kTogether, rows - begin);
      const float* first = from + begin * stride;
      float* to = static_cast<float*>(E::row_of(m, row + begin));
      int64_t n = 0;
      for (; n + L <= m.features; n += L) {
        int64_t at[L];
        for (int64_t k = 0; k < L; ++k) at[k] = m.rank[n + k];
        for (int64_t r = 0; r < some; ++r) {
          __builtin_prefetch(first + (kTogether + r) * stride + n);
          I::store(to + r * m.stride + n, I::gather(first + r * stride, at));
        }
      }
      for (; n < m.features; ++n) {
        for (int64_t r = 0; r < some; ++r) to[r * m.stride + n] = first[r * stride + m.rank[n]];
      }
    }
  }

  // Zeros in the rows of a tile that `mask` leaves out: such rows may hold anything, NaN included.
  static void clear_rows(float* tile, int64_t line, int64_t lines, const uint8_t* mask,
                         int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (mask[r]) continue;
      for (int64_t n = 0; n < lines; ++n) I::store(tile + n * line + r * L, I::zero());
    }
  }

  // Floats from row to row of results that cannot be written in place.
  static int64_t row_stride(int64_t features) {
    const int64_t n = E::round_up(features, 16);
    return n % 128 == 0 ? n + 16 : n;
  }
};

}  // namespace maskmoe
