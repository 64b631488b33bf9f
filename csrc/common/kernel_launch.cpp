#include "common/kernel_launch.h"

#include <cstring>
#include <stdexcept>

namespace maskmoe {

namespace {

constexpr int kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT: this thread has none
// Of cuTensorMapEncodeTiled: no interleaving, promotion to lines of 128 bytes in L2, zeros outside.
constexpr int kNoInterleave = 0, kPromote128 = 2, kFillZeros = 0;

}  // namespace

KernelLaunch::KernelLaunch(const Driver& driver, const Shape& shape,
                           const std::vector<std::string>& parameters,
                           const std::vector<int64_t>& places,
                           const std::vector<Described>& described)
    : driver_(driver), shape_(shape), described_(described), encoded_(described.size()) {
  for (const std::string& value : parameters) {
    const size_t alignment = value.size() == kMapBytes ? kMapBytes : 8;
    bytes_ = (bytes_ + alignment - 1) / alignment * alignment;
    if (bytes_ + value.size() > kMostBytes || offsets_.size() == kMostParameters) {
      throw std::invalid_argument("a kernel with so many parameters is not launched here");
    }
    std::memcpy(values_.data() + bytes_, value.data(), value.size());
    offsets_.push_back(bytes_);
    bytes_ += value.size();
  }
  const auto offset_of = [&](int64_t parameter, size_t size) {
    const bool fits = parameter >= 0 && parameter < static_cast<int64_t>(parameters.size()) &&
                      parameters[parameter].size() == size;
    if (!fits) throw std::invalid_argument("there is no such parameter of this size");
    return static_cast<int64_t>(offsets_[parameter]);
  };
  for (int64_t place : places) places_.push_back(place < 0 ? -1 : offset_of(place, 8));
  for (const Described& d : described) {
    offset_of(static_cast<int64_t>(d.parameter), kMapBytes);
    if (d.address >= places.size()) throw std::invalid_argument("there is no such address");
  }
  driver_.current_context(&context_);
}

int KernelLaunch::prepare(const uint64_t* addresses, Parameters& parameters) {
  for (size_t k = 0; k < places_.size(); ++k) {
    if (places_[k] >= 0) std::memcpy(values_.data() + places_[k], &addresses[k], 8);
  }
  for (size_t k = 0; k < described_.size(); ++k) {
    const uint64_t address = addresses[described_[k].address];
    if (address == encoded_[k] && address != 0) continue;
    encoded_[k] = 0;
    unsigned char* map = values_.data() + offsets_[described_[k].parameter];
    if (const int status = encode(described_[k], address, map)) return status;
    encoded_[k] = address;
  }
  std::memcpy(parameters.bytes, values_.data(), bytes_);
  for (size_t k = 0; k < offsets_.size(); ++k) {
    parameters.pointers[k] = parameters.bytes + offsets_[k];
  }
  return 0;
}

int KernelLaunch::encode(const Described& described, uint64_t address, unsigned char* map) const {
  constexpr uint32_t kSteps[2] = {1, 1};
  const int status = driver_.encode_tiled(
      map, described.type, 2, reinterpret_cast<void*>(address), described.sizes, &described.stride,
      described.box, kSteps, kNoInterleave, described.swizzle, kPromote128, kFillZeros);
  if (status == 0 && described.is_small) {
    // Drivers up to 13.1 set a bit that is wrong for less than 128 KiB; Triton clears it, too.
    uint64_t word;
    std::memcpy(&word, map + 8, 8);
    word &= ~(uint64_t{1} << 21);
    std::memcpy(map + 8, &word, 8);
  }
  return status;
}

int KernelLaunch::launch(void* stream, Parameters& parameters) const {
  const auto& [x, y, z] = shape_.grid;
  if (x == 0 || y == 0 || z == 0) return 0;
  const auto once = [&] {
    return driver_.launch_kernel(shape_.function, x, y, z, shape_.threads, 1, 1, shape_.shared,
                                 stream, parameters.pointers, nullptr);
  };
  int status = once();
  if (status == kInvalidContext && context_ != nullptr) {  // a thread that is new to the device
    status = driver_.set_context(context_);
    if (status == 0) status = once();
  }
  return status;
}

std::string KernelLaunch::error(int status) const {
  const char* text = nullptr;
  driver_.error_text(status, &text);
  return "CUDA error " + std::to_string(status) + ": " + (text == nullptr ? "unknown" : text);
}

}  // namespace maskmoe
