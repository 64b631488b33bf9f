// The number types of the kernels; they compute in float32.
#pragma once

#include "cuda/thread_block.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace maskmoe::fused {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// float32 in memory; a product rounds its factors to TF32, which has 11 significant bits.
struct Tf32 {
  float value;
};

MASKMOE_DEVICE float to_float(float v) { return v; }
MASKMOE_DEVICE float to_float(Tf32 v) { return v.value; }
MASKMOE_DEVICE float to_float(Bfloat16 v) { return bits_to_float(uint32_t{v.bits} << 16); }
MASKMOE_DEVICE float to_float(Float16 v) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(v.bits));
#else
  _Float16 half;
  std::memcpy(&half, &v, sizeof half);
  return static_cast<float>(half);
#endif
}

// To the nearest, ties to even.
template <class T>
MASKMOE_DEVICE T rounded(float v);

template <>
MASKMOE_DEVICE float rounded<float>(float v) {
  return v;
}
template <>
MASKMOE_DEVICE Tf32 rounded<Tf32>(float v) {
  return {v};
}
template <>
MASKMOE_DEVICE Bfloat16 rounded<Bfloat16>(float v) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t bits = float_to_bits(v);
  if (v != v) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}
template <>
MASKMOE_DEVICE Float16 rounded<Float16>(float v) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const _Float16 half = static_cast<_Float16>(v);
  Float16 out;
  std::memcpy(&out, &half, sizeof out);
  return out;
#endif
}

}  // namespace maskmoe::fused
