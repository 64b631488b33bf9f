// Entry points of the kernels, for the files that make them: one for each number type.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "cuda/gpu.h"
#include "cuda/masked_mlp_backward.h"
#include "cuda/masked_mlp_mixture.h"
#include "cuda/reductions.h"
#include "cuda/tables.h"

namespace maskmoe::fused {

template <class Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::kResident)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ Quad shared[];
  Kernel::run(arguments, {blockIdx.x, gridDim.x, reinterpret_cast<unsigned char*>(shared)});
}

constexpr int64_t kUnasked = 48 << 10;  // bytes of shared memory that every kernel may have

// Lets a kernel have all the shared memory of the device.
template <class Kernel>
void allow(int64_t limit) {
  check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limit)),
        "a kernel is not given the shared memory that the device has");
}

template <class Kernel>
int64_t Gpu::resident(int64_t shared) const {
  static std::mutex mutex;
  static std::map<std::pair<int, int64_t>, int64_t> known;
  std::lock_guard<std::mutex> lock(mutex);
  int64_t& count = known[{device_, shared}];
  if (count == 0) {
    allow<Kernel>(shared_limit());
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry<Kernel>, kThreads, shared),
          "a kernel cannot run here");
    count = (blocks > 0 ? blocks : 1) * processors();
  }
  return count;
}

template <class Kernel>
void Gpu::launch(int64_t blocks, int64_t shared,
                 const typename Kernel::Arguments& arguments) const {
  if (shared > kUnasked) allow<Kernel>(shared_limit());
  entry<Kernel><<<static_cast<unsigned>(blocks), kThreads, shared, stream_>>>(arguments);
  check(cudaGetLastError(), "a kernel cannot be launched");
}

#define MASKMOE_MAKE(...)                                                              \
  template int64_t Gpu::resident<__VA_ARGS__>(int64_t) const;                          \
  template void Gpu::launch<__VA_ARGS__>(int64_t, int64_t,                             \
                                         const typename __VA_ARGS__::Arguments&) const;

// With products of T.
#define MASKMOE_MAKE_PRODUCTS(T)                  \
  MASKMOE_MAKE(Forward<T, high_tile(sizeof(T))>)  \
  MASKMOE_MAKE(Forward<T, low_tile(sizeof(T))>)   \
  MASKMOE_MAKE(Mix<T, high_tile(sizeof(T))>)      \
  MASKMOE_MAKE(Mix<T, low_tile(sizeof(T))>)       \
  MASKMOE_MAKE(Backward<T, high_tile(sizeof(T))>) \
  MASKMOE_MAKE(Backward<T, low_tile(sizeof(T))>)

#define MASKMOE_MAKE_ALL(T)    \
  MASKMOE_MAKE_PRODUCTS(T)     \
  MASKMOE_MAKE(Pack<T>)        \
  MASKMOE_MAKE(Reduce<T>)      \
  MASKMOE_MAKE(ScatterRows<T>) \
  MASKMOE_MAKE(ScatterSum<T>)  \
  MASKMOE_MAKE(ScatterSorted<T>)

}  // namespace maskmoe::fused
