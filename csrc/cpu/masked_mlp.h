// A whole network on rows of a batch, for one instruction set `I`: a tile of rows goes through all
// layers, its loss, and back, while its activations stay in the cache.
//
// Activations lie in tiles of lines, as panels leave them; the next layer's segments count in their
// slots. A chain of gradients stays within one expert, for only blocks on the diagonal route one,
// but nothing here depends on that: what routes a gradient is in the turned panels.
#pragma once

#include "masked_linear.h"

namespace maskmoe {

template <class I>
struct MaskedMLP {
  using Linear = MaskedLinear<I>;
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  // Where things of a tile lie; each in floats from the start of scratch or `saved`.
  struct Places {
    int64_t line, total = 0, kept = 0;
    int64_t x, stage, logits, grads[2], gem;
    bool keeps_z;

    explicit Places(const Network& n) : line(Linear::line_stride(n.tile_rows)) {
      keeps_z = n.activation == Activation::kGelu || n.activation == Activation::kSilu;
      int64_t most = 0;
      for (int64_t k = 0; k < n.depth; ++k) {
        const int64_t size = n.layers[k].panels.lines * line;
        most = size > most ? size : most;
        if (k + 1 < n.depth) kept += (keeps_z ? 2 : 1) * size;
      }
      x = take(Linear::lines(n.in_features) * line);
      stage = take(n.num_parts > 1 || n.parts->ids != nullptr || n.need_inputs
                       ? n.tile_rows * Linear::row_stride(n.in_features)
                       : 0);
      logits = take(n.layers[n.depth - 1].panels.lines * line);
      grads[0] = take(most);
      grads[1] = take(most);
      gem = take(5 * L * experts_of(n));
    }

    static int64_t experts_of(const Network& n) {
      if (n.mixture != nullptr) return n.mixture->selection.experts;
      return n.gem == nullptr ? 0 : n.gem->selection.experts;
    }

   private:
    int64_t take(int64_t size) {
      const int64_t at = total;
      total += Linear::round_up(size, 16);
      return at;
    }
  };

  static int64_t saved(const Network& n) { return Linear::round_up(Places(n).kept, 16); }

  static int64_t scratch(const Network& n) {
    const Places at(n);
    return at.total + (n.saved == nullptr ? at.kept : 0);
  }

  static void run(const Network& n, int64_t begin, int64_t end, const LayerSums* sums,
                  const GemSums& totals, float* scratch) {
    const Places at(n);
    if (n.gem != nullptr) {
      // Lanes without an expert are computed on, and dropped: on values, not on what lay here.
      const int64_t size = n.layers[n.depth - 1].panels.lines * at.line;
      for (int64_t k = 0; k < size; k += L) I::store(scratch + at.grads[0] + k, I::zero());
      for (int64_t i = 0; i < n.gem->selection.experts; ++i) {
        totals.loss[i] = totals.weight[i] = 0;
      }
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * n.tile_rows, rows = Linear::smaller(n.tile_rows, n.rows - row);
      float* kept = n.saved == nullptr ? scratch + at.total : n.saved + tile * n.saved_stride;
      const Activations of(n, at, kept);
      if (n.forward || n.need_weights) load_inputs(n, at, row, rows, scratch);
      if (n.forward) forward(n, at, of, row, rows, scratch);
      if (n.mixture != nullptr) mix(*n.mixture, at, row, rows, scratch);
      float* grads = scratch + at.grads[0];
      if (n.gem != nullptr) {
        gem(n, at, row, rows, scratch, grads, totals);
      } else if (n.backward) {
        load_grads(n, at, row, rows, grads);
      }
      if (n.backward) backward(n, at, of, row, rows, sums, tile > begin, scratch);
    }
  }

 private:
  // Tiles of every hidden layer: its output, and the pre-activation where the derivative needs it.
  struct Activations {
    const Network& network;
    const Places& at;
    float* first;

    Activations(const Network& n, const Places& places, float* kept)
        : network(n), at(places), first(kept) {}

    float* output(int64_t layer) const {
      float* from = first;
      for (int64_t k = 0; k < layer; ++k) from += size(k);
      return from;
    }
    float* before(int64_t layer) const {
      return output(layer) + (at.keeps_z ? size(layer) / 2 : 0);
    }
    int64_t size(int64_t k) const {
      return (at.keeps_z ? 2 : 1) * network.layers[k].panels.lines * at.line;
    }
  };

  static constexpr int64_t kAhead = 8;  // rows of tables lie anywhere: ask for them in time

  static void prefetch(const char* from, int64_t bytes) {
    for (int64_t n = 0; n < bytes; n += 64) __builtin_prefetch(from + n);
  }

