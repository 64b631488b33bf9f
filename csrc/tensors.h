// Tensors as the kernels see them, for the files that implement ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/driver.h"
#include "cpu/pages.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as in torch 2.11's headers
#define STABLE_TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, #call " failed")
#endif

namespace maskmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::optional<Dtype> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return std::nullopt;
  }
}

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "tanh") return Activation::kTanh;
  STD_TORCH_CHECK(name == "silu", "maskmoe: unknown activation ", name);
  return Activation::kSilu;
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

inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The compiled layouts if these kernels can run on tensors of this kind, else null: then the PyTorch
// path does.
inline std::shared_ptr<const Chain> chain_of(const Tensor& like, const std::vector<Tensor>& plans,
                                             const std::vector<int64_t>& layouts) {
  const Kernels* k = kernels();
  if (k == nullptr) return nullptr;
  auto found = find_plan(layouts, k->width);
  if (found == nullptr) {
    std::vector<Tensor> held;
    std::vector<Encoded> encoded;
    for (size_t n = 0; n < plans.size(); ++n) {
      std::array<StableIValue, 2> stack{torch::stable::detail::from(plans[n]),
                                        torch::stable::detail::from(layouts[n])};
      STABLE_TORCH_ERROR_CODE_CHECK(
          torch_call_dispatcher("maskmoe::plan_obstacle", "", stack.data(), TORCH_ABI_VERSION));
      const auto obstacle = torch::stable::detail::to<std::string>(stack[0]);
      STD_TORCH_CHECK(obstacle.empty(), obstacle);
      held.push_back(dense(plans[n]));
      encoded.push_back({static_cast<const int64_t*>(held.back().data_ptr()), held.back().numel()});
    }
    found = build_plan(layouts, k->width, encoded);
  }
  return found->empty() || !dtype_of(like) ? nullptr : found;
}

}  // namespace maskmoe
