// Number types of the kernels, activations, confidences and the cross-entropy, in float32.
#pragma once

#include <cmath>

#include "cuda/machine.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace maskmoe::fused {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// float32 whose products keep the first 11 digits of their factors.
struct Tf32 {
  float value;
};

MASKMOE_DEVICE float to_float(float v) { return v; }
MASKMOE_DEVICE float to_float(Tf32 v) { return v.value; }
MASKMOE_DEVICE float to_float(Bfloat16 v) { return float_of(uint32_t{v.bits} << 16); }
MASKMOE_DEVICE float to_float(Float16 v) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(v.bits));
#else
  _Float16 half;
  std::memcpy(&half, &v, sizeof half);
  return static_cast<float>(half);
#endif
}

// Rounded to the nearest, ties to even.
template <class T>
MASKMOE_DEVICE T rounded(float v);

template <>
MASKMOE_DEVICE float rounded<float>(float v) {
  return v;
}
template <>
MASKMOE_DEVICE Tf32 rounded<Tf32>(float v) {
  return {v};
}
template <>
MASKMOE_DEVICE Bfloat16 rounded<Bfloat16>(float v) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t bits = bits_of(v);
  if (v != v) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}
template <>
MASKMOE_DEVICE Float16 rounded<Float16>(float v) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const _Float16 half = static_cast<_Float16>(v);
  Float16 out;
  std::memcpy(&out, &half, sizeof out);
  return out;
#endif
}

// Between layers, gradients are rounded to the numbers of the network. float16 ends at 2^-24: there
// the loss hands on 2^8 times its gradients (beyond 2^8, then, they are infinite), and weights whose
// sum is below 1 are divided first; for other numbers see kMayWait of cpu/networks.cpp.
template <class T>
constexpr bool kNarrow = false;
template <>
constexpr bool kNarrow<Float16> = true;
template <class T>
constexpr float kGain = kNarrow<T> ? 256.0f : 1.0f;
template <class T>
constexpr float kLeast = kNarrow<T> ? 1.0f : 1.0842021724855044e-19f;

// a / by; a where there is nothing to divide by.
MASKMOE_DEVICE float quotient(float a, float by) { return a / (by == 0.0f ? 1.0f : by); }

enum class Activation : int { kNone, kRelu, kLeakyRelu, kGelu, kTanh, kSilu };

// Does the derivative follow from the activation's value alone?
constexpr bool follows_from_value(Activation a) {
  return a != Activation::kGelu && a != Activation::kSilu;
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

// The derivative at z, for those whose value does not tell it.
MASKMOE_DEVICE float slope_at(float z, Activation a) {
  if (a == Activation::kGelu) {
    const float bell = 0.39894228f * expf(-0.5f * z * z);
    return 0.5f * (1.0f + erff(z * 0.70710678f)) + (bell == 0 ? 0.0f : z * bell);
  }
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// Gradient before an activation from the one after it and the activation's value.
MASKMOE_DEVICE float before(float gradient, float value, Activation a) {
  if (a == Activation::kTanh) return gradient * (1.0f - value * value);
  if (a == Activation::kRelu) return value <= 0 ? 0.0f : gradient;
  if (a == Activation::kLeakyRelu) return value > 0 ? gradient : 0.01f * gradient;
  return gradient;
}

// p and 1 - p, each with its digits wherever p lies.
struct Pair {
  float own, rest;
};

// f = sigmoid(2 z) and 1 - f.
MASKMOE_DEVICE Pair odds_of(float z) {
  const float e = expf(-2.0f * fabsf(z));
  const float large = 1.0f / (1.0f + e), small = e / (1.0f + e);
  return z > 0 ? Pair{large, small} : Pair{small, large};
}

enum class Confidence : int { kAbs, kSquare, kSmooth, kRare };

MASKMOE_DEVICE float least(float a, float b) { return b < a ? b : a; }  // NaN a stays

// g and 1 - g; section 3.3.1.
MASKMOE_DEVICE Pair confidence_of(float z, Confidence name) {
  const float e = expf(-2.0f * fabsf(z));
  if (name == Confidence::kRare) {
    const Pair p = odds_of(z);
    const float q = fabsf(p.own - 0.3f), cube = q * q * q;
    const float g = q * cube / (1.0f + cube) * (1.343f / 0.2401f);
    // t^4 (1 + q^3) - q^4 (1 + t^3) with t = 0.7 and t - q = 1 - p: see objectives.selection.
    const float factor = 0.343f + 0.49f * q + 0.7f * q * q + 1.343f * cube;
    const float rest = g < 0.5f ? 1.0f - g : p.rest * factor / ((1.0f + cube) * 0.2401f);
    return {least(g, 1.0f), least(rest, 1.0f)};
  }
  const float t = tanhf(fabsf(z));
  float g = t, rest = 2.0f * e / (1.0f + e);
  if (name == Confidence::kSquare) {
    g = t * t;
    rest *= 1.0f + t;
  } else if (name == Confidence::kSmooth) {
    const float cube = t * t * t;
    g = 2.0f * cube * t / (1.0f + cube);
    rest *= (1.0f + t + t * t + 2.0f * cube) / (1.0f + cube);
  }
  return {least(g, 1.0f), least(rest, 1.0f)};
}

// g^s and 1 - g^s.
MASKMOE_DEVICE Pair sharpened(Pair of, float power) {
  constexpr float kTiny = 1.17549435e-38f;
  if (of.own != of.own) return of;
  const float log_own =
      of.own < 0.5f ? logf(of.own < kTiny ? kTiny : of.own) : log1pf(-least(of.rest, 0.5f));
  const float x = power * log_own;
  if (of.own < kTiny) return {0.0f, 1.0f};
  return {expf(x), least(-expm1f(x), 1.0f)};
}

// BCE(y, f) and f - y with f = sigmoid(2 z), as torch has them for infinite and NaN logits too.
struct Loss {
  float value, error;
};

MASKMOE_DEVICE Loss cross_entropy(float z, float y) {
  const float e = expf(-2.0f * fabsf(z));
  const Pair p = odds_of(z);
  const float negative = z > 0 ? 0.0f : z;
  // f (1 - y) - (1 - f) y = f - y, without cancellation where f is right.
  return {(1.0f - y) * (2.0f * z) - (2.0f * negative - log1pf(e)), p.own * (1.0f - y) - p.rest * y};
}

}  // namespace maskmoe::fused
