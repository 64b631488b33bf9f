// Execution plans on a device, compiled on first use and kept.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common/serialized_layout.h"
#include "cuda/buffers.h"
#include "cuda/execution_plan.h"

namespace maskmoe::fused {

template <class Device>
struct DevicePlan {
  CompiledPlan compiled;
  typename Device::Memory memory;  // holds the tables on the device
  ExecutionPlan host, device;      // the plan with addresses on the host, and on the device

  DevicePlan(const std::vector<Encoded>& layouts, const Integers& part_widths)
      : compiled(layouts, part_widths),
        memory(compiled.bytes()),
        host(compiled.at(compiled.bytes().data())),
        device(compiled.at(memory.data())) {}
};

// The layouts of an MLP, and the widths of the parts of its input. `serialized` is the layouts on
// the device, `layout_ids` is what the library knows them by.
struct PlanRequest {
  const Tensors& serialized;
  const Integers& layout_ids;
  Integers part_widths;
};

// A plan is found by the addresses of the serialized layouts that it was compiled from: the cache
// holds these tensors, so their addresses stay theirs. Other tensors are compared by content. To
// compile a plan reads the layouts back from the device and so cannot be captured in a CUDA graph.
// Plans are kept for good, because graphs that were captured later point to their tables.
template <class Device>
class PlanCache {
 public:
  using Plan = std::shared_ptr<const DevicePlan<Device>>;

  static Plan find_or_compile(const Device& device, const Checks& checks,
                              const PlanRequest& request) {
    static PlanCache& cache = *new PlanCache;  // never destroyed: at exit torch may be gone before
    const Integers key = key_of(device, request);
    const std::vector<Encoded> addresses = addresses_of(request.serialized);
    if (Plan found = cache.find(key, [&](const Entry& e) { return e.addresses == addresses; })) {
      return found;
    }
    Contents contents;
    for (size_t n = 0; n < request.serialized.size(); ++n) {
      const Tensor& serialized = request.serialized[n];
      checks.readable(serialized, "plans", n, aoti_torch_dtype_int64());
      STD_TORCH_CHECK(serialized.dim() == 1, checks.named("plans", n), " must be a vector");
      contents.push_back(device.copy_to_host(dense(serialized)));
    }
    Plan plan = cache.find(key, [&](const Entry& e) { return e.contents == contents; });
    if (plan == nullptr) plan = compile(contents, request);
    cache.insert(key, {addresses, request.serialized, std::move(contents), plan});
    return plan;
  }

 private:
  static constexpr size_t kMaxEntries = 64;  // of a key: tensors that hold the same layouts

  struct Entry {
    std::vector<Encoded> addresses;  // of these tensors:
    Tensors serialized;
    Contents contents;
    Plan plan;
  };

  static Integers key_of(const Device& device, const PlanRequest& request) {
    Integers key = request.layout_ids;
    key.insert(key.end(), request.part_widths.begin(), request.part_widths.end());
    key.push_back(static_cast<int64_t>(request.layout_ids.size()));
    key.push_back(device.index());
    return key;
  }

  static std::vector<Encoded> addresses_of(const Tensors& serialized) {
    std::vector<Encoded> addresses;
    for (const Tensor& t : serialized) {
      addresses.push_back({static_cast<const int64_t*>(t.data_ptr()), t.numel()});
    }
    return addresses;
  }

  static Plan compile(const Contents& contents, const PlanRequest& request) {
    const auto layouts = verified(contents, request.layout_ids);
    int64_t features = 0;
    for (int64_t width : request.part_widths) features += width;
    STD_TORCH_CHECK(layouts.front().in_features == features, "maskmoe: the fused mlp reads ",
                    layouts.front().in_features, " features, its parts have ", features);
    std::vector<Encoded> encoded;
    for (const auto& values : contents) {
      encoded.push_back({values.data(), static_cast<int64_t>(values.size())});
    }
    return std::make_shared<const DevicePlan<Device>>(encoded, request.part_widths);
  }

  template <class Matches>
  Plan find(const Integers& key, const Matches& matches) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& entry : entries_[key]) {
      if (matches(entry)) return entry.plan;
    }
    return nullptr;
  }

  void insert(const Integers& key, Entry entry) {
    // Freed after the lock is released: to free a tensor that Python knows waits for Python's own
    // lock, whose owner may be waiting for this one.
    Entry dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Entry>& all = entries_[key];
    if (all.size() >= kMaxEntries) {  // drop one, but never the last entry that has its plan
      auto spare = std::find_if(all.begin(), all.end(),
                                [](const Entry& e) { return e.plan.use_count() > 1; });
      if (spare != all.end()) {
        dropped = std::move(*spare);
        all.erase(spare);
      }
    }
    all.push_back(std::move(entry));
  }

  std::mutex mutex_;
  std::map<Integers, std::vector<Entry>> entries_;
};

}  // namespace maskmoe::fused
