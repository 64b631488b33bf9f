// Gradients of weights and biases, for one instruction set `I`: sums over the rows of a tile. The
// sums of some inputs by one panel stay in registers while the kernel goes down the rows.
#pragma once

#include "cpu/masked_linear/elements.h"

namespace maskmoe {

template <class I>
struct WeightSums {
  using E = Elements<I>;
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  struct Sums {
    const float* x;  // the first input's slot, in the first row
    const float* g;  // the panel's first line, in the first row
    int64_t line;    // from line to line of g
    int64_t rows;
    float* to;
    int64_t to_stride;
    bool add;
  };

  template <int K, int N>
  [[gnu::always_inline]] static void outer_row(V (&sum)[K][N], const float* x, const float* g,
                                               int64_t line) {
    V b[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) b[v] = I::load(g + v * line);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      V a = I::set(x[k]);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[k][v] = I::fma(a, b[v], sum[k][v]);
    }
  }

  // to[k] (+)= sum over rows of x[k] * g, for K inputs by N vectors of lanes.
  template <int K, int N>
  static void outer(const Sums& s) {
    V sum[K][N];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[k][v] = I::zero();
    }
    constexpr int kUnrolled = 4 / N;  // the loop control would cost 10 % and more
    const float* x = s.x;
    const float* g = s.g;
    int64_t left = s.rows;
    if (N == 2 && s.add) {  // large sums, which are read after the last row
#pragma GCC unroll 16
      for (int input = 0; input < K; ++input) {
        __builtin_prefetch(s.to + input * s.to_stride, 1);
        __builtin_prefetch(s.to + input * s.to_stride + L, 1);
      }
    }
    for (; left >= kUnrolled; left -= kUnrolled, x += kUnrolled * L, g += kUnrolled * L) {
#pragma GCC unroll 4
      for (int r = 0; r < kUnrolled; ++r) outer_row(sum, x + r * L, g + r * L, s.line);
    }
    for (; left > 0; --left, x += L, g += L) outer_row(sum, x, g, s.line);
    float* to = s.to;
    const int64_t stride = s.to_stride;
    if (s.add) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) {
          sum[k][v] = I::add(I::load(to + k * stride + v * L), sum[k][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k, to += stride) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) I::store(to + v * L, sum[k][v]);
    }
  }

  using Outer = void (*)(const Sums&);

  template <int N, int K>
  static constexpr void outers(Outer* table) {
    table[K] = outer<K, N>;
    if constexpr (K > 1) outers<N, K - 1>(table);
  }

  struct Outers {
    Outer one[I::kSums1 + 1]{}, two[I::kSums2 + 1]{};
    constexpr Outers() {
      outers<1, I::kSums1>(one);
      outers<2, I::kSums2>(two);
    }
  };
  static constexpr Outers outer_table{};

  // Where blocks share a panel, sums of absent weights are computed as well, and never read.
  static void weight_sums(const PanelsView& view, Place in_place, const float* x, const float* g,
                          int64_t line, int64_t rows, float* grad_weight, float* grad_buffer,
                          bool add) {
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      const bool direct = panel.place >= in_place;
      const int64_t stride = direct ? panel.stride : panel.vectors * L;
      Sums sums{nullptr, g + panel.line * line, line, rows,
                direct ? grad_weight + panel.weight : grad_buffer + panel.buffer, stride, add};
      const Outer* of = panel.vectors == 2 ? outer_table.two : outer_table.one;
      const int64_t most = panel.vectors == 2 ? I::kSums2 : I::kSums1;
      for (int64_t n = panel.runs; n < panel.runs_end; ++n) {
        int64_t slot = view.runs[n].first;
        for (int64_t left = view.runs[n].length; left > 0;) {
          // To the end of the line, in nearly equal parts: as Cut, without a division.
          const int64_t here = E::min(left, L - slot % L);
          const int64_t inputs = here <= most ? here : here <= 2 * most ? (here + 1) / 2 : most;
          sums.x = x + slot / L * line + slot % L;
          of[inputs](sums);
          sums.to += inputs * stride;
          slot += inputs;
          left -= inputs;
        }
      }
    }
  }

  // A tile is summed by itself first: with many tiles, rounding stays small.
  static void bias_sums(const PanelsView& view, const float* g, int64_t line, int64_t rows,
                        float* total, bool add) {
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      for (int64_t n = 0; n < panel.lanes; n += L, g += line) {
        const int64_t count = E::min(L, panel.lanes - n);
        const M stored = I::mask(~0u >> (32 - count));
        // Four sums: a single one would wait for each addition.
        V part[4] = {I::zero(), I::zero(), I::zero(), I::zero()};
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) part[k] = I::add(part[k], I::load(g + (r + k) * L));
        }
        for (; r < rows; ++r) part[0] = I::add(part[0], I::load(g + r * L));
        const V sum = I::add(I::add(part[0], part[1]), I::add(part[2], part[3]));
        float* to = total + panel.first + n;
        I::store(to, add ? I::add(I::load(to, stored), sum) : sum, stored);
      }
    }
  }
};

}  // namespace maskmoe
