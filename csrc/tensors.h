// Tensors as the kernels see them, for the files that implement ops.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/driver.h"
#include "cpu/pages.h"

namespace maskmoe {

using torch::headeronly::ScalarType;

inline std::optional<Dtype> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return std::nullopt;
  }
}

inline Activation activation_of(const std::string& name) {
  constexpr std::array names{"none", "relu", "leaky_relu", "gelu", "tanh", "silu"};
  return named_of<Activation>(names, name, "activation");
}

// An empty tensor of `like`'s dtype, or of another.
inline Tensor empty_like_with(const Tensor& like, const int64_t* sizes, int64_t dims,
                              int32_t dtype = -1) {
  int64_t strides[64];
  STD_TORCH_CHECK(dims <= 64, "maskmoe: at most 64 dimensions, got ", dims);
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  if (dtype < 0) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor empty(handle);
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  prefer_large_pages(empty.data_ptr(), bytes);
  return empty;
}

inline Tensor nothing(const Tensor& like) {
  const int64_t zero = 0;
  return empty_like_with(like, &zero, 1);
}

// A tensor (*, features) as a matrix; `held` keeps alive what the matrix points to.
inline Matrix matrix_of(const Tensor& t, Tensor& held, Dtype dtype, const std::vector<int64_t>& order) {
  const int64_t features = t.size(t.dim() - 1);
  held = t;
  int64_t stride = features;
  if (t.dim() == 2 && (features == 1 || t.stride(1) == 1) && t.stride(0) >= features) {
    stride = t.stride(0);
  } else if (!t.is_contiguous()) {
    held = torch::stable::contiguous(t);
  }
  return {held.data_ptr(), dtype, features, stride, order.empty() ? nullptr : order.data()};
}

// How many features a call brings and wants.
struct Widths {
  int64_t in, out;

  void check(const char* op, const Layout& first, const Layout& last) const {
    STD_TORCH_CHECK(in == first.in_features && out == last.out_features, "maskmoe::", op,
                    ": the layout has ", first.in_features, " features and ", last.out_features,
                    " units, the call ", in, " and ", out);
  }
};

// The compiled layouts if these kernels can run on tensors of this kind, else null: then the PyTorch
// path does. Plans are verified first: what that path raises reaches nobody, the dispatcher keeps it.
inline std::shared_ptr<const Chain> chain_of(const Checks& checks, std::optional<Dtype> dtype,
                                             const std::vector<Tensor>& plans,
                                             const std::vector<int64_t>& layouts, Widths widths) {
  const Kernels* k = kernels();
  if (k == nullptr) return nullptr;
  const char* const op = checks.op();
  STD_TORCH_CHECK(!plans.empty() && plans.size() == layouts.size(), "maskmoe::", op, ": ",
                  plans.size(), " plans for ", layouts.size(), " layouts");
  std::array<Encoded, 16> few;
  std::vector<Encoded> many(plans.size() > few.size() ? plans.size() : 0);
  Encoded* const encoded = many.empty() ? few.data() : many.data();
  for (size_t n = 0; n < plans.size(); ++n) {
    encoded[n] = {static_cast<const int64_t*>(plans[n].data_ptr()), plans[n].numel()};
  }
  const std::span<const Encoded> addresses(encoded, plans.size());
  auto found = find_chain(layouts, k->width, addresses);
  if (found == nullptr) {
    Contents contents;
    for (size_t n = 0; n < plans.size(); ++n) {
      checks.readable(plans[n], "plans", n, aoti_torch_dtype_int64());
      STD_TORCH_CHECK(plans[n].dim() == 1 && plans[n].is_contiguous(), checks.named("plans", n),
                      " must be a vector");
      contents.emplace_back(encoded[n].values, encoded[n].values + encoded[n].count);
    }
    found = keep_chain(layouts, k->width, addresses,
                       std::make_shared<const std::vector<Tensor>>(plans), std::move(contents),
                       [&](const Contents& values) {
                         auto read = verified(values, layouts);
                         widths.check(op, read.front(), read.back());  // before memory is taken
                         return compile(k->width, std::move(read));
                       });
  }
  if (found->empty() || !dtype) return nullptr;
  widths.check(op, found->front().layout, found->back().layout);
  return found;
}

}  // namespace maskmoe
