// A whole MLP on rows of a batch, for one instruction set `I`: a tile of rows goes through all
// layers, its loss, and back, while its activations stay in the cache.
//
// Activations lie in tiles of lines, as panels leave them; the next layer's segments count in their
// slots. Gradients usually stay within one expert, where only blocks on the diagonal route one, but
// nothing here depends on that: the transposed panels hold the blocks that route a gradient.
#pragma once

#include "cpu/masked_linear/line_tile.h"
#include "cpu/masked_linear/panel_product.h"
#include "cpu/masked_linear/weight_sums.h"
#include "cpu/masked_mlp/head.h"

namespace maskmoe {

template <class I>
struct MaskedMlp {
  using E = Elements<I>;
  using Tile = LineTile<I>;
  using Product = PanelProduct<I>;
  using Sums = WeightSums<I>;
  using Head = MlpHead<I>;
  using V = typename I::V;
  static constexpr int L = I::kLanes;

  // Offsets of a tile's arrays, in floats from the start of scratch or `saved`.
  struct Places : E::Arrays {
    using E::Arrays::take;
    int64_t line, kept = 0;
    int64_t x, stage, logits, grads[2], head;
    bool keeps_z;

    explicit Places(const Mlp& n) : line(Tile::line_stride(n.tile_rows)) {
      keeps_z = n.activation == Activation::kGelu || n.activation == Activation::kSilu;
      int64_t most = 0;
      for (int64_t k = 0; k < n.depth; ++k) {
        const int64_t size = n.layers[k].panels.lines * line;
        most = size > most ? size : most;
        if (k + 1 < n.depth) kept += (keeps_z ? 2 : 1) * size;
      }
      x = take(Tile::lines(n.in_features) * line);
      stage = take(n.num_parts > 1 || n.parts->ids != nullptr || n.need_inputs
                       ? n.tile_rows * Tile::row_stride(n.in_features)
                       : 0);
      logits = take(n.layers[n.depth - 1].panels.lines * line);
      grads[0] = take(most);
      grads[1] = take(most);
      head = take(Head::work(n));
    }
  };

  static int64_t saved(const Mlp& n) { return E::round_up(Places(n).kept, 16); }
  static int64_t units(const Mlp& n) { return n.layers[0].panels.lines * Places(n).line; }

  static int64_t scratch(const Mlp& n) {
    const Places at(n);
    return at.total + (n.saved == nullptr ? at.kept : 0);
  }

  static void run(const Mlp& n, int64_t begin, int64_t end, const LayerSums* sums,
                  const GemSums& totals, float* scratch) {
    const Places at(n);
    const typename Head::Buffers buffers{scratch + at.logits, scratch + at.grads[0],
                                         scratch + at.head, at.line};
    Head::begin(n, buffers, totals);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * n.tile_rows, rows = E::min(n.tile_rows, n.rows - row);
      float* units = Head::units_of(n, tile);
      if (n.unit_scale != nullptr) {
        Head::scale_units(n, units, scratch + at.grads[0], at.line, rows);
        input_grads(n, at, scratch + at.grads[0], row, rows, scratch);
        continue;
      }
      float* kept = n.saved == nullptr ? scratch + at.total : n.saved + tile * n.saved_stride;
      const Activations of(n, at, kept);
      if (n.forward || n.need_weights) load_inputs(n, at, row, rows, scratch);
      if (n.forward) forward(n, at, of, rows, scratch);
      Head::run(n, buffers, row, rows, totals);
      const bool add = n.done > 0 || tile > begin;
      if (n.backward) {
        const float* g = backward(n, at, of, rows, sums, add, units, scratch);
        if (n.need_inputs) input_grads(n, at, g, row, rows, scratch);
        if (units != nullptr && g != units) Head::keep_units(n, g, units, at.line, rows);
      }
    }
  }

 private:
  // Tiles of every hidden layer: its output, and the pre-activation where the derivative needs it.
  struct Activations {
    const Mlp& mlp;
    const Places& at;
    float* first;

    Activations(const Mlp& n, const Places& places, float* kept)
        : mlp(n), at(places), first(kept) {}

    float* output(int64_t layer) const {
      float* from = first;
      for (int64_t k = 0; k < layer; ++k) from += size(k);
      return from;
    }
    float* before(int64_t layer) const {
      return output(layer) + (at.keeps_z ? size(layer) / 2 : 0);
    }
    int64_t size(int64_t k) const {
      return (at.keeps_z ? 2 : 1) * mlp.layers[k].panels.lines * at.line;
    }
  };

  static constexpr int64_t kAhead = 8;  // rows of tables are scattered: prefetch them

  static void prefetch(const char* from, int64_t bytes) {
    for (int64_t n = 0; n < bytes; n += 64) __builtin_prefetch(from + n);
  }

