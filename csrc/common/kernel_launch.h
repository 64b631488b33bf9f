// Launches of a kernel that Triton compiled, by NVIDIA's driver, when all its arguments but some
// addresses are known beforehand.
//
// The driver is not linked: the caller gives the addresses of its functions. So this is built, and
// tested, on machines without one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace maskmoe {

// What a launch needs of the driver (cuda.h), in this order in Python, too. All give 0 or an error.
struct Driver {
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                       void* stream, void** parameters, void** extra);
  int (*encode_tiled)(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                      int interleave, int swizzle, int promotion, int fill);
  int (*current_context)(void** context);
  int (*set_context)(void* context);
  int (*error_text)(int status, const char** text);
};

// A matrix that the kernel reads by a tensor descriptor, as `encode_tiled` names it: columns first.
struct Described {
  size_t address;    // which of the given addresses it begins at
  size_t parameter;  // the descriptor's place among the parameters
  int type, swizzle;
  uint64_t sizes[2], stride;  // of the matrix; from one row to the next, in bytes
  uint32_t box[2];            // sizes of a block
  bool is_small;              // see KernelLaunch::encode
};

class KernelLaunch {
 public:
  struct Shape {
    void* function;
    unsigned grid[3], threads, shared;
  };

  // `parameters`: the bytes of each. `places`: of each given address the parameter that it is, or
  // -1 where the kernel has no use for it.
  KernelLaunch(const Driver& driver, const Shape& shape,
               const std::vector<std::string>& parameters, const std::vector<int64_t>& places,
               const std::vector<Described>& described);

  size_t count() const { return places_.size(); }  // addresses that a launch is given

  // Writes the addresses among the parameters. To launch takes a copy of these, so that other
  // threads may prepare theirs meanwhile. Both give the driver's error, or 0.
  struct Parameters;
  int prepare(const uint64_t* addresses, Parameters& parameters);
  int launch(void* stream, Parameters& parameters) const;

  std::string error(int status) const;

 private:
  static constexpr size_t kMostBytes = 4096, kMostParameters = 128;
  static constexpr size_t kMapBytes = 128;  // of a tensor descriptor, and its alignment

  int encode(const Described& described, uint64_t address, unsigned char* map) const;

  Driver driver_;
  Shape shape_;
  void* context_ = nullptr;
  std::vector<size_t> offsets_;   // of each parameter
  std::vector<int64_t> places_;   // offset of the parameter that is the given address, or -1
  std::vector<Described> described_;
  std::vector<uint64_t> encoded_;  // the address that each descriptor names now
  size_t bytes_ = 0;
  alignas(kMapBytes) std::array<unsigned char, kMostBytes> values_{};
};

struct KernelLaunch::Parameters {
  alignas(kMapBytes) unsigned char bytes[kMostBytes];
  void* pointers[kMostParameters];
};

}  // namespace maskmoe
