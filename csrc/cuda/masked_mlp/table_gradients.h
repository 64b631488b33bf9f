// Launches the kernels for the gradient of a table; the size of the table decides which.
#pragma once

#include <array>

#include "cuda/buffers.h"
#include "cuda/masked_mlp/scatter_rows.h"

namespace maskmoe::fused {

// Sorts ids with torch's stable sort, so that samples of one id keep their order.
inline void sort_ids(ScatterArguments& s, const Tensor& ids, Buffers& buffers) {
  using torch::stable::detail::from;
  const Tensor flat = torch::stable::reshape(ids, {s.samples});
  std::array<StableIValue, 4> stack{from(flat), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == 0,
      "maskmoe: ids cannot be sorted");
  auto kept = [&](StableIValue value) {
    const Tensor& tensor = buffers.keep(torch::stable::detail::to<Tensor>(value));
    return static_cast<const int64_t*>(tensor.data_ptr());
  };
  s.ids = kept(stack[0]);
  s.order = kept(stack[1]);
}

// The gradient (rows, width) of a table. s: the samples' gradients, null if no part of the input is
// the table, and all sizes.
template <class T, class Device>
Tensor table_gradient(const Device& device, Buffers& buffers, ScatterArguments s, const Tensor& ids,
                      ScalarType dtype) {
  Tensor result = buffers.empty({s.rows, s.width}, dtype);
  s.result = result.mutable_data_ptr();
  s.ids = static_cast<const int64_t*>(ids.data_ptr());
  partition(s);
  const bool read = s.grad != nullptr && s.samples > 0 && s.rows > 0 && s.width > 0;
  const bool sorted = s.spans > kMaxSpans;
  if (!read || sorted) torch::stable::zero_(result);
  if (!read) return result;
  if (sorted) {
    sort_ids(s, ids, buffers);
    device.template launch<ScatterSorted<T>>(grid_size(32 * s.samples), 0, s);
    return result;
  }
  const int64_t cells = s.rows * s.width;
  if (s.slices > 1) s.slice_sums = buffers.take<float>(s.slices * cells);
  device.template launch<ScatterRows<T>>(s.spans * s.slices, shared_bytes(s), s);
  if (s.slices > 1) device.template launch<ScatterSum<T>>(grid_size(cells), 0, s);
  return result;
}

}  // namespace maskmoe::fused
