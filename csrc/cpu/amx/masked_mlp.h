// MLPs in bfloat16 on tiles: as masked_mlp/kernel.h, with activations in lines of 32 slots.
// Other dtypes use AVX-512.
//
// Between layers, values are rounded to bfloat16, as tiles are read and as layers one by one round
// them; so is what derivatives need. Logits, the loss and gradients are float32, and gradients are
// rounded where they are multiplied.
#pragma once

#include "cpu/amx/masked_linear.h"
#include "cpu/masked_mlp/head.h"

namespace maskmoe::amx {

struct MaskedMlp {
  using Head = MlpHead<Isa>;

  // --- Where things of a tile lie, in floats from the start of scratch or `saved` ---------------

  // Vectors of 16 slots in a layer's inputs.
  static int64_t halves_into(const Mlp& n, int64_t layer) {
    return layer == 0 ? FloatTile::lines(n.in_features) : n.layers[layer - 1].panels.lines;
  }

  static bool gathers(const Mlp& n) { return n.num_parts > 1 || n.parts->ids != nullptr; }

  struct Places {
    int64_t tile, line, total = 0, kept = 0;
    int64_t work, x, stage, floats, logits, grads[2], rounded, pairs, transposed, head;
    bool keeps_z;

    explicit Places(const Mlp& n)
        : tile(tile_rows(n.tile_rows)), line(FloatTile::line_stride(tile)),
          keeps_z(n.activation == Activation::kGelu || n.activation == Activation::kSilu) {
      int64_t units = 0, inputs = 0, widened = 0, multiplies = 2 * kTileFloats;
      for (int64_t k = 0; k < n.depth; ++k) {
        const MlpLayer& layer = n.layers[k];
        const Needs needs(layer.panels);
        multiplies = max(multiplies, multiply_scratch(needs));
        if (n.backward) multiplies = max(multiplies, multiply_scratch(Needs(layer.transposed)));
        units = max(units, layer.panels.lines);
        inputs = max(inputs, halves_into(n, k));
        if (needs.floats) widened = max(widened, halves_into(n, k));
        if (k + 1 < n.depth) kept += kept_of(layer);
      }
      work = take(multiplies);
      x = take(lines(n.in_features) * line);
      stage = take(gathers(n) ? tile * lines(n.in_features) * L : 0);
      floats = take(widened * line);
      logits = take(n.layers[n.depth - 1].panels.lines * line);
      grads[0] = take(units * line);
      grads[1] = take(n.backward ? units * line : 0);
      rounded = take(n.backward ? (units + 1) / 2 * line : 0);
      pairs = take(n.backward ? units * (tile / 2) * L : 0);
      transposed = take(n.backward ? inputs * (tile / 2) * L : 0);
      head = take(Head::work(n));
    }

    int64_t size_of(const MlpLayer& layer) const { return (layer.panels.lines + 1) / 2 * line; }
    int64_t kept_of(const MlpLayer& layer) const { return (keeps_z ? 2 : 1) * size_of(layer); }

   private:
    int64_t take(int64_t size) {
      const int64_t at = total;
      total += E::round_up(size, 16);
      return at;
    }
  };

  // Lines of every hidden layer: its output, and the pre-activation where the derivative needs it.
  struct Activations {
    const Mlp& mlp;
    const Places& at;
    float* first;

    float* output(int64_t layer) const {
      float* from = first;
      for (int64_t k = 0; k < layer; ++k) from += at.kept_of(mlp.layers[k]);
      return from;
    }
    float* before(int64_t layer) const {
      return output(layer) + (at.keeps_z ? at.size_of(mlp.layers[layer]) : 0);
    }
  };

  static int64_t saved(const Mlp& n) {
    return n.dtype == Dtype::kBfloat16 ? E::round_up(Places(n).kept, 16)
                                       : kAvx512.mlp_saved(n);
  }

  static int64_t units(const Mlp& n) {
    return n.dtype == Dtype::kBfloat16 ? n.layers[0].panels.lines * Places(n).line
                                       : kAvx512.mlp_units(n);
  }

  static int64_t scratch(const Mlp& n) {
    if (n.dtype != Dtype::kBfloat16) return kAvx512.mlp_scratch(n);
    const Places at(n);
    return at.total + (n.saved == nullptr ? at.kept : 0);
  }

  static void run(const Mlp& n, int64_t begin, int64_t end, const LayerSums* sums,
                  const GemSums& totals, float* scratch) {
    if (n.dtype != Dtype::kBfloat16) {
      kAvx512.mlp(n, begin, end, sums, totals, scratch);
      return;
    }
    const Places at(n);
    const Head::Buffers buffers{scratch + at.logits, scratch + at.grads[0], scratch + at.head,
                                at.line};
    Head::begin(n, buffers, totals);
    Tiles::configure();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * n.tile_rows, rows = min(n.tile_rows, n.rows - row);
      float* units = Head::units_of(n, tile);
      if (n.unit_scale != nullptr) {
        Head::scale_units(n, units, scratch + at.grads[0], at.line, rows);
        input_grads(n, at, scratch + at.grads[0], row, rows, scratch);
        continue;
      }
      float* kept = n.saved == nullptr ? scratch + at.total : n.saved + tile * n.saved_stride;
      const Activations of{n, at, kept};
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
    Tiles::release();
  }

 private:
  // --- Forward ---------------------------------------------------------------------------------

