// The confidence of an expert in its logit, and the cross-entropy, in float32.
#pragma once

#include <cmath>

#include "common/names.h"
#include "cuda/number_types.h"

namespace maskmoe::fused {

// Gradients between layers have the number type of the MLP. The smallest float16 is 2^-24, so the
// gradients of a float16 loss are scaled by 2^8 on their way (those beyond 2^8 become infinite).
// And a sum of weights below kMinDivisor divides its weights before they are multiplied with
// anything, not after: 1 for float16, 2^-63 for the other types.
template <class T>
constexpr bool kNarrowRange = false;
template <>
constexpr bool kNarrowRange<Float16> = true;
template <class T>
constexpr float kLossScale = kNarrowRange<T> ? 256.0f : 1.0f;
template <class T>
constexpr float kMinDivisor = kNarrowRange<T> ? 1.0f : 1.0842021724855044e-19f;

// a / by; a where `by` is 0.
MASKMOE_DEVICE float quotient(float a, float by) { return a / (by == 0.0f ? 1.0f : by); }

// p and 1 - p, both precise to the last digits, for p near 0 and near 1.
struct WithComplement {
  float value, complement;
};

// f = sigmoid(2 z) and 1 - f.
MASKMOE_DEVICE WithComplement probability_of(float z) {
  const float e = expf(-2.0f * fabsf(z));
  const float large = 1.0f / (1.0f + e), small = e / (1.0f + e);
  return z > 0 ? WithComplement{large, small} : WithComplement{small, large};
}

MASKMOE_DEVICE float least(float a, float b) { return b < a ? b : a; }  // NaN a stays

// g and 1 - g; section 3.3.1.
MASKMOE_DEVICE WithComplement confidence_of(float z, Confidence name) {
  const float e = expf(-2.0f * fabsf(z));
  if (name == Confidence::kRare) {
    const WithComplement p = probability_of(z);
    const float q = fabsf(p.value - 0.3f), cube = q * q * q;
    const float g = q * cube / (1.0f + cube) * (1.343f / 0.2401f);
    // t^4 (1 + q^3) - q^4 (1 + t^3) with t = 0.7 and t - q = 1 - p: see objectives.selection.
    const float factor = 0.343f + 0.49f * q + 0.7f * q * q + 1.343f * cube;
    const float complement =
        g < 0.5f ? 1.0f - g : p.complement * factor / ((1.0f + cube) * 0.2401f);
    return {least(g, 1.0f), least(complement, 1.0f)};
  }
  const float t = tanhf(fabsf(z));
  float g = t, complement = 2.0f * e / (1.0f + e);
  if (name == Confidence::kSquare) {
    g = t * t;
    complement *= 1.0f + t;
  } else if (name == Confidence::kSmooth) {
    const float cube = t * t * t;
    g = 2.0f * cube * t / (1.0f + cube);
    complement *= (1.0f + t + t * t + 2.0f * cube) / (1.0f + cube);
  }
  return {least(g, 1.0f), least(complement, 1.0f)};
}

// g^s and 1 - g^s.
MASKMOE_DEVICE WithComplement sharpened(WithComplement of, float power) {
  constexpr float kTiny = 1.17549435e-38f;
  if (of.value != of.value) return of;
  const float log_value = of.value < 0.5f ? logf(of.value < kTiny ? kTiny : of.value)
                                          : log1pf(-least(of.complement, 0.5f));
  const float x = power * log_value;
  if (of.value < kTiny) return {0.0f, 1.0f};
  return {expf(x), least(-expm1f(x), 1.0f)};
}

// BCE(y, f) and f - y with f = sigmoid(2 z); of infinite and NaN logits what torch returns.
struct Loss {
  float value, error;
};

MASKMOE_DEVICE Loss cross_entropy(float z, float y) {
  const float e = expf(-2.0f * fabsf(z));
  const WithComplement p = probability_of(z);
  const float negative = z > 0 ? 0.0f : z;
  // f (1 - y) - (1 - f) y = f - y, without cancellation where f is near y.
  return {(1.0f - y) * (2.0f * z) - (2.0f * negative - log1pf(e)),
          p.value * (1.0f - y) - p.complement * y};
}

}  // namespace maskmoe::fused
