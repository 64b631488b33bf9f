// Monotone rational-quadratic splines (Durkan et al., "Neural Spline Flows", 2019), one for each
// element, for one instruction set `I` (simd_*.h). A vector holds one number of L elements.
//
// An element has K bins. What they take of the domain, w, what they take of the range, and the
// slopes d at inner knots are made of its parameters (parameters.h):
//   x_k = B (2 (w_0 + ... + w_{k-1}) - 1), the same for y_k,  d_0 = d_K = 1.
// In bin k, with W = x_{k+1} - x_k, H = y_{k+1} - y_k, s = H / W, z = (x - x_k) / W, q = z (1 - z),
//   y = y_k + H (s z^2 + d_k q) / D,          D = s + (d_k + d_{k+1} - 2 s) q,
//   log dy/dx = log(s^2 P / D^2),             P = 2 s q + d_k (1 - z)^2 + d_{k+1} z^2;
// outside of [-B, B], y = x. The inverse solves the first for z, a quadratic equation. What is not
// finite makes NaN of the slope.
#pragma once

#include "cpu/masked_linear/elements.h"
#include "cpu/splines/parameters.h"

namespace maskmoe {

// `P`: what the parameters mean.
template <class I, class P>
struct RationalQuadraticOf {
  using Sum = ExactSum<I>;
  using E = Elements<I>;
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  static void forward(const Splines& s, int64_t begin, int64_t end) {
    each_vector<false>(s, begin, end, [&](const Lanes& lanes, V x, const Bin& bin, Curve& c,
                                          Scratch&) {
      c.go_to(I::mul(I::sub(x, bin.left), c.inv_width));
      lanes.store(s.y, I::select(bin.inside, I::fma(c.height, c.ratio, bin.bottom), x));
      lanes.store(s.log_slope, I::select(bin.inside, c.log_slope(), bin.nothing));
    });
  }

  // x and y change their names: s.x holds values, and s.y becomes where they are taken; the slope
  // is that of the spline there.
  static void inverse(const Splines& s, int64_t begin, int64_t end) {
    each_vector<true>(s, begin, end, [&](const Lanes& lanes, V y, const Bin& bin, Curve& c,
                                         Scratch&) {
      c.go_to(c.root(I::sub(y, bin.bottom)));
      lanes.store(s.y, I::select(bin.inside, I::fma(c.width, c.z, bin.left), y));
      lanes.store(s.log_slope, I::select(bin.inside, c.log_slope(), bin.nothing));
    });
  }

  static void backward(const Splines& s, const SplineGradients& grads, int64_t begin,
                       int64_t end) {
    const int64_t K = s.bins;
    each_vector<false>(s, begin, end, [&](const Lanes& lanes, V x, const Bin& bin, Curve& c,
                                          Scratch& scratch) {
      c.go_to(I::mul(I::sub(x, bin.left), c.inv_width));
      const V grad_y = grads.y == nullptr ? I::zero() : lanes.load(grads.y);
      const V grad_log = grads.log_slope == nullptr ? I::zero() : lanes.load(grads.log_slope);
      const Partials of(c, grad_y, grad_log);
      lanes.store(grads.x, I::select(bin.inside, I::mul(of.z, c.inv_width),
                                     I::add(grad_y, bin.nothing)));
      // z and s by the bin's left end, its width and its height. Gradients take the places of the
      // parameters.
      const V of_left = I::mul(minus(of.z), c.inv_width);
      const V of_width = minus(I::mul(I::fma(of.z, c.z, I::mul(of.s, c.s)), c.inv_width));
      const V of_height = I::fma(of.s, c.inv_width, I::mul(grad_y, c.ratio));
      softmax_grads(s, bin, {of_left, of_width, bin.before_width, bin.width},
                    Axis(s, s.least_width).rest, scratch.widths, scratch.parameters);
      softmax_grads(s, bin, {grad_y, of_height, bin.before_height, bin.height},
                    Axis(s, s.least_height).rest, scratch.heights, scratch.parameters + K * L);
      slope_grads(s, bin, c, of, scratch.parameters + 2 * K * L);
      turn_out(scratch.parameters, 3 * K - 1, lanes, grads.parameters);
    });
  }

 private:
  // Of L elements: their parameters, and the softmax of those of widths and heights.
  struct Scratch {
    alignas(64) float parameters[3 * kMaxBins * L], widths[kMaxBins * L], heights[kMaxBins * L];
  };

