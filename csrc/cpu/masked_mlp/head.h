// What comes after an MLP's last layer, for one instruction set `I`: logits are written, mixed
// or go into the loss, and their gradients are put where the layers read them.
#pragma once

#include "cpu/confidence.h"
#include "cpu/masked_linear/line_tile.h"
#include "cpu/masked_mlp/expert_losses.h"

namespace maskmoe {

template <class I>
struct MlpHead {
  using E = Elements<I>;
  using Tile = LineTile<I>;
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  // Tiles of the last layer's lines, `line` floats apart, and scratch of `work` floats.
  struct Buffers {
    float *logits, *grads, *work;
    int64_t line;
  };

  static int64_t work(const Mlp& n) {
    if (n.mixture != nullptr) return 3 * L * n.mixture->selection.experts;
    return n.gem == nullptr ? 0 : 6 * L * n.gem->selection.experts;
  }

  // Before a thread's first tile.
  static void begin(const Mlp& n, const Buffers& at, const GemSums& totals) {
    if (n.gem == nullptr) return;
    // Lanes without an expert are computed too, and dropped; they must not hold old memory.
    const int64_t size = n.layers[n.depth - 1].panels.lines * at.line;
    for (int64_t k = 0; k < size; k += L) I::store(at.grads + k, I::zero());
    if (n.done > 0) return;
    for (int64_t i = 0; i < n.gem->selection.experts; ++i) totals.loss[i] = totals.weight[i] = 0;
  }

  // Between a tile's forward and its backward.
  static void run(const Mlp& n, const Buffers& at, int64_t row, int64_t rows,
                  const GemSums& totals) {
    if (n.logits.data != nullptr) store_logits(n, at, row, rows);
    if (n.mixture != nullptr) mix(*n.mixture, at, row, rows);
    if (n.gem != nullptr && n.gem->objective != Objective::kBinary) {
      expert_losses(n, at, row, rows, totals);
    } else if (n.gem != nullptr) {
      gem(n, at, row, rows, totals);
    } else if (n.backward) {
      load_grads(n, at, row, rows);
    }
  }

  // Where gradients of a tile's first units are kept until their factors are known; null: they are
  // not kept.
  static float* units_of(const Mlp& n, int64_t tile) {
    return n.unit_grads == nullptr ? nullptr : n.unit_grads + tile * n.units_stride;
  }

  // Copies the units' gradients from a tile to there.
  static void keep_units(const Mlp& n, const float* from, float* to, int64_t line, int64_t rows) {
    for (int64_t k = 0; k < n.layers[0].panels.lines; ++k, from += line, to += line) {
      for (int64_t at = 0; at < rows * L; at += L) I::store(to + at, I::load(from + at));
    }
  }

  // Copies them back to a tile, times their factors.
  static void scale_units(const Mlp& n, const float* from, float* to, int64_t line, int64_t rows) {
    for (int64_t k = 0; k < n.layers[0].panels.lines; ++k, from += line, to += line) {
      const V scale = I::load(n.unit_scale + k * L);
      for (int64_t at = 0; at < rows * L; at += L) {
        I::store(to + at, I::mul(I::load(from + at), scale));
      }
    }
  }

