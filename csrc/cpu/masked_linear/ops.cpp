// masked_linear and its backward: tensors in, tensors out.

#include "cpu/instruction_sets.h"
#include "cpu/masked_linear/masked_linear.h"
#include "cpu/ops.h"
#include "cpu/plan_lookup.h"
#include "cpu/tensors.h"

namespace maskmoe {

std::tuple<Tensor, Tensor> masked_linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                            Tensor serialized, int64_t id, int64_t out_features,
                                            Text activation, bool keep) {
  const Checks checks("masked_linear", x);
  STD_TORCH_CHECK(x.dim() > 0, "maskmoe::masked_linear: x must be (*, in_features)");
  const Dtype dtype = checked_dtype(checks, x, "x", -1);
  const auto chain = chain_of(checks, {serialized}, {id}, {x.size(x.dim() - 1), out_features});
  const ExecutionPlan& plan = chain->front();
  const Layout& layout = plan.layout;
  const int64_t rows = rows_of(x);
  checks.matrix(x, "x", rows, layout.in_features);
  checks.values(weight, "weight", -1, layout.num_weights);
  if (bias) checks.values(*bias, "bias", -1, layout.out_features);
  const Activation act = activation_named(activation);
  const bool kept = keep && (act == Activation::kGelu || act == Activation::kSilu);
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[d] = x.size(d);
  sizes.back() = layout.out_features;
  Tensor y = empty_like_with(x, sizes.data(), x.dim());
  Tensor z = kept ? empty_like_with(x, sizes.data(), x.dim()) : nothing(x);
  Tensor held;
  const Matrix from = matrix_of(x, held, dtype, layout.col_order);
  const Matrix to{y.data_ptr(),          dtype,
                  layout.out_features,   layout.out_features,
                  data_or_null(layout.row_order), data_or_null(layout.row_rank)};
  Matrix pre_activation = to;
  pre_activation.data = kept ? z.data_ptr() : nullptr;
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  masked_linear(plan, *kernels(), from, weight.data_ptr(), bias ? bias->data_ptr() : nullptr, to,
                pre_activation, act, rows);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward_op(
    Tensor grad_y, Tensor x, Tensor weight, Tensor saved, Tensor serialized, int64_t id,
    Text activation, bool need_x, bool need_weight, bool need_bias) {
  const Checks checks("masked_linear_backward", x);
  STD_TORCH_CHECK(x.dim() > 0 && grad_y.dim() > 0,
                  "maskmoe::masked_linear_backward: x and grad_y must be (*, features)");
  const Dtype dtype = checked_dtype(checks, x, "x", -1);
  const auto chain = chain_of(checks, {serialized}, {id},
                              {x.size(x.dim() - 1), grad_y.size(grad_y.dim() - 1)});
  const ExecutionPlan& plan = chain->front();
  const Layout& layout = plan.layout;
  const int64_t rows = rows_of(x);
  checks.matrix(x, "x", rows, layout.in_features);
  checks.matrix(grad_y, "grad_y", rows, layout.out_features);
  checks.values(weight, "weight", -1, layout.num_weights);
  const Activation act = activation_named(activation);
  Tensor held_y, held_x, held_saved;
  const Matrix given = matrix_of(grad_y, held_y, dtype, layout.row_order);
  Matrix from = matrix_of(x, held_x, dtype, layout.col_order);
  from.rank = data_or_null(layout.col_rank);
  Matrix kept = given;
  if (act != Activation::kNone) {
    checks.matrix(saved, "saved", rows, layout.out_features);
    kept = matrix_of(saved, held_saved, dtype, layout.row_order);
  }
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d);
  Tensor grad_x = need_x ? empty_like_with(x, sizes.data(), x.dim()) : nothing(x);
  Tensor grad_weight = need_weight ? empty_like_with(x, &layout.num_weights, 1) : nothing(x);
  Tensor grad_bias = need_bias ? empty_like_with(x, &layout.out_features, 1) : nothing(x);
  weight = dense(weight);
  masked_linear_backward(plan, *kernels(), given, kept, from, weight.data_ptr(),
                         {need_x ? grad_x.data_ptr() : nullptr,
                          need_weight ? grad_weight.data_ptr() : nullptr,
                          need_bias ? grad_bias.data_ptr() : nullptr},
                         act, rows);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace maskmoe
