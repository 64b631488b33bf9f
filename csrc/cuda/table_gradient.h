// The gradient of a table, on any Machine; which of the two ways depends on its size.
#pragma once

#include <array>

#include "cuda/inputs.h"
#include "cuda/tables.h"

namespace maskmoe::fused {

// torch's stable sort: samples of one id keep their order.
inline void sort(Scatter& s, const Tensor& ids, Buffers& buffers) {
  using torch::stable::detail::from;
  const Tensor flat = torch::stable::reshape(ids, {s.samples});
  std::array<StableIValue, 4> stack{from(flat), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == 0,
      "maskmoe: ids cannot be sorted");
  auto held = [&](StableIValue value) {
    const Tensor& kept = buffers.keep(torch::stable::detail::to<Tensor>(value));
    return static_cast<const int64_t*>(kept.data_ptr());
  };
  s.ids = held(stack[0]);
  s.order = held(stack[1]);
}

// s: the samples' gradients (null: nobody reads the table) and all sizes.
template <class T, class Machine>
Tensor table_gradient(const Machine& machine, Buffers& buffers, Scatter s, const Tensor& ids,
                      ScalarType type) {
  Tensor result = buffers.empty({s.rows, s.width}, type);
  s.result = result.mutable_data_ptr();
  s.ids = static_cast<const int64_t*>(ids.data_ptr());
  cut(s);
  const bool read = s.grad != nullptr && s.samples > 0 && s.rows > 0 && s.width > 0;
  const bool sorted = s.spans > kMostSpans;
  if (!read || sorted) torch::stable::zero_(result);
  if (!read) return result;
  if (sorted) {
    sort(s, ids, buffers);
    machine.template launch<ScatterSorted<T>>(spread(32 * s.samples), 0, s);
    return result;
  }
  const int64_t cells = s.rows * s.width;
  if (s.slices > 1) s.partial = buffers.take<float>(s.slices * cells);
  machine.template launch<ScatterRows<T>>(s.spans * s.slices, shared_bytes(s), s);
  if (s.slices > 1) machine.template launch<ScatterSum<T>>(spread(cells), 0, s);
  return result;
}

}  // namespace maskmoe::fused
