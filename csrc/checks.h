// What an op checks of its tensors before a kernel touches their memory. Ops are called by programs
// that strangers wrote, so nothing is believed: each tensor lies on the op's device, in plain
// memory and inside its storage, and has the type and the size that the kernel will read.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <string>
#include <vector>

#include "plan.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as in torch 2.11's headers
#define STABLE_TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, #call " failed")
#endif

namespace maskmoe {

// A string among an op's arguments. torch's conversion to std::string leaks it at every call
// (pytorch/pytorch#191340).
struct Text : std::string {
  using std::string::string;
};

}  // namespace maskmoe

namespace torch::stable::detail {

template <>
struct ToImpl<maskmoe::Text> {
  static maskmoe::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    maskmoe::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <>
struct FromImpl<maskmoe::Text> {
  static StableIValue call(const maskmoe::Text& text, uint64_t, bool) {
    return from(static_cast<const std::string&>(text));
  }
};

}  // namespace torch::stable::detail

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

// Lists that belong together are equally long, and there is something in them.
inline void check_lists(const char* op, const std::vector<Tensor>& plans,
                        const std::vector<int64_t>& layouts, const std::vector<Tensor>& weights,
                        const std::vector<Tensor>& biases, const std::vector<Tensor>& tables,
                        const std::vector<Tensor>& ids, bool has_x) {
  const size_t layers = layouts.size();
  STD_TORCH_CHECK(layers > 0 && plans.size() == layers && weights.size() == layers &&
                      (biases.empty() || biases.size() == layers) && ids.size() == tables.size() &&
                      (has_x || !ids.empty()),
                  "maskmoe::", op, ": weights, biases, plans, layouts, tables and ids do not match");
}

// A part of an input: `column` and on of x, or rows of a table.
struct PartOf {
  int64_t table;  // -1: x
  int64_t column, width;
};

// The parts of an input, side by side. Every table is named at most once, and every column of x is
// read once.
inline std::vector<PartOf> read_parts(const char* op, const std::vector<int64_t>& parts,
                                      const std::vector<Tensor>& tables, int64_t columns) {
  std::vector<PartOf> found;
  std::vector<bool> met(tables.size(), false);
  int64_t column = 0;
  for (const int64_t p : parts) {
    if (p < 0) {
      STD_TORCH_CHECK(p >= column - columns, "maskmoe::", op, ": parts name more columns than the ",
                      columns, " of x");
      found.push_back({-1, column, -p});
      column -= p;
      continue;
    }
    const auto t = static_cast<size_t>(p);
    STD_TORCH_CHECK(t < tables.size() && !met[t], "maskmoe::", op, ": parts name table ", p,
                    " twice, or there are fewer than that: ", tables.size());
    STD_TORCH_CHECK(tables[t].dim() == 2, "maskmoe::", op, ": tables[", p, "] must be (rows, width)");
    met[t] = true;
    found.push_back({p, 0, tables[t].size(1)});
  }
  STD_TORCH_CHECK(column == columns, "maskmoe::", op, ": parts name ", column, " columns of x, it has ",
                  columns);
  return found;
}

inline int64_t features_of(const std::vector<PartOf>& parts) {
  int64_t features = 0;
  for (const PartOf& part : parts) {
    STD_TORCH_CHECK(part.width <= std::numeric_limits<int64_t>::max() - features,
                    "maskmoe: the parts of an input have too many features");
    features += part.width;
  }
  return features;
}

// `choices` holds this name; what the kernels call it.
template <class Of, size_t N>
Of named_of(const std::array<const char*, N>& choices, const std::string& name, const char* what) {
  for (size_t n = 0; n < N; ++n) {
    if (name == choices[n]) return static_cast<Of>(n);
  }
  STD_TORCH_CHECK(false, "maskmoe: unknown ", what, " ", name);
}

// A power that confidences can take: the range of `check_confidence`.
inline float checked_sharpness(double sharpness) {
  STD_TORCH_CHECK(sharpness >= 1e-6 && sharpness <= 1e6,
                  "maskmoe: sharpness must be from 1e-6 to 1e6, got ", sharpness);
  return static_cast<float>(sharpness);
}

// Layouts from plans that this process has not met: the library reads them (`check_serialized_layout`), and
// the content has to be what the id says. The values are a copy, which nobody can change between
// the look and the use.
inline std::vector<Layout> verified(const Contents& contents, const std::vector<int64_t>& ids) {
  using torch::stable::detail::from;
  std::vector<Layout> layouts;
  for (size_t n = 0; n < contents.size(); ++n) {
    const auto count = static_cast<int64_t>(contents[n].size());
    const int64_t step = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &count, &step, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
    const Tensor copy(handle);
    std::copy(contents[n].begin(), contents[n].end(), static_cast<int64_t*>(copy.data_ptr()));
    std::array<StableIValue, 2> stack{from(copy), from(ids[n])};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("maskmoe::check_serialized_layout", "", stack.data(), TORCH_ABI_VERSION));
    const auto obstacle = torch::stable::detail::to<Text>(stack[0]);
    STD_TORCH_CHECK(obstacle.empty(), obstacle);
    layouts.push_back(decode({contents[n].data(), count}));
  }
  return layouts;
}

}  // namespace maskmoe
