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
  static constexpr int64_t kShortRow = 1024;  // bytes

  // Where features are reordered, kTogether rows are first copied column by column. To load L
  // columns of the copy from anywhere and transpose them takes a fifth of the time of a gather.
  static int64_t columns_size(const Matrix& m) {
    const bool copied = I::kTransposes && m.order != nullptr && m.dtype == Dtype::kFloat32;
    return copied ? E::round_up(m.features, L) * kTogether : 0;
  }

  // Copies kTogether rows of `features` values, `stride` floats apart, to `columns`.
  static void copy_columns(float* columns, const float* from, int64_t stride, int64_t features) {
    if constexpr (I::kTransposes) {
      static_assert(L == kTogether);
      int64_t n = 0;
      for (; n + L <= features; n += L, columns += L * L) {
        const float* rows[L];
        V turned[L];
        for (int64_t r = 0; r < L; ++r) rows[r] = from + r * stride + n;
        I::transpose(rows, turned);
        for (int64_t k = 0; k < L; ++k) I::store(columns + k * L, turned[k]);
      }
      for (; n < features; ++n, columns += L) {
        for (int64_t r = 0; r < L; ++r) columns[r] = from[r * stride + n];
      }
    }
  }

  // Copies `rows` rows of a matrix from `row` on to `columns`, if they are reordered and all there.
  // Returns where they are, or null.
  static const float* columns_of(float* columns, const Matrix& m, int64_t row, int64_t rows) {
    if (columns_size(m) == 0 || rows < kTogether) return nullptr;
    copy_columns(columns, static_cast<const float*>(E::row_of(m, row)), m.stride, m.features);
    return columns;
  }

  // The values at order[0 .. count - 1] of L rows, then zeros: a vector a row.
  static void pick(const float* columns, const int64_t* order, int64_t count, V (&rows)[L]) {
    static constexpr float kZeros[L] = {};
    const float* from[L];
    for (int64_t k = 0; k < L; ++k) from[k] = k < count ? columns + order[k] * L : kZeros;
    I::transpose(from, rows);
  }

  // Copies `count` columns from `column` on, of rows [row, row + rows), to one line of a tile;
  // zeros after them. `then(values, row)` is what is stored. `columns`: these rows, or null.
  template <Dtype D, class F>
  static void load_line(float* to, const Matrix& m, int64_t row, int64_t rows, int64_t column,
                        int64_t count, const float* columns, const F& then) {
    if constexpr (D == Dtype::kFloat32 && I::kTransposes) {
      if (columns != nullptr) {
        V values[L];
        pick(columns, m.order + column, count, values);
        for (int64_t r = 0; r < L; ++r) I::store(to + r * L, then(values[r], r));
        return;
      }
    }
    const char* from = static_cast<const char*>(E::row_of(m, row));
    constexpr int64_t width = D == Dtype::kFloat32 ? 4 : 2;
    const int64_t step = m.stride * width;
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
        // The same columns of the next rows. Where two vectors share a cache line, those of long
        // rows would push each other out between the first and the second.
        if (L * width >= 64 || step <= kShortRow) {
          __builtin_prefetch(from + kTogether * step + column * width);
        }
        I::store(to, then(E::template load_as<D>(from, column), r));
      }
    } else {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        I::store(to, then(E::template load_tail<D>(from, column, count), r));
      }
    }
  }

  // Are all values of a tile finite? Of any other, the product with 0 is NaN.
  static bool all_finite(const float* tile, int64_t line, int64_t lines, int64_t rows) {
    V products[2] = {I::zero(), I::zero()};
    for (int64_t n = 0; n < lines; ++n, tile += line) {
      int64_t k = 0;
      for (; k + 2 * L <= rows * L; k += 2 * L) {
        products[0] = I::fma(I::load(tile + k), I::zero(), products[0]);
        products[1] = I::fma(I::load(tile + k + L), I::zero(), products[1]);
      }
      if (k < rows * L) products[0] = I::fma(I::load(tile + k), I::zero(), products[0]);
    }
    float lanes[L];
    I::store(lanes, I::add(products[0], products[1]));
    bool zeros = true;
    for (int64_t k = 0; k < L; ++k) zeros = zeros && lanes[k] == 0;
    return zeros;
  }

  // `columns`: room for columns_size(m), or null.
  static void load_tile(float* tile, int64_t line, const Matrix& m, int64_t row, int64_t rows,
                        float* columns = nullptr) {
    E::with_dtype(m.dtype, [&]<Dtype D>() {
      for (int64_t r = 0; r < rows; r += kTogether) {
        float* to = tile + r * L;
        const int64_t some = E::min(kTogether, rows - r);
        const float* copied =
            columns == nullptr ? nullptr : columns_of(columns, m, row + r, some);
        for (int64_t n = 0; n < m.features; n += L, to += line) {
          load_line<D>(to, m, row + r, some, n, E::min(L, m.features - n), copied,
                       [](V a, int64_t) { return a; });
        }
      }
    });
  }

  // Rows of results in block order, `stride` floats apart, to a matrix. `columns`: as in load_tile.
  static void store_rows(const Matrix& m, int64_t row, const float* from, int64_t stride,
                         int64_t rows, float* columns) {
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
      if constexpr (I::kTransposes) {
        if (some == kTogether) {
          copy_columns(columns, first, stride, m.features);
          for (; n + L <= m.features; n += L) {
            V values[L];
            pick(columns, m.rank + n, L, values);
            for (int64_t r = 0; r < L; ++r) I::store(to + r * m.stride + n, values[r]);
          }
        }
      }
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
