// The masked linear map on rows of a batch, for one instruction set `I` (simd_*.h).
//
// Forward: a tile is R rows by one panel of lanes (units). Its sums stay in registers while the
// panel's segments are walked; each step loads the weights of one input for all lanes and
// multiplies them by that input's value in each row. Inputs that no lane sees are in no segment;
// where small blocks share a panel, a mask keeps an input from lanes that do not see it.
// grad_x is the same walk with lanes and inputs exchanged. grad_weight keeps the sums of some
// inputs by one panel in registers while it walks down the rows.
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

  // Rows this far apart do not fall on the same few cache sets.
  static int64_t row_stride(int64_t features) {
    int64_t n = round_up(features, 16);
    return n % 128 == 0 ? n + 16 : n;
  }
  static bool collides(int64_t stride) { return stride % 256 == 0; }

  // --- Elements: any dtype to and from float32 -------------------------------------------

  static float widen(const void* p, Dtype dtype, int64_t n) {
    float one[L];
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(p)[n];
    uint16_t padded[L] = {static_cast<const uint16_t*>(p)[n]};
    I::store(one, dtype == Dtype::kBfloat16 ? I::load_bf16(padded) : I::load_fp16(padded));
    return one[0];
  }

  static V load_as(const void* p, Dtype dtype, int64_t n) {
    switch (dtype) {
      case Dtype::kFloat32: return I::load(static_cast<const float*>(p) + n);
      case Dtype::kBfloat16: return I::load_bf16(static_cast<const uint16_t*>(p) + n);
      default: return I::load_fp16(static_cast<const uint16_t*>(p) + n);
    }
  }

  // The last, partial vector of a row, without touching what lies behind it.
  static V load_tail(const void* p, Dtype dtype, int64_t n, int64_t count) {
    if (dtype == Dtype::kFloat32) {
      return I::load(static_cast<const float*>(p) + n, I::mask((1u << count) - 1));
    }
    uint16_t padded[L] = {};
    for (int64_t k = 0; k < count; ++k) padded[k] = static_cast<const uint16_t*>(p)[n + k];
    return dtype == Dtype::kBfloat16 ? I::load_bf16(padded) : I::load_fp16(padded);
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
    int64_t n = 0;
    for (; n + L <= count; n += L) I::store(to + n, load_as(from, dtype, n));
    if (n < count) {
      I::store(to + n, load_tail(from, dtype, n, count - n), I::mask((1u << (count - n)) - 1));
    }
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

  // Can tiles be read or written where the matrix has them?
  static bool in_place(const Matrix& m) {
    return m.dtype == Dtype::kFloat32 && m.order == nullptr && !collides(m.stride);
  }

  // --- Weights ---------------------------------------------------------------------------

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
                   Dtype dtype, bool skip_direct, float* buffer) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (skip_direct && panel.direct) continue;
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
          float line[64];
          for (int64_t lane = 0; lane < copy.lanes; ++lane) {
            const uint16_t* from =
                static_cast<const uint16_t*>(weight) + copy.packed + lane * copy.lane_step;
            for (int64_t k = 0; k < copy.inputs; k += 64) {
              const int64_t count = smaller(64, copy.inputs - k);
              if (copy.input_step == 1) {
                load(line, from + k, dtype, nullptr, count);
              } else {
                for (int64_t n = 0; n < count; ++n) {
                  line[n] = widen(from, dtype, (k + n) * copy.input_step);
                }
              }
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
                     bool skip_direct, float* weight) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (skip_direct && panel.direct) continue;
      const int64_t width = panel.vectors * L;
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        const float* from = buffer + panel.buffer + copy.row * width + copy.lane;
        float* to = weight + copy.packed;
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
    const float* x;
    int64_t x_stride;
    const float* weight;
    int64_t weight_stride;
    const Segment *segments, *segments_end;
    const float* bias;  // of the panel's first lane, or null
    float* y;
    int64_t y_stride;
    int32_t lanes;
    Activation activation;  // none, relu or leaky_relu
  };

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
    for (const Segment* s = t.segments; s != t.segments_end; ++s) {
      const float* x = t.x + s->first;
      // The rows of the next tile lie too far apart for the machine to foresee them.
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(x + (R + r) * t.x_stride);
        if (s->length > 16) __builtin_prefetch(x + 16 + (R + r) * t.x_stride);
      }
      M seen{};
      if constexpr (Shared) seen = I::mask(s->mask);
      for (const float* end = x + s->length; x != end; ++x, w += t.weight_stride) {
        V b[N];
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) b[v] = I::load(w + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          V a = I::set(x[r * t.x_stride]);
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
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* y = t.y + r * t.y_stride;
      __builtin_prefetch(y + R * t.y_stride, 1);
      if constexpr (N == 2) __builtin_prefetch(y + R * t.y_stride + L, 1);
      if constexpr (N == 2) I::store(y, sum[r][0]);
      I::store(y + (N - 1) * L, sum[r][N - 1], last);
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

  // All panels on `rows` rows; y in block order.
  static void multiply(const PanelsView& view, const float* x, int64_t x_stride,
                       const float* weight, const float* buffer, const float* bias, float* y,
                       int64_t y_stride, Activation activation, int64_t rows) {
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      const bool direct = weight != nullptr && panel.direct;
      Tile tile{x,
                x_stride,
                direct ? weight + panel.weight : buffer + panel.buffer,
                direct ? panel.stride : panel.vectors * L,
                view.segments + panel.segments,
                view.segments + panel.segments_end,
                bias == nullptr ? nullptr : bias + panel.first,
                y + panel.first,
                y_stride,
                panel.lanes,
                activation};
      const Product* of = panel.shared ? table.shared : panel.vectors == 2 ? table.two : table.one;
      const int64_t most = panel.vectors == 2 ? I::kRows2 : I::kRows1;
      // Tiles of nearly equal height.
      for (int64_t left = rows, tiles = (rows + most - 1) / most; tiles > 0; --tiles) {
        const int64_t height = (left + tiles - 1) / tiles;
        of[height](tile);
        tile.x += height * x_stride;
        tile.y += height * y_stride;
        left -= height;
      }
    }
  }

  // --- Forward -----------------------------------------------------------------------------

  static bool fused(Activation a) {
    return a == Activation::kNone || a == Activation::kRelu || a == Activation::kLeakyRelu;
  }

  static int64_t forward_scratch(const Forward& f) {
    int64_t size = 0;
    if (!in_place(f.x)) size += f.tile_rows * row_stride(f.x.features);
    if (!in_place(f.y) || !fused(f.activation)) size += f.tile_rows * row_stride(f.y.features);
    return size;
  }

  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    const bool x_here = in_place(f.x), y_here = in_place(f.y) && fused(f.activation);
    const int64_t x_stride = x_here ? f.x.stride : row_stride(f.x.features);
    const int64_t y_stride = y_here ? f.y.stride : row_stride(f.y.features);
    float* x_tile = scratch;
    float* y_tile = scratch + (x_here ? 0 : f.tile_rows * x_stride);
    const Activation inside = fused(f.activation) ? f.activation : Activation::kNone;
    for (; row < end; row += f.tile_rows) {
      const int64_t rows = smaller(f.tile_rows, end - row);
      const float* x = x_tile;
      if (x_here) {
        x = static_cast<const float*>(row_of(f.x, row));
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          load(x_tile + r * x_stride, row_of(f.x, row + r), f.x.dtype, f.x.order, f.x.features);
        }
      }
      float* y = y_here ? static_cast<float*>(row_of(f.y, row)) : y_tile;
      multiply(f.panels, x, x_stride, f.weight, f.buffer, f.bias, y, y_stride, inside, rows);
      if (y_here) continue;
      for (int64_t r = 0; r < rows; ++r) {
        float* line = y_tile + r * y_stride;
        if (f.z.data != nullptr) {
          store(row_of(f.z, row + r), f.z.dtype, f.z.order, line, f.z.features);
        }
        if (!fused(f.activation)) activate_row(f.activation, line, f.y.features);
        store(row_of(f.y, row + r), f.y.dtype, f.y.order, line, f.y.features);
      }
    }
  }

  template <Activation A>
  static void activate_all(float* line, int64_t count) {
    for (int64_t n = 0; n < count; n += L) {  // a tile's rows are padded
      I::store(line + n, activate<I, A>(I::load(line + n)));
    }
  }

  static void activate_row(Activation a, float* line, int64_t count) {
    if (a == Activation::kGelu) activate_all<Activation::kGelu>(line, count);
    if (a == Activation::kTanh) activate_all<Activation::kTanh>(line, count);
    if (a == Activation::kSilu) activate_all<Activation::kSilu>(line, count);
  }

  // --- Backward ----------------------------------------------------------------------------

  static constexpr int64_t kAhead = 8;  // rows to fetch ahead of the sums

  struct Sums {
    const float* x;  // of the first input
    int64_t x_stride;
    const float* g;  // of the panel's first lane
    int64_t g_stride;
    int64_t rows;
    float* to;
    int64_t to_stride;
    bool add;
  };

  // to[k] (+)= sum over rows of x[k] * g, for K inputs by N vectors of lanes.
  template <int K, int N>
  static void outer(const Sums& s) {
    V sum[K][N];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[k][v] = I::zero();
    }
    const float* x = s.x;
    const float* g = s.g;
    for (int64_t r = 0; r < s.rows; ++r, x += s.x_stride, g += s.g_stride) {
      V b[N];
      __builtin_prefetch(x + kAhead * s.x_stride);
      __builtin_prefetch(g + kAhead * s.g_stride);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) b[v] = I::load(g + v * L);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        V a = I::set(x[k]);
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) sum[k][v] = I::fma(a, b[v], sum[k][v]);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      float* to = s.to + k * s.to_stride;
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        I::store(to + v * L, s.add ? I::add(I::load(to + v * L), sum[k][v]) : sum[k][v]);
      }
    }
  }

  using Outer = void (*)(const Sums&);

  template <int N, int K>
  static constexpr void outers(Outer* table) {
    table[K] = outer<K, N>;
    if constexpr (K > 1) outers<N, K - 1>(table);
  }

  struct Outers {
    Outer one[I::kRows1 + 1]{}, two[I::kRows2 + 1]{};
    constexpr Outers() {
      outers<1, I::kRows1>(one);
      outers<2, I::kRows2>(two);
    }
  };
  static constexpr Outers outer_table{};

  static void weight_sums(const Backward& b, const float* x, int64_t x_stride, const float* g,
                          int64_t g_stride, int64_t rows, float* grad_weight, float* grad_buffer,
                          bool add) {
    for (int64_t p = 0; p < b.panels.count; ++p) {
      const Panel& panel = b.panels.panels[p];
      const bool direct = b.direct && panel.direct;
      const int64_t stride = direct ? panel.stride : panel.vectors * L;
      Sums sums{nullptr, x_stride, g + panel.first, g_stride, rows,
                direct ? grad_weight + panel.weight : grad_buffer + panel.buffer, stride, add};
      const Outer* of = panel.vectors == 2 ? outer_table.two : outer_table.one;
      const int64_t most = panel.vectors == 2 ? I::kRows2 : I::kRows1;
      for (int64_t n = panel.segments; n < panel.segments_end; ++n) {
        const Segment& segment = b.panels.segments[n];
        sums.x = x + segment.first;
        for (int64_t left = segment.length, parts = (left + most - 1) / most; parts > 0; --parts) {
          const int64_t inputs = (left + parts - 1) / parts;
          of[inputs](sums);
          sums.x += inputs;
          sums.to += inputs * stride;
          left -= inputs;
        }
      }
    }
  }

  template <Activation A>
  static void gradient_rows(const Backward& b, float* g, int64_t g_stride, int64_t row,
                            int64_t rows) {
    const Matrix& y = b.grad_y;
    for (int64_t r = 0; r < rows; ++r, g += g_stride) {
      const void* given = row_of(y, row + r);
      if (y.order != nullptr || A == Activation::kNone) {
        load(g, given, y.dtype, y.order, y.features);
      }
      if constexpr (A == Activation::kNone) continue;
      const void* saved = row_of(b.saved, row + r);
      if (y.order != nullptr) {
        for (int64_t n = 0; n < y.features; ++n) {
          V one = activation_grad<I, A>(I::set(g[n]), I::set(widen(saved, y.dtype, y.order[n])));
          I::store(g + n, one, I::mask(1));
        }
        continue;
      }
      int64_t n = 0;
      for (; n + L <= y.features; n += L) {
        I::store(g + n, activation_grad<I, A>(load_as(given, y.dtype, n),
                                              load_as(saved, y.dtype, n)));
      }
      if (n < y.features) {
        const int64_t count = y.features - n;
        V tail = activation_grad<I, A>(load_tail(given, y.dtype, n, count),
                                       load_tail(saved, y.dtype, n, count));
        I::store(g + n, tail, I::mask((1u << count) - 1));
      }
    }
  }

  // grad_z of a tile, in block order.
  static void gradient(const Backward& b, float* g, int64_t g_stride, int64_t row, int64_t rows) {
    switch (b.activation) {
      case Activation::kNone: gradient_rows<Activation::kNone>(b, g, g_stride, row, rows); break;
      case Activation::kRelu: gradient_rows<Activation::kRelu>(b, g, g_stride, row, rows); break;
      case Activation::kLeakyRelu:
        gradient_rows<Activation::kLeakyRelu>(b, g, g_stride, row, rows);
        break;
      case Activation::kGelu: gradient_rows<Activation::kGelu>(b, g, g_stride, row, rows); break;
      case Activation::kTanh: gradient_rows<Activation::kTanh>(b, g, g_stride, row, rows); break;
      case Activation::kSilu: gradient_rows<Activation::kSilu>(b, g, g_stride, row, rows); break;
    }
  }

  // A panel's partial last vector reads up to L - 1 floats behind a row; a tile has them.
  static bool gradient_in_place(const Backward& b) {
    return b.activation == Activation::kNone && in_place(b.grad_y) && b.full;
  }

  static int64_t backward_scratch(const Backward& b) {
    int64_t size = row_stride(b.grad_y.features) + L;  // a tile's bias sums
    if (!gradient_in_place(b)) size += b.tile_rows * row_stride(b.grad_y.features) + 2 * L;
    if (b.need_weight && !in_place(b.x)) size += b.tile_rows * row_stride(b.x.features);
    if (b.grad_x.data != nullptr && !in_place(b.grad_x)) {
      size += b.tile_rows * row_stride(b.grad_x.features);
    }
    return round_up(size, 16);
  }

  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                       float* grad_buffer, float* grad_bias, float* scratch) {
    const bool g_here = gradient_in_place(b), x_here = in_place(b.x);
    const bool out_here = b.grad_x.data != nullptr && in_place(b.grad_x);
    const int64_t g_stride = g_here ? b.grad_y.stride : row_stride(b.grad_y.features);
    const int64_t x_stride = x_here ? b.x.stride : row_stride(b.x.features);
    const int64_t out_stride = out_here ? b.grad_x.stride : row_stride(b.grad_x.features);
    float* part = scratch;
    scratch += round_up(row_stride(b.grad_y.features) + L, 16);
    float* g_tile = scratch;
    if (!g_here) scratch += round_up(b.tile_rows * g_stride + 2 * L, 16);
    float* x_tile = scratch;
    if (b.need_weight && !x_here) scratch += b.tile_rows * x_stride;
    float* out_tile = scratch;
    for (bool add = false; row < end; row += b.tile_rows, add = true) {
      const int64_t rows = smaller(b.tile_rows, end - row);
      const float* g = g_tile;
      if (g_here) {
        g = static_cast<const float*>(row_of(b.grad_y, row));
      } else {
        gradient(b, g_tile, g_stride, row, rows);
      }
      if (b.grad_x.data != nullptr) {
        float* out = out_here ? static_cast<float*>(row_of(b.grad_x, row)) : out_tile;
        multiply(b.turned, g, g_stride, nullptr, b.turned_buffer, nullptr, out, out_stride,
                 Activation::kNone, rows);
        for (int64_t r = 0; !out_here && r < rows; ++r) {
          store(row_of(b.grad_x, row + r), b.grad_x.dtype, b.grad_x.order,
                out_tile + r * out_stride, b.grad_x.features);
        }
      }
      if (b.need_weight) {
        const float* x = x_tile;
        if (x_here) {
          x = static_cast<const float*>(row_of(b.x, row));
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            load(x_tile + r * x_stride, row_of(b.x, row + r), b.x.dtype, b.x.order, b.x.features);
          }
        }
        weight_sums(b, x, x_stride, g, g_stride, rows, grad_weight, grad_buffer, add);
      }
      if (b.need_bias) bias_sums(g, g_stride, rows, b.grad_y.features, part, grad_bias, add);
    }
  }

  // A tile is summed by itself first: with many tiles, rounding stays small.
  static void bias_sums(const float* g, int64_t g_stride, int64_t rows, int64_t count, float* part,
                        float* total, bool accumulate) {
    float* to = accumulate ? part : total;
    for (int64_t n = 0; n < count; n += L) {
      const M live = count - n < L ? I::mask((1u << (count - n)) - 1) : I::mask(~0u);
      V sum = I::load(g + n, live);
      for (int64_t r = 1; r < rows; ++r) sum = I::add(sum, I::load(g + n + r * g_stride, live));
      I::store(to + n, sum, live);
    }
    if (accumulate) add(total, part, count);
  }

  static constexpr Kernels kernels(const char* name) {
    return {name, L, pack, unpack, forward_scratch, forward, backward_scratch, backward,
            add,  load, store};
  }
};

}  // namespace maskmoe
