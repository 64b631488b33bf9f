// MLPs in bfloat16, with the processor's own products `P`: as masked_mlp/kernel.h, with activations
// in lines of 32 slots.
//
// Between layers, values are rounded to bfloat16, as layers one by one round them; so is what
// derivatives need, and so are gradients. Logits, the loss and the sums over the batch are float32.
#pragma once

#include "cpu/bfloat16/masked_linear.h"
#include "cpu/masked_mlp/head.h"

namespace maskmoe {

template <class P>
struct Bfloat16Mlp {
  using I = typename P::Isa;
  using E = Elements<I>;
  using Lines = Bfloat16Lines<I>;
  using FloatTile = LineTile<I>;
  using Head = MlpHead<I>;
  using Gradients = typename Lines::Gradients;
  static constexpr int64_t L = I::kLanes;

  // --- Where things of a tile lie, in floats from the start of scratch or `saved` ---------------

  // Vectors of 16 slots in a layer's inputs.
  static int64_t halves_into(const Mlp& n, int64_t layer) {
    return layer == 0 ? FloatTile::lines(n.in_features) : n.layers[layer - 1].panels.lines;
  }

  static bool gathers(const Mlp& n) { return n.num_parts > 1 || n.parts->ids != nullptr; }

  struct Places : E::Arrays {
    using E::Arrays::take;
    int64_t tile, line, row_line, kept = 0;
    int64_t work, x, stage, floats[2], logits, last_grads, grads[2], row_pairs, turned, head;
    bool keeps_z;

    explicit Places(const Mlp& n)
        : tile(Bfloat16Linear<P>::tile_rows(n.tile_rows)), line(FloatTile::line_stride(tile)),
          row_line(FloatTile::line_stride(tile / 2)),
          keeps_z(n.activation == Activation::kGelu || n.activation == Activation::kSilu) {
      int64_t units = 0, inputs = 0, widened = 0, multiplies = 0;
      for (int64_t k = 0; k < n.depth; ++k) {
        const MlpLayer& layer = n.layers[k];
        multiplies = E::max(multiplies, P::scratch(layer.panels));
        multiplies = E::max(multiplies, P::scratch(layer.transposed));
        units = E::max(units, layer.panels.lines);
        inputs = E::max(inputs, halves_into(n, k));
        if (P::reads_floats(layer.panels)) widened = E::max(widened, halves_into(n, k));
        if (P::reads_floats(layer.transposed)) widened = E::max(widened, layer.panels.lines);
        if (k + 1 < n.depth) kept += kept_of(layer);
      }
      work = take(multiplies);
      x = take(Lines::lines(n.in_features) * line);
      stage = take(gathers(n) ? tile * Lines::lines(n.in_features) * L : 0);
      for (int64_t& lines : floats) lines = take(widened * line);
      logits = take(n.layers[n.depth - 1].panels.lines * line);
      last_grads = take(E::max(n.layers[n.depth - 1].panels.lines, n.layers[0].panels.lines) * line);
      for (int64_t& lines : grads) lines = take((units + 1) / 2 * line);
      row_pairs = take(n.backward ? units * row_line : 0);
      turned = take(n.backward ? (inputs + 1) / 2 * 2 * row_line : 0);
      head = take(Head::work(n));
    }

    int64_t size_of(const MlpLayer& layer) const { return (layer.panels.lines + 1) / 2 * line; }
    int64_t kept_of(const MlpLayer& layer) const { return (keeps_z ? 2 : 1) * size_of(layer); }
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

  static int64_t saved(const Mlp& n) { return E::round_up(Places(n).kept, 16); }
  static int64_t units(const Mlp& n) { return n.layers[0].panels.lines * Places(n).line; }

  static int64_t scratch(const Mlp& n) {
    const Places at(n);
    return at.total + (n.saved == nullptr ? at.kept : 0);
  }

  static void run(const Mlp& n, int64_t begin, int64_t end, const LayerSums* sums,
                  const GemSums& totals, float* scratch) {
    const Places at(n);
    const typename Head::Buffers buffers{scratch + at.logits, scratch + at.last_grads,
                                         scratch + at.head, at.line};
    Head::begin(n, buffers, totals);
    P::begin();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * n.tile_rows, rows = E::min(n.tile_rows, n.rows - row);
      float* units = Head::units_of(n, tile);
      if (n.unit_scale != nullptr) {
        float* g = scratch + at.last_grads;
        Head::scale_units(n, units, g, at.line, rows);
        const Gradients rounded = gradients(n, at, 0, nullptr, scratch);
        rounded.put_lines(g, n.layers[0].panels.lines, rows, P::kRowStep);
        input_grads(n, at, rounded, row, rows, scratch);
        continue;
      }
      float* kept = n.saved == nullptr ? scratch + at.total : n.saved + tile * n.saved_stride;
      const Activations of{n, at, kept};
      if (n.forward || n.need_weights) load_inputs(n, at, row, rows, scratch);
      if (n.forward) forward(n, at, of, rows, scratch);
      Head::run(n, buffers, row, rows, totals);
      const bool add = n.done > 0 || tile > begin;
      if (n.backward) backward(n, at, of, row, rows, sums, add, units, scratch);
    }
    P::end();
  }

