// The matrix instruction: 16 x 16 x 16 products of a warp, one interface for all number types.
//
// Bfloat16 and Float16 use mma.m16n8k16, Tf32 uses mma.m16n8k8. float32 uses the latter three times
// (3xTF32): for the products of the high parts of both factors, and of each high with the other low
// part. In the host emulator a lane holds the same values in the same places, and loops compute
// what the instruction is defined to compute.
#pragma once

#include <type_traits>

#include "cuda/number_types.h"

namespace maskmoe::fused {

// A 16 x 16 result: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of both halves.
struct Accumulator {
  float x[8];
};

MASKMOE_DEVICE int accumulator_row(int lane, int n) { return lane / 4 + (n & 2) * 4; }
MASKMOE_DEVICE int accumulator_column(int lane, int n) {
  return (n / 4) * 8 + lane % 4 * 2 + (n & 1);
}

MASKMOE_DEVICE void clear(PerLane<Accumulator>& acc) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int n = 0; n < 8; ++n) acc[lane].x[n] = 0.0f;
  });
}

// Operands of 16-bit types: two values a register.
template <class T>
struct Mma {
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];  // columns 0-7: rows 0-7, rows 8-15; then columns 8-15
  };

  // The weight (k, n) at place `at` of a packed block, in which a lane's values lie side by side.
  static MASKMOE_DEVICE void weight_position(int at, int& k, int& n) {
    const int lane = at / 8, r = at % 8 / 2;
    k = (r & 1) * 8 + lane % 4 * 2 + (at & 1);
    n = (r >> 1) * 8 + lane / 4;
  }

  static MASKMOE_DEVICE void load_weights(PerLane<B>& b, const T* block) {
    each_lane([&](int lane) {
      const UInt4 q = read_only(reinterpret_cast<const UInt4*>(block) + lane);
      MASKMOE_UNROLL
      for (int n = 0; n < 4; ++n) b[lane].r[n] = q.word[n];
    });
  }

  // Rows of a row-major tile in shared memory.
  static MASKMOE_DEVICE void load(PerLane<A>& a, const T* tile, int stride) {
    fetch<false>(a, [&](int lane) {
      return tile + (lane % 8 + (lane & 8)) * stride + (lane & 16) / 2;
    });
  }
  // Columns of the tile as rows.
  static MASKMOE_DEVICE void load_transposed(PerLane<A>& a, const T* tile, int stride) {
    fetch<true>(a, [&](int lane) {
      return tile + (lane % 8 + (lane & 16) / 2) * stride + (lane & 8);
    });
  }
  // Rows of the tile as rows of the right-hand operand.
  static MASKMOE_DEVICE void load_right(PerLane<B>& b, const T* tile, int stride) {
    fetch<true>(b, [&](int lane) {
      return tile + (lane % 8 + (lane & 8)) * stride + (lane & 16) / 2;
    });
  }

  static MASKMOE_DEVICE void multiply(PerLane<Accumulator>& acc, const PerLane<A>& a,
                                      const PerLane<B>& b) {
    MASKMOE_UNROLL
    for (int half = 0; half < 2; ++half) mma(acc, a, b, half);
  }

 private:
  // ldmatrix.x4: lane 8 m + r names row r of 8 x 8 matrix m.
  template <bool kTransposed, class R, class F>
  static MASKMOE_DEVICE void fetch(PerLane<R>& to, const F& address) {
#ifdef __CUDACC__
    const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(address(threadIdx.x % 32)));
    uint32_t* r = to[0].r;
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    }
#else
    for (int m = 0; m < 4; ++m) {
      const T* row[8];
      for (int r = 0; r < 8; ++r) row[r] = address(8 * m + r);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = kTransposed ? row[t][g].bits : row[g][t].bits;
        const uint32_t high = kTransposed ? row[t + 1][g].bits : row[g][t + 1].bits;
        to[lane].r[m] = low | high << 16;
      }
    }
#endif
  }

  static MASKMOE_DEVICE void mma(PerLane<Accumulator>& acc, const PerLane<A>& a,
                                 const PerLane<B>& b, int half) {
#ifdef __CUDACC__
    float* c = acc[0].x + half * 4;
    const uint32_t* l = a[0].r;
    const uint32_t* r = b[0].r + half * 2;
    if constexpr (std::is_same_v<T, Bfloat16>) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
    }
#else
    float left[16][16], right[16][8];
    auto value = [](uint32_t word, int n) {
      return to_float(T{static_cast<uint16_t>(word >> (16 * n))});
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int n = 0; n < 8; ++n) {
        const int r = n / 2;
        left[g + (r & 1) * 8][t + (r >> 1) * 8 + n % 2] = value(a[lane].r[r], n % 2);
      }
      for (int n = 0; n < 4; ++n) {
        right[t + n / 2 * 8 + n % 2][g] = value(b[lane].r[half * 2 + n / 2], n % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int n = 0; n < 4; ++n) {
        float& c = acc[lane].x[half * 4 + n];
        float sum = c;
        const int row = accumulator_row(lane, n), col = accumulator_column(lane, n);
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
        c = sum;
      }
    }