  // Elements [first, first + count) of a call; lanes beyond repeat the last of them.
  struct Lanes {
    int64_t first, count, element[L];
    Lanes(int64_t first, int64_t end) : first(first), count(E::min(L, end - first)) {
      for (int64_t l = 0; l < L; ++l) element[l] = first + E::min(l, count - 1);
    }
    V load(const float* p) const {
      return count == L ? I::load(p + first) : I::load(p + first, some());
    }
    void store(float* p, V a) const {
      count == L ? I::store(p + first, a) : I::store(p + first, a, some());
    }
    M some() const { return I::mask((1u << count) - 1); }
  };

  // Rows of `count` numbers, turned: to[k * L + l] is the k-th of lane l.
  static void turn_in(const Strided& rows, int64_t count, const Lanes& lanes, float* to) {
    int64_t k = 0, at[L];
    for (int64_t l = 0; l < L; ++l) at[l] = lanes.element[l] * rows.stride;
    if constexpr (I::kTransposes) {
      for (; count >= L && k < count; k += L) {  // the last L overlap those before
        const int64_t begin = E::min(k, count - L);
        const float* from[L];
        V turned[L];
        for (int64_t l = 0; l < L; ++l) from[l] = rows.data + at[l] + begin;
        I::transpose(from, turned);
        for (int64_t n = 0; n < L; ++n) I::store(to + (begin + n) * L, turned[n]);
      }
    }
    for (; k < count; ++k) I::store(to + k * L, I::gather(rows.data + k, at));
  }

  // The way back, to dense rows.
  static void turn_out(const float* from, int64_t count, const Lanes& lanes, float* rows) {
    int64_t k = 0;
    rows += lanes.first * count;
    if constexpr (I::kTransposes) {
      for (; count >= L && k < count; k += L) {
        const int64_t begin = E::min(k, count - L);
        const float* of[L];
        V turned[L];
        for (int64_t n = 0; n < L; ++n) of[n] = from + (begin + n) * L;
        I::transpose(of, turned);
        for (int64_t l = 0; l < L; ++l) {
          if (l < lanes.count) I::store(rows + l * count + begin, turned[l]);
        }
      }
    }
    for (; k < count; ++k) {
      for (int64_t l = 0; l < lanes.count; ++l) rows[l * count + k] = from[k * L + l];
    }
  }

  struct Bin {
    V index;                        // below 0: outside
    V left, bottom;                 // its lower corner
    V width, height;                // their softmax
    V before_width, before_height;  // the sums of all those before it
    V t0, t1;                       // of the slopes at its ends
    V nothing;                      // 0, or NaN where anything is not finite
    M inside;
  };

  // A bin's curve; and, after `go_to`, the place z on it.
  struct Curve {
    V width, height, inv_width, s, d0, d1, bend;
    SlopeAt<I> at0, at1;
    V z, rest, q, inv_d, p, ratio;  // ratio: (y - y_k) / H

    Curve(const Splines& of, const Bin& b) {
      const V size = I::set(2 * of.bound);
      width = I::mul(size, Axis(of, of.least_width).fraction(b.width));
      height = I::mul(size, Axis(of, of.least_height).fraction(b.height));
      inv_width = I::div(I::set(1.0f), width);
      s = I::mul(height, inv_width);
      at0 = P::slope(of, b.t0), at1 = P::slope(of, b.t1);
      const V one = I::set(1.0f), last = I::set(static_cast<float>(of.bins - 1));
      d0 = I::select(I::greater(b.index, I::zero()), at0.slope, one);
      d1 = I::select(I::greater(last, b.index), at1.slope, one);
      bend = I::fma(I::set(-2.0f), s, I::add(d0, d1));
    }
    void go_to(V place) {
      const V one = I::set(1.0f);
      z = place;
      rest = I::sub(one, z);
      q = I::mul(z, rest);
      const V z2 = I::mul(z, z);
      inv_d = I::div(one, I::fma(bend, q, s));
      p = I::fma(I::add(s, s), q, I::fma(d1, z2, I::mul(I::mul(d0, rest), rest)));
      ratio = I::mul(I::fma(s, z2, I::mul(d0, q)), inv_d);
    }
    V log_slope() const {
      const V steep = I::mul(s, inv_d), slope = I::mul(I::mul(steep, steep), p);
      const V none = I::set(-__builtin_inff());  // of 0; NaN stays NaN
      return I::select(I::less_equal(slope, I::zero()), none,
                       I::fma(slope, I::zero(), log<I>(slope)));
    }
    // The z where the curve is `above` its lower end: a z^2 + b z = c.
    V root(V above) const {
      const V bent = I::mul(above, bend), c = I::mul(s, above);
      const V a = I::fma(height, I::sub(s, d0), bent), b = I::sub(I::mul(height, d0), bent);
      const V square = I::fma(I::mul(I::set(4.0f), a), c, I::mul(b, b));
      return I::div(I::add(c, c), I::add(b, I::sqrt(I::max(I::zero(), square))));
    }
  };

