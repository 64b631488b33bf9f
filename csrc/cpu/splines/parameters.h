// What the parameters of a spline mean, for one instruction set `I` (simd_*.h): the softmax that says
// how the domain, and the range, are divided between bins, and the slopes at inner knots.
#pragma once

#include "cpu/confidence.h"
#include "cpu/kernels.h"

namespace maskmoe {

// A sum, and beside it what its additions lose: a narrow bin would show it.
template <class I>
struct ExactSum {
  using V = typename I::V;
  V sum = I::zero(), lost = I::zero();
  void add(V a) {
    const V next = I::add(sum, a), back = I::sub(next, sum);
    lost = I::add(lost, I::add(I::sub(sum, I::sub(next, back)), I::sub(a, back)));
    sum = next;
  }
  V total() const { return I::add(sum, lost); }
  // The knot there: first + size * sum.
  V knot(V size, V first) const { return I::fma(size, lost, I::fma(size, sum, first)); }
};

template <class I>
struct SlopeAt {
  typename I::V slope, by_parameter;  // and its derivative
};

// As zuko's MonotonicRQSTransform has them. With S = |log of the least slope|: the softmax of
// u / (1 + 2 |u| / S), and slopes exp(t / (1 + |t| / S)).
template <class I>
struct SquashedParameters {
  using V = typename I::V;
  static constexpr bool kFloors = false;  // has a bin a least fraction?
  static constexpr int L = I::kLanes;

  // 1 / (1 + c |u|): u times it is between -1 / c and 1 / c; its square is the derivative.
  static V shrink(V u, V c) {
    const V one = I::set(1.0f);
    return I::div(one, I::fma(c, absolute<I>(u), one));
  }
  static V exponent_grad(const Splines& s, V u) {
    const V shrunk = shrink(u, I::set(2 / s.steepest));
    return I::mul(shrunk, shrunk);
  }
  // e^a for an a between -14 and 14, or NaN.
  static V bounded_exp(V a) {
    const auto e = exp_parts<I>(a);
    const V power = I::power_of_two(e.n);
    return I::fma(power, e.y, power);
  }
  // The numerators of the softmax, and their sum. The exponents are bounded, so no maximum has to
  // be found.
  static V exponentials(const Splines& s, const float* u, float* to) {
    const V one = I::set(1.0f), squash = I::set(2 / s.steepest);
    ExactSum<I> sum;
    for (int64_t k = 0; k < s.bins; ++k) {
      const V a = I::load(u + k * L);
      const V e = bounded_exp(I::div(a, I::fma(squash, absolute<I>(a), one)));
      I::store(to + k * L, e);
      sum.add(e);
    }
    return sum.total();
  }
  static SlopeAt<I> slope(const Splines& s, V t) {
    const V shrunk = shrink(t, I::set(1 / s.steepest));
    const V d = bounded_exp(I::mul(t, shrunk));
    return {d, I::mul(d, I::mul(shrunk, shrunk))};
  }
};

// As nflows has them: the softmax of u, and slopes the least slope + softplus(t).
template <class I>
struct FlooredParameters {
  using V = typename I::V;
  static constexpr bool kFloors = true;
  static constexpr int L = I::kLanes;

  static V exponent_grad(const Splines&, V) { return I::set(1.0f); }
  static V exponentials(const Splines& s, const float* u, float* to) {
    V most = I::load(u);
    for (int64_t k = 1; k < s.bins; ++k) most = I::max(most, I::load(u + k * L));
    ExactSum<I> sum;
    for (int64_t k = 0; k < s.bins; ++k) {
      const V e = exp<I>(I::sub(I::load(u + k * L), most));
      I::store(to + k * L, e);
      sum.add(e);
    }
    return sum.total();
  }
  static SlopeAt<I> slope(const Splines& s, V t) {
    const V one = I::set(1.0f), e = exp<I>(I::sub(I::zero(), absolute<I>(t)));
    const V large = I::div(one, I::add(one, e));
    const V softplus = I::add(I::max(t, I::zero()), log_one_plus<I>(e));
    return {I::add(I::set(s.slope), softplus),
            I::select(I::greater(t, I::zero()), large, I::mul(e, large))};
  }
};

}  // namespace maskmoe