  static void load_inputs(const Mlp& n, const Places& at, int64_t row, int64_t rows,
                          float* scratch) {
    float* x = scratch + at.x;
    if (n.num_parts == 1 && n.parts->ids == nullptr) {
      const Matrix from{const_cast<void*>(n.parts->data), n.dtype, n.in_features, n.parts->stride,
                        n.in_order};
      Tile::load_tile(x, at.line, from, row, rows);
    } else {
      float* stage = scratch + at.stage;
      const int64_t stride = Tile::row_stride(n.in_features);
      const int64_t size = n.dtype == Dtype::kFloat32 ? 4 : 2;
      for (int64_t r = 0; r < rows; ++r) {
        float* to = stage + r * stride;
        for (int64_t p = 0; p < n.num_parts; to += n.parts[p].width, ++p) {
          const Part& part = n.parts[p];
          const int64_t from = part.ids == nullptr ? row + r : part.ids[row + r];
          if (part.ids != nullptr && r + kAhead < rows) {
            prefetch(static_cast<const char*>(part.data) +
                         part.ids[row + r + kAhead] * part.stride * size,
                     part.width * size);
          }
          E::load(to, static_cast<const char*>(part.data) + from * part.stride * size,
                       n.dtype, nullptr, part.width);
        }
      }
      Tile::load_tile(x, at.line, {stage, Dtype::kFloat32, n.in_features, stride, n.in_order}, 0,
                        rows);
    }
    if (n.mask == nullptr) return;
    Tile::clear_rows(x, at.line, Tile::lines(n.in_features), n.mask + row, rows);
  }

  static void forward(const Mlp& n, const Places& at, const Activations& of, int64_t rows,
                      float* scratch) {
    const float* from = scratch + at.x;
    for (int64_t k = 0; k < n.depth; ++k) {
      const MlpLayer& layer = n.layers[k];
      const bool last = k + 1 == n.depth;
      const Activation activation = last ? Activation::kNone : n.activation;
      const bool fused = Product::fused(activation);
      float* to = last ? scratch + at.logits : fused ? of.output(k) : of.before(k);
      Product::multiply(layer.panels, from, at.line, layer.weight, n.in_place, layer.buffer,
                        layer.bias, {to, L, at.line}, fused ? activation : Activation::kNone, rows);
      if (!fused) activate_tile(activation, to, of.output(k), layer.panels.lines, at.line, rows);
      from = last ? from : of.output(k);
    }
  }

  static void activate_tile(Activation a, const float* from, float* to, int64_t lines,
                            int64_t line, int64_t rows) {
    dispatch<I>(a, [&]<Activation A>() {
      for (int64_t n = 0; n < lines; ++n, from += line, to += line) {
        for (int64_t k = 0; k < rows * L; k += L) {
          I::store(to + k, activate<I, A>(I::load(from + k)));
        }
      }
    });
  }

  // --- Backward ----------------------------------------------------------------------------

  // Gradients of the first layer's units, in `units` where there are later layers and it is not
  // null; those of all weights are added to the sums.
  static const float* backward(const Mlp& n, const Places& at, const Activations& of,
                               int64_t rows, const LayerSums* sums, bool add, float* units,
                               float* scratch) {
    float* g = scratch + at.grads[0];
    float* next = scratch + at.grads[1];
    for (int64_t k = n.depth - 1; k >= 0; --k) {
      const MlpLayer& layer = n.layers[k];
      const float* inputs = k == 0 ? scratch + at.x : of.output(k - 1);
      if (n.need_weights) {
        Sums::weight_sums(layer.panels, n.in_place, inputs, g, at.line, rows, sums[k].weight,
                            sums[k].buffer, add);
        if (layer.bias != nullptr) {
          Sums::bias_sums(layer.panels, g, at.line, rows, sums[k].bias, add);
        }
      }
      if (k == 0) break;
      if (k == 1 && units != nullptr) next = units;
      const bool fused = Product::fused(n.activation);
      const float* saved = n.activation == Activation::kNone ? nullptr : of.before(k - 1);
      Product::multiply(layer.transposed, g, at.line, nullptr, Place::kNowhere,
                        layer.transposed_buffer, nullptr,
                        {next, L, at.line, fused ? saved : nullptr, n.activation},
                        Activation::kNone, rows);
      if (!fused) {
        derive(n.activation, saved, next, n.layers[k - 1].panels.lines, at.line, rows);
      }
      float* done = g;
      g = next;
      next = done;
    }
    return g;
  }

  // grad *= act', for all lines of a tile.
  static void derive(Activation a, const float* saved, float* grad, int64_t lines, int64_t line,
                     int64_t rows) {
    dispatch<I>(a, [&]<Activation A>() {
      for (int64_t n = 0; n < lines; ++n, saved += line, grad += line) {
        for (int64_t k = 0; k < rows * L; k += L) {
          I::store(grad + k, activation_grad<I, A>(I::load(grad + k), I::load(saved + k)));
        }
      }
    });
  }

  static void input_grads(const Mlp& n, const Places& at, const float* g, int64_t row,
                          int64_t rows, float* scratch) {
    const Matrix& to = n.grad_inputs;
    row -= n.done;
    const bool here = E::in_place(to);
    const int64_t stride = here ? to.stride : Tile::row_stride(n.in_features);
    float* out = here ? static_cast<float*>(E::row_of(to, row)) : scratch + at.stage;
    Product::multiply(n.layers[0].transposed, g, at.line, nullptr, Place::kNowhere,
                      n.layers[0].transposed_buffer, nullptr, {out, stride, 0},
                      Activation::kNone, rows);
    for (int64_t r = 0; !here && r < rows; ++r) {
      E::store(E::row_of(to, row + r), to.dtype, to.order, out + r * stride, to.features);
    }
  }
};

}  // namespace maskmoe
