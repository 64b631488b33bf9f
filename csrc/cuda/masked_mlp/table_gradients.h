// Launches the kernels for the gradient of a table; the size of the table decides which.
#pragma once

#include <array>
#include <limits>

#include "cuda/buffers.h"
#include "cuda/masked_mlp/scatter_rows.h"

namespace maskmoe::fused {

// Sorts ids with torch's stable sort, so that samples of one id keep their order. A sort passes over
// the ids as often as they have bytes: Id is as narrow as the table's rows allow.
template <class Id, class Device>
void sort_ids(const Device& device, Buffers& buffers, ScatterArguments& s) {
  using torch::stable::detail::from;
  constexpr auto kType = sizeof(Id) == 2 ? ScalarType::Short : ScalarType::Int;
  Tensor ids = buffers.keep(buffers.empty({s.samples}, kType));
  device.template launch<NarrowIds<Id>>(grid_size(s.samples), 0,
                                        {s.ids, s.samples, s.rows, ids.mutable_data_ptr()});
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == 0,
      "maskmoe: ids cannot be sorted");
  auto kept = [&](StableIValue value) {
    return buffers.keep(torch::stable::detail::to<Tensor>(value)).data_ptr();
  };
  s.sorted = kept(stack[0]);
  s.order = static_cast<const int64_t*>(kept(stack[1]));
}

template <class T, class Id, class Device>
void add_sorted(const Device& device, Buffers& buffers, ScatterArguments& s) {
  sort_ids<Id>(device, buffers, s);
  device.template launch<ScatterSorted<T, Id>>(grid_size(32 * s.samples), 0, s);
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
    constexpr int64_t kShort = std::numeric_limits<int16_t>::max();
    constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(s.rows <= kInt, "maskmoe: tables of more than ", kInt,
                    " rows have no gradient in one op; use backend='torch'");
    if (s.rows <= kShort) {
      add_sorted<T, int16_t>(device, buffers, s);
    } else {
      add_sorted<T, int32_t>(device, buffers, s);
    }
    return result;
  }
  const int64_t cells = s.rows * s.width;
  if (s.slices > 1) s.slice_sums = buffers.take<float>(s.slices * cells);
  device.template launch<ScatterRows<T>>(s.spans * s.slices, shared_bytes(s), s);
  if (s.slices > 1) {
    device.template launch<ScatterSum<T>>(grid_size(kWarps * cells), ScatterSum<T>::kShared, s);
  }
  return result;
}

}  // namespace maskmoe::fused