 private:
  static void store_logits(const Mlp& n, const Buffers& at, int64_t row, int64_t rows) {
    const MlpLayer& last = n.layers[n.depth - 1];
    for (int64_t p = 0; p < last.panels.count; ++p) {
      const Panel& panel = last.panels.panels[p];
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < panel.lanes; lane += L) {
          const int64_t first = panel.first + lane;
          const float* values = at.logits + (panel.line + lane / L) * at.line + r * L;
          store_lanes(E::row_of(n.logits, row + r), n.logits, first, values,
                      E::min(L, panel.lanes - lane));
        }
      }
    }
  }

  static void store_lanes(void* to, const Matrix& m, int64_t first, const float* from,
                          int64_t count) {
    if (m.order != nullptr) {
      E::store(to, m.dtype, m.order + first, from, count);
    } else {
      const int64_t size = m.dtype == Dtype::kFloat32 ? 4 : 2;
      E::store(static_cast<char*>(to) + first * size, m.dtype, nullptr, from, count);
    }
  }

  static void load_grads(const Mlp& n, const Buffers& at, int64_t row, int64_t rows) {
    const PanelsView& view = n.layers[n.depth - 1].panels;
    E::with_dtype(n.grad_logits.dtype, [&]<Dtype D>() {
      for (int64_t p = 0; p < view.count; ++p) {
        const Panel& panel = view.panels[p];
        for (int64_t lane = 0; lane < panel.lanes; lane += L) {
          const int64_t first = panel.first + lane, count = E::min(L, panel.lanes - lane);
          const V scale = n.scale == nullptr
                              ? I::set(1.0f)
                              : I::load(n.scale + first, I::mask(~0u >> (32 - count)));
          Tile::template load_line<D>(at.grads + (panel.line + lane / L) * at.line, n.grad_logits,
                                      row, rows, first, count, nullptr,
                                      [&](V a, int64_t) { return I::mul(a, scale); });
        }
      }
    });
  }

  // --- The loss: a vector holds one expert's values in L rows ---------------------------------

  static void gem(const Mlp& n, const Buffers& at, int64_t row, int64_t rows,
                  const GemSums& totals) {
    const Gem& gem = *n.gem;
    const Selection& of = gem.selection;
    const int64_t size = of.experts * L;
    float* w = at.work;
    float *rest = w + size, *bce = rest + size, *dlogit = bce + size;
    float *losses = dlogit + size, *weights = losses + size;
    for (int64_t k = 0; k < size; k += L) {
      I::store(losses + k, I::zero());
      I::store(weights + k, I::zero());
    }
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t count = E::min(L, rows - r);
      float targets[L] = {}, counts[L] = {};
      for (int64_t k = 0; k < count; ++k) {
        const int64_t sample = row + r + k;
        if (n.mask != nullptr && !n.mask[sample]) continue;
        counts[k] = gem.sample_weight == nullptr ? 1.0f : gem.sample_weight[sample];
        targets[k] = gem.target[sample];
      }
      const V y = I::load(targets), times = I::load(counts);
      const M row_mask = I::greater(times, I::zero());
      select(of, at, r, count, w, rest, [&](int64_t i, V z, M known, const Odds<I>& odds) {
        cross_entropy(z, known, odds, y, bce + i * L, dlogit + i * L);
      });
      normalize_weights(gem, w, row_mask, times);
      for (int64_t i = 0; i < of.experts; ++i) {
        const V weight = I::load(w + i * L);
        V g = I::mul(I::load(dlogit + i * L), I::mul(weight, I::set(gem.scale)));
        I::store(dlogit + i * L, I::select(row_mask, g, I::zero()));
        add_to(losses + i * L,
               I::select(row_mask, I::mul(weight, I::load(bce + i * L)), I::zero()));
        add_to(weights + i * L, weight);
      }
      put_grads(of, at, r, count, dlogit);
      for (int64_t i = 0; gem.kept != nullptr && i < of.experts; ++i) {
        for (int64_t k = 0; k < count; ++k) {
          gem.kept[(row + r + k) * of.experts + i] = dlogit[i * L + k];
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

  // The logits of L rows, (experts, L); 0 beyond `count` of them.
  static void load_logits(const Selection& of, const Buffers& at, int64_t row, int64_t count,
                          float* to) {
    for (int64_t i = 0; i < of.experts; ++i) {
      const float* from = at.logits + of.slots[i] / L * at.line + of.slots[i] % L + row * L;
      for (int64_t k = 0; k < L; ++k) to[i * L + k] = k < count ? from[k * L] : 0;
    }
  }

  // And their gradients to where the backward reads them.
  static void put_grads(const Selection& of, const Buffers& at, int64_t row, int64_t count,
                        const float* from) {
    for (int64_t i = 0; i < of.experts; ++i) {
      float* to = at.grads + of.slots[i] / L * at.line + of.slots[i] % L + row * L;
      for (int64_t k = 0; k < count; ++k) to[k * L] = from[i * L + k];
    }
  }

  // Every expert's own loss, summed over experts and samples.
  static void expert_losses(const Mlp& n, const Buffers& at, int64_t row, int64_t rows,
                            const GemSums& totals) {
    using Losses = ExpertLosses<I>;
    const Gem& gem = *n.gem;
    const int64_t logits = gem.selection.experts, outputs = gem.outputs;
    const bool classes = gem.objective == Objective::kMulticlass;
    const int64_t labels = classes ? 1 : outputs;
    float* z = at.work;
    float *grads = z + logits * L, *y = grads + logits * L;
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t count = E::min(L, rows - r);
      float counts[L] = {};
      for (int64_t k = 0; k < labels * L; k += L) I::store(y + k, I::zero());
      for (int64_t k = 0; k < count; ++k) {
        const int64_t sample = row + r + k;
        if (n.mask != nullptr && !n.mask[sample]) continue;
        counts[k] = gem.sample_weight == nullptr ? 1.0f : gem.sample_weight[sample];
        for (int64_t c = 0; c < labels; ++c) y[c * L + k] = gem.target[sample * labels + c];
      }
      const V times = I::load(counts), factor = I::mul(times, I::set(gem.scale));
      const M row_mask = I::greater(times, I::zero());
      load_logits(gem.selection, at, r, count, z);
      for (int64_t i = 0; i < logits; i += outputs) {
        float *of = z + i * L, *grad = grads + i * L;
        const V loss = classes ? Losses::multiclass(of, outputs, I::load(y), grad)
                               : Losses::squared(of, outputs, y, grad);
        for (int64_t k = 0; k < outputs * L; k += L) {
          const V scaled = I::mul(I::load(grad + k), factor);
          I::store(grad + k, I::select(row_mask, scaled, I::zero()));
        }
        float sums[L];
        I::store(sums, I::select(row_mask, I::mul(loss, times), I::zero()));
        for (int64_t k = 0; k < L; ++k) totals.loss[i] += sums[k];
      }
      put_grads(gem.selection, at, r, count, grads);
    }
  }

  // For L rows: each expert's weight in `own`; `rest` is scratch. `also` gets each expert's
  // logits, which of them are known (not NaN), and their odds; unknown ones have the odds of 0.
  template <class F>
  static void select(const Selection& of, const Buffers& at, int64_t row, int64_t count, float* own,
                     float* rest, const F& also) {
    load_logits(of, at, row, count, own);
    for (int64_t i = 0; i < of.experts; ++i) {
      const V z = I::load(own + i * L);
      // Comparisons with NaN are false.
      const M known = I::less_equal(absolute<I>(z), I::set(__builtin_inff()));
      const V safe = I::select(known, z, I::zero());
      const Odds<I> odds(safe);
      also(i, z, known, odds);
      I::store(own + i * L, I::set(1.0f));
      if (of.weighting == Weighting::kUniform) continue;
      Confident<I> c = confidence<I>(of.confidence, safe, odds);
      if (of.sharpness != 1.0f && of.has_superset[i]) c = sharpened<I>(c, of.sharpness);
      if (of.weighting == Weighting::kSelection) I::store(own + i * L, I::select(known, c.g, z));
      I::store(rest + i * L, I::select(known, c.rest, z));
    }
    if (of.weighting == Weighting::kUniform) return;
    for (int64_t i = 0; i < of.experts; ++i) {
      V w = I::load(own + i * L);
      for (int64_t n = of.subsets_at[i]; n < of.subsets_at[i + 1]; ++n) {
        w = I::mul(w, I::load(rest + of.subsets[n] * L));
      }
      I::store(own + i * L, w);
    }
  }

  // BCE of a logit, and its derivative; NaN where the logit is.
  static void cross_entropy(V z, M known, const Odds<I>& odds, V y, float* bce, float* dlogit) {
    // BCE(2z, y) = max(2z, 0) - 2z y + log(1 + e).
    const V twice = I::add(z, z), positive = I::max(I::zero(), twice);
    I::store(bce, I::add(I::sub(positive, I::mul(twice, y)), log_one_plus<I>(odds.e)));
    // p - y without cancellation.
    const V from_one = I::mul(I::sub(I::set(1.0f), y), odds.p);
    const V half = I::sub(from_one, I::mul(y, odds.rest));
    I::store(dlogit, I::select(known, I::add(half, half), z));
  }

  // Weights become 0 where `row_mask` is not set, and are divided where that is asked for: by their
  // sum over the sample, or by the divisors of their experts. A sample counts `times`.
  static void normalize_weights(const Gem& gem, float* weights, M row_mask, V times) {
    V total = I::zero();
    for (int64_t i = 0; i < gem.selection.experts; ++i) {
      const V w = I::select(row_mask, I::load(weights + i * L), I::zero());
      total = I::add(total, w);
      I::store(weights + i * L, gem.per_sample ? w : I::mul(w, times));
    }
    if (!gem.per_sample && gem.divisors == nullptr) return;
    for (int64_t i = 0; i < gem.selection.experts; ++i) {
      const V w = I::load(weights + i * L);
      I::store(weights + i * L, gem.per_sample ? I::mul(quotient(w, total), times)
                                               : quotient(w, I::set(gem.divisors[i])));
    }
  }

  // a / by; a where `by` is 0. A thread that takes denormals for zero does so in the comparison,
  // too.
  static V quotient(V a, V by) {
    return I::div(a, I::select(I::less_equal(by, I::zero()), I::set(1.0f), by));
  }

  // Where no expert has any confidence, all have the same attribution.
  static void mix(const Mixture& to, const Buffers& at, int64_t row, int64_t rows) {
    const Selection& of = to.selection;
    const int64_t experts = of.experts;
    float* alpha = at.work;
    float *rest = alpha + experts * L, *p = rest + experts * L;
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t count = E::min(L, rows - r);
      select(of, at, r, count, alpha, rest, [&](int64_t i, V z, M known, const Odds<I>& odds) {
        I::store(p + i * L, I::select(known, odds.p, z));
      });
      V total = I::zero(), sum = I::zero();
      for (int64_t i = 0; i < experts; ++i) total = I::add(total, I::load(alpha + i * L));
      const M no_confidence = I::less_equal(total, I::zero());
      const V alike = I::set(1.0f / static_cast<float>(experts));
      for (int64_t i = 0; i < experts; ++i) {
        const V part = I::select(no_confidence, alike, quotient(I::load(alpha + i * L), total));
        I::store(rest + i * L, part);
        sum = I::fma(part, I::load(p + i * L), sum);
      }
      float probability[L];
      I::store(probability, I::min(I::set(1.0f), sum));  // the parts may sum to 1 and a rounding
      for (int64_t k = 0; k < count; ++k) {
        to.probability[row + r + k] = probability[k];
        for (int64_t i = 0; i < experts; ++i) {
          to.alpha[(row + r + k) * experts + i] = alpha[i * L + k];
          to.attribution[(row + r + k) * experts + i] = rest[i * L + k];
        }
      }
    }
  }

  static void add_to(float* sum, V a) { I::store(sum, I::add(I::load(sum), a)); }
};

}  // namespace maskmoe
