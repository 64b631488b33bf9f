// Tensors as the CPU's kernels see them, for the files that implement ops.
#pragma once

#include <vector>

#include "common/checks.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace maskmoe {

using torch::headeronly::ScalarType;

// The dtype of `t`, which has to be one that the kernels compute in.
inline Dtype checked_dtype(const Checks& checks, const Tensor& t, const char* name, int64_t n) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, checks.named(name, n), " is ",
                  torch::headeronly::toString(t.scalar_type()),
                  "; the CPU kernels take float32, bfloat16 and float16. Convert it, or choose "
                  "another backend: backend='torch'");
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
  advise_huge_pages(empty.data_ptr(), bytes);
  return empty;
}

// A result that was not asked for: no elements.
inline Tensor nothing(const Tensor& like) {
  const int64_t zero = 0;
  return empty_like_with(like, &zero, 1);
}

inline const int64_t* data_or_null(const std::vector<int64_t>& values) {
  return values.empty() ? nullptr : values.data();
}

// A tensor (*, features) as a matrix; `held` keeps alive what the matrix points to.
inline Matrix matrix_of(const Tensor& t, Tensor& held, Dtype dtype,
                        const std::vector<int64_t>& order) {
  const int64_t features = t.size(t.dim() - 1);
  held = t;
  int64_t stride = features;
  if (t.dim() == 2 && (features == 1 || t.stride(1) == 1) && t.stride(0) >= features) {
    stride = t.stride(0);
  } else if (!t.is_contiguous()) {
    held = torch::stable::contiguous(t);
  }
  return {held.data_ptr(), dtype, features, stride, data_or_null(order)};
}

}  // namespace maskmoe
