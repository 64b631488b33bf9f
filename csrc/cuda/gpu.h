// The GPU as a Machine: the caller's stream and device, tables in its memory, launches.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace maskmoe::fused {

void check(cudaError_t status, const char* what);

class Gpu {
 public:
  // Tables of a network, on the device as long as somebody holds them.
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

  // The device of a tensor and its current stream, until the end of the scope.
  explicit Gpu(const torch::stable::Tensor& like);
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu() {
    if (before_ != device_) cudaSetDevice(before_);
  }

  int64_t device() const { return device_; }
  int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared() const { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // A plan's values. Waits for the device: for the first call of a network only.
  std::vector<int64_t> read(const torch::stable::Tensor& plan) const;

  // Both are made for each kernel in the file of its number type; see kernels.h.
  template <class Kernel>
  int64_t resident(int64_t shared) const;  // blocks that the device runs at a time
  template <class Kernel>
  void launch(int64_t blocks, int64_t shared, const typename Kernel::Arguments& arguments) const;

 private:
  int64_t attribute(cudaDeviceAttr name) const;

  int device_, before_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace maskmoe::fused
