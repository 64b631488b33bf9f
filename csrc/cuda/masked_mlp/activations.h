// Activations and their derivatives, in float32.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/names.h"
#include "cuda/thread_block.h"

namespace maskmoe::fused {

// Does the derivative follow from the activation's value alone?
constexpr bool follows_from_value(Activation a) {
  return a != Activation::kGelu && a != Activation::kSilu;
}

template <Activation kActivation>
constexpr bool kFollowsFromValue = follows_from_value(kActivation);

template <Activation kActivation>
using ActivationIs = std::integral_constant<Activation, kActivation>;

// f(ActivationIs<a>{}): code of its own for each activation. Code that asks at every value which one
// it is does not fit the instruction cache.
template <class F>
MASKMOE_DEVICE void with_activation(Activation a, const F& f) {
  if (a == Activation::kGelu) return f(ActivationIs<Activation::kGelu>{});
  if (a == Activation::kSilu) return f(ActivationIs<Activation::kSilu>{});
  if (a == Activation::kTanh) return f(ActivationIs<Activation::kTanh>{});
  if (a == Activation::kRelu) return f(ActivationIs<Activation::kRelu>{});
  if (a == Activation::kLeakyRelu) return f(ActivationIs<Activation::kLeakyRelu>{});
  f(ActivationIs<Activation::kNone>{});
}

MASKMOE_DEVICE float sigmoid(float z) {
  const float e = expf(-fabsf(z));
  return (z < 0 ? e : 1.0f) / (1.0f + e);
}

MASKMOE_DEVICE float activate(float z, Activation a) {
  if (a == Activation::kGelu) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  if (a == Activation::kSilu) return z * sigmoid(z);
  if (a == Activation::kTanh) return tanhf(z);
  if (a == Activation::kRelu) return z <= 0 ? 0.0f : z;  // NaN stays
  if (a == Activation::kLeakyRelu) return z > 0 ? z : 0.01f * z;
  return z;
}

// The derivative at z, of GELU and SiLU: it does not follow from their value.
MASKMOE_DEVICE float activation_derivative(float z, Activation a) {
  if (a == Activation::kGelu) {
    const float bell = 0.39894228f * expf(-0.5f * z * z);
    return 0.5f * (1.0f + erff(z * 0.70710678f)) + (bell == 0 ? 0.0f : z * bell);
  }
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// The gradient before an activation, from the gradient after it and the activation's value.
MASKMOE_DEVICE float grad_before_activation(float gradient, float value, Activation a) {
  if (a == Activation::kTanh) return gradient * (1.0f - value * value);
  if (a == Activation::kRelu) return value <= 0 ? 0.0f : gradient;
  if (a == Activation::kLeakyRelu) return value > 0 ? gradient : 0.01f * gradient;
  return gradient;
}

}  // namespace maskmoe::fused
