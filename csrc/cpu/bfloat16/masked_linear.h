// One layer in bfloat16, with the processor's own products `P` (amx/products.h, dot_products.h).
//
// Gradients of units are rounded to bfloat16, as they are where layers run one by one.
#pragma once

#include "cpu/bfloat16/lines.h"

namespace maskmoe {

template <class P>
struct Bfloat16Linear {
  using I = typename P::Isa;
  using E = Elements<I>;
  using V = typename I::V;
  using Lines = Bfloat16Lines<I>;
  using FloatTile = LineTile<I>;
  static constexpr int64_t L = I::kLanes;

  static int64_t tile_rows(int64_t wanted) { return E::round_up(wanted, P::kRowStep); }

  // --- Forward ---------------------------------------------------------------------------------

  // Offsets in the scratch, in floats.
  struct ForwardPlaces : E::Arrays {
    using E::Arrays::take;
    int64_t tile, line, x, floats;
    bool reads_floats;

    explicit ForwardPlaces(const Forward& f)
        : tile(tile_rows(f.tile_rows)), line(FloatTile::line_stride(tile)),
          reads_floats(P::reads_floats(f.panels)) {
      take(P::scratch(f.panels));
      x = take(Lines::lines(f.x.features) * line);
      floats = take(reads_floats ? FloatTile::lines(f.x.features) * line : 0);
    }
  };

  static int64_t forward_scratch(const Forward& f) { return ForwardPlaces(f).total; }

  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    const ForwardPlaces at(f);
    float *x = scratch + at.x, *floats = scratch + at.floats;
    const Matrix* z = f.z.data == nullptr ? nullptr : &f.z;
    P::begin();
    for (; row < end; row += at.tile) {
      const int64_t rows = E::min(at.tile, end - row);
      Lines::load_lines(x, at.line, f.x, row, rows);
      if (at.reads_floats) {
        Lines::widen_lines(floats, x, at.line, FloatTile::lines(f.x.features), rows);
      }
      P::multiply(f.panels, x, floats, at.line, f.buffer, f.bias,
                  typename Lines::Rows{f.y, z, f.activation, row}, rows, scratch);
    }
    P::end();
  }

  // --- Backward --------------------------------------------------------------------------------

  struct BackwardPlaces : E::Arrays {
    using E::Arrays::take;
    int64_t tile, line, row_line, lines, row_pairs, floats, x, turned;
    bool to_inputs, to_weights, reads_floats;

    explicit BackwardPlaces(const Backward& b)
        : tile(tile_rows(b.tile_rows)), line(FloatTile::line_stride(tile)),
          row_line(FloatTile::line_stride(tile / 2)), to_inputs(b.grad_x.data != nullptr),
          to_weights(b.need_weight || b.need_bias),
          reads_floats(to_inputs && P::reads_floats(b.transposed)) {
      take(E::max(P::scratch(b.panels), P::scratch(b.transposed)));
      lines = take(to_inputs ? (b.panels.lines + 1) / 2 * line : 0);
      row_pairs = take(to_weights ? b.panels.lines * row_line : 0);
      floats = take(reads_floats ? b.panels.lines * line : 0);
      x = take(b.need_weight ? Lines::lines(b.x.features) * line : 0);
      turned = take(b.need_weight ? FloatTile::lines(b.x.features) * row_line : 0);
    }
  };

  // Values of a row, from `column` on; zeros after `count` of them.
  static V values(const Matrix& m, int64_t row, int64_t column, int64_t count) {
    const void* from = E::row_of(m, row);
    if (m.order != nullptr) {
      return E::template gather<Dtype::kBfloat16>(from, m.order + column, count);
    }
    const auto* at = static_cast<const uint16_t*>(from) + column;
    return count == L ? I::load_bf16(at) : I::widen_bf16(Lines::load_half(at, count));
  }

  // The gradients of a tile's pre-activations; every panel begins a line.
  static void gradient(const Backward& b, const typename Lines::Gradients& to, int64_t row,
                       int64_t rows) {
    dispatch<I>(b.activation, [&]<Activation A>() {
      for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t p = 0; p < b.panels.count; ++p) {
          const Panel& panel = b.panels.panels[p];
          for (int64_t n = 0; n < panel.lanes; n += L) {
            const int64_t column = panel.first + n, count = E::min(L, panel.lanes - n);
            const auto value = [&](int64_t at) {
              const V g = values(b.grad_y, at, column, count);
              if constexpr (A == Activation::kNone) return g;
              return activation_grad<I, A>(g, values(b.saved, at, column, count));
            };
            to.put(panel.line + n / L, r, value(row + r),
                   r + 1 < rows ? value(row + r + 1) : I::zero());
          }
        }
      }
    });
    for (int64_t n = 0; n < b.panels.lines; ++n) to.pad(n, rows, P::kRowStep);
  }

  static int64_t backward_scratch(const Backward& b) { return BackwardPlaces(b).total; }

  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_buffer,
                       float* grad_bias, float* scratch) {
    const BackwardPlaces at(b);
    float *x = scratch + at.x, *turned = scratch + at.turned;
    const typename Lines::Gradients g{
        at.to_inputs ? scratch + at.lines : nullptr,
        at.to_weights ? scratch + at.row_pairs : nullptr,
        at.reads_floats ? scratch + at.floats : nullptr,
        at.line, at.row_line};
    P::begin();
    for (bool add = false; row < end; row += at.tile, add = true) {
      const int64_t rows = E::min(at.tile, end - row);
      gradient(b, g, row, rows);
      if (at.to_inputs) {
        P::multiply(b.transposed, g.lines, g.floats, at.line, b.transposed_buffer, nullptr,
                    typename Lines::Rows{b.grad_x, nullptr, Activation::kNone, row}, rows,
                    scratch);
      }
      if (b.need_weight) {
        Lines::load_lines(x, at.line, b.x, row, rows);
        P::turn(turned, at.row_line, x, at.line, FloatTile::lines(b.x.features), rows);
        P::weight_sums(b.panels, turned, g.row_pairs, at.row_line, rows, grad_buffer, add, scratch);
      }
      if (b.need_bias) {
        Lines::bias_sums(b.panels, g.row_pairs, at.row_line, rows, grad_bias, add);
      }
    }
    P::end();
  }
};

}  // namespace maskmoe
