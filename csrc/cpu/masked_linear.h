// The masked linear map on rows of a batch, for one instruction set `I` (simd_*.h).
//
// Forward: a tile is R rows by one panel of lanes (units). Its sums stay in registers while the
// panel's segments are walked; each step loads the weights of one input for all lanes and
// multiplies them by that input's value in each row. Inputs that no lane sees are in no segment;
// where small blocks share a panel, a mask keeps an input from lanes that do not see it.
// grad_x is the same walk with lanes and inputs exchanged. grad_weight keeps the sums of some
// inputs by one panel in registers while it walks down the rows.
//
// Inputs are first copied (and converted) to a tile of lines: line n holds slots nL .. nL + L - 1
// of all rows of the tile, row under row. A step then reads its rows at constant distances, which
// saves an address in every multiply, and no stride of the caller's can make rows fall on the same
// cache sets.
#pragma once

#include "kernels.h"

namespace maskmoe {

template <class I>
struct MaskedLinear {
  using V = typename I::V;
  using M = typename I::M;
  static constexpr int L = I::kLanes;

  static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // --- Elements: any dtype to and from float32 -------------------------------------------

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

  // The last, partial vector of a row, without touching what lies behind it; then zeros.
  template <Dtype D>
  static V load_tail(const void* p, int64_t n, int64_t count) {
    if constexpr (D == Dtype::kFloat32) {
      return I::load(static_cast<const float*>(p) + n, I::mask((1u << count) - 1));
    }
    uint16_t padded[L] = {};
    for (int64_t k = 0; k < count; ++k) padded[k] = static_cast<const uint16_t*>(p)[n + k];
    return load_as<D>(padded, 0);
  }

  // `run` is a lambda over a dtype known to the compiler.
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
    with_dtype(dtype, [&]<Dtype D>() {
      int64_t n = 0;
      for (; n + L <= count; n += L) I::store(to + n, load_as<D>(from, n));
      if (n < count) {
        I::store(to + n, load_tail<D>(from, n, count - n), I::mask((1u << (count - n)) - 1));
      }
    });
  }

