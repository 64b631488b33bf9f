// What the ops share: names, a network's tables on a device, buffers.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/mlp_inputs.h"
#include "common/serialized_layout.h"
#include "cuda/numbers.h"

namespace maskmoe::fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

inline Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "relu", "leaky_relu", "gelu", "tanh", "silu"};
  for (int n = 0; n < 6; ++n) {
    if (name == names[n]) return static_cast<Activation>(n);
  }
  STD_TORCH_CHECK(false, "maskmoe: unknown activation ", name);
}

inline int index_of(const std::string& name, std::initializer_list<const char*> names) {
  int n = 0;
  for (const char* known : names) {
    if (name == known) return n;
    ++n;
  }
  STD_TORCH_CHECK(false, "maskmoe: unknown option ", name);
}

inline Confidence confidence_named(const std::string& name) {
  return static_cast<Confidence>(index_of(name, {"abs", "square", "smooth", "rare"}));
}

// Is a float32 product to be one TF32 product? torch's setting as it is now; see ops/networks.py.
inline bool single_products() {
  StableIValue answer{};
  STD_TORCH_CHECK(
      torch_call_dispatcher("maskmoe::single_products", "", &answer, TORCH_ABI_VERSION) == 0,
      "maskmoe: torch.get_float32_matmul_precision() fails, as it does where TF32 was set in torch's "
      "old way and its new one; call torch.set_float32_matmul_precision and nothing else");
  return torch::stable::detail::to<bool>(answer);
}

// What a network's tensors are on one device.
template <class Machine>
struct Placed {
  Network network;
  typename Machine::Memory memory;  // holds the tables
  Tables host, tables;

  Placed(const std::vector<Encoded>& layouts, const std::vector<PartSize>& parts)
      : network(layouts, parts),
        memory(network.bytes()),
        host(network.at(network.bytes().data())),
        tables(network.at(memory.data())) {}
};

// The arguments that all three ops share.
struct Inputs {
  std::optional<Tensor> x;
  Tensors tables, ids;
  Integers parts;
  Tensors weights, biases, plans;
  Integers layouts;
  Activation activation;
};

inline Tensor compact(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Buffers of a call. They go back to torch when it returns: what the stream does then, it does
// after the call's kernels.
class Buffers {
 public:
  explicit Buffers(const Tensor& like) : like_(like) {}

  Tensor empty(const Integers& sizes, ScalarType type) const {
    return torch::stable::new_empty(like_, sizes, type);
  }

  template <class V>
  V* take(int64_t count) {
    const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(V));
    return static_cast<V*>(keep(empty({bytes}, ScalarType::Byte)).mutable_data_ptr());
  }

  const Tensor& keep(Tensor t) {
    held_.push_back(std::move(t));
    return held_.back();
  }

 private:
  Tensor like_;
  Tensors held_;
};

// Blocks that share so many items, one a thread.
inline int64_t spread(int64_t items) {
  return std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, 4096);
}

}  // namespace maskmoe::fused
