// What an op checks of its tensors before a kernel touches their memory. Ops are called by programs
// that strangers wrote, so no argument is trusted: each tensor has to lie on the op's device, in
// dense memory and inside its storage, with the dtype and the size that the kernel reads.
#pragma once

#include <string>

#include "common/text.h"

namespace maskmoe {

using torch::stable::Tensor;

// torch's number of a tensor's dtype.
inline int32_t code_of(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

class Checks {
 public:
  // All tensors have to be where `like` is.
  Checks(const char* op, const Tensor& like)
      : op_(op), device_(type_of(like)), index_(index_of(like)), dtype_(code_of(like)) {}

  // `t` holds values of this dtype where a kernel can read them. `n`: of a list.
  void readable(const Tensor& t, const char* name, int64_t n, int32_t dtype) const {
    const AtenTensorHandle handle = t.get();
    int32_t layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), named(name, n),
                    " must be a dense tensor");
    STD_TORCH_CHECK(type_of(t) == device_ && index_of(t) == index_, named(name, n),
                    " must be on the device of the other tensors");
    STD_TORCH_CHECK(code_of(t) == dtype, named(name, n), " has another dtype than the op reads");
    int64_t dims, count, offset, bytes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &count));
    if (count == 0) return;
    int64_t *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    int64_t end = offset + 1;
    for (int64_t d = 0; d < dims; ++d) end += (sizes[d] - 1) * strides[d];
    const auto size = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    STD_TORCH_CHECK(end <= bytes / size, named(name, n), " ends behind its storage, which holds ",
                    bytes, " bytes: it was freed or resized");
  }

  // A vector of `count` values, in the dtype of all.
  void values(const Tensor& t, const char* name, int64_t n, int64_t count) const {
    readable(t, name, n, dtype_);
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == count, named(name, n), " must hold ", count,
                    " values, its layout says, and holds ", t.numel(), " in ", t.dim(),
                    " dimensions");
  }

  // `t` is (*, features): as many features, and `rows` of them; in the dtype of all.
  void matrix(const Tensor& t, const char* name, int64_t rows, int64_t features) const {
    readable(t, name, -1, dtype_);
    fits(t, name, rows, features);
  }
  void fits(const Tensor& t, const char* name, int64_t rows, int64_t features) const {
    const int64_t dims = t.dim();
    const bool last = dims > 0 && t.size(dims - 1) == features;
    STD_TORCH_CHECK(last && t.numel() == rows * features, named(name, -1), " must be ", rows,
                    " rows of ", features, " values");
  }

  std::string named(const char* name, int64_t n) const {
    const std::string list = n < 0 ? "" : "[" + std::to_string(n) + "]";
    return std::string("maskmoe::") + op_ + ": " + name + list;
  }

  const char* op() const { return op_; }
  int32_t dtype() const { return dtype_; }

 private:
  static int32_t type_of(const Tensor& t) {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
  }
  static int32_t index_of(const Tensor& t) {
    int32_t index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    return index;
  }

  const char* op_;
  int32_t device_, index_, dtype_;
};

// The rows of a tensor (*, features).
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A power that confidences can take: the range of `check_confidence`.
inline float checked_sharpness(double sharpness) {
  STD_TORCH_CHECK(sharpness >= 1e-6 && sharpness <= 1e6,
                  "maskmoe: sharpness must be from 1e-6 to 1e6, got ", sharpness);
  return static_cast<float>(sharpness);
}

}  // namespace maskmoe
