// Values of any dtype, to and from float32, for one instruction set `I` (simd_*.h).
#pragma once

#include "cpu/kernels.h"

namespace maskmoe {

template <class I>
struct Elements {
  using V = typename I::V;
  static constexpr int L = I::kLanes;

  static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

  // Arrays one after the other in scratch: `take` gives the next one's offset, in floats.
  struct Arrays {
    int64_t total = 0;
    int64_t take(int64_t size) {
      const int64_t at = total;
      total += round_up(size, 16);
      return at;
    }
  };

  static float widen(const void* p, Dtype dtype, int64_t n) {
    float one[L];
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(p)[n];
    uint16_t padded[L] = {static_cast<const uint16_t*>(p)[n]};
    I::store(one, dtype == Dtype::kBfloat16 ? I::load_bf16(padded) : I::load_fp16(padded));
    return one[0];
  }

  template <Dtype D>
  static V load_as(const void* p, int64_t n) {
    if constexpr (D == Dtype::kFloat32) return I::load(static_cast<const float*>(p) + n);
    if constexpr (D == Dtype::kBfloat16) return I::load_bf16(static_cast<const uint16_t*>(p) + n);
    if constexpr (D == Dtype::kFloat16) return I::load_fp16(static_cast<const uint16_t*>(p) + n);
  }

  // The last, partial vector of a row, then zeros; memory after the row is not touched.
  template <Dtype D>
  static V load_tail(const void* p, int64_t n, int64_t count) {
    if constexpr (D == Dtype::kFloat32) {
      return I::load(static_cast<const float*>(p) + n, I::mask((1u << count) - 1));
    }
    uint16_t padded[L] = {};
    for (int64_t k = 0; k < count; ++k) padded[k] = static_cast<const uint16_t*>(p)[n + k];
    return load_as<D>(padded, 0);
  }

  // The `count` values at `order`, then zeros.
  template <Dtype D>
  static V gather(const void* p, const int64_t* order, int64_t count) {
    if constexpr (D == Dtype::kFloat32) {
      const float* from = static_cast<const float*>(p);
      float lanes[L] = {};
      for (int64_t k = 0; k < count; ++k) lanes[k] = from[order[k]];
      return I::load(lanes);
    }
    const uint16_t* from = static_cast<const uint16_t*>(p);
    uint16_t lanes[L] = {};
    for (int64_t k = 0; k < count; ++k) lanes[k] = from[order[k]];
    return load_as<D>(lanes, 0);
  }

  // Calls `run` with the dtype as a template argument.
  template <class F>
  static void with_dtype(Dtype dtype, const F& run) {
    switch (dtype) {
      case Dtype::kFloat32: run.template operator()<Dtype::kFloat32>(); break;
      case Dtype::kBfloat16: run.template operator()<Dtype::kBfloat16>(); break;
      case Dtype::kFloat16: run.template operator()<Dtype::kFloat16>(); break;
    }
  }

  static void store_as(void* p, Dtype dtype, int64_t n, V a) {
    switch (dtype) {
      case Dtype::kFloat32: I::store(static_cast<float*>(p) + n, a); break;
      case Dtype::kBfloat16: I::store_bf16(static_cast<uint16_t*>(p) + n, a); break;
      default: I::store_fp16(static_cast<uint16_t*>(p) + n, a);
    }
  }

  static void store_tail(void* p, Dtype dtype, int64_t n, int64_t count, V a) {
    if (dtype == Dtype::kFloat32) {
      I::store(static_cast<float*>(p) + n, a, I::mask((1u << count) - 1));
      return;
    }
    uint16_t padded[L];
    dtype == Dtype::kBfloat16 ? I::store_bf16(padded, a) : I::store_fp16(padded, a);
    for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(p)[n + k] = padded[k];
  }

  static void load(float* to, const void* from, Dtype dtype, const int64_t* order, int64_t count) {
    if (order != nullptr) {
      for (int64_t n = 0; n < count; ++n) to[n] = widen(from, dtype, order[n]);
      return;
    }
    if (dtype == Dtype::kFloat32) return copy(to, static_cast<const float*>(from), count);
    with_dtype(dtype, [&]<Dtype D>() {
      int64_t n = 0;
      for (; n + L <= count; n += L) I::store(to + n, load_as<D>(from, n));
      if (n == count) return;
      float lanes[L];
      I::store(lanes, load_tail<D>(from, n, count - n));
      copy(to + n, lanes, count - n);
    });
  }

  // Without masked stores, which take tens of cycles with AVX2 on some processors.
  static void copy(float* to, const float* from, int64_t count) {
    int64_t n = 0;
    for (; n + L <= count; n += L) I::store(to + n, I::load(from + n));
    if (count - n >= 8) __builtin_memcpy(to + n, from + n, 32), n += 8;
    if (count - n >= 4) __builtin_memcpy(to + n, from + n, 16), n += 4;
    if (count - n >= 2) __builtin_memcpy(to + n, from + n, 8), n += 2;
    if (n < count) to[n] = from[n];
  }

  static void store(void* to, Dtype dtype, const int64_t* order, const float* from,
                    int64_t count) {
    if (order != nullptr && dtype == Dtype::kFloat32) {
      for (int64_t n = 0; n < count; ++n) static_cast<float*>(to)[order[n]] = from[n];
      return;
    }
    if (order != nullptr) {
      uint16_t lanes[L];
      for (int64_t n = 0; n < count; n += L) {
        const int64_t some = min(L, count - n);
        store(lanes, dtype, nullptr, from + n, some);
        for (int64_t k = 0; k < some; ++k) static_cast<uint16_t*>(to)[order[n + k]] = lanes[k];
      }
      return;
    }
    if (dtype == Dtype::kFloat32) return copy(static_cast<float*>(to), from, count);
    int64_t n = 0;
    for (; n + L <= count; n += L) store_as(to, dtype, n, I::load(from + n));
    if (n < count) {
      store_tail(to, dtype, n, count - n, I::load(from + n, I::mask((1u << (count - n)) - 1)));
    }
  }

  static void* row_of(const Matrix& m, int64_t row) {
    const int64_t size = m.dtype == Dtype::kFloat32 ? 4 : 2;
    return static_cast<char*>(m.data) + row * m.stride * size;
  }

  // Can a kernel write float32 results straight to the matrix?
  static bool in_place(const Matrix& m) {
    return m.dtype == Dtype::kFloat32 && m.order == nullptr;
  }

  static void add(float* into, const float* from, int64_t count) {
    int64_t n = 0;
    for (; n + L <= count; n += L) I::store(into + n, I::add(I::load(into + n), I::load(from + n)));
    for (; n < count; ++n) into[n] += from[n];
  }
};

}  // namespace maskmoe
