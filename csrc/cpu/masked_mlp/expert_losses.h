// Losses of an expert with `outputs` outputs, for L samples at a time, and the gradients of its
// outputs: z, grad (outputs, L); the loss is returned. Over an instruction-set policy `I`.
#pragma once

#include "cpu/confidence.h"

namespace maskmoe {

template <class I>
struct ExpertLosses {
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  // The cross-entropy of class y (a number) in softmax(z); NaN where an output is.
  static V multiclass(const float* z, int64_t outputs, V y, float* grad) {
    V most = I::load(z);
    for (int64_t k = 1; k < outputs; ++k) most = I::max(I::load(z + k * L), most);
    // Sums of e^(z - most), which is 1 for the largest output: of all but that one (the first of
    // several), and of all but class y.
    const V one = I::set(1.0f), none = I::set(-__builtin_inff());
    V rest = I::zero(), others = I::zero(), of_y = I::zero(), found = I::zero();
    for (int64_t k = 0; k < outputs; ++k) {
      const V value = I::load(z + k * L), e = exp<I>(I::sub(value, most));
      const M again = I::greater(found, I::zero());
      const M is_most = I::less_equal(most, I::select(again, none, value));
      const M is_y = is_class(y, k);
      found = I::select(is_most, one, found);
      rest = I::add(rest, I::select(is_most, I::sub(e, one), e));
      others = I::add(others, I::select(is_y, I::zero(), e));
      of_y = I::select(is_y, value, of_y);
      I::store(grad + k * L, e);
    }
    const V sum = I::add(one, rest), by = I::div(one, sum);
    for (int64_t k = 0; k < outputs; ++k) {
      // p - 1 of class y is the sum of all other p, which does not cancel.
      const V e = I::select(is_class(y, k), I::sub(I::zero(), others), I::load(grad + k * L));
      I::store(grad + k * L, I::mul(e, by));
    }
    const V log_sum = I::select(I::greater(rest, one), log<I>(sum), log_one_plus<I>(rest));
    return I::add(I::sub(most, of_y), log_sum);
  }

  // The sum of squared errors; y: (outputs, L).
  static V squared(const float* z, int64_t outputs, const float* y, float* grad) {
    V loss = I::zero();
    for (int64_t k = 0; k < outputs * L; k += L) {
      const V error = I::sub(I::load(z + k), I::load(y + k));
      loss = I::fma(error, error, loss);
      I::store(grad + k, I::add(error, error));
    }
    return loss;
  }

 private:
  static M is_class(V y, int64_t k) {
    return I::less_equal(absolute<I>(I::sub(y, I::set(static_cast<float>(k)))), I::set(0.25f));
  }
};

}  // namespace maskmoe