  static void store(void* to, Dtype dtype, const int64_t* order, const float* from,
                    int64_t count) {
    if (order != nullptr) {
      for (int64_t n = 0; n < count; ++n) {
        V one = I::set(from[n]);
        store_tail(to, dtype, order[n], 1, one);
      }
      return;
    }
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

  // Can results be written where the matrix has them?
  static bool in_place(const Matrix& m) {
    return m.dtype == Dtype::kFloat32 && m.order == nullptr;
  }

  // --- Tiles of lines -----------------------------------------------------------------------

  static int64_t lines(int64_t features) { return (features + L - 1) / L; }
  // Floats from line to line; never a multiple of a page, on which lines would collide.
  static int64_t line_stride(int64_t tile_rows) {
    const int64_t n = tile_rows * L;
    return n % 256 == 0 ? n + L : n;
  }

  static constexpr int64_t kTogether = 8;  // rows that are copied side by side

  // What is at `column` of rows [row, row + rows), to one line of a tile; zeros after `count`.
  template <Dtype D, class F>
  static void load_line(float* to, const Matrix& m, int64_t row, int64_t rows, int64_t column,
                        int64_t count, const F& then) {
    const char* from = static_cast<const char*>(row_of(m, row));
    const int64_t step = m.stride * (D == Dtype::kFloat32 ? 4 : 2);
    if (m.order != nullptr) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        float lanes[L] = {};
        for (int64_t k = 0; k < count; ++k) lanes[k] = widen(from, D, m.order[column + k]);
        I::store(to, then(I::load(lanes), r));
      }
    } else if (count == L) {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        // These columns of the rows after these.
        __builtin_prefetch(from + kTogether * step + column * (D == Dtype::kFloat32 ? 4 : 2));
        I::store(to, then(load_as<D>(from, column), r));
      }
    } else {
      for (int64_t r = 0; r < rows; ++r, from += step, to += L) {
        I::store(to, then(load_tail<D>(from, column, count), r));
      }
    }
  }

  static void load_tile(float* tile, int64_t line, const Matrix& m, int64_t row, int64_t rows) {
    with_dtype(m.dtype, [&]<Dtype D>() {
      for (int64_t r = 0; r < rows; r += kTogether) {
        float* to = tile + r * L;
        for (int64_t n = 0; n < m.features; n += L, to += line) {
          load_line<D>(to, m, row + r, smaller(kTogether, rows - r), n,
                       smaller(L, m.features - n), [](V a, int64_t) { return a; });
        }
      }
    });
  }

  // Zeros in the rows of a tile that `mask` leaves out: what does not count may hold anything.
  static void clear_rows(float* tile, int64_t line, int64_t lines, const uint8_t* mask,
                         int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (mask[r]) continue;
      for (int64_t n = 0; n < lines; ++n) I::store(tile + n * line + r * L, I::zero());
    }
  }

  // --- Weights ---------------------------------------------------------------------------

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
                   Dtype dtype, Place in_place, float* buffer) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (panel.place >= in_place) continue;
      const int64_t width = panel.vectors * L;
      float* to = buffer + panel.buffer;
      if (panel.shared || panel.lanes < width) {
        for (int64_t n = 0; n < panel.depth * width; n += L) I::store(to + n, I::zero());
      }
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        float* at = to + copy.row * width + copy.lane;
        if (dtype == Dtype::kFloat32) {
          copy_block(at, width, static_cast<const float*>(weight) + copy.packed, copy);
        } else if (copy.lane_step == 1) {
          const uint16_t* from = static_cast<const uint16_t*>(weight) + copy.packed;
          for (int64_t k = 0; k < copy.inputs; ++k) {
            load(at + k * width, from + k * copy.input_step, dtype, nullptr, copy.lanes);
          }
        } else {
          float line[64];  // where lanes lie apart, inputs lie side by side
          for (int64_t lane = 0; lane < copy.lanes; ++lane) {
            const uint16_t* from =
                static_cast<const uint16_t*>(weight) + copy.packed + lane * copy.lane_step;
            for (int64_t k = 0; k < copy.inputs; k += 64) {
              const int64_t count = smaller(64, copy.inputs - k);
              load(line, from + k, dtype, nullptr, count);
              for (int64_t n = 0; n < count; ++n) at[(k + n) * width + lane] = line[n];
            }
          }
        }
      }
    }
  }

  static void copy_block(float* at, int64_t width, const float* from, const Copy& copy) {
    if (copy.lane_step == 1) {
      for (int64_t k = 0; k < copy.inputs; ++k) {
        load(at + k * width, from + k * copy.input_step, Dtype::kFloat32, nullptr, copy.lanes);
      }
      return;
    }
    for (int64_t k = 0; k < copy.inputs; ++k) {
      for (int64_t lane = 0; lane < copy.lanes; ++lane) {
        at[k * width + lane] = from[k * copy.input_step + lane * copy.lane_step];
      }
    }
  }

  static void unpack(const PanelsView& view, int64_t begin, int64_t end, const float* buffer,
                     Place in_place, float* weight) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (panel.place >= in_place) continue;
      const int64_t width = panel.vectors * L;
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        const float* from = buffer + panel.buffer + copy.row * width + copy.lane;
        float* to = weight + copy.packed;
        if (copy.lane_step == 1) {
          for (int64_t k = 0; k < copy.inputs; ++k) {
            load(to + k * copy.input_step, from + k * width, Dtype::kFloat32, nullptr, copy.lanes);
          }
          continue;
        }
        for (int64_t k = 0; k < copy.inputs; ++k) {
          for (int64_t lane = 0; lane < copy.lanes; ++lane) {
            to[k * copy.input_step + lane * copy.lane_step] = from[k * width + lane];
          }
        }
      }
    }
  }

  static void add(float* into, const float* from, int64_t count) {
    int64_t n = 0;
    for (; n + L <= count; n += L) I::store(into + n, I::add(I::load(into + n), I::load(from + n)));
    for (; n < count; ++n) into[n] += from[n];
  }

  // --- The product: rows x lanes, down the inputs ------------------------------------------

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
    bool whole;  // vectors are stored whole, lanes without an output being zero
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
  template <int R, int N, bool Shared>
  [[gnu::always_inline]] static void step(V (&sum)[R][N], const float* x, const float* w, M seen) {
    V b[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) b[v] = I::load(w + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V a = I::set(x[r * L]);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        if constexpr (Shared) {
          sum[r][v] = I::fma(a, b[v], sum[r][v], seen);
        } else {
          sum[r][v] = I::fma(a, b[v], sum[r][v]);
        }
      }
    }
  }

  static constexpr int64_t kAhead = 24;  // inputs

  template <int R, int N, bool Shared>
  static void product(const Tile& t) {
    V sum[R][N];
    M last = I::mask(~0u >> (32 - (t.lanes - (N - 1) * L)));
    for (int v = 0; v < N; ++v) {
      V start = I::zero();
      if (t.bias != nullptr) {
        start = v == N - 1 ? I::load(t.bias + v * L, last) : I::load(t.bias + v * L);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][v] = start;
    }
    const float* w = t.weight;
    // Copies: the compiler must believe that a store could change what `t` refers to.
    const int64_t w_stride = t.weight_stride, y_stride = t.y_stride, line = t.line;
    const int64_t second = N == 2 ? t.y_second : 0;
    for (const Segment* s = t.segments; s != t.segments_end; ++s) {
      M seen{};
      if constexpr (Shared) seen = I::mask(s->mask);
      const float* base = t.x + static_cast<uint64_t>(s->first) / L * line;
      int64_t k = static_cast<uint64_t>(s->first) % L;
      for (int64_t left = s->length; left > 0; base += line, k = 0) {
        const float* x = base + k;
        const int64_t steps = smaller(left, L - k);
        left -= steps;
        const float* next = base + line + k * L;
        for (const float* end = x + steps; x != end; ++x, w += w_stride, next += L) {
          if constexpr (N == 2) {  // large blocks: the next line's rows, and weights to come
            __builtin_prefetch(next);
            __builtin_prefetch(w + kAhead * w_stride);
            __builtin_prefetch(w + kAhead * w_stride + L);
          }
          step<R, N, Shared>(sum, x, w, seen);
        }
      }
    }
    if (t.activation == Activation::kRelu) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) sum[r][v] = activate<I, Activation::kRelu>(sum[r][v]);
      }
    } else if (t.activation == Activation::kLeakyRelu) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) sum[r][v] = activate<I, Activation::kLeakyRelu>(sum[r][v]);
      }
    }
    if (t.saved != nullptr) derive(sum, t, second);
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
    // The next tile's rows, which the machine does not foresee.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, y += y_stride) {
      __builtin_prefetch(y, 1);
      if constexpr (N == 2) __builtin_prefetch(y + L, 1);
    }
  }

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
    Product one[I::kRows1 + 1]{}, two[I::kRows2 + 1]{}, shared[I::kRows1 + 1]{};
    constexpr Products() {
      products<1, false, I::kRows1>(one);
      products<2, false, I::kRows2>(two);
      products<1, true, I::kRows1>(shared);
    }
  };
  static constexpr Products table{};

  // `size` > 0 things in the fewest parts of at most `most`, all nearly equal. A division takes as
  // long as a small tile, so there is one cut for many of them.
  struct Cut {
    uint32_t count, each, larger;  // the first `larger` parts have one more
    Cut(int64_t size, uint32_t most)
        : count((static_cast<uint32_t>(size) + most - 1) / most),
          each(static_cast<uint32_t>(size) / count),
          larger(static_cast<uint32_t>(size) % count) {}
    int64_t operator[](uint32_t part) const { return each + (part < larger ? 1 : 0); }
  };

  // All panels on `rows` rows.
  static void multiply(const PanelsView& view, const float* x, int64_t line,
                       const float* weight, Place in_place, const float* buffer,
                       const float* bias, const Output& y, Activation activation, int64_t rows) {
    const bool lined = y.line != 0;
    const Cut cuts[2] = {{rows, I::kRows1}, {rows, I::kRows2}};
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      const bool direct = panel.place >= in_place;
      Tile tile{x,
                line,
                direct ? weight + panel.weight : buffer + panel.buffer,
                direct ? panel.stride : panel.vectors * L,
                view.segments + panel.segments,
                view.segments + panel.segments_end,
                bias == nullptr ? nullptr : bias + panel.first,
                y.data + (lined ? panel.line * y.line : panel.first),
                y.stride,
                lined ? y.line : L,
                panel.lanes,
                lined,
                activation,
                y.saved == nullptr ? nullptr : y.saved + panel.line * y.line,
                y.derivative};
      const Product* of = panel.shared ? table.shared : panel.vectors == 2 ? table.two : table.one;
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

  // --- Forward -----------------------------------------------------------------------------

  static bool fused(Activation a) {
    return a == Activation::kNone || a == Activation::kRelu || a == Activation::kLeakyRelu;
  }

  // Rows of a tile of results that cannot be written in place.
  static int64_t row_stride(int64_t features) {
    const int64_t n = round_up(features, 16);
    return n % 128 == 0 ? n + 16 : n;
  }

  static int64_t forward_scratch(const Forward& f) {
    int64_t size = lines(f.x.features) * line_stride(f.tile_rows);
    if (!in_place(f.y) || !fused(f.activation)) size += f.tile_rows * row_stride(f.y.features);
    return size;
  }

  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    const bool y_here = in_place(f.y) && fused(f.activation);
    const int64_t line = line_stride(f.tile_rows);
    const int64_t y_stride = y_here ? f.y.stride : row_stride(f.y.features);
    float* x = scratch;
    float* y_tile = scratch + lines(f.x.features) * line;
    const Activation inside = fused(f.activation) ? f.activation : Activation::kNone;
    for (; row < end; row += f.tile_rows) {
      const int64_t rows = smaller(f.tile_rows, end - row);
      load_tile(x, line, f.x, row, rows);
      float* y = y_here ? static_cast<float*>(row_of(f.y, row)) : y_tile;
      multiply(f.panels, x, line, f.weight, f.in_place, f.buffer, f.bias, {y, y_stride, 0}, inside,
               rows);
      if (y_here) continue;
      for (int64_t r = 0; r < rows; ++r) {
        float* of = y_tile + r * y_stride;
        if (f.z.data != nullptr) {
          store(row_of(f.z, row + r), f.z.dtype, f.z.order, of, f.z.features);
        }
        if (!fused(f.activation)) activate_row(f.activation, of, f.y.features);
        store(row_of(f.y, row + r), f.y.dtype, f.y.order, of, f.y.features);
      }
    }
  }

  static void activate_row(Activation a, float* line, int64_t count) {
    dispatch<I>(a, [&]<Activation A>() {
      for (int64_t n = 0; n < count; n += L) {  // a tile's rows are padded
        I::store(line + n, activate<I, A>(I::load(line + n)));
      }
    });
  }

  // --- Backward ----------------------------------------------------------------------------

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
    constexpr int kUnrolled = 4 / N;  // the loop itself would cost a tenth and more
    const float* x = s.x;
    const float* g = s.g;
    int64_t left = s.rows;
    if (N == 2 && s.add) {  // large sums, which are needed when the rows are through
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
      for (int64_t n = panel.segments; n < panel.segments_end; ++n) {
        int64_t slot = view.segments[n].first;
        for (int64_t left = view.segments[n].length; left > 0;) {
          // As far as the line goes, in nearly equal parts: without a division, as in Cut.
          const int64_t here = smaller(left, L - slot % L);
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

  // grad_z of a tile, every panel beginning a line; lanes without a unit are zero.
  template <Activation A>
  static void gradient_tile(const Backward& b, float* g, int64_t line, int64_t row, int64_t rows) {
    with_dtype(b.grad_y.dtype, [&]<Dtype D>() {
      float saved[kTogether * L];
      for (int64_t r = 0; r < rows; r += kTogether) {
        float* to = g + r * L;
        const int64_t some = smaller(kTogether, rows - r);
        for (int64_t p = 0; p < b.panels.count; ++p) {
          const Panel& panel = b.panels.panels[p];
          for (int64_t n = 0; n < panel.lanes; n += L, to += line) {
            const int64_t column = panel.first + n, count = smaller(L, panel.lanes - n);
            if constexpr (A == Activation::kNone) {
              load_line<D>(to, b.grad_y, row + r, some, column, count,
                           [](V a, int64_t) { return a; });
            } else {
              load_line<D>(saved, b.saved, row + r, some, column, count,
                           [](V a, int64_t) { return a; });
              load_line<D>(to, b.grad_y, row + r, some, column, count, [&](V a, int64_t k) {
                return activation_grad<I, A>(a, I::load(saved + k * L));
              });
            }
          }
        }
      }
    });
  }

  static void gradient(const Backward& b, float* g, int64_t line, int64_t row, int64_t rows) {
    dispatch<I>(b.activation, [&]<Activation A>() { gradient_tile<A>(b, g, line, row, rows); });
  }

  static int64_t backward_scratch(const Backward& b) {
    const int64_t line = line_stride(b.tile_rows);
    int64_t size = b.panels.lines * line;
    if (b.need_weight) size += lines(b.x.features) * line;
    if (b.grad_x.data != nullptr && !in_place(b.grad_x)) {
      size += b.tile_rows * row_stride(b.grad_x.features);
    }
    return size;
  }

  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                       float* grad_buffer, float* grad_bias, float* scratch) {
    const bool out_here = b.grad_x.data != nullptr && in_place(b.grad_x);
    const int64_t line = line_stride(b.tile_rows);
    const int64_t out_stride = out_here ? b.grad_x.stride : row_stride(b.grad_x.features);
    float* g = scratch;
    float* x = g + b.panels.lines * line;
    float* out_tile = x + (b.need_weight ? lines(b.x.features) * line : 0);
    for (bool add = false; row < end; row += b.tile_rows, add = true) {
      const int64_t rows = smaller(b.tile_rows, end - row);
      gradient(b, g, line, row, rows);
      if (b.grad_x.data != nullptr) {
        float* out = out_here ? static_cast<float*>(row_of(b.grad_x, row)) : out_tile;
        multiply(b.turned, g, line, nullptr, Place::kNowhere, b.turned_buffer, nullptr,
                 {out, out_stride, 0}, Activation::kNone, rows);
        for (int64_t r = 0; !out_here && r < rows; ++r) {
          store(row_of(b.grad_x, row + r), b.grad_x.dtype, b.grad_x.order,
                out_tile + r * out_stride, b.grad_x.features);
        }
      }
      if (b.need_weight) {
        load_tile(x, line, b.x, row, rows);
        weight_sums(b.panels, b.in_place, x, g, line, rows, grad_weight, grad_buffer, add);
      }
      if (b.need_bias) bias_sums(b.panels, g, line, rows, grad_bias, add);
    }
  }

  // A tile is summed by itself first: with many tiles, rounding stays small.
  static void bias_sums(const PanelsView& view, const float* g, int64_t line, int64_t rows,
                        float* total, bool add) {
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      for (int64_t n = 0; n < panel.lanes; n += L, g += line) {
        const int64_t count = smaller(L, panel.lanes - n);
        const M live = I::mask(~0u >> (32 - count));
        V part[4] = {I::zero(), I::zero(), I::zero(), I::zero()};  // one would wait for itself
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) part[k] = I::add(part[k], I::load(g + (r + k) * L));
        }
        for (; r < rows; ++r) part[0] = I::add(part[0], I::load(g + r * L));
        const V sum = I::add(I::add(part[0], part[1]), I::add(part[2], part[3]));
        float* to = total + panel.first + n;
        I::store(to, add ? I::add(I::load(to, live), sum) : sum, live);
      }
    }
  }

};

}  // namespace maskmoe
