// Confidences over an instruction-set policy `I`, from the logit: g and 1 - g (section 3.3.1), and
// what cross-entropy needs.
//
// Everything follows from e = exp(-2|z|): 1 - tanh|z| = 2e / (1 + e) does not cancel, so 1 - g
// keeps its digits at saturation and a product over omega(i) needs no logarithm.
#pragma once

#include "common/names.h"
#include "cpu/activations.h"

namespace maskmoe {

// 2 atanh(w) for |w| <= 1/3: the first term left out is below 1e-9 of the sum.
template <class I>
inline typename I::V twice_atanh(typename I::V w) {
  auto s = I::mul(w, w);
  auto p = polynomial<I>(s, 1.0f, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9, 1.0f / 11, 1.0f / 13,
                         1.0f / 15, 1.0f / 17);
  return I::mul(I::add(w, w), p);
}

// log(1 + x) for x in [-0.5, 1].
template <class I>
inline typename I::V log_one_plus(typename I::V x) {
  return twice_atanh<I>(I::div(x, I::add(I::set(2.0f), x)));
}

// log x for normal x > 0.
template <class I>
inline typename I::V log(typename I::V x) {
  const auto one = I::set(1.0f);
  auto n = I::exponent(x);
  auto m = I::mantissa(x);  // [1, 2)
  auto high = I::greater(m, I::set(0x1.6a09e6p0f));
  n = I::select(high, I::add(n, one), n);
  m = I::select(high, I::mul(m, I::set(0.5f)), m);
  auto rest = twice_atanh<I>(I::div(I::sub(m, one), I::add(m, one)));
  rest = I::fma(n, I::set(-0x1.05c61p-29f), rest);  // ln 2 as a sum of two floats
  return I::fma(n, I::set(0x1.62e43p-1f), rest);
}

// What a logit says: e, p = sigmoid(2z) and rest = sigmoid(-2z), the two also by size.
template <class I>
struct Odds {
  typename I::V e, p, rest, large, small;
  explicit Odds(typename I::V z) {
    const auto one = I::set(1.0f);
    e = exp<I>(I::mul(I::set(-2.0f), absolute<I>(z)));
    large = I::div(one, I::add(one, e));
    small = I::mul(e, large);
    auto positive = I::greater(z, I::zero());
    p = I::select(positive, large, small);
    rest = I::select(positive, small, large);
  }
};

template <class I>
struct Confident {
  typename I::V g, rest;  // g and 1 - g, both in [0, 1]
};

// g and 1 - g of logits that are not NaN.
template <class I>
inline Confident<I> confidence(Confidence name, typename I::V z, const Odds<I>& odds) {
  const auto one = I::set(1.0f);
  typename I::V g, rest;
  if (name == Confidence::kRare) {
    // Threshold 0.3, power 4; with top = 0.7 and q = p - 0.3, top - q = 1 - p holds above the
    // threshold only.
    auto q = absolute<I>(I::sub(odds.p, I::set(0.3f)));
    auto cube = I::mul(I::mul(q, q), q);
    auto divisor = I::add(one, cube);
    g = I::mul(I::div(I::mul(q, cube), divisor), I::set(1.343f / 0.2401f));
    auto factor = polynomial<I>(q, 0.343f, 0.49f, 0.7f, 1.343f);
    auto far = I::div(I::mul(odds.rest, factor), I::mul(divisor, I::set(0.2401f)));
    rest = I::select(I::greater(I::set(0.5f), g), I::sub(one, g), far);
  } else {
    auto a = absolute<I>(z), u = I::mul(a, a);
    // tanh a: 1 - e cancels where a is small; the series of activations.h ends there.
    auto p = polynomial<I>(u, -0x1.55553ep-2f, 0x1.110b58p-3f, -0x1.b92b2ep-5f, 0x1.5d160cp-6f,
                           -0x1.e5e522p-8f, 0x1.a0085ep-10f);
    auto t = I::select(I::greater(a, I::set(0.8f)), I::mul(I::sub(one, odds.e), odds.large),
                       I::fma(I::mul(u, p), a, a));
    rest = I::add(odds.small, odds.small);
    if (name == Confidence::kAbs) {
      g = t;
    } else if (name == Confidence::kSquare) {
      g = I::mul(t, t);
      rest = I::mul(rest, I::add(one, t));
    } else {
      auto square = I::mul(t, t), cube = I::mul(square, t), divisor = I::add(one, cube);
      g = I::div(I::mul(I::add(cube, cube), t), divisor);
      auto ratio = I::add(I::add(one, t), I::add(square, I::add(cube, cube)));
      rest = I::mul(rest, I::div(ratio, divisor));
    }
  }
  return {I::min(g, one), I::min(rest, one)};
}

// g^s and 1 - g^s, each with its digits wherever g lies.
template <class I>
inline Confident<I> sharpened(Confident<I> c, float power) {
  const auto one = I::set(1.0f), half = I::set(0.5f), tiny = I::set(0x1p-126f);
  auto log_g = I::select(I::greater(half, c.g), log<I>(I::max(c.g, tiny)),
                         log_one_plus<I>(I::sub(I::zero(), I::min(c.rest, half))));
  auto x = I::mul(I::set(power), log_g);
  auto sharp = I::select(I::greater(tiny, c.g), I::zero(), exp<I>(x));
  // 1 - e^x where e^x > 0.5: the product form of its series.
  auto y = I::max(x, I::set(-0.75f));
  auto near = I::mul(y, polynomial<I>(y, -1.0f, -1.0f / 2, -1.0f / 6, -1.0f / 24, -1.0f / 120,
                                      -1.0f / 720, -1.0f / 5040, -1.0f / 40320, -1.0f / 362880));
  auto rest = I::select(I::greater(half, sharp), I::sub(one, sharp), near);
  return {sharp, I::min(rest, one)};
}

}  // namespace maskmoe