  static void load_inputs(const Mlp& n, const Places& at, int64_t row, int64_t rows,
                          float* scratch) {
    float* x = scratch + at.x;
    if (gathers(n)) {
      const int64_t stride = lines(n.in_features) * kLine;
      auto* stage = reinterpret_cast<char*>(scratch + at.stage);
      for (int64_t r = 0; r < rows; ++r) {
        char* to = stage + r * stride * 2;
        for (int64_t p = 0; p < n.num_parts; to += n.parts[p].width * 2, ++p) {
          const Part& part = n.parts[p];
          const int64_t from = part.ids == nullptr ? row + r : part.ids[row + r];
          __builtin_memcpy(to, static_cast<const char*>(part.data) + from * part.stride * 2,
                           part.width * 2);
        }
      }
      load_lines(x, at.line, {stage, n.dtype, n.in_features, stride, n.in_order}, 0, rows);
    } else {
      load_lines(x, at.line, {const_cast<void*>(n.parts->data), n.dtype, n.in_features,
                              n.parts->stride, n.in_order}, row, rows);
    }
    if (n.mask == nullptr) return;
    FloatTile::clear_rows(x, at.line, lines(n.in_features), n.mask + row, rows);
  }

  // Results to lines of 32 slots.
  struct Hidden {
    float *y, *z;  // z null: not kept
    int64_t line;
    Activation activation;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      dispatch<Isa>(activation, [&]<Activation A>() {
        each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
          const int64_t index = panel.line + lane / L, slot = (row + r) * kLine;
          if (z != nullptr) Isa::store_bf16(half(z, line, index) + slot, a);
          Isa::store_bf16(half(y, line, index) + slot, activate<Isa, A>(a));
        });
      });
    }
  };

  // Results to lines of 16 floats, times the derivative that the activation had at `saved`.
  struct Floats {
    float* to;
    int64_t line;
    const float* saved;  // lines of 32 slots; null with kNone
    Activation derivative;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      dispatch<Isa>(derivative, [&]<Activation A>() {
        each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
          const int64_t index = panel.line + lane / L;
          if constexpr (A != Activation::kNone) {
            const uint16_t* at = half(saved, line, index) + (row + r) * kLine;
            a = activation_grad<Isa, A>(a, Isa::load_bf16(at));
          }
          Isa::store(to + index * line + (row + r) * L, a);
        });
      });
    }
  };

  static void forward(const Mlp& n, const Places& at, const Activations& of, int64_t rows,
                      float* scratch) {
    const float* x = scratch + at.x;
    float *floats = scratch + at.floats, *work = scratch + at.work;
    for (int64_t k = 0; k < n.depth; ++k) {
      const MlpLayer& layer = n.layers[k];
      const auto to = [&](const auto& results) {
        multiply(layer.panels, x, floats, at.line, layer.buffer, layer.bias, results, rows, work);
      };
      if (Needs(layer.panels).floats) widen_lines(floats, x, at.line, halves_into(n, k), rows);
      if (k + 1 == n.depth) {
        to(Floats{scratch + at.logits, at.line, nullptr, Activation::kNone});
      } else {
        float* y = of.output(k);
        to(Hidden{y, at.keeps_z ? of.before(k) : nullptr, at.line, n.activation});
        x = y;
      }
    }
  }

  // --- Backward --------------------------------------------------------------------------------

  // Gradients of the first layer's units, in `units` where there are later layers and it is not
  // null; those of all weights are added to the sums.
  static const float* backward(const Mlp& n, const Places& at, const Activations& of,
                               int64_t rows, const LayerSums* sums, bool add, float* units,
                               float* scratch) {
    float *g = scratch + at.grads[0], *next = scratch + at.grads[1];
    for (int64_t k = n.depth - 1; k >= 0; --k) {
      const MlpLayer& layer = n.layers[k];
      if (n.need_weights) {
        float *pairs = scratch + at.pairs, *transposed = scratch + at.transposed;
        transpose_lines(transposed, k == 0 ? scratch + at.x : of.output(k - 1), at.line,
                        halves_into(n, k), rows);
        pair_rows(pairs, g, at.line, layer.panels.lines, rows);
        weight_sums(layer.panels, transposed, pairs, rows, sums[k].buffer, add, scratch + at.work);
        if (layer.bias != nullptr) {
          FloatSums::bias_sums(layer.panels, g, at.line, rows, sums[k].bias, add);
        }
      }
      if (k == 0) break;
      if (k == 1 && units != nullptr) next = units;
      go_back(layer, at, g, Floats{next, at.line, of.before(k - 1), n.activation}, rows, scratch);
      float* done = g;
      g = next;
      next = done;
    }
    return g;
  }

  static void input_grads(const Mlp& n, const Places& at, const float* g, int64_t row,
                          int64_t rows, float* scratch) {
    go_back(n.layers[0], at, g, Rows{n.grad_inputs, nullptr, Activation::kNone, row - n.done}, rows,
            scratch);
  }

  // From gradients of a layer's units to those of its inputs.
  template <class R>
  static void go_back(const MlpLayer& layer, const Places& at, const float* g, const R& results,
                      int64_t rows, float* scratch) {
    float* rounded = scratch + at.rounded;
    if (Needs(layer.transposed).pieces > 0) {
      round_lines(rounded, g, at.line, layer.panels.lines, rows);
    }
    multiply(layer.transposed, rounded, g, at.line, layer.transposed_buffer, nullptr, results, rows,
             scratch + at.work);
  }
};

}  // namespace maskmoe::amx
