// The machine that the kernels are written for: a thread block of kWarps warps, on the GPU, or its
// twin on the host, where warps take turns and lanes are loops. A kernel is a sequence of phases
// (each_thread, each_warp) with barriers between them. Between phases nothing may live in a
// thread's registers: what a later phase needs lies in shared or global memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/network.h"

#ifdef __CUDACC__
#define MASKMOE_DEVICE __device__ __forceinline__
#define MASKMOE_BOTH __host__ __device__ inline
#define MASKMOE_UNROLL _Pragma("unroll")
#define MASKMOE_ROLL _Pragma("unroll 1")
#else
#define MASKMOE_DEVICE inline
#define MASKMOE_BOTH inline
#define MASKMOE_UNROLL
#define MASKMOE_ROLL
#endif

namespace maskmoe::fused {

// Where a thread block is.
struct Place {
  int64_t block, blocks;
  unsigned char* shared;
};

// Neighbouring values, read and written at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Several {
  T value[kCount];
};

// Does a pointer have the alignment of V?
template <class V>
MASKMOE_DEVICE bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(V) == 0;
}

// Words of 16 bytes.
struct alignas(16) Quad {
  uint32_t word[4];
};
struct alignas(16) Quad4 {
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

// Bit l: the flag of lane l.
MASKMOE_DEVICE uint32_t ballot(const PerLane<bool>& flag) {
  return __ballot_sync(0xffffffffu, flag.value);
}

template <class V>
MASKMOE_DEVICE V read_only(const V* p) {
  return __ldg(p);
}
MASKMOE_DEVICE Quad read_only(const Quad* p) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(p));
  return {{q.x, q.y, q.z, q.w}};
}
MASKMOE_DEVICE Quad4 read_only(const Quad4* p) {
  const float4 q = __ldg(reinterpret_cast<const float4*>(p));
  return {{q.x, q.y, q.z, q.w}};
}

// What a warp reads soon, into L2: so many bytes, both multiples of 16.
MASKMOE_DEVICE void fetch_ahead(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
  }
#endif
}

MASKMOE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
MASKMOE_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }

#else

// A value in each lane of a warp.
template <class V>
struct PerLane {
  V value[32];
  V& operator[](int lane) { return value[lane]; }
  const V& operator[](int lane) const { return value[lane]; }
};

// The warp that runs; the others wait at the barrier before, or are there already. A warp runs
// from barrier to barrier, so that a barrier that is missing shows in the results; and from the
// first warp and lane to the last or the other way round, so that their order shows too.
inline int running_warp = 0;
inline bool reversed = false;
inline void (*reach_barrier)() = nullptr;

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

inline void fetch_ahead(const void*, int) {}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#endif

}  // namespace maskmoe::fused
