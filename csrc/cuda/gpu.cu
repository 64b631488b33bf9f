#include "cuda/gpu.h"

#include <dlfcn.h>

#include "common/checks.h"

namespace maskmoe::fused {

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "maskmoe: ", what, ": ", cudaGetErrorString(status));
}

namespace {

// torch's current stream. The function lives in torch's CUDA library, which a CPU build of torch
// does not have, so it is looked up when it is needed first.
cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, kName);
    if (found == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      if (library != nullptr) found = dlsym(library, kName);
    }
    return reinterpret_cast<Function>(found);
  }();
  STD_TORCH_CHECK(function != nullptr, "maskmoe: torch's CUDA library is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "maskmoe: device ", device, " has no stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

Gpu::Memory::Memory(const std::vector<unsigned char>& bytes) {
  check(cudaMalloc(&data_, bytes.size()), "there is no memory for an execution plan");
  check(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
        "an execution plan cannot be copied");
}

Gpu::Gpu(const Tensor& like) : index_(like.get_device_index()) {
  check(cudaGetDevice(&before_), "there is no device");
  if (before_ != index_) check(cudaSetDevice(index_), "the tensors' device cannot be used");
  stream_ = current_stream(index_);
}

DeviceLimits Gpu::limits() const {
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

int64_t Gpu::attribute(cudaDeviceAttr name) const {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, index_), "the device does not answer");
  return value;
}

std::vector<int64_t> Gpu::copy_to_host(const Tensor& serialized) const {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream_, &status), "the stream does not answer");
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                  "maskmoe: the first call of an mlp compiles its execution plan, which a CUDA "
                  "graph cannot capture; call it once before the capture");
  std::vector<int64_t> values(serialized.numel());
  check(cudaMemcpyAsync(values.data(), serialized.data_ptr(), values.size() * sizeof(int64_t),
                        cudaMemcpyDefault, stream_),
        "a serialized layout cannot be read");
  check(cudaStreamSynchronize(stream_), "a serialized layout cannot be read");
  return values;
}

}  // namespace maskmoe::fused
