// The GPU as a Device: the caller's stream, limits, memory of execution plans, launches.
//
// Operators are templates over a Device, so that the host emulator (host_emulator.cc) can take the
// place of the GPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "cuda/smem_layout.h"

namespace maskmoe::fused {

// Raises an error that says what failed.
void check(cudaError_t status, const char* what);

class Gpu {
 public:
  // The tables of an execution plan on the device; freed with the object.
  class Memory {
   public:
    explicit Memory(const std::vector<unsigned char>& bytes);
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { cudaFree(data_); }
    const void* data() const { return data_; }

   private:
    void* data_ = nullptr;
  };

  // The device of a tensor and its current stream. The device is the current one until the end of
  // the scope.
  explicit Gpu(const torch::stable::Tensor& like);
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu() {
    if (before_ != index_) cudaSetDevice(before_);
  }

  int64_t index() const { return index_; }
  DeviceLimits limits() const;

  // The values of a serialized layout. Waits for the device: done only for layouts that are new.
  std::vector<int64_t> copy_to_host(const torch::stable::Tensor& serialized) const;

  // The next three are instantiated in kernels_*.cu; see kernel_launch.h.
  // Thread blocks with so many bytes of shared memory that the device runs at a time.
  template <class Kernel>
  int64_t resident_blocks(int64_t shared, int threads) const;
  template <class Kernel>
  void launch(int64_t blocks, int64_t shared, const typename Kernel::Arguments& arguments,
              int threads = kThreads) const;
  // Lets a kernel have all the shared memory of the device.
  template <class Kernel>
  void set_shared_memory_limit() const;

 private:
  int64_t attribute(cudaDeviceAttr name) const;

  int index_, before_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace maskmoe::fused
