// masked_mlp_gem, masked_mlp_expert_loss and masked_mlp_mixture: tensors in, tensors out.

#include <limits>

#include "cpu/instruction_sets.h"
#include "cpu/masked_mlp/arguments.h"

namespace maskmoe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMostClasses = 1 << 24;  // as float32, beyond, some are the same number

int64_t experts_in(const Tensor& strict) { return strict.dim() > 0 ? strict.size(0) : 0; }

// Each expert's strict subsets, for the kernels.
struct SelectionTables {
  Integers subsets, subsets_at{0};
  std::vector<uint8_t> has_superset;
  Selection selection;

  SelectionTables(const Checks& checks, const Chain& chain, Tensor strict, const Text& confidence,
                  double sharpness, Weighting weighting)
      : has_superset(chain.back().layout.out_features, 0) {
    const int64_t experts = chain.back().layout.out_features;
    checks.readable(strict, "strict", -1, aoti_torch_dtype_bool());
    STD_TORCH_CHECK(strict.dim() == 2 && strict.size(0) == experts && strict.size(1) == experts,
                    checks.named("strict", -1), " must be (experts, experts), the mlp has ",
                    experts, " logits");
    strict = dense(strict);
    const auto* is_proper_subset = static_cast<const uint8_t*>(strict.data_ptr());
    for (int64_t i = 0; i < experts; ++i) {
      for (int64_t j = 0; j < experts; ++j) {
        if (!is_proper_subset[i * experts + j]) continue;
        subsets.push_back(j);
        has_superset[j] = 1;
      }
      subsets_at.push_back(static_cast<int64_t>(subsets.size()));
    }
    selection = {experts,
                 chain.back().forward.slots.data(),
                 subsets.data(),
                 subsets_at.data(),
                 has_superset.data(),
                 confidence_named(confidence),
                 checked_sharpness(sharpness),
                 weighting};
  }
  SelectionTables(const SelectionTables&) = delete;  // `selection` points into it
};

// f(target) for all targets of samples that count?
template <class F>
bool all_targets(const float* target, int64_t labels, const MlpInputs& in, const F& f) {
  bool all = true;
  for (int64_t r = 0; r < in.rows; ++r) {
    if (in.mask != nullptr && in.mask[r] == 0) continue;
    for (int64_t k = 0; k < labels; ++k) all &= f(target[r * labels + k]);
  }
  return all;
}

// The samples of a loss: `labels` numbers each, whether they count and how often.
struct Samples {
  const float *target, *times = nullptr;

  Samples(const Checks& checks, MlpInputs& in, int64_t labels, Tensor& targets,
          std::optional<Tensor>& mask, std::optional<Tensor>& sample_weight) {
    checks.readable(targets, "target", -1, aoti_torch_dtype_float32());
    if (mask) checks.readable(*mask, "mask", -1, aoti_torch_dtype_bool());
    if (sample_weight) {
      checks.readable(*sample_weight, "sample_weight", -1, aoti_torch_dtype_float32());
    }
    STD_TORCH_CHECK(targets.numel() == in.rows * labels && (!mask || mask->numel() == in.rows) &&
                        (!sample_weight || sample_weight->numel() == in.rows),
                    "maskmoe::", checks.op(), ": target, mask and sample_weight must have a value "
                    "for each of ", in.rows, " samples");
    targets = dense(targets);
    target = static_cast<const float*>(targets.data_ptr());
    if (mask) {
      mask = dense(*mask);
      in.mask = static_cast<const uint8_t*>(mask->data_ptr());
    }
    if (!sample_weight) return;
    sample_weight = dense(*sample_weight);
    times = static_cast<const float*>(sample_weight->data_ptr());
    bool all = true;
    for (int64_t r = 0; r < in.rows; ++r) all &= times[r] >= 0.0f && times[r] < kInfinity;
    STD_TORCH_CHECK(all, "maskmoe::", checks.op(),
                    ": sample_weight must be finite and at least 0");
  }
};

// The loss and the gradients that are needed, in float32 whatever the weights are: the factor that
// multiplies the loss is not known yet.
Tensors loss_and_gradients(const PreparedMlp& call, const MlpArguments& a, const Gem& gem,
                           Normalization normalization, bool need_x, bool need_tables,
                           bool need_weights) {
  MlpResults results(call, Dtype::kFloat32, a, need_x, need_tables, need_weights);
  Tensor total = empty_float(a.first_weight(), {});
  *static_cast<float*>(total.data_ptr()) = masked_mlp_gem(
      call.in, *kernels(), tiles_of(call.in), gem, normalization, results.grads);
  results.all.insert(results.all.begin(), total);
  return results.all;
}

}  // namespace

