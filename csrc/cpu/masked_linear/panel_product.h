// The product of a tile of rows and all panels, for one instruction set `I` (simd_*.h).
//
// A tile of sums is R rows by one panel of lanes. Its sums stay in registers while the kernel goes
// through the panel's segments; each step loads the weights of one input for all lanes and
// multiplies them by that input's value in each row. Inputs that no lane sees are in no segment;
// where blocks share a panel, a mask keeps an input from lanes that do not see it, unless all inputs
// are known to be finite: then their product with the zero in its place is zero.
//
// With pairs (I::kPairs), x and the weights are words of two bfloat16, a step takes two inputs, and
// no pair crosses the end of a segment. Words of weights are one behind the other, segment by
// segment; a segment of n inputs has at most n.
#pragma once

#include "cpu/activations.h"
#include "cpu/masked_linear/elements.h"

namespace maskmoe {

template <class I>
struct PanelProduct {
  using E = Elements<I>;
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  struct Tile {
    const float* x;  // the tile, at its first row
    int64_t line;    // from line to line
    const float* weight;
    int64_t weight_stride;
    const Segment *segments, *segments_end;
    const float* bias;  // of the panel's first lane, or null
    float* y;
    int64_t y_stride;
    int64_t y_second;  // from the first vector of lanes to the second
    int32_t lanes;
    bool whole;  // vectors are stored whole; lanes without an output hold zeros
    Activation activation;  // none, relu or leaky_relu
    const float* saved;     // where given, results are multiplied by the derivative that the
    Activation derivative;  // activation had there: relu or leaky_relu
  };

  // Where results go: rows of outputs in block order, or a tile of lines.
  struct Output {
    float* data;
    int64_t stride;  // from row to row
    int64_t line;    // from line to line of a tile; 0: rows
    const float* saved = nullptr;  // a tile like this one; see Tile
    Activation derivative = Activation::kNone;
  };

  // sum += x w for one input: its value in R rows, its weights for N vectors of lanes.
  template <int R, int N, bool Masked>
  [[gnu::always_inline]] static void step(V (&sum)[R][N], const float* x, const float* w,
                                          const M (&seen)[N]) {
    V b[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) b[v] = I::load(w + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V a = I::set(x[r * L]);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        if constexpr (Masked) {
          sum[r][v] = I::fma(a, b[v], sum[r][v], seen[v]);
        } else {
          sum[r][v] = I::fma(a, b[v], sum[r][v]);
        }
      }
    }
  }

  // Some neighbouring inputs, from `first` on. Returns the weights after theirs.
  template <int R, int N, bool Masked>
  [[gnu::always_inline]] static const float* add_run(V (&sum)[R][N], uint64_t first,
                                                     int64_t length, const float* tile,
                                                     int64_t line, const float* w,
                                                     int64_t w_stride, const M (&seen)[N]) {
    const float* base = tile + first / L * line;
    int64_t k = first % L;
    for (int64_t left = length; left > 0; base += line, k = 0) {
      const float* x = base + k;
      const int64_t steps = E::min(left, L - k);
      left -= steps;
      const float* next = base + line + k * L;
      for (const float* end = x + steps; x != end; ++x, w += w_stride, next += L) {
        if constexpr (N == 2) {  // large blocks: prefetch the next line's rows and weights
          __builtin_prefetch(next);
          __builtin_prefetch(w + kAhead * w_stride);
          __builtin_prefetch(w + kAhead * w_stride + L);
        }
        step<R, N, Masked>(sum, x, w, seen);
      }
    }
    return w;
  }

