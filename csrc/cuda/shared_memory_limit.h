// More shared memory for a kernel than every kernel may have: allowed once for each device.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>

namespace maskmoe::fused {

constexpr int64_t kDefaultSharedMemory = 48 << 10;  // bytes a block that need no permission

// Lets a kernel have all the shared memory of the device, unless that was done before.
template <class Kernel, class Device>
void raise_shared_memory_limit(const Device& device) {
  static std::mutex mutex;
  static std::set<int64_t> raised;  // devices
  const std::lock_guard<std::mutex> lock(mutex);
  if (raised.contains(device.index())) return;
  device.template set_shared_memory_limit<Kernel>();
  raised.insert(device.index());
}

}  // namespace maskmoe::fused
