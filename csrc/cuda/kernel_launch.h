// Entry points and launches of the kernels, for the files that instantiate them: one for each
// number type, so that they compile side by side.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/gpu.h"
#include "cuda/masked_mlp/backward.h"
#include "cuda/masked_mlp/forward.h"
#include "cuda/masked_mlp/mixture.h"
#include "cuda/masked_mlp/pack_weights.h"
#include "cuda/masked_mlp/reduce_gradients.h"
#include "cuda/masked_mlp/reduce_loss.h"
#include "cuda/masked_mlp/scatter_rows.h"
#include "cuda/shared_memory_limit.h"

namespace maskmoe::fused {

// Threads of a block, at most.
template <class Kernel>
constexpr int most_threads() {
  if constexpr (requires { Kernel::kMostThreads; }) return Kernel::kMostThreads;
  return kThreads;
}

template <class Kernel>
__global__ void __launch_bounds__(most_threads<Kernel>(), Kernel::kBlocksPerMultiprocessor)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ UInt4 shared[];
  Kernel::run(arguments, {blockIdx.x, gridDim.x, reinterpret_cast<unsigned char*>(shared)});
}

template <class Kernel>
void Gpu::set_shared_memory_limit() const {
  check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limits().shared_per_block)),
        "a kernel is not given the shared memory that the device has");
}

template <class Kernel>
int64_t Gpu::resident_blocks(int64_t shared, int threads) const {
  static std::mutex mutex;
  static std::map<std::tuple<int, int64_t, int>, int64_t> known;
  std::lock_guard<std::mutex> lock(mutex);
  int64_t& count = known[{index_, shared, threads}];
  if (count == 0) {
    raise_shared_memory_limit<Kernel>(*this);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry<Kernel>, threads, shared),
          "a kernel cannot run here");
    count = (blocks > 0 ? blocks : 1) * limits().multiprocessors;
  }
  return count;
}

template <class Kernel>
void Gpu::launch(int64_t blocks, int64_t shared, const typename Kernel::Arguments& arguments,
                 int threads) const {
  if (shared > kDefaultSharedMemory) raise_shared_memory_limit<Kernel>(*this);
  entry<Kernel><<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(arguments);
  check(cudaGetLastError(), "a kernel cannot be launched");
}

#define MASKMOE_INSTANTIATE(...)                                              \
  template int64_t Gpu::resident_blocks<__VA_ARGS__>(int64_t, int) const;     \
  template void Gpu::launch<__VA_ARGS__>(                                     \
      int64_t, int64_t, const typename __VA_ARGS__::Arguments&, int) const;

// The kernels whose products depend on T.
#define MASKMOE_INSTANTIATE_TILES(T)                       \
  MASKMOE_INSTANTIATE(Forward<T, max_tile_rows(sizeof(T))>)  \
  MASKMOE_INSTANTIATE(Forward<T, min_tile_rows(sizeof(T))>)  \
  MASKMOE_INSTANTIATE(Mix<T, max_tile_rows(sizeof(T))>)      \
  MASKMOE_INSTANTIATE(Mix<T, min_tile_rows(sizeof(T))>)      \
  MASKMOE_INSTANTIATE(Backward<T, max_tile_rows(sizeof(T))>) \
  MASKMOE_INSTANTIATE(Backward<T, min_tile_rows(sizeof(T))>)

// Those, and the kernels that read or write tensors of T.
#define MASKMOE_INSTANTIATE_ALL(T)        \
  MASKMOE_INSTANTIATE_TILES(T)            \
  MASKMOE_INSTANTIATE(PackWeights<T>)     \
  MASKMOE_INSTANTIATE(ReduceGradients<T>) \
  MASKMOE_INSTANTIATE(ScatterRows<T>)     \
  MASKMOE_INSTANTIATE(ScatterSum<T>)      \
  MASKMOE_INSTANTIATE(ScatterSorted<T, int16_t>) \
  MASKMOE_INSTANTIATE(ScatterSorted<T, int32_t>)

}  // namespace maskmoe::fused
