// masked_mlp_gem and masked_mlp_mixture: tensors in, tensors out.

#include <limits>

#include "cpu/instruction_sets.h"
#include "cpu/masked_mlp/arguments.h"

namespace maskmoe {
namespace {

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

// Do the targets that count lie in [0, 1]? NaN does not.
bool all_labels(const float* target, const uint8_t* mask, int64_t rows) {
  bool all = true;
  for (int64_t r = 0; r < rows; ++r) {
    const bool label = target[r] >= 0.0f && target[r] <= 1.0f;
    all &= label || (mask != nullptr && mask[r] == 0);
  }
  return all;
}

// Are the weights of samples, where there are any, finite and not negative?
bool all_weights(const float* weight, int64_t rows) {
  bool all = true;
  for (int64_t r = 0; weight != nullptr && r < rows; ++r) {
    all &= weight[r] >= 0.0f && weight[r] < std::numeric_limits<float>::infinity();
  }
  return all;
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
  const int64_t rows = call.in.rows;
  a.checks.readable(target, "target", -1, aoti_torch_dtype_float32());
  if (mask) a.checks.readable(*mask, "mask", -1, aoti_torch_dtype_bool());
  if (sample_weight) {
    a.checks.readable(*sample_weight, "sample_weight", -1, aoti_torch_dtype_float32());
  }
  STD_TORCH_CHECK(target.numel() == rows && (!mask || mask->numel() == rows) &&
                      (!sample_weight || sample_weight->numel() == rows),
                  "maskmoe::masked_mlp_gem: target, mask and sample_weight must have a value for "
                  "each of ", rows, " samples");
  target = dense(target);
  if (mask) mask = dense(*mask);
  if (sample_weight) sample_weight = dense(*sample_weight);
  call.in.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  const auto* labels = static_cast<const float*>(target.data_ptr());
  STD_TORCH_CHECK(all_labels(labels, call.in.mask, rows),
                  "maskmoe::masked_mlp_gem: target must hold labels in [0, 1]");
  const auto* times =
      sample_weight ? static_cast<const float*>(sample_weight->data_ptr()) : nullptr;
  STD_TORCH_CHECK(all_weights(times, rows),
                  "maskmoe::masked_mlp_gem: sample_weight must be finite and at least 0");
  const SelectionTables experts(a.checks, *chain, strict, confidence, sharpness,
                                weighting_named(weighting));
  const Gem loss{experts.selection, labels, times, false, 1.0f, nullptr, nullptr};
  // In float32 whatever the weights are: the factor that multiplies the loss is not known yet.
  MlpResults results(call, Dtype::kFloat32, a, need_x, need_tables, need_weights);
  Tensor total = empty_float(target, {});
  *static_cast<float*>(total.data_ptr()) =
      masked_mlp_gem(call.in, *kernels(), tiles_of(call.in), loss, normalization_named(normalize),
                     results.grads);
  results.all.insert(results.all.begin(), total);
  return results.all;
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
