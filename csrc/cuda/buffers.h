// Memory of a call, from torch's allocator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "cuda/execution_plan.h"

namespace maskmoe::fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// Results, and buffers that go back to torch when the call returns: torch hands them out again for
// work of the same stream, which runs after the call's kernels.
class Buffers {
 public:
  explicit Buffers(const Tensor& like) : like_(like) {}

  Tensor empty(const Integers& sizes, ScalarType type) const {
    return torch::stable::new_empty(like_, sizes, type);
  }

  // A buffer of `count` values, for this call.
  template <class V>
  V* take(int64_t count) {
    const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(V));
    return static_cast<V*>(keep(empty({bytes}, ScalarType::Byte)).mutable_data_ptr());
  }

  // Keeps a tensor until the call returns.
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

 private:
  Tensor like_;
  Tensors kept_;
};

// The grid size for so many items, one a thread.
inline int64_t grid_size(int64_t items) {
  return std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, 4096);
}

}  // namespace maskmoe::fused