#endif
  }
};

// Operands of 32 bits: one value a register, two steps of 8. kWhole: float32, else TF32.
template <class T, bool kWhole>
struct WideMma {
  struct A {
    float x[8];  // of each step: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
  };
  struct B {
    float x[8];  // of each step: columns 0-7: rows t, t + 4; then columns 8-15
  };

  static MASKMOE_DEVICE void weight_position(int at, int& k, int& n) {
    const int lane = at % 128 / 4;
    k = at / 128 * 8 + (at & 1) * 4 + lane % 4;
    n = (at & 2) * 4 + lane / 4;
  }

  static MASKMOE_DEVICE void load_weights(PerLane<B>& b, const T* block) {
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int step = 0; step < 2; ++step) {
        const Float4 q = read_only(reinterpret_cast<const Float4*>(block) + step * 32 + lane);
        MASKMOE_UNROLL
        for (int n = 0; n < 4; ++n) b[lane].x[step * 4 + n] = q.value[n];
      }
    });
  }

  static MASKMOE_DEVICE void load(PerLane<A>& a, const T* tile, int stride) {
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 8; ++n) {
        const int row = lane / 4 + (n & 1) * 8, k = lane % 4 + n / 2 * 4;
        a[lane].x[n] = to_float(tile[row * stride + k]);
      }
    });
  }
  static MASKMOE_DEVICE void load_transposed(PerLane<A>& a, const T* tile, int stride) {
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 8; ++n) {
        const int row = lane / 4 + (n & 1) * 8, k = lane % 4 + n / 2 * 4;
        a[lane].x[n] = to_float(tile[k * stride + row]);
      }
    });
  }
  static MASKMOE_DEVICE void load_right(PerLane<B>& b, const T* tile, int stride) {
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 8; ++n) {
        const int k = lane % 4 + (n & 1) * 4 + n / 4 * 8, col = lane / 4 + (n & 2) * 4;
        b[lane].x[n] = to_float(tile[k * stride + col]);
      }
    });
  }

  // kWhole: high * low + low * high + high * high. The instruction reads 11 bits of a low part, so
  // that the relative error of a product is about 2^-21; that of float32 is 2^-24. Infinities
  // become NaN, as their low part is. Otherwise: high * high, with a relative error of 2^-11 a
  // factor.
  static MASKMOE_DEVICE void multiply(PerLane<Accumulator>& acc, const PerLane<A>& a,
                                      const PerLane<B>& b) {
    PerLane<A> a_high, a_low;
    PerLane<B> b_high, b_low;
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 8; ++n) {
        a_high[lane].x[n] = tf32(a[lane].x[n]);
        b_high[lane].x[n] = tf32(b[lane].x[n]);
        if (!kWhole) continue;
        a_low[lane].x[n] = a[lane].x[n] - a_high[lane].x[n];
        b_low[lane].x[n] = b[lane].x[n] - b_high[lane].x[n];
      }
    });
    MASKMOE_UNROLL
    for (int step = 0; step < 2; ++step) {
      MASKMOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (kWhole) {
          mma(acc, a_high, b_low, step, half);
          mma(acc, a_low, b_high, step, half);
        }
        mma(acc, a_high, b_high, step, half);
      }
    }
  }

 private:
  // The nearest value with 11 significant bits.
  static MASKMOE_DEVICE float tf32(float v) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits_to_float(bits);
#else
    if (v - v != 0.0f) return v;
    return bits_to_float((float_to_bits(v) + 0x1000) & 0xffffe000u);
#endif
  }

  static MASKMOE_DEVICE void mma(PerLane<Accumulator>& acc, const PerLane<A>& a,
                                 const PerLane<B>& b, int step, int half) {
#ifdef __CUDACC__
    float* c = acc[0].x + half * 4;
    const float* l = a[0].x + step * 4;
    const float* r = b[0].x + step * 4 + half * 2;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(float_to_bits(l[0])), "r"(float_to_bits(l[1])), "r"(float_to_bits(l[2])),
                   "r"(float_to_bits(l[3])), "r"(float_to_bits(r[0])), "r"(float_to_bits(r[1])));
#else
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int n = 0; n < 4; ++n) {
        left[g + (n & 1) * 8][t + (n >> 1) * 4] = truncated(a[lane].x[step * 4 + n]);
      }
      for (int n = 0; n < 2; ++n) {
        right[t + n * 4][g] = truncated(b[lane].x[step * 4 + half * 2 + n]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int n = 0; n < 4; ++n) {
        float& c = acc[lane].x[half * 4 + n];
        float sum = c;
        const int row = accumulator_row(lane, n), col = accumulator_column(lane, n);
        for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][col];
        c = sum;
      }
    }
#endif
  }

#ifndef __CUDACC__
  // The instruction ignores the last 13 bits.
  static float truncated(float v) { return bits_to_float(float_to_bits(v) & 0xffffe000u); }
#endif
};

template <>
struct Mma<float> : WideMma<float, true> {};
template <>
struct Mma<Tf32> : WideMma<Tf32, false> {};

}  // namespace maskmoe::fused
