// The ops that have an implementation for the CPU; maskmoe_kernels/ops defines their schemas.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/text.h"

namespace maskmoe {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// --- masked_linear (cpu/masked_linear/ops.cpp) -------------------------------------------------

std::tuple<Tensor, Tensor> masked_linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                            Tensor serialized, int64_t id, int64_t out_features,
                                            Text activation, bool keep);

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward_op(
    Tensor grad_y, Tensor x, Tensor weight, Tensor saved, Tensor serialized, int64_t id,
    Text activation, bool need_x, bool need_weight, bool need_bias);

// --- masked_mlp (cpu/masked_mlp/ops.cpp, objective_ops.cpp) ------------------------------------

std::tuple<Tensor, Tensor> masked_mlp_op(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                         Integers parts, Tensors weights, Tensors biases,
                                         Tensors serialized, Integers layouts, int64_t out_features,
                                         Text activation, bool keep);

Tensors masked_mlp_backward_op(Tensor grad_logits, std::optional<Tensor> x, Tensors tables,
                               Tensors ids, Integers parts, Tensors weights, Tensors biases,
                               Tensor saved, Tensors serialized, Integers layouts, Text activation,
                               bool need_x, bool need_tables, bool need_weights);

Tensors masked_mlp_gem_op(std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts,
                          Tensors weights, Tensors biases, Tensors serialized, Integers layouts,
                          Text activation, Tensor target, std::optional<Tensor> mask,
                          std::optional<Tensor> sample_weight, Tensor strict, Text confidence,
                          double sharpness, Text weighting, Text normalize, bool need_x,
                          bool need_tables, bool need_weights);

Tensors masked_mlp_expert_loss_op(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                  Integers parts, Tensors weights, Tensors biases,
                                  Tensors serialized, Integers layouts, Text activation,
                                  Tensor target, std::optional<Tensor> mask,
                                  std::optional<Tensor> sample_weight, Text kind,
                                  int64_t out_features, int64_t outputs, bool need_x, bool need_tables, bool need_weights);

std::tuple<Tensor, Tensor, Tensor> masked_mlp_mixture_op(
    std::optional<Tensor> x, Tensors tables, Tensors ids, Integers parts, Tensors weights,
    Tensors biases, Tensors serialized, Integers layouts, Text activation, Tensor strict,
    Text confidence, double sharpness);

// --- rational_quadratic (cpu/splines/ops.cpp) --------------------------------------------------

std::tuple<Tensor, Tensor> rational_quadratic_op(Tensor x, Tensor widths, Tensor heights,
                                                 Tensor derivatives, double bound, double slope,
                                                 double width, double height, bool squashed);

std::tuple<Tensor, Tensor> rational_quadratic_inverse_op(Tensor y, Tensor widths, Tensor heights,
                                                         Tensor derivatives, double bound,
                                                         double slope, double width, double height,
                                                         bool squashed);

std::tuple<Tensor, Tensor> rational_quadratic_backward_op(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_log_slope, Tensor x, Tensor widths,
    Tensor heights, Tensor derivatives, double bound, double slope, double width, double height,
    bool squashed);

}  // namespace maskmoe
