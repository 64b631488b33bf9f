// The loss of generalised EM and all its gradients.

#include <algorithm>
#include <numeric>

#include "cpu/masked_mlp/call.h"
#include "cpu/masked_mlp/input_gradients.h"

namespace maskmoe {
namespace {

constexpr int64_t kUnitBytes = 1 << 30;  // of the units' gradients that are kept for a whole batch

// An expert's weights whose sum is smaller are divided by it before anything is multiplied by them.
// Dividing by a sum of at least 2^-63 can be left to the end: products of weights then have all
// their digits where the result is 2^-63 (a normal 2^-126, divided), and no optimizer tells smaller
// gradients apart, for their squares are denormal.
constexpr double kLeastSum = 0x1p-63;

// Has every layer a block of units an expert, and does every layer but the first route gradients
// from an expert to itself only?
bool isolated(const Chain& chain, size_t experts) {
  if (chain[0].layout.rows() != experts) return false;
  for (size_t k = 1; k < chain.size(); ++k) {
    const Layout& layout = chain[k].layout;
    if (layout.rows() != experts || layout.cols() != experts) return false;
    for (size_t i = 0; i < experts; ++i) {
      for (size_t j = 0; j < experts; ++j) {
        if (i != j && layout.routed(i, j)) return false;
      }
    }
  }
  return true;
}

// How each expert's weights are divided by their sum: by a factor at the end, or by a divisor in
// another pass over the batch. Returns whether that pass is needed. An expert's own sum decides for
// it alone, so its bits do not depend on other experts.
bool divide(const std::vector<double>& weight, Normalization normalization, double* factor,
            float* divisor) {
  bool again = false;
  const double all = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (size_t i = 0; i < weight.size(); ++i) {
    const double by = normalization == Normalization::kExpert ? weight[i] : all;
    const bool small = by > 0 && by < kLeastSum;
    if (small) divisor[i] = static_cast<float>(by);
    factor[i] = small || by == 0 ? 1 : 1 / by;
    again = again || small;
  }
  return again;
}

int64_t samples_that_count(const MlpInputs& in) {
  if (in.mask == nullptr) return in.rows;
  return std::count_if(in.mask, in.mask + in.rows, [](uint8_t m) { return m != 0; });
}

// One call. With normalization by expert or batch, the experts' factors are known after a pass over
// the batch. Gradients of an expert's own weights are scaled at the end. What experts give to
// inputs is added up, so it has to be scaled before: the gradients of the first layer's units are
// kept for the whole batch and go back to the inputs later ("deferred"), or there is a second pass
// ("twice").
class GemCall {
 public:
  GemCall(const MlpInputs& in, const Kernels& k, const Tiling& tiling, const Gem& gem,
          Normalization normalization, const MlpGradients& grads)
      : in_(in), k_(k), gem_(gem), normalization_(normalization), inputs_(in, grads, tiling),
        wanted_(!grads.weights.empty() || inputs_.wanted()),
        by_sums_(normalization == Normalization::kExpert ||
                 normalization == Normalization::kBatch),
        per_sample_(1.0f / static_cast<float>(std::max<int64_t>(samples_that_count(in), 1))),
        call_(in, k, tiling, flops_of(in, true, inputs_.wanted(), !grads.weights.empty())) {
    gem_.scale = by_sums_ ? 1.0f : per_sample_;
    gem_.per_sample = normalization == Normalization::kSample;
    prepare(tiling, grads);
  }

  float run() {
    const int64_t experts = gem_.selection.experts;
    std::vector<double> loss(experts), weight(experts), factor(experts, per_sample_);
    pass(loss, weight);
    if (by_sums_) {
      std::vector<float> divisors(experts, 1.0f);
      if (divide(weight, normalization_, factor.data(), divisors.data())) {
        gem_.divisors = divisors.data();
        pass(loss, weight);
      }
    }
    double total = 0;
    for (int64_t i = 0; i < experts; ++i) {
      total += loss[i] * factor[i];
      scale_[i] = static_cast<float>(factor[i]);
    }
    if (twice_) pass_with_factors();
    if (deferred_) inputs_from_units();
    if (wanted_) call_.reduce(by_sums_ && !twice_ ? scale_ : nullptr);
    return static_cast<float>(total);
  }