  // Gradients of z, s and the slopes at the bin's ends, other numbers held.
  struct Partials {
    V z, s, d0, d1;
    Partials(const Curve& c, V grad_y, V grad_log) {
      const V one = I::set(1.0f), two = I::set(2.0f);
      const V by_ratio = I::mul(I::mul(grad_y, c.height), c.inv_d);  // times d(ratio) D
      const V by_p = I::div(grad_log, c.p);                          // times dP
      const V by_d = I::mul(I::add(grad_log, grad_log), c.inv_d);    // times dD
      const V turn = I::sub(c.rest, c.z);                            // dq/dz
      const V z2 = I::mul(c.z, c.z), rest2 = I::mul(c.rest, c.rest);

      const V d_by_z = I::mul(c.bend, turn);
      const V n_by_z = I::fma(I::mul(two, c.s), c.z, I::mul(c.d0, turn));
      const V p_by_z = I::mul(two, I::fma(c.s, turn, I::sub(I::mul(c.d1, c.z),
                                                            I::mul(c.d0, c.rest))));
      z = total(by_ratio, I::sub(n_by_z, I::mul(c.ratio, d_by_z)), by_p, p_by_z, by_d, d_by_z);

      const V d_by_s = I::sub(one, I::add(c.q, c.q));
      s = total(by_ratio, I::sub(z2, I::mul(c.ratio, d_by_s)), by_p, I::add(c.q, c.q), by_d,
                d_by_s);
      s = I::add(s, I::div(I::add(grad_log, grad_log), c.s));

      d0 = total(by_ratio, I::mul(c.q, I::sub(one, c.ratio)), by_p, rest2, by_d, c.q);
      d1 = total(by_ratio, minus(I::mul(c.q, c.ratio)), by_p, z2, by_d, c.q);
    }
    static V total(V by_ratio, V ratio, V by_p, V p, V by_d, V d) {
      return I::fma(by_ratio, ratio, I::fma(by_p, p, minus(I::mul(by_d, d))));
    }
  };

  static V minus(V a) { return I::xor_bits(a, I::set(-0.0f)); }

  // Of the domain, or of the range, a bin takes the fraction f = least + (1 - K least) p, where p is
  // the softmax of the bins' parameters.
  struct Axis {
    V least, rest;
    Axis(const Splines& s, float least)
        : least(I::set(least)), rest(I::set(1 - static_cast<float>(s.bins) * least)) {}
    V fraction(V p) const { return P::kFloors ? I::fma(rest, p, least) : p; }
  };

  // Up to a bin: the sum of p and, with what its additions lose, that of f.
  struct Before {
    V p = I::zero();
    Sum f;
    void add(const Axis& axis, V next) {
      f.add(axis.fraction(next));
      p = P::kFloors ? I::add(p, next) : f.sum;
    }
  };

  static void softmax(const Splines& s, const float* u, float* to) {
    const V total = P::exponentials(s, u, to);
    for (int64_t k = 0; k < s.bins; ++k) I::store(to + k * L, I::div(I::load(to + k * L), total));
  }

  // The bin that x is in, or y where kUp. Parameters and their softmax are left in `scratch`.
  template <bool kUp>
  static Bin find(const Splines& s, const Lanes& lanes, V x, Scratch& scratch) {
    float *u = scratch.parameters, *v = u + s.bins * L, *slopes = v + s.bins * L;
    turn_in(s.widths, s.bins, lanes, u);
    turn_in(s.heights, s.bins, lanes, v);
    turn_in(s.derivatives, s.bins - 1, lanes, slopes);
    softmax(s, u, scratch.widths);
    softmax(s, v, scratch.heights);
    const Axis domain(s, s.least_width), range(s, s.least_height);
    const V first = I::set(-s.bound), size = I::set(2 * s.bound), none = I::zero();
    Before across, up;
    V left = first, bottom = first;
    const V& searched = kUp ? bottom : left;
    Bin b{I::set(-1.0f), none, none, none, none, none, none, none, none, none, I::mask(0)};
    V t = none, all = x;
    for (int64_t k = 0; k < s.bins; ++k) {
      const V width = I::load(scratch.widths + k * L), height = I::load(scratch.heights + k * L);
      const V next_t = k + 1 < s.bins ? I::load(slopes + k * L) : none;
      const M here = I::greater(x, searched);
      b.index = I::select(here, I::set(static_cast<float>(k)), b.index);
      b.left = I::select(here, left, b.left);
      b.bottom = I::select(here, bottom, b.bottom);
      b.width = I::select(here, width, b.width);
      b.height = I::select(here, height, b.height);
      b.before_width = I::select(here, across.p, b.before_width);
      b.before_height = I::select(here, up.p, b.before_height);
      b.t0 = I::select(here, t, b.t0);
      b.t1 = I::select(here, next_t, b.t1);
      across.add(domain, width), up.add(range, height);
      left = across.f.knot(size, first), bottom = up.f.knot(size, first);
      all = I::add(all, next_t);
      t = next_t;
    }
    const V beyond = I::select(I::greater(x, searched), I::set(-1.0f), b.index);
    b.inside = I::greater(beyond, I::set(-0.5f));
    b.nothing = I::mul(I::add(all, I::add(across.p, up.p)), none);
    return b;
  }

