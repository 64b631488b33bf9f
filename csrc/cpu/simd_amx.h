// The tile instructions of AMX as a policy, `Tiles`: eight registers of 16 rows by 64 bytes.
//
// With MASKMOE_EMULATE the same is computed in plain C++, bit for bit as Intel defines it, so
// that kernels built on tiles can be tested on machines without them.
#pragma once

#include <cstdint>

namespace maskmoe::amx {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;                              // of a row
constexpr int64_t kTileFloats = kTileRows * kTileBytes / 4;  // of a whole tile

#ifndef MASKMOE_EMULATE

// Assembly, not _tile_*: those paste their arguments, so a register cannot be a template's, and
// GCC's loads do not tell the compiler that they read memory.
struct Tiles {
  // Every register 16 by 64. Each thread has a configuration of its own, and having one makes
  // context switches slower: configure before the first tile of a task, release after the last.
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int n = 0; n < 8; ++n) {
      shape.bytes[n] = kTileBytes;
      shape.rows[n] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  static void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows lie `stride` bytes apart; 0: one row, 16 times.
  template <int T>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // C[m][n] += the dot product of row m of A and column n of B, whose rows are pairs of inputs.
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

#else

struct Tiles {
  union Tile {
    float sums[16][16];
    uint16_t values[16][32];
    uint8_t bytes[16][64];
  };

  // Traps where the processor would raise a fault.
  static void configure() {
    if (configured()) __builtin_trap();
    for (int t = 0; t < 8; ++t) tile(t) = Tile{};
    configured() = true;
  }
  static void release() {
    if (!configured()) __builtin_trap();
    configured() = false;
  }

  template <int T>
  static void zero() {
    use(T) = Tile{};
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    const auto* p = static_cast<const char*>(from);
    for (int m = 0; m < 16; ++m) __builtin_memcpy(use(T).bytes[m], p + m * stride, 64);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    auto* p = static_cast<char*>(to);
    for (int m = 0; m < 16; ++m) __builtin_memcpy(p + m * stride, use(T).bytes[m], 64);
  }

  // TDPBF16PS: the first and the second products of all pairs are summed apart, each with one
  // rounding, then with each other, then to C; denormals are zero going in and coming out.
  template <int C, int A, int B>
  static void dot() {
    Tile& c = use(C);
    const Tile &a = use(A), &b = use(B);
    for (int m = 0; m < 16; ++m) {
      float first[16] = {}, second[16] = {};
      for (int k = 0; k < 16; ++k) {
        const float x = value(a.values[m][2 * k]), y = value(a.values[m][2 * k + 1]);
        for (int n = 0; n < 16; ++n) {
          first[n] = flush(__builtin_fmaf(x, value(b.values[k][2 * n]), first[n]));
          second[n] = flush(__builtin_fmaf(y, value(b.values[k][2 * n + 1]), second[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        c.sums[m][n] = flush(flush(c.sums[m][n]) + flush(first[n] + second[n]));
      }
    }
  }

 private:
  static bool& configured() {
    static thread_local bool yes = false;
    return yes;
  }
  static Tile& tile(int t) {
    static thread_local Tile all[8];
    return all[t];
  }
  static Tile& use(int t) {
    if (!configured()) __builtin_trap();
    return tile(t);
  }
  static float flush(float a) {
    const float size = __builtin_fabsf(a);
    return size < 0x1p-126f ? __builtin_copysignf(0.0f, a) : a;
  }
  static float value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float a;
    __builtin_memcpy(&a, &wide, sizeof a);
    return flush(a);
  }
};

#endif

}  // namespace maskmoe::amx
