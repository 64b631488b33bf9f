// Memory for the intermediate values of one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/huge_pages.h"

namespace maskmoe {

// Scratch for one call; kept by the calling thread while it is small.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    static thread_local Buffer kept;
    Buffer& buffer = size <= kKept ? kept : own_;
    if (buffer.size < size) {
      const size_t bytes = size * sizeof(float);
      buffer.data.reset(static_cast<float*>(::operator new(bytes, kAligned)));
      buffer.size = size;
      advise_huge_pages(buffer.data.get(), static_cast<int64_t>(bytes));
    }
    at_ = buffer.data.get();
  }

  float* take(int64_t size) {
    float* from = at_;
    at_ += round_up(size);
    return from;
  }

  static int64_t round_up(int64_t size) { return (size + 15) / 16 * 16; }

 private:
  static constexpr int64_t kKept = 1 << 24;  // floats
  static constexpr std::align_val_t kAligned{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAligned); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t size = 0;
  };
  Buffer own_;
  float* at_;
};

}  // namespace maskmoe