 private:
  // --- Forward ---------------------------------------------------------------------------------

  static void load_inputs(const Mlp& n, const Places& at, int64_t row, int64_t rows,
                          float* scratch) {
    float* x = scratch + at.x;
    if (gathers(n)) {
      const int64_t stride = Lines::lines(n.in_features) * Lines::kLine;
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
      Lines::load_lines(x, at.line, {stage, n.dtype, n.in_features, stride, n.in_order}, 0, rows);
    } else {
      Lines::load_lines(x, at.line,
                        {const_cast<void*>(n.parts->data), n.dtype, n.in_features,
                         n.parts->stride, n.in_order},
                        row, rows);
    }
    if (n.mask == nullptr) return;
    FloatTile::clear_rows(x, at.line, Lines::lines(n.in_features), n.mask + row, rows);
  }

  static void forward(const Mlp& n, const Places& at, const Activations& of, int64_t rows,
                      float* scratch) {
    const float* x = scratch + at.x;
    float *floats = scratch + at.floats[0], *work = scratch + at.work;
    for (int64_t k = 0; k < n.depth; ++k) {
      const MlpLayer& layer = n.layers[k];
      const auto to = [&](const auto& results) {
        P::multiply(layer.panels, x, floats, at.line, layer.buffer, layer.bias, results, rows,
                    work);
      };
      if (P::reads_floats(layer.panels)) {
        Lines::widen_lines(floats, x, at.line, halves_into(n, k), rows);
      }
      if (k + 1 == n.depth) {
        to(typename Lines::Floats{scratch + at.logits, at.line});
      } else {
        float* y = of.output(k);
        to(typename Lines::Hidden{y, at.keeps_z ? of.before(k) : nullptr, at.line, n.activation});
        x = y;
      }
    }
  }

  // --- Backward --------------------------------------------------------------------------------

  // Where the gradients of a layer's units go: lines, if products read them; row pairs, if weights
  // want gradients. `units`: lines of floats to keep, too, or null.
  static Gradients gradients(const Mlp& n, const Places& at, int64_t layer, float* units,
                             float* scratch) {
    const bool reads_floats = P::reads_floats(n.layers[layer].transposed);
    float* floats = reads_floats ? scratch + at.floats[layer % 2] : nullptr;
    return {layer > 0 || n.need_inputs ? scratch + at.grads[layer % 2] : nullptr,
            n.need_weights ? scratch + at.row_pairs : nullptr,
            units != nullptr ? units : floats, at.line, at.row_line};
  }

  // From the gradients of the logits to those of the inputs; those of all weights are added to the
  // sums. The first layer's units leave theirs in `units`, where it is not null.
  static void backward(const Mlp& n, const Places& at, const Activations& of, int64_t row,
                       int64_t rows, const LayerSums* sums, bool add, float* units,
                       float* scratch) {
    const float* last = scratch + at.last_grads;
    int64_t k = n.depth - 1;
    Gradients g = gradients(n, at, k, nullptr, scratch);
    g.put_lines(last, n.layers[k].panels.lines, rows, P::kRowStep);
    if (k == 0 && units != nullptr) Head::keep_units(n, last, units, at.line, rows);
    for (; k >= 0; --k) {
      if (n.need_weights) {
        const MlpLayer& layer = n.layers[k];
        float* turned = scratch + at.turned;
        P::turn(turned, at.row_line, k == 0 ? scratch + at.x : of.output(k - 1), at.line,
                halves_into(n, k), rows);
        P::weight_sums(layer.panels, turned, g.row_pairs, at.row_line, rows, sums[k].buffer, add,
                       scratch + at.work);
        if (layer.bias != nullptr) {
          Lines::bias_sums(layer.panels, g.row_pairs, at.row_line, rows, sums[k].bias, add);
        }
      }
      if (k == 0) break;
      const Gradients next = gradients(n, at, k - 1, k == 1 ? units : nullptr, scratch);
      const float* saved = n.activation == Activation::kNone ? nullptr : of.before(k - 1);
      go_back(n.layers[k], at, g, typename Lines::Derived{next, saved, n.activation, P::kRowStep},
              rows, scratch);
      g = next;
    }
    if (n.need_inputs) input_grads(n, at, g, row, rows, scratch);
  }

  static void input_grads(const Mlp& n, const Places& at, const Gradients& g, int64_t row,
                          int64_t rows, float* scratch) {
    go_back(n.layers[0], at, g,
            typename Lines::Rows{n.grad_inputs, nullptr, Activation::kNone, row - n.done}, rows,
            scratch);
  }

  // From gradients of a layer's units to those of its inputs.
  template <class R>
  static void go_back(const MlpLayer& layer, const Places& at, const Gradients& g,
                      const R& results, int64_t rows, float* scratch) {
    P::multiply(layer.transposed, g.lines, g.floats, at.line, layer.transposed_buffer, nullptr,
                results, rows, scratch + at.work);
  }
};

}  // namespace maskmoe
