// The ops' signatures, for any Machine; the schemas stand in maskmoe_kernels/ops.
#pragma once

#include "cuda/operators.h"

namespace maskmoe::fused {

template <class Machine>
struct Ops {
  static std::tuple<Tensor, Tensor> forward(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                            Integers parts, Tensors weights, Tensors biases,
                                            Tensors plans, Integers layouts,
                                            int64_t /*out_features*/, Text activation,
                                            bool /*keep*/) {
    // Nothing is kept: a backward recomputes the activations, which never left the chip.
    Operator<Machine> op({x, tables, ids, parts, weights, biases, plans, layouts,
                          activation_of(activation)},
                         Use::kForward);
    return op.forward();
  }

  static Tensors backward(Tensor grad_logits, std::optional<Tensor> x, Tensors tables, Tensors ids,
                          Integers parts, Tensors weights, Tensors biases, Tensor /*saved*/,
                          Tensors plans, Integers layouts, Text activation, bool need_x,
                          bool need_tables, bool need_weights) {
    Operator<Machine> op({x, tables, ids, parts, weights, biases, plans, layouts,
                          activation_of(activation)},
                         Use::kBackward);
    return op.backward(grad_logits, need_x, need_tables, need_weights);
  }

  static std::tuple<Tensor, Tensor, Tensor> mixture(
      std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts, Tensors weights,
      Tensors biases, Tensors plans, Integers layouts, Text activation, Tensor strict,
      Text confidence, double sharpness) {
    Operator<Machine> op({x, tables, ids, parts, weights, biases, plans, layouts,
                          activation_of(activation)},
                         Use::kMixture);
    return op.mixture({strict, confidence_named(confidence), sharpness, true});
  }

  static Tensors gem(std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts,
                     Tensors weights, Tensors biases, Tensors plans, Integers layouts,
                     Text activation, Tensor target, std::optional<Tensor> mask,
                     Tensor strict, Text confidence, double sharpness,
                     Text weighting, Text normalize, bool need_x, bool need_tables,
                     bool need_weights) {
    Operator<Machine> op({x, tables, ids, parts, weights, biases, plans, layouts,
                          activation_of(activation)},
                         Use::kGem);
    return op.gem({target, mask, index_of(normalize, {"none", "sample", "expert", "batch"})},
                  {strict, confidence_named(confidence), sharpness,
                   index_of(weighting, {"deselection", "selection"}) == 1},
                  need_x, need_tables, need_weights);
  }
};

}  // namespace maskmoe::fused
