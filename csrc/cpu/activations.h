// Activations and their gradients over an instruction-set policy `I` (simd_avx512.h, simd_avx2.h).
//
// Single precision, branch-free. Nothing here calls the standard library, and every function is a
// template over `I`, so no symbol compiled for one instruction set can replace that of another.
// Coefficients are minimax fits in float64, then rounded to float one by one with the rest
// refitted; each says its interval and its error before arithmetic rounds anything.
#pragma once

#include "common/names.h"

namespace maskmoe {

// c0 + c1 x + c2 x^2 + ...
template <class I, class... C>
inline typename I::V polynomial(typename I::V x, float c, C... higher) {
  if constexpr (sizeof...(higher) == 0) {
    return I::set(c);
  } else {
    return I::fma(polynomial<I>(x, higher...), x, I::set(c));
  }
}

template <class I>
inline typename I::V absolute(typename I::V x) {
  return I::xor_bits(x, I::and_bits(x, I::set(-0.0f)));
}
template <class I>
inline typename I::V with_sign_of(typename I::V magnitude, typename I::V x) {
  return I::or_bits(magnitude, I::and_bits(x, I::set(-0.0f)));
}

// --- exp ---------------------------------------------------------------------------------------

// The integer nearest to x / ln 2, for |x| < 2^21: at 1.5 * 2^23 a float has no fraction bits left.
template <class I>
inline typename I::V octaves(typename I::V x) {
  const auto shift = I::set(0x1.8p23f);
  return I::sub(I::fma(x, I::set(0x1.715476p0f), shift), shift);
}

// e^r - 1 for |r| <= 0.3473 (ln 2 / 2 and a little): relative to e^r, 2^-28.2.
template <class I>
inline typename I::V exp_minus_one(typename I::V r) {
  auto q = polynomial<I>(r, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558bcp-5f, 0x1.1239c6p-7f,
                         0x1.6a4154p-10f);
  return I::fma(I::mul(r, r), q, r);
}

// e^x = 2^n (1 + y), kept apart: a product with 1 + y then rounds once, as fma(a, y, a).
template <class I>
struct Exponential {
  typename I::V n, y;
};

template <class I>
inline Exponential<I> exp_parts(typename I::V x) {
  auto n = octaves<I>(x);
  auto r = I::fma(n, I::set(-0x1.62e43p-1f), x);  // ln 2 as a sum of two floats
  r = I::fma(n, I::set(0x1.05c61p-29f), r);
  return {n, exp_minus_one<I>(r)};
}

// e^x with x first clamped to [lo, hi]; NaN stays NaN.
template <class I>
inline typename I::V exp_clamped(typename I::V x, float lo, float hi) {
  auto e = exp_parts<I>(I::max(I::set(lo), I::min(I::set(hi), x)));
  return I::scale(I::add(I::set(1.0f), e.y), e.n);
}

template <class I>
inline typename I::V exp(typename I::V x) {
  return exp_clamped<I>(x, -104.0f, 89.0f);  // 0 and infinity from here on
}

// --- tanh --------------------------------------------------------------------------------------

// |x| <= 0.8: x + x u P(u), u = x^2, relative error 2^-28.0. Beyond: 1 - 2 / (e^2|x| + 1).
template <class I>
inline typename I::V tanh(typename I::V x) {
  const auto one = I::set(1.0f);
  auto u = I::mul(x, x);
  auto p = polynomial<I>(u, -0x1.55553ep-2f, 0x1.110b58p-3f, -0x1.b92b2ep-5f, 0x1.5d160cp-6f,
                         -0x1.e5e522p-8f, 0x1.a0085ep-10f);
  auto small = I::fma(I::mul(u, p), x, x);

  auto a = absolute<I>(x);
  auto b = I::min(I::set(10.0f), a);  // tanh is 1 from 9.02 on
  auto e = exp_parts<I>(I::add(b, b));
  auto power = I::power_of_two(e.n);
  auto e_plus_one = I::fma(power, e.y, I::add(power, one));
  auto large = I::sub(one, I::div(I::set(2.0f), e_plus_one));
  return with_sign_of<I>(I::select(I::greater(a, I::set(0.8f)), large, small), x);
}

// --- gelu --------------------------------------------------------------------------------------
//
// 1 + erf(z / sqrt 2) cancels for negative z. Instead, with a = |z| and the normal's distribution
// Phi, r(a) = Phi(-a) / e^(-a^2 / 2) is smooth, falls as 1 / a, and
//   gelu(z)  = max(z, 0) - a r(a) e^(-a^2 / 2)
//   gelu'(z) = [z > 0] +- (a / sqrt(2 pi) - r(a)) e^(-a^2 / 2)
// keep their relative accuracy in the tail. The bracket has a root at a0 = 0.7518; as (a - a0) s(a)
// with s smooth and positive it keeps its accuracy there too. Both quotients below are arranged so
// that rounding errors in their polynomials largely cancel or reach a small part of the result.

constexpr float kGeluTail = 15.0f;  // from here on all that e^(-a^2 / 2) multiplies is 0

// e^(-a^2 / 2) for a in [0, kGeluTail]. The square is never rounded: n times the 16-bit head of
// ln 2 is exact, and the fma subtracts it from the exact square.
template <class I>
inline Exponential<I> gaussian(typename I::V a) {
  auto half = I::mul(a, I::set(-0.5f));
  auto n = octaves<I>(I::mul(half, a));
  auto r = I::fma(half, a, I::mul(n, I::set(-0x1.62e4p-1f)));
  r = I::fma(n, I::set(-0x1.7f7d1cp-20f), r);
  return {n, exp_minus_one<I>(r)};
}

template <class I>
inline typename I::V times(typename I::V a, Exponential<I> e) {
  return I::scale(I::fma(a, e.y, a), e.n);
}

template <class I>
inline typename I::V gelu(typename I::V z) {
  // |z|, but NaN for -infinity, as torch's -inf * 0.
  auto a = I::fma(I::set(-2.0f), I::min(I::zero(), z), z);
  a = I::min(I::set(kGeluTail), a);
  // r = P / (2 P + a (2.5066 P + Q)) on [0, 14.5]: relative error 2^-26.7, exactly 1/2 at 0.
  auto p = polynomial<I>(a, 0x1.151ebap0f, 0x1.e5112ap-1f, 0x1.9504f6p-2f, 0x1.66a29ap-4f,
                         0x1.21d92ap-7f);
  auto q = polynomial<I>(a, -0x1.f8d15p-1f, -0x1.226084p-1f, -0x1.39e0aep-3f, -0x1.21925ep-6f);
  q = I::fma(I::fma(I::set(0x1.40d836p1f), p, q), a, I::add(p, p));
  auto r = I::div(p, q);
  auto tail = times<I>(I::mul(a, r), gaussian<I>(a));
  return I::sub(I::max(I::set(-0.0f), z), tail);  // max(-0, -z) = -0: gelu keeps the sign of 0
}

template <class I>
inline typename I::V gelu_dact(typename I::V z) {
  // |z|, but NaN for the infinities, as torch's inf * 0.
  auto a = I::min(I::set(kGeluTail), I::fma(z, I::zero(), absolute<I>(z)));
  // s = 0.3989 + P / Q on [0, 14.5]: relative error 2^-26.7. What a0 loses as a float matters
  // near it only, and is added back as a constant.
  auto d = I::sub(a, I::set(0x1.80ead2p-1f));
  auto p = polynomial<I>(a, 0x1.21e4ccp-2f, 0x1.a9af98p-3f, 0x1.0ba3eep-4f, 0x1.108788p-7f);
  auto q = polynomial<I>(a, 0x1.1051ecp0f, 0x1.7cb328p0f, 0x1.af7436p-1f, 0x1.dea0fcp-3f,
                         0x1.c68912p-6f);
  auto bracket = I::fma(d, I::div(p, q), I::set(0x1.dc87p-28f));
  bracket = I::fma(d, I::set(0x1.9884f2p-2f), bracket);
  auto tail = times<I>(bracket, gaussian<I>(a));
  auto positive = I::greater(z, I::zero());
  return I::fma(tail, I::select(positive, I::set(1.0f), I::set(-1.0f)),
                I::select(positive, I::set(1.0f), I::zero()));
}

// --- silu --------------------------------------------------------------------------------------

// 1 + e^-z. Infinite where e^-z is; below 2^-125, e^-z is lost beside 1 and need not be exact.
template <class I>
inline typename I::V sigmoid_divisor(typename I::V z) {
  return I::add(I::set(1.0f), exp_clamped<I>(I::xor_bits(z, I::set(-0.0f)), -87.0f, 89.0f));
}

// sig (1 + z (1 - sig)); NaN at the infinities, as in torch.
template <class I>
inline typename I::V silu_dact(typename I::V z) {
  const auto one = I::set(1.0f);
  auto sig = I::div(one, sigmoid_divisor<I>(z));
  return I::mul(sig, I::fma(z, I::sub(one, sig), one));
}

// --- what the kernels call ---------------------------------------------------------------------

// y = f(z), as torch defines it: NaN stays NaN, and so do gelu(-inf) and silu(-inf).
template <class I, Activation A>
inline typename I::V activate(typename I::V z) {
  if constexpr (A == Activation::kRelu) {
    return I::max(I::zero(), z);  // z where z is NaN, and where both are 0
  } else if constexpr (A == Activation::kLeakyRelu) {
    return I::select(I::greater(z, I::zero()), z, I::mul(z, I::set(0.01f)));
  } else if constexpr (A == Activation::kGelu) {
    return gelu<I>(z);
  } else if constexpr (A == Activation::kTanh) {
    return tanh<I>(z);
  } else if constexpr (A == Activation::kSilu) {
    return I::div(z, sigmoid_divisor<I>(z));
  } else {
    return z;
  }
}

// grad_z from grad_y and what the forward saved: y for relu, leaky relu and tanh; z for gelu and
// silu; nothing for none, where `saved` is not looked at.
template <class I, Activation A>
inline typename I::V activation_grad(typename I::V grad_y, typename I::V saved) {
  if constexpr (A == Activation::kRelu) {
    return I::select(I::less_equal(saved, I::zero()), I::zero(), grad_y);
  } else if constexpr (A == Activation::kLeakyRelu) {
    auto positive = I::greater(saved, I::zero());
    return I::select(positive, grad_y, I::mul(grad_y, I::set(0.01f)));
  } else if constexpr (A == Activation::kGelu) {
    return I::mul(grad_y, gelu_dact<I>(saved));
  } else if constexpr (A == Activation::kTanh) {
    auto minus = I::xor_bits(saved, I::set(-0.0f));
    return I::mul(grad_y, I::fma(minus, saved, I::set(1.0f)));
  } else if constexpr (A == Activation::kSilu) {
    return I::mul(grad_y, silu_dact<I>(saved));
  } else {
    return grad_y;
  }
}

// Calls body.template operator()<A>() for the A that is `a`: one switch outside the loops.
//   dispatch<I>(a, [&]<Activation A>() { ... activate<I, A>(z) ... });
template <class I, class Body>
inline auto dispatch(Activation a, const Body& body) {
  switch (a) {
    case Activation::kRelu: return body.template operator()<Activation::kRelu>();
    case Activation::kLeakyRelu: return body.template operator()<Activation::kLeakyRelu>();
    case Activation::kGelu: return body.template operator()<Activation::kGelu>();
    case Activation::kTanh: return body.template operator()<Activation::kTanh>();
    case Activation::kSilu: return body.template operator()<Activation::kSilu>();
    case Activation::kNone: break;
  }
  return body.template operator()<Activation::kNone>();
}

}  // namespace maskmoe
