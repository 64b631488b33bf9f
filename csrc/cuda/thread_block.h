// A thread block, a few warps: what the kernels are written in. The GPU runs it, or the emulator
// on the host, where warps take turns and the lanes of a warp are a loop.
//
// A kernel is a sequence of phases (each_thread, each_warp) with barriers between them. Registers
// do not survive a phase: what a later phase needs lies in shared or global memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/execution_plan.h"

#ifdef __CUDACC__
#define MASKMOE_DEVICE __device__ __forceinline__
#define MASKMOE_HOST_DEVICE __host__ __device__ inline
#define MASKMOE_UNROLL _Pragma("unroll")
#define MASKMOE_UNROLL_8 _Pragma("unroll 8")
#define MASKMOE_NO_UNROLL _Pragma("unroll 1")
#else
#define MASKMOE_DEVICE inline
#define MASKMOE_HOST_DEVICE inline
#define MASKMOE_UNROLL
#define MASKMOE_UNROLL_8
#define MASKMOE_NO_UNROLL
#endif

namespace maskmoe::fused {

// Where a thread block is in its grid, and its shared memory.
struct GridPosition {
  int64_t block, num_blocks;
  unsigned char* shared;
};

// Neighbouring values, which one instruction reads or writes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  T value[kCount];
};

// Does a pointer have the alignment of V?
template <class V>
MASKMOE_DEVICE bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(V) == 0;
}

// 16 bytes.
struct alignas(16) UInt4 {
  uint32_t word[4];
};
struct alignas(16) Float4 {
  float value[4];
};

#ifdef __CUDACC__

// A value in each lane of a warp.
template <class V>
struct PerLane {
  V value;
  MASKMOE_DEVICE V& operator[](int) { return value; }
  MASKMOE_DEVICE const V& operator[](int) const { return value; }
};

// Of the block: kWarps or kMostWarps.
MASKMOE_DEVICE int num_warps() { return static_cast<int>(blockDim.x) / 32; }

template <class F>
MASKMOE_DEVICE void each_thread(const F& f) {
  f(static_cast<int>(threadIdx.x));
}

template <class F>
MASKMOE_DEVICE void each_warp(const F& f) {
  f(static_cast<int>(threadIdx.x) / 32);
}

template <class F>
MASKMOE_DEVICE void each_lane(const F& f) {
  f(static_cast<int>(threadIdx.x) % 32);
}

MASKMOE_DEVICE void barrier() { __syncthreads(); }

// Bit l is the flag of lane l.
MASKMOE_DEVICE uint32_t ballot(const PerLane<bool>& flag) {
  return __ballot_sync(0xffffffffu, flag.value);
}

template <class V>
MASKMOE_DEVICE V read_only(const V* p) {
  return __ldg(p);
}
MASKMOE_DEVICE UInt4 read_only(const UInt4* p) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(p));
  return {{q.x, q.y, q.z, q.w}};
}
MASKMOE_DEVICE Float4 read_only(const Float4* p) {
  const float4 q = __ldg(reinterpret_cast<const float4*>(p));
  return {{q.x, q.y, q.z, q.w}};
}
MASKMOE_DEVICE Vec<float, 2> read_only(const Vec<float, 2>* p) {
  const float2 q = __ldg(reinterpret_cast<const float2*>(p));
  return {{q.x, q.y}};
}

// Fetches what a warp reads soon into L2. Address and number of bytes are multiples of 16.
MASKMOE_DEVICE void prefetch_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
  }
#endif
}

MASKMOE_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
MASKMOE_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

#else

// A value in each lane of a warp.
template <class V>
struct PerLane {
  V value[32];
  V& operator[](int lane) { return value[lane]; }
  const V& operator[](int lane) const { return value[lane]; }
};

// One warp runs at a time, from barrier to barrier, so that a missing barrier changes the results.
// Warps and lanes run from the first to the last, or reversed, so that a result which depends on
// their order changes too.
inline int running_warp = 0, running_warps = kWarps;
inline bool reversed = false;
inline void (*reach_barrier)() = nullptr;

inline int num_warps() { return running_warps; }

template <class F>
void each_lane(const F& f) {
  for (int n = 0; n < 32; ++n) f(reversed ? 31 - n : n);
}

template <class F>
void each_thread(const F& f) {
  each_lane([&](int lane) { f(running_warp * 32 + lane); });
}

template <class F>
void each_warp(const F& f) {
  f(running_warp);
}

inline void barrier() { reach_barrier(); }

inline uint32_t ballot(const PerLane<bool>& flag) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{flag[lane]} << lane;
  return bits;
}

template <class V>
V read_only(const V* p) {
  return *p;
}

inline void prefetch_l2(const void*, int) {}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#endif

MASKMOE_DEVICE int num_threads() { return 32 * num_warps(); }

}  // namespace maskmoe::fused