Tensors masked_mlp_gem_op(std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts,
                          Tensors weights, Tensors biases, Tensors serialized, Integers layouts,
                          Text activation, Tensor target, std::optional<Tensor> mask,
                          std::optional<Tensor> sample_weight, Tensor strict, Text confidence,
                          double sharpness, Text weighting, Text normalize, bool need_x,
                          bool need_tables, bool need_weights) {
  const MlpArguments a("masked_mlp_gem", x, tables, ids, parts, weights, biases, serialized,
                       layouts);
  const auto chain = a.chain(experts_in(strict));
  PreparedMlp call(*chain, a, activation_named(activation));
  const Samples samples(a.checks, call.in, 1, target, mask, sample_weight);
  const auto is_label = [](float y) { return y >= 0.0f && y <= 1.0f; };
  STD_TORCH_CHECK(all_targets(samples.target, 1, call.in, is_label),
                  "maskmoe::masked_mlp_gem: target must hold labels in [0, 1]");
  const SelectionTables experts(a.checks, *chain, strict, confidence, sharpness,
                                weighting_named(weighting));
  const Gem gem{experts.selection, Objective::kBinary, 1, samples.target, samples.times, false,
                1.0f, nullptr, nullptr};
  return loss_and_gradients(call, a, gem, normalization_named(normalize), need_x, need_tables,
                            need_weights);
}

Tensors masked_mlp_expert_loss_op(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                  Integers parts, Tensors weights, Tensors biases,
                                  Tensors serialized, Integers layouts, Text activation,
                                  Tensor target, std::optional<Tensor> mask,
                                  std::optional<Tensor> sample_weight, Text kind,
                                  int64_t out_features, int64_t outputs, bool need_x,
                                  bool need_tables, bool need_weights) {
  const MlpArguments a("masked_mlp_expert_loss", x, tables, ids, parts, weights, biases,
                       serialized, layouts);
  const Objective objective = objective_named(kind);
  const auto chain = a.chain(out_features);
  const ExecutionPlan& last = chain->back();
  STD_TORCH_CHECK(outputs > 0 && outputs <= kMostClasses && out_features % outputs == 0 &&
                      last.layout.row_order.empty(),
                  "maskmoe::masked_mlp_expert_loss: experts must have ", outputs,
                  " units each of the last layer, side by side; it has ", out_features);
  STD_TORCH_CHECK(objective != Objective::kBinary,
                  "maskmoe::masked_mlp_expert_loss: of binary labels, masked_mlp_gem has the loss");
  PreparedMlp call(*chain, a, activation_named(activation));
  const bool classes = objective == Objective::kMulticlass;
  const int64_t labels = classes ? 1 : outputs;
  const Samples samples(a.checks, call.in, labels, target, mask, sample_weight);
  const auto most = static_cast<float>(outputs - 1);
  const auto is_target = [&](float y) {
    if (!classes) return y > -kInfinity && y < kInfinity;
    return y >= 0.0f && y <= most && y == static_cast<float>(static_cast<int64_t>(y));
  };
  STD_TORCH_CHECK(all_targets(samples.target, labels, call.in, is_target),
                  "maskmoe::masked_mlp_expert_loss: target must hold class indices below ",
                  outputs, ", or finite numbers");
  const Selection every{out_features, last.forward.slots.data(), nullptr, nullptr, nullptr,
                        Confidence::kAbs, 1.0f, Weighting::kUniform};
  const Gem gem{every, objective, outputs, samples.target, samples.times, false, 1.0f, nullptr,
                nullptr};
  return loss_and_gradients(call, a, gem, Normalization::kNone, need_x, need_tables,
                            need_weights);
}

std::tuple<Tensor, Tensor, Tensor> masked_mlp_mixture_op(
    std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts, Tensors weights,
    Tensors biases, Tensors serialized, Integers layouts, Text activation, Tensor strict,
    Text confidence, double sharpness) {
  const MlpArguments a("masked_mlp_mixture", x, tables, ids, parts, weights, biases, serialized,
                       layouts);
  const auto chain = a.chain(experts_in(strict));
  const PreparedMlp call(*chain, a, activation_named(activation));
  const SelectionTables experts(a.checks, *chain, strict, confidence, sharpness,
                                Weighting::kSelection);
  Integers sizes = a.batch_sizes();
  Tensor probability = empty_float(a.first_weight(), sizes);
  sizes.push_back(experts.selection.experts);
  Tensor alpha = empty_float(a.first_weight(), sizes);
  Tensor attribution = empty_float(a.first_weight(), sizes);
  masked_mlp_mixture(
      call.in, *kernels(), tiles_of(call.in),
      {experts.selection, static_cast<float*>(probability.data_ptr()),
       static_cast<float*>(alpha.data_ptr()), static_cast<float*>(attribution.data_ptr())});
  return {probability, alpha, attribution};
}

}  // namespace maskmoe