  static void load_inputs(const Network& n, const Places& at, int64_t row, int64_t rows,
                          float* scratch) {
    float* x = scratch + at.x;
    if (n.num_parts == 1 && n.parts->ids == nullptr) {
      const Matrix from{const_cast<void*>(n.parts->data), n.dtype, n.in_features, n.parts->stride,
                        n.in_order};
      Linear::load_tile(x, at.line, from, row, rows);
    } else {
      float* stage = scratch + at.stage;
      const int64_t stride = Linear::row_stride(n.in_features);
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
          Linear::load(to, static_cast<const char*>(part.data) + from * part.stride * size,
                       n.dtype, nullptr, part.width);
        }
      }
      Linear::load_tile(x, at.line, {stage, Dtype::kFloat32, n.in_features, stride, n.in_order}, 0,
                        rows);
    }
    if (n.mask == nullptr) return;
    for (int64_t r = 0; r < rows; ++r) {  // what does not count may hold anything
      if (n.mask[row + r]) continue;
      for (int64_t k = 0; k < Linear::lines(n.in_features); ++k) {
        I::store(x + k * at.line + r * L, I::zero());
      }
    }
  }

  static void forward(const Network& n, const Places& at, const Activations& of, int64_t row,
                      int64_t rows, float* scratch) {
    const float* from = scratch + at.x;
    for (int64_t k = 0; k < n.depth; ++k) {
      const NetworkLayer& layer = n.layers[k];
      const bool last = k + 1 == n.depth;
      const Activation activation = last ? Activation::kNone : n.activation;
      const bool fused = Linear::fused(activation);
      float* to = last ? scratch + at.logits : fused ? of.output(k) : of.before(k);
      Linear::multiply(layer.panels, from, at.line, layer.weight, n.in_place, layer.buffer,
                       layer.bias, {to, L, at.line}, fused ? activation : Activation::kNone, rows);
      if (!fused) activate_tile(activation, to, of.output(k), layer.panels.lines, at.line, rows);
      from = last ? from : of.output(k);
    }
    if (n.logits.data == nullptr) return;
    const NetworkLayer& last = n.layers[n.depth - 1];
    const float* logits = scratch + at.logits;
    for (int64_t p = 0; p < last.panels.count; ++p) {
      const Panel& panel = last.panels.panels[p];
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < panel.lanes; lane += L) {
          const int64_t first = panel.first + lane;
          const float* values = logits + (panel.line + lane / L) * at.line + r * L;
          store_lanes(Linear::row_of(n.logits, row + r), n.logits, first, values,
                      Linear::smaller(L, panel.lanes - lane));
        }
      }
    }
  }

  static void store_lanes(void* to, const Matrix& m, int64_t first, const float* from,
                          int64_t count) {
    if (m.order != nullptr) {
      Linear::store(to, m.dtype, m.order + first, from, count);
    } else {
      const int64_t size = m.dtype == Dtype::kFloat32 ? 4 : 2;
      Linear::store(static_cast<char*>(to) + first * size, m.dtype, nullptr, from, count);
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

  static void load_grads(const Network& n, const Places& at, int64_t row, int64_t rows,
                         float* grads) {
    const PanelsView& view = n.layers[n.depth - 1].panels;
    Linear::with_dtype(n.grad_logits.dtype, [&]<Dtype D>() {
      for (int64_t p = 0; p < view.count; ++p) {
        const Panel& panel = view.panels[p];
        for (int64_t lane = 0; lane < panel.lanes; lane += L) {
          const int64_t first = panel.first + lane, count = Linear::smaller(L, panel.lanes - lane);
          const V scale = n.scale == nullptr
                              ? I::set(1.0f)
                              : I::load(n.scale + first, I::mask(~0u >> (32 - count)));
          Linear::template load_line<D>(grads + (panel.line + lane / L) * at.line, n.grad_logits,
                                        row, rows, first, count,
                                        [&](V a, int64_t) { return I::mul(a, scale); });
        }
      }
    });
  }

  static void backward(const Network& n, const Places& at, const Activations& of, int64_t row,
                       int64_t rows, const LayerSums* sums, bool add, float* scratch) {
    float* g = scratch + at.grads[0];
    float* next = scratch + at.grads[1];
    for (int64_t k = n.depth - 1; k >= 0; --k) {
      const NetworkLayer& layer = n.layers[k];
      const float* inputs = k == 0 ? scratch + at.x : of.output(k - 1);
      if (n.need_weights) {
        Linear::weight_sums(layer.panels, n.in_place, inputs, g, at.line, rows, sums[k].weight,
                            sums[k].buffer, add);
        if (layer.bias != nullptr) {
          Linear::bias_sums(layer.panels, g, at.line, rows, sums[k].bias, add);
        }
      }
      if (k == 0) break;
      const bool fused = Linear::fused(n.activation);
      const float* saved = n.activation == Activation::kNone ? nullptr : of.before(k - 1);
      Linear::multiply(layer.turned, g, at.line, nullptr, Place::kNowhere, layer.turned_buffer,
                       nullptr, {next, L, at.line, fused ? saved : nullptr, n.activation},
                       Activation::kNone, rows);
      if (!fused) {
        derive(n.activation, saved, next, n.layers[k - 1].panels.lines, at.line, rows);
      }
      float* done = g;
      g = next;
      next = done;
    }
    if (n.need_inputs) input_grads(n, at, g, row, rows, scratch);
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

  static void input_grads(const Network& n, const Places& at, const float* g, int64_t row,
                          int64_t rows, float* scratch) {
    const Matrix& to = n.grad_inputs;
    const bool here = Linear::in_place(to);
    const int64_t stride = here ? to.stride : Linear::row_stride(n.in_features);
    float* out = here ? static_cast<float*>(Linear::row_of(to, row)) : scratch + at.stage;
    Linear::multiply(n.layers[0].turned, g, at.line, nullptr, Place::kNowhere,
                     n.layers[0].turned_buffer, nullptr, {out, stride, 0}, Activation::kNone, rows);
    for (int64_t r = 0; !here && r < rows; ++r) {
      Linear::store(Linear::row_of(to, row + r), to.dtype, to.order, out + r * stride, to.features);
    }
  }

  // --- The loss ------------------------------------------------------------------------------
  //
  // A vector holds one expert's values in L rows.

  static void gem(const Network& n, const Places& at, int64_t row, int64_t rows, float* scratch,
                  float* grads, const GemSums& totals) {
    const Gem& gem = *n.gem;
    const Selection& of = gem.selection;
    const int64_t size = of.experts * L;
    float* z = scratch + at.gem;  // logits, then gradients
    float* own = z + size;        // g, then w
    float* rest = own + size;
    float *losses = rest + size, *weights = losses + size;
    for (int64_t k = 0; k < size; k += L) {
      I::store(losses + k, I::zero());
      I::store(weights + k, I::zero());
    }
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t count = Linear::smaller(L, rows - r);
      float y[L] = {}, counts[L] = {};
      for (int64_t k = 0; k < count; ++k) {
        if (n.mask != nullptr && !n.mask[row + r + k]) continue;
        counts[k] = 1;
        y[k] = gem.target[row + r + k];
      }
      const M live = I::greater(I::load(counts), I::zero());
      select(of, at, scratch + at.logits, r, count, z, own, rest);
      share_out(gem, own, live);
      for (int64_t i = 0; i < of.experts; ++i) {
        judge(gem, i, z, own, I::load(y), live, losses, weights);
        float* to = grads + of.slots[i] / L * at.line + of.slots[i] % L;
        for (int64_t k = 0; k < count; ++k) to[(r + k) * L] = z[i * L + k];
        for (int64_t k = 0; gem.kept != nullptr && k < count; ++k) {
          gem.kept[(row + r + k) * of.experts + i] = z[i * L + k];
        }
      }
    }
    for (int64_t i = 0; i < of.experts; ++i) {
      for (int64_t k = 0; k < L; ++k) {
        totals.loss[i] += losses[i * L + k];
        totals.weight[i] += weights[i * L + k];
      }
    }
  }

  // Logits of L rows; g, then what each expert weighs, in `own`; 1 - g in `rest`.
  static void select(const Selection& of, const Places& at, const float* logits, int64_t row,
                     int64_t count, float* z, float* own, float* rest) {
    for (int64_t i = 0; i < of.experts; ++i) {
      const float* from = logits + of.slots[i] / L * at.line + of.slots[i] % L + row * L;
      for (int64_t k = 0; k < L; ++k) z[i * L + k] = k < count ? from[k * L] : 0;
      confident(of, i, z + i * L, own + i * L, rest + i * L);
    }
    for (int64_t i = 0; i < of.experts; ++i) {
      V w = of.own ? I::load(own + i * L) : I::set(1.0f);
      for (int64_t n = of.inside_at[i]; n < of.inside_at[i + 1]; ++n) {
        w = I::mul(w, I::load(rest + of.inside[n] * L));
      }
      I::store(own + i * L, w);
    }
  }

  // g and 1 - g of one expert, NaN where its logit is.
  static void confident(const Selection& of, int64_t i, const float* logits, float* own,
                        float* rest) {
    const V z = I::load(logits);
    // Comparisons with NaN are false.
    const M known = I::less_equal(absolute<I>(z), I::set(__builtin_inff()));
    const V safe = I::select(known, z, I::zero());
    Confident<I> c = confidence<I>(of.confidence, safe, Odds<I>(safe));
    if (of.sharpness != 1.0f && of.larger[i]) c = sharpened<I>(c, of.sharpness);
    I::store(own, I::select(known, c.g, z));
    I::store(rest, I::select(known, c.rest, z));
  }

  // Weights of samples that count, those of a sample divided by their sum where that is asked for.
  static void share_out(const Gem& gem, float* weights, M live) {
    V total = I::zero();
    for (int64_t i = 0; i < gem.selection.experts; ++i) {
      const V w = I::select(live, I::load(weights + i * L), I::zero());
      total = I::add(total, w);
      I::store(weights + i * L, w);
    }
    if (!gem.per_sample) return;
    // Nothing to share is shared out as nothing.
    const V by = I::select(I::less_equal(total, I::zero()), I::set(1.0f), total);
    for (int64_t i = 0; i < gem.selection.experts; ++i) {
      I::store(weights + i * L, I::div(I::load(weights + i * L), by));
    }
  }

  // Where no expert has any confidence, all count alike.
  static void mix(const Mixture& to, const Places& at, int64_t row, int64_t rows, float* scratch) {
    const Selection& of = to.selection;
    const int64_t experts = of.experts;
    float* z = scratch + at.gem;
    float *alpha = z + experts * L, *rest = alpha + experts * L;
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t count = Linear::smaller(L, rows - r);
      select(of, at, scratch + at.logits, r, count, z, alpha, rest);
      V total = I::zero(), sum = I::zero();
      for (int64_t i = 0; i < experts; ++i) total = I::add(total, I::load(alpha + i * L));
      const M nobody = I::less_equal(total, I::zero());
      const V alike = I::set(1.0f / static_cast<float>(experts));
      const V by = I::select(nobody, I::set(1.0f), total);
      for (int64_t i = 0; i < experts; ++i) {
        const V share = I::select(nobody, alike, I::div(I::load(alpha + i * L), by));
        I::store(rest + i * L, share);
        sum = I::fma(share, Odds<I>(I::load(z + i * L)).p, sum);
      }
      float probability[L];
      I::store(probability, I::min(I::set(1.0f), sum));  // shares may sum to 1 and a rounding
      for (int64_t k = 0; k < count; ++k) {
        to.probability[row + r + k] = probability[k];
        for (int64_t i = 0; i < experts; ++i) {
          to.alpha[(row + r + k) * experts + i] = alpha[i * L + k];
          to.share[(row + r + k) * experts + i] = rest[i * L + k];
        }
      }
    }
  }

  // Adds w BCE and w to the sums, and leaves the gradient in place of the logit.
  static void judge(const Gem& gem, int64_t i, float* logits, const float* own, V y, M live,
                    float* losses, float* weights) {
    const V z = I::load(logits + i * L), w = I::load(own + i * L), one = I::set(1.0f);
    const Odds<I> odds(z);
    // BCE(2z, y) = max(2z, 0) - 2z y + log(1 + e).
    const V twice = I::add(z, z), above = I::max(I::zero(), twice);
    V bce = I::add(I::sub(above, I::mul(twice, y)), log_one_plus<I>(odds.e));
    // p - y without cancellation.
    V slope = I::sub(I::mul(I::sub(one, y), odds.p), I::mul(y, odds.rest));
    slope = I::mul(I::add(slope, slope), I::mul(w, I::set(gem.scale)));
    add_to(losses + i * L, I::select(live, I::mul(w, bce), I::zero()));
    add_to(weights + i * L, w);
    I::store(logits + i * L, I::select(live, slope, I::zero()));
  }

  static void add_to(float* sum, V a) { I::store(sum, I::add(I::load(sum), a)); }
};

template <class I>
constexpr Kernels kernels_of(const char* name) {
  using Linear = MaskedLinear<I>;
  using MLP = MaskedMLP<I>;
  return {name,
          I::kLanes,
          Linear::pack,
          Linear::unpack,
          Linear::forward_scratch,
          Linear::forward,
          Linear::backward_scratch,
          Linear::backward,
          Linear::add,
          Linear::load,
          Linear::store,
          MLP::saved,
          MLP::scratch,
          MLP::run};
}

}  // namespace maskmoe
