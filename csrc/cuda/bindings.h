// The signatures of the ops, for the GPU and for the host emulator. Their schemas stand in
// maskmoe_kernels/ops.
#pragma once

#include <optional>
#include <tuple>

#include "common/names.h"
#include "common/text.h"
#include "cuda/masked_mlp/operators.h"

namespace maskmoe::fused {

template <class Device>
struct Bindings {
  static std::tuple<Tensor, Tensor> forward(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                            Integers parts, Tensors weights, Tensors biases,
                                            Tensors plans, Integers layouts,
                                            int64_t /*out_features*/, Text activation,
                                            bool /*keep*/) {
    return fused::forward<Device>({x, tables, ids, parts, weights, biases, plans, layouts,
                                   activation_named(activation)});
  }

  static Tensors backward(Tensor grad_logits, std::optional<Tensor> x, Tensors tables, Tensors ids,
                          Integers parts, Tensors weights, Tensors biases, Tensor /*saved*/,
                          Tensors plans, Integers layouts, Text activation, bool need_x,
                          bool need_tables, bool need_weights) {
    return fused::backward<Device>({x, tables, ids, parts, weights, biases, plans, layouts,
                                    activation_named(activation)},
                                   grad_logits, {need_x, need_tables, need_weights});
  }

  static std::tuple<Tensor, Tensor, Tensor> mixture(
      std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts, Tensors weights,
      Tensors biases, Tensors plans, Integers layouts, Text activation, Tensor is_proper_subset,
      Text confidence, double sharpness) {
    return fused::mixture<Device>({x, tables, ids, parts, weights, biases, plans, layouts,
                                   activation_named(activation)},
                                  {is_proper_subset, confidence_named(confidence), sharpness,
                                   Weighting::kSelection});
  }

  static Tensors gem(std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts,
                     Tensors weights, Tensors biases, Tensors plans, Integers layouts,
                     Text activation, Tensor target, std::optional<Tensor> mask,
                     std::optional<Tensor> sample_weight, Tensor is_proper_subset,
                     Text confidence, double sharpness, Text weighting, Text normalize,
                     bool need_x, bool need_tables, bool need_weights) {
    return fused::gem<Device>(
        {x, tables, ids, parts, weights, biases, plans, layouts, activation_named(activation)},
        {target, mask, sample_weight, normalization_named(normalize)},
        {is_proper_subset, confidence_named(confidence), sharpness, weighting_named(weighting)},
        {need_x, need_tables, need_weights});
  }
};

}  // namespace maskmoe::fused
