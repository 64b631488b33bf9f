// The CPU implementation of the ops that maskmoe_kernels/ops/registration.py defines.

#include <tuple>

#include "tensors.h"

namespace maskmoe {
namespace {

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                   Tensor plan, int64_t layout, int64_t out_features,
                                   Text activation, bool keep) {
  const Checks checks("masked_linear", x);
  const auto known = dtype_of(x);
  STD_TORCH_CHECK(x.dim() > 0, "maskmoe::masked_linear: x must be (*, in_features)");
  const Widths widths{x.size(x.dim() - 1), out_features};
  const auto chain = chain_of(checks, known, {plan}, {layout}, widths);
  if (chain == nullptr) {
    std::array<StableIValue, 8> stack{
        torch::stable::detail::from(x),      torch::stable::detail::from(weight),
        torch::stable::detail::from(bias),   torch::stable::detail::from(plan),
        torch::stable::detail::from(layout), torch::stable::detail::from(out_features),
        torch::stable::detail::from(activation), torch::stable::detail::from(keep)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("maskmoe::torch_linear", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  }
  const Plan& compiled = chain->front();
  const Layout& of = compiled.layout;
  const Dtype dtype = *known;
  const int64_t rows = rows_of(x);
  checks.matrix(x, "x", rows, of.in_features);
  checks.values(weight, "weight", -1, of.num_weights);
  if (bias) checks.values(*bias, "bias", -1, of.out_features);
  const Activation act = activation_of(activation);
  const bool kept = keep && (act == Activation::kGelu || act == Activation::kSilu);
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[d] = x.size(d);
  sizes.back() = of.out_features;
  Tensor y = empty_like_with(x, sizes.data(), x.dim());
  Tensor z = kept ? empty_like_with(x, sizes.data(), x.dim()) : nothing(x);
  Tensor held;
  const Matrix from = matrix_of(x, held, dtype, of.col_order);
  const int64_t* row_order = of.row_order.empty() ? nullptr : of.row_order.data();
  const Matrix to{y.data_ptr(), dtype, of.out_features, of.out_features, row_order};
  Matrix before = to;
  before.data = kept ? z.data_ptr() : nullptr;
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  masked_linear(compiled, *kernels(), from, weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
                to, before, act, rows);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor x, Tensor weight, Tensor saved,
                                            Tensor plan, int64_t layout, Text activation,
                                            bool need_x, bool need_weight, bool need_bias) {
  const Checks checks("masked_linear_backward", x);
  const auto known = dtype_of(x);
  STD_TORCH_CHECK(x.dim() > 0 && grad_y.dim() > 0,
                  "maskmoe::masked_linear_backward: x and grad_y must be (*, features)");
  const Widths widths{x.size(x.dim() - 1), grad_y.size(grad_y.dim() - 1)};
  const auto chain = chain_of(checks, known, {plan}, {layout}, widths);
  if (chain == nullptr) {
    std::array<StableIValue, 10> stack{
        torch::stable::detail::from(grad_y),      torch::stable::detail::from(x),
        torch::stable::detail::from(weight),      torch::stable::detail::from(saved),
        torch::stable::detail::from(plan),        torch::stable::detail::from(layout),
        torch::stable::detail::from(activation),  torch::stable::detail::from(need_x),
        torch::stable::detail::from(need_weight), torch::stable::detail::from(need_bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("maskmoe::torch_linear_backward", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
            torch::stable::detail::to<Tensor>(stack[2])};
  }
  const Plan& compiled = chain->front();
  const Layout& of = compiled.layout;
  const Dtype dtype = *known;
  const int64_t rows = rows_of(x);
  checks.matrix(x, "x", rows, of.in_features);
  checks.matrix(grad_y, "grad_y", rows, of.out_features);
  checks.values(weight, "weight", -1, of.num_weights);
  const Activation act = activation_of(activation);
  Tensor held_y, held_x, held_saved;
  const Matrix given = matrix_of(grad_y, held_y, dtype, of.row_order);
  const Matrix from = matrix_of(x, held_x, dtype, of.col_order);
  Matrix before = given;
  if (act != Activation::kNone) {
    checks.matrix(saved, "saved", rows, of.out_features);
    before = matrix_of(saved, held_saved, dtype, of.row_order);
  }
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d);
  Tensor grad_x = need_x ? empty_like_with(x, sizes.data(), x.dim()) : nothing(x);
  Tensor grad_weight = need_weight ? empty_like_with(x, &of.num_weights, 1) : nothing(x);
  Tensor grad_bias = need_bias ? empty_like_with(x, &of.out_features, 1) : nothing(x);
  weight = dense(weight);
  masked_linear_backward(compiled, *kernels(), given, before, from, weight.data_ptr(),
                         {need_x ? grad_x.data_ptr() : nullptr,
                          need_weight ? grad_weight.data_ptr() : nullptr,
                          need_bias ? grad_bias.data_ptr() : nullptr},
                         act, rows);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace maskmoe

STABLE_TORCH_LIBRARY_IMPL(maskmoe, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&maskmoe::forward));
  m.impl("masked_linear_backward", TORCH_BOX(&maskmoe::backward));
}