  // body(lanes, x, bin, curve, scratch) for elements [begin, end), L at a time; kUp as in `find`.
  template <bool kUp, class Body>
  static void each_vector(const Splines& s, int64_t begin, int64_t end, const Body& body) {
    Scratch scratch;
    for (int64_t n = begin; n < end; n += L) {
      const Lanes lanes(n, end);
      const V x = lanes.load(s.x);
      const Bin bin = find<kUp>(s, lanes, x, scratch);
      Curve curve(s, bin);
      body(lanes, x, bin, curve, scratch);
    }
  }

  // Of a bin's extent along one axis: gradients of its lower end and of its size; the softmax's
  // values before it, and its own.
  struct Extent {
    V of_end, of_size, before, own;
  };

  // Gradients of the parameters of widths, or of heights, in place. `p`: their softmax.
  static void softmax_grads(const Splines& s, const Bin& bin, const Extent& e, V rest,
                            const float* p, float* u) {
    const V size = I::mul(I::set(2 * s.bound), rest);
    const V of_end = I::mul(e.of_end, size), of_size = I::mul(e.of_size, size);
    const V mean = I::fma(of_end, e.before, I::mul(of_size, e.own));
    for (int64_t k = 0; k < s.bins; ++k) {
      const V at = I::set(static_cast<float>(k));
      const V from_here = I::select(I::greater(at, bin.index), I::zero(), of_size);
      const V of_this = I::select(I::greater(bin.index, at), of_end, from_here);
      const V grad = I::mul(I::load(p + k * L), I::sub(of_this, mean));
      const V kept = I::mul(grad, P::exponent_grad(s, I::load(u + k * L)));
      I::store(u + k * L, I::select(bin.inside, kept, bin.nothing));
    }
  }

  // Gradients of the parameters of the slopes at inner knots, in their places.
  static void slope_grads(const Splines& s, const Bin& bin, const Curve& c, const Partials& of,
                          float* to) {
    const V of_t0 = I::mul(of.d0, c.at0.by_parameter), of_t1 = I::mul(of.d1, c.at1.by_parameter);
    for (int64_t k = 1; k < s.bins; ++k) {  // the knot between bins k - 1 and k
      const V at = I::set(static_cast<float>(k)), before = I::set(static_cast<float>(k - 1));
      const M above = I::greater(bin.index, at), below = I::greater(before, bin.index);
      const V grad = I::select(I::greater(at, bin.index), of_t1, of_t0);
      const V kept = I::select(above, I::zero(), I::select(below, I::zero(), grad));
      I::store(to + (k - 1) * L, I::select(bin.inside, kept, bin.nothing));
    }
  }
};

template <class I>
struct RationalQuadratic {
  using Squashed = RationalQuadraticOf<I, SquashedParameters<I>>;
  using Floored = RationalQuadraticOf<I, FlooredParameters<I>>;

  static void forward(const Splines& s, int64_t begin, int64_t end) {
    s.squashed ? Squashed::forward(s, begin, end) : Floored::forward(s, begin, end);
  }
  static void inverse(const Splines& s, int64_t begin, int64_t end) {
    s.squashed ? Squashed::inverse(s, begin, end) : Floored::inverse(s, begin, end);
  }
  static void backward(const Splines& s, const SplineGradients& grads, int64_t begin,
                       int64_t end) {
    s.squashed ? Squashed::backward(s, grads, begin, end) : Floored::backward(s, grads, begin, end);
  }
};

}  // namespace maskmoe
