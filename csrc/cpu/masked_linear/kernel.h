// The masked linear map on rows of a batch, for one instruction set `I` (simd_*.h).
//
// Forward, lanes are units and inputs are features. grad_x is the same product with lanes and
// inputs exchanged: only routed blocks are in its panels.
#pragma once

#include "cpu/masked_linear/line_tile.h"
#include "cpu/masked_linear/panel_product.h"
#include "cpu/masked_linear/weight_sums.h"

namespace maskmoe {

template <class I>
struct MaskedLinear {
  using E = Elements<I>;
  using Tile = LineTile<I>;
  using Product = PanelProduct<I>;
  using Sums = WeightSums<I>;
  using V = typename I::V;
  static constexpr int L = I::kLanes;

  // --- Forward -----------------------------------------------------------------------------

  static int64_t forward_scratch(const Forward& f) {
    int64_t size = Tile::lines(f.x.features) * Tile::line_stride(f.tile_rows);
    if (!E::in_place(f.y) || !Product::fused(f.activation)) {
      size += f.tile_rows * Tile::row_stride(f.y.features);
    }
    return size + E::max(Tile::columns_size(f.x), Tile::columns_size(f.y));
  }

  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    const bool y_here = E::in_place(f.y) && Product::fused(f.activation);
    const int64_t line = Tile::line_stride(f.tile_rows);
    const int64_t y_stride = y_here ? f.y.stride : Tile::row_stride(f.y.features);
    float* x = scratch;
    float* y_tile = x + Tile::lines(f.x.features) * line;
    float* columns = y_tile + (y_here ? 0 : f.tile_rows * y_stride);
    const Activation applied = Product::fused(f.activation) ? f.activation : Activation::kNone;
    for (; row < end; row += f.tile_rows) {
      const int64_t rows = E::min(f.tile_rows, end - row);
      Tile::load_tile(x, line, f.x, row, rows, columns);
      const bool finite =
          f.panels.shared && Tile::all_finite(x, line, Tile::lines(f.x.features), rows);
      float* y = y_here ? static_cast<float*>(E::row_of(f.y, row)) : y_tile;
      Product::multiply(f.panels, x, line, f.weight, f.in_place, f.buffer, f.bias, {y, y_stride, 0},
                        applied, rows, finite);
      if (y_here) continue;
      if (f.z.data != nullptr) Tile::store_rows(f.z, row, y_tile, y_stride, rows, columns);
      for (int64_t r = 0; r < rows && !Product::fused(f.activation); ++r) {
        activate_row(f.activation, y_tile + r * y_stride, f.y.features);
      }
      Tile::store_rows(f.y, row, y_tile, y_stride, rows, columns);
    }
  }

  static void activate_row(Activation a, float* line, int64_t count) {
    dispatch<I>(a, [&]<Activation A>() {
      for (int64_t n = 0; n < count; n += L) {  // a tile's rows are padded
        I::store(line + n, activate<I, A>(I::load(line + n)));
      }
    });
  }

  // --- Backward ----------------------------------------------------------------------------

  // grad_z of a tile, every panel beginning a line; lanes without a unit are zero.
  template <Activation A>
  static void gradient_tile(const Backward& b, float* g, int64_t line, int64_t row, int64_t rows,
                            float* columns) {
    E::with_dtype(b.grad_y.dtype, [&]<Dtype D>() {
      float saved[Tile::kTogether * L];
      float* saved_columns = columns + Tile::columns_size(b.grad_y);
      for (int64_t r = 0; r < rows; r += Tile::kTogether) {
        float* to = g + r * L;
        const int64_t some = E::min(Tile::kTogether, rows - r);
        const float* of_y = Tile::columns_of(columns, b.grad_y, row + r, some);
        const float* of_saved = A == Activation::kNone
                                    ? nullptr
                                    : Tile::columns_of(saved_columns, b.saved, row + r, some);
        for (int64_t p = 0; p < b.panels.count; ++p) {
          const Panel& panel = b.panels.panels[p];
          for (int64_t n = 0; n < panel.lanes; n += L, to += line) {
            const int64_t column = panel.first + n, count = E::min(L, panel.lanes - n);
            if constexpr (A == Activation::kNone) {
              Tile::template load_line<D>(to, b.grad_y, row + r, some, column, count, of_y,
                                          [](V a, int64_t) { return a; });
            } else {
              Tile::template load_line<D>(saved, b.saved, row + r, some, column, count, of_saved,
                                          [](V a, int64_t) { return a; });
              const auto times_dact = [&](V a, int64_t k) {
                return activation_grad<I, A>(a, I::load(saved + k * L));
              };
              Tile::template load_line<D>(to, b.grad_y, row + r, some, column, count, of_y,
                                          times_dact);
            }
          }
        }
      }
    });
  }

  static void gradient(const Backward& b, float* g, int64_t line, int64_t row, int64_t rows,
                       float* columns) {
    dispatch<I>(b.activation, [&]<Activation A>() {
      gradient_tile<A>(b, g, line, row, rows, columns);
    });
  }

  static int64_t backward_scratch(const Backward& b) {
    const int64_t line = Tile::line_stride(b.tile_rows);
    int64_t size = b.panels.lines * line;
    if (b.need_weight) size += Tile::lines(b.x.features) * line;
    if (b.grad_x.data != nullptr && !E::in_place(b.grad_x)) {
      size += b.tile_rows * Tile::row_stride(b.grad_x.features);
    }
    return size + E::max(Tile::columns_size(b.x), 2 * Tile::columns_size(b.grad_y));
  }

  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                       float* grad_buffer, float* grad_bias, float* scratch) {
    const bool out_here = b.grad_x.data != nullptr && E::in_place(b.grad_x);
    const int64_t line = Tile::line_stride(b.tile_rows);
    const int64_t out_stride = out_here ? b.grad_x.stride : Tile::row_stride(b.grad_x.features);
    float* g = scratch;
    float* x = g + b.panels.lines * line;
    float* out_tile = x + (b.need_weight ? Tile::lines(b.x.features) * line : 0);
    float* columns = out_tile;
    if (b.grad_x.data != nullptr && !out_here) columns += b.tile_rows * out_stride;
    for (bool add = false; row < end; row += b.tile_rows, add = true) {
      const int64_t rows = E::min(b.tile_rows, end - row);
      gradient(b, g, line, row, rows, columns);
      if (b.grad_x.data != nullptr) {
        const bool finite =
            b.transposed.shared && Tile::all_finite(g, line, b.panels.lines, rows);
        float* out = out_here ? static_cast<float*>(E::row_of(b.grad_x, row)) : out_tile;
        Product::multiply(b.transposed, g, line, nullptr, Place::kNowhere, b.transposed_buffer,
                          nullptr, {out, out_stride, 0}, Activation::kNone, rows, finite);
        if (!out_here) Tile::store_rows(b.grad_x, row, out_tile, out_stride, rows, columns);
      }
      if (b.need_weight) {
        Tile::load_tile(x, line, b.x, row, rows, columns);
        Sums::weight_sums(b.panels, b.in_place, x, g, line, rows, grad_weight, grad_buffer, add);
      }
      if (b.need_bias) Sums::bias_sums(b.panels, g, line, rows, grad_bias, add);
    }
  }
};

}  // namespace maskmoe