  // One pair of inputs, of which only one half is in the segment: zero stands for the other.
  template <int R, int N, bool Masked>
  [[gnu::always_inline]] static void add_half(V (&sum)[R][N], uint64_t slot, uint32_t half,
                                              const float* tile, int64_t line, const float* w,
                                              const M (&seen)[N]) {
    const float* x = tile + slot / 2 / L * line + slot / 2 % L;
    const V kept = I::set(__builtin_bit_cast(float, half));
    V b[N];
    for (int v = 0; v < N; ++v) b[v] = I::load(w + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V a = I::and_bits(I::set(x[r * L]), kept);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        sum[r][v] = Masked ? I::fma(a, b[v], sum[r][v], seen[v]) : I::fma(a, b[v], sum[r][v]);
      }
    }
  }

  // All inputs of one segment. Returns the weights after its own.
  template <int R, int N, bool Masked>
  [[gnu::always_inline]] static const float* add_segment(V (&sum)[R][N], const Segment& s,
                                                         const float* tile, int64_t line,
                                                         const float* w, int64_t w_stride) {
    M seen[N]{};
    if constexpr (Masked) {
      for (int v = 0; v < N; ++v) seen[v] = I::mask(s.mask >> (v * L));
    }
    if constexpr (!I::kPairs) {
      w = add_run<R, N, Masked>(sum, s.first, s.length, tile, line, w, w_stride, seen);
    } else {
      uint64_t first = s.first;
      const uint64_t end = first + s.length;
      if (first % 2 != 0) {
        add_half<R, N, Masked>(sum, first++, 0xffff0000u, tile, line, w, seen);
        w += w_stride;
      }
      const auto pairs = static_cast<int64_t>((end - first) / 2);
      w = add_run<R, N, Masked>(sum, first / 2, pairs, tile, line, w, w_stride, seen);
      if (end % 2 != 0) {
        add_half<R, N, Masked>(sum, end - 1, 0x0000ffffu, tile, line, w, seen);
        w += w_stride;
      }
    }
    return w;
  }

  static constexpr int64_t kAhead = 24;  // inputs

  // Biases of the panel's lanes, in each row.
  template <int R, int N>
  [[gnu::always_inline]] static void begin_sums(V (&sum)[R][N], const Tile& t, const M& last) {
    for (int v = 0; v < N; ++v) {
      V start = I::zero();
      if (t.bias != nullptr) {
        start = v == N - 1 ? I::load(t.bias + v * L, last) : I::load(t.bias + v * L);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][v] = start;
    }
  }

  template <int R, int N, bool Shared>
  static void product(const Tile& t) {
    V sum[R][N];
    M last = I::mask(~0u >> (32 - (t.lanes - (N - 1) * L)));
    begin_sums(sum, t, last);
    const float* w = t.weight;
    // Copies: the compiler must assume that a store can change what `t` refers to.
    const int64_t w_stride = t.weight_stride, y_stride = t.y_stride, line = t.line;
    const int64_t second = N == 2 ? t.y_second : 0;
    for (const Segment* s = t.segments; s != t.segments_end; ++s) {
      if (Shared && s->mask != ~0u) {
        w = add_segment<R, N, true>(sum, *s, t.x, line, w, w_stride);
      } else {
        w = add_segment<R, N, false>(sum, *s, t.x, line, w, w_stride);
      }
    }
    if constexpr (Shared) clear_signs(sum);
    if (t.activation == Activation::kRelu) {
      activate_sums<Activation::kRelu>(sum);
    } else if (t.activation == Activation::kLeakyRelu) {
      activate_sums<Activation::kLeakyRelu>(sum);
    }
    if (t.saved != nullptr) derive(sum, t, second);
    store_sums(sum, t, y_stride, second, last);
  }

  // -0 becomes 0: the sign of a zero, alone, could tell of an input that is multiplied by 0.
  template <int R, int N>
  [[gnu::always_inline]] static void clear_signs(V (&sum)[R][N]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[r][v] = I::add(sum[r][v], I::zero());
    }
  }

  template <Activation A, int R, int N>
  [[gnu::always_inline]] static void activate_sums(V (&sum)[R][N]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[r][v] = activate<I, A>(sum[r][v]);
    }
  }

  template <int R, int N>
  [[gnu::always_inline]] static void store_sums(V (&sum)[R][N], const Tile& t, int64_t y_stride,
                                                int64_t second, const M& last) {
    float* y = t.y;
    if (t.whole || t.lanes == N * L) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, y += y_stride) {
        if constexpr (N == 2) I::store(y, sum[r][0]);
        I::store(y + second, sum[r][N - 1]);
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, y += y_stride) {
        if constexpr (N == 2) I::store(y, sum[r][0]);
        I::store(y + second, sum[r][N - 1], last);
      }
    }
    if (t.whole) return;  // a tile stays in the cache
    // The next tile's rows, which the hardware does not prefetch.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, y += y_stride) {
      __builtin_prefetch(y, 1);
      if constexpr (N == 2) __builtin_prefetch(y + L, 1);
    }
  }

  // sum *= act'(saved)
  template <int R, int N>
  [[gnu::always_inline]] static void derive(V (&sum)[R][N], const Tile& t, int64_t second) {
    const bool leaky = t.derivative == Activation::kLeakyRelu;
    const float* saved = t.saved;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, saved += t.y_stride) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        const V at = I::load(saved + v * second);
        if (leaky) {
          sum[r][v] = activation_grad<I, Activation::kLeakyRelu>(sum[r][v], at);
        } else {
          sum[r][v] = activation_grad<I, Activation::kRelu>(sum[r][v], at);
        }
      }
    }
  }

  using Product = void (*)(const Tile&);

  template <int N, bool Shared, int R>
  static constexpr void products(Product* table) {
    table[R] = product<R, N, Shared>;
    if constexpr (R > 1) products<N, Shared, R - 1>(table);
  }

  struct Products {
    Product one[I::kRows1 + 1]{}, two[I::kRows2 + 1]{};
    Product shared_one[I::kRows1 + 1]{}, shared_two[I::kRows2 + 1]{};
    constexpr Products() {
      products<1, false, I::kRows1>(one);
      products<2, false, I::kRows2>(two);
      products<1, true, I::kRows1>(shared_one);
      products<2, true, I::kRows2>(shared_two);
    }
  };
  static constexpr Products table{};

  // Cuts `size` > 0 rows into the fewest parts of at most `most` rows, all nearly equal. A division
  // takes as long as a small tile, so one cut serves all panels.
  struct Cut {
    uint32_t count, each, longer;  // the first `longer` parts have one more
    Cut(int64_t size, uint32_t most)
        : count((static_cast<uint32_t>(size) + most - 1) / most),
          each(static_cast<uint32_t>(size) / count),
          longer(static_cast<uint32_t>(size) % count) {}
    int64_t operator[](uint32_t part) const { return each + (part < longer ? 1 : 0); }
  };

  // All panels on `rows` rows. `finite`: all of x is; where it is not known, it is not.
  static void multiply(const PanelsView& view, const float* x, int64_t line,
                       const float* weight, Place in_place, const float* buffer,
                       const float* bias, const Output& y, Activation activation, int64_t rows,
                       bool finite = false) {
    const bool lined = y.line != 0;
    const Cut cuts[2] = {{rows, I::kRows1}, {rows, I::kRows2}};
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      const bool direct = panel.place >= in_place;
      const bool unmasked = finite || !panel.shared;
      Tile tile{x,
                line,
                direct ? weight + panel.weight : buffer + panel.buffer,
                direct ? panel.stride : panel.vectors * L,
                unmasked ? view.runs + panel.runs : view.segments + panel.segments,
                unmasked ? view.runs + panel.runs_end : view.segments + panel.segments_end,
                bias == nullptr ? nullptr : bias + panel.first,
                y.data + (lined ? panel.line * y.line : panel.first),
                y.stride,
                lined ? y.line : L,
                panel.lanes,
                lined,
                activation,
                y.saved == nullptr ? nullptr : y.saved + panel.line * y.line,
                y.derivative};
      const Product* of = panel.vectors == 2 ? (panel.shared ? table.shared_two : table.two)
                                             : (panel.shared ? table.shared_one : table.one);
      const Cut& cut = cuts[panel.vectors - 1];
      for (uint32_t n = 0; n < cut.count; ++n) {
        const int64_t height = cut[n];
        of[height](tile);
        tile.x += height * L;
        tile.y += height * y.stride;
        if (tile.saved != nullptr) tile.saved += height * y.stride;
      }
    }
  }

  // Does `multiply` apply this activation itself?
  static bool fused(Activation a) {
    return a == Activation::kNone || a == Activation::kRelu || a == Activation::kLeakyRelu;
  }
};

}  // namespace maskmoe