 private:
  // Decides how the gradients are scaled, and allocates.
  void prepare(const Tiling& tiling, const MlpGradients& grads) {
    const int64_t experts = gem_.selection.experts;
    Mlp& n = call_.mlp;
    n.gem = &gem_;
    n.forward = true;
    n.backward = wanted_;
    n.need_inputs = inputs_.wanted();
    n.saved_stride = k_.mlp_saved(n);
    n.units_stride = Scratch::round_up(k_.mlp_units(n));
    const bool own = by_sums_ && isolated(in_.chain, experts);
    const int64_t all_units = n.units_stride * tiling.count;
    deferred_ = own && inputs_.wanted() && 4 * all_units <= kUnitBytes;
    twice_ = wanted_ && by_sums_ && !deferred_ && (inputs_.wanted() || !own);
    keeps_ = twice_ && 4 * n.saved_stride * tiling.count <= kKeptBytes;
    const int64_t kept = Scratch::round_up(keeps_ ? n.saved_stride * tiling.count : 0);
    const int64_t kept_grads = Scratch::round_up(twice_ ? in_.rows * experts : 0);
    const int64_t factors = Scratch::round_up(experts);
    const int64_t units = deferred_ ? all_units : 0;
    const int64_t slots = deferred_ ? call_.slots_of_units() : 0;
    call_.prepare(grads, experts, inputs_.scratch() + kept + kept_grads + factors + units + slots);
    n.grad_inputs = inputs_.take(*call_.scratch);
    float* saved = call_.scratch->take(kept);
    grad_logits_ = call_.scratch->take(kept_grads);
    scale_ = call_.scratch->take(factors);
    float* unit_grads = call_.scratch->take(units);
    unit_scale_ = call_.scratch->take(slots);
    if (deferred_) {
      n.unit_grads = unit_grads;
      n.need_inputs = false;
    }
    if (twice_) {
      n.saved = keeps_ ? saved : nullptr;
      gem_.kept = grad_logits_;
      n.backward = false;
    }
  }

  void pass(std::vector<double>& loss, std::vector<double>& weight) {
    const Mlp& n = call_.mlp;
    if (n.need_inputs && n.backward) {
      inputs_.run(call_, k_);
    } else {
      call_.run();
    }
    call_.add_totals(gem_.selection.experts, loss.data(), weight.data());
  }

  // Backward from the gradients of the logits that the first pass kept.
  void pass_with_factors() {
    const int64_t experts = gem_.selection.experts;
    Mlp& n = call_.mlp;
    n.gem = nullptr;
    n.forward = !keeps_;
    n.backward = true;
    n.grad_logits = {grad_logits_, Dtype::kFloat32, experts, experts, nullptr};
    n.scale = scale_;
    inputs_.run(call_, k_);
  }

  // From the gradients of units that the pass kept to those of the inputs.
  void inputs_from_units() {
    Mlp& n = call_.mlp;
    call_.expand_to_units(scale_, unit_scale_);
    n.gem = nullptr;
    n.unit_scale = unit_scale_;
    n.need_inputs = true;
    inputs_.run(call_, k_);
  }

  const MlpInputs& in_;
  const Kernels& k_;
  Gem gem_;
  const Normalization normalization_;
  InputGradients inputs_;
  const bool wanted_, by_sums_;
  const float per_sample_;
  MlpCall call_;
  bool deferred_, twice_, keeps_;
  float *grad_logits_, *scale_, *unit_scale_;
};

}  // namespace

float masked_mlp_gem(const MlpInputs& in, const Kernels& k, const Tiling& tiling, const Gem& gem,
                     Normalization normalization, const MlpGradients& grads) {
  return GemCall(in, k, tiling, gem, normalization, grads).run();
}

}  // namespace maskmoe
