// masked_mlp and its backward: tensors in, tensors out.

#include "cpu/instruction_sets.h"
#include "cpu/masked_mlp/arguments.h"

namespace maskmoe {
namespace {

constexpr int64_t kMostTileRows = 378;  // that tiles_of gives: 252, and half of that by rounding

// The shape of what a forward keeps, `kept` floats a tile: the first size is a tile's rows, so that
// backward can divide the batch into the same tiles.
Integers saved_shape(const Tiling& tiling, int64_t kept) {
  if (kept == 0) return {0, 0};
  return {tiling.rows, (tiling.count * kept + tiling.rows - 1) / tiling.rows};
}

// The tiles of the forward that returned `saved`, however many threads there are now.
Tiling tiles_of_saved(const PreparedMlp& call, const Checks& checks, const Tensor& saved) {
  checks.readable(saved, "saved", -1, aoti_torch_dtype_float32());
  STD_TORCH_CHECK(saved.dim() == 2 && saved.is_contiguous() && saved.size(0) <= kMostTileRows,
                  "maskmoe::masked_mlp_backward: saved is not what a forward returned");
  const int64_t rows = saved.size(0);
  const Tiling tiling{rows, (call.in.rows + rows - 1) / rows};
  const auto shape = saved_shape(tiling, worth_keeping(call.in, *kernels(), tiling));
  STD_TORCH_CHECK(saved.size(0) == shape[0] && saved.size(1) == shape[1],
                  "maskmoe::masked_mlp_backward: activations were kept by other kernels; "
                  "leave the instruction set alone between forward and backward");
  return tiling;
}

}  // namespace

std::tuple<Tensor, Tensor> masked_mlp_op(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                         Integers parts, Tensors weights, Tensors biases,
                                         Tensors serialized, Integers layouts, int64_t out_features,
                                         Text activation, bool keep) {
  const MlpArguments a("masked_mlp", x, tables, ids, parts, weights, biases, serialized, layouts);
  const auto chain = a.chain(out_features);
  const PreparedMlp call(*chain, a, activation_named(activation));
  const Layout& last = chain->back().layout;
  Integers sizes = a.batch_sizes();
  sizes.push_back(last.out_features);
  Tensor logits =
      empty_like_with(a.first_weight(), sizes.data(), static_cast<int64_t>(sizes.size()));
  const Tiling tiling = tiles_of(call.in);
  const int64_t kept = keep ? worth_keeping(call.in, *kernels(), tiling) : 0;
  Tensor saved = empty_float(a.first_weight(), saved_shape(tiling, kept));
  Tensor held;
  masked_mlp_forward(call.in, *kernels(), tiling, matrix_of(logits, held, a.dtype, last.row_order),
                     kept > 0 ? static_cast<float*>(saved.data_ptr()) : nullptr);
  return {logits, saved};
}

Tensors masked_mlp_backward_op(Tensor grad_logits, std::optional<Tensor> x, Tensors tables,
                               Tensors ids, Integers parts, Tensors weights, Tensors biases,
                               Tensor saved, Tensors serialized, Integers layouts, Text activation,
                               bool need_x, bool need_tables, bool need_weights) {
  const MlpArguments a("masked_mlp_backward", x, tables, ids, parts, weights, biases, serialized,
                       layouts);
  const int64_t dims = grad_logits.dim();
  const auto chain = a.chain(dims > 0 ? grad_logits.size(dims - 1) : 0);
  const PreparedMlp call(*chain, a, activation_named(activation));
  MlpResults results(call, a.dtype, a, need_x, need_tables, need_weights);
  if (results.all.empty()) return {};
  Tensor held;
  const Layout& last = chain->back().layout;
  a.checks.matrix(grad_logits, "grad_logits", call.in.rows, last.out_features);
  const Matrix from = matrix_of(grad_logits, held, a.dtype, last.row_order);
  const bool kept = saved.numel() > 0;
  const Tiling tiling = kept ? tiles_of_saved(call, a.checks, saved) : tiles_of(call.in);
  masked_mlp_backward(call.in, *kernels(), tiling, from,
                      kept ? static_cast<const float*>(saved.data_ptr()) : nullptr, results.grads);
  return results.all;
}

}  // namespace maskmoe
