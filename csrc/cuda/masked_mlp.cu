// The ops for CUDA tensors, on the caller's stream.

#include <dlfcn.h>

#include "cuda/boxed.h"
#include "cuda/gpu.h"

namespace maskmoe::fused {

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "maskmoe: ", what, ": ", cudaGetErrorString(status));
}

namespace {

// torch's current stream. The function lives in torch's CUDA library, which a CPU build of torch
// does not have: it is looked up when it is needed.
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
  check(cudaMalloc(&data_, bytes.size()), "there is no memory for a network's tables");
  check(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
        "a network's tables cannot be copied");
}

Gpu::Gpu(const Tensor& like) : device_(like.get_device_index()) {
  check(cudaGetDevice(&before_), "there is no device");
  if (before_ != device_) check(cudaSetDevice(device_), "the tensors' device cannot be used");
  stream_ = current_stream(device_);
}

int64_t Gpu::attribute(cudaDeviceAttr name) const {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device_), "the device does not answer");
  return value;
}

std::vector<int64_t> Gpu::read(const Tensor& plan) const {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream_, &status), "the stream does not answer");
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                  "maskmoe: the first call of a network builds its tables, which a CUDA graph "
                  "cannot capture; call it once before the capture");
  std::vector<int64_t> values(plan.numel());
  check(cudaMemcpyAsync(values.data(), plan.data_ptr(), values.size() * sizeof(int64_t),
                        cudaMemcpyDefault, stream_),
        "a plan cannot be read");
  check(cudaStreamSynchronize(stream_), "a plan cannot be read");
  return values;
}

}  // namespace maskmoe::fused

STABLE_TORCH_LIBRARY_IMPL(maskmoe, CUDA, m) {
  using Ops = maskmoe::fused::Ops<maskmoe::fused::Gpu>;
  m.impl("masked_mlp", TORCH_BOX(&Ops::forward));
  m.impl("masked_mlp_backward", TORCH_BOX(&Ops::backward));
  m.impl("masked_mlp_mixture", TORCH_BOX(&Ops::mixture));
  m.impl("masked_mlp_gem", TORCH_BOX(&Ops::gem));
}
