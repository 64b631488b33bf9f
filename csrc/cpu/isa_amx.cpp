// bfloat16 on AMX: sums of 16 rows by 16 lanes, 32 inputs a step. Other dtypes use AVX-512.
//
// Rows lie in lines of 32 slots, two vectors of lanes long: 16 rows of a line are one tile. A panel
// sees `pieces`: halves of lines, of which it may see a part. Two pieces make a step. Where they
// are the two halves of a line and seen as a whole, the tile is read where it lies; else what is
// seen is copied between zeros: what is not seen must not be multiplied, not even by zero.
//
// Weights are packed to match: per step and vector of lanes a tile of 16 pairs of inputs, in the
// room that their float32 values would take. Panels that do not fit there (their tiles would be
// more than half empty) and panels whose lanes see different segments are left to AVX-512.
#include "amx.h"
#include "masked_linear.h"
#include "simd_avx512.h"

namespace maskmoe {
namespace amx {

// Under a name of its own: what is compiled here for AMX stands in for nothing compiled elsewhere.
struct Isa : avx512::Isa {};

struct Kernel {
  using Float = MaskedLinear<Isa>;
  using V = Isa::V;
  static constexpr int64_t L = Isa::kLanes;
  static constexpr int64_t kLine = 2 * L;  // slots
  static constexpr int64_t kBlock = 32;    // rows that are computed together

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
  static __mmask16 lowest(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

  // --- What a panel sees ---------------------------------------------------------------------

  // Slots 16 * index and up; `seen`: which of the 16.
  struct Piece {
    int64_t index;
    uint32_t seen;
  };

  // Goes through the pieces of a panel. Inputs lie in ascending order, in a piece, too.
  struct Pieces {
    const Segment *segment, *end;
    int64_t done = 0;  // of the segment

    Pieces(const PanelsView& view, const Panel& panel)
        : segment(view.segments + panel.segments), end(view.segments + panel.segments_end) {}

    bool next(Piece& piece) {
      if (segment == end) return false;
      piece = {(segment->first + done) / L, 0};
      while (segment != end && (segment->first + done) / L == piece.index) {
        const int64_t slot = (segment->first + done) % L;
        const int64_t count = smaller(L - slot, segment->length - done);
        piece.seen |= static_cast<uint32_t>(lowest(count)) << slot;
        done += count;
        if (done == segment->length) ++segment, done = 0;
      }
      return true;
    }
  };

  // How many pieces a panel has; 0: it is left to AVX-512.
  static int64_t count_pieces(const PanelsView& view, const Panel& panel) {
    if (panel.shared) return 0;
    const int64_t most = panel.depth / L * 2;  // a step takes the room of 16 inputs
    int64_t count = 0;
    Piece piece;
    for (Pieces pieces(view, panel); pieces.next(piece);) {
      if (++count > most) return 0;
    }
    return count;
  }

  // What tiles of inputs the panels need.
  struct Needs {
    int64_t pieces = 0;  // at most in one panel; 0: no lines
    bool floats = false;
    explicit Needs(const PanelsView& view) {
      for (int64_t p = 0; p < view.count; ++p) {
        const int64_t count = count_pieces(view, view.panels[p]);
        pieces = larger(pieces, count);
        floats = floats || count == 0;
      }
    }
  };

  // --- Weights -------------------------------------------------------------------------------

  // 16 by 16 words, rows to columns.
  static void transpose(__m512i (&r)[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // b[4i + c]: of four rows, columns c, 4 + c, 8 + c and 12 + c.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
      b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
      b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
      b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
      const __m512i odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
      const __m512i even2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
      const __m512i odd2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
      r[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
      r[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
      r[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
      r[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
  }

  static void add_bits(float* to, __m512i bits) {
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_loadu_si512(to), bits));
  }

  // The weights of `count` neighbouring inputs, from `slot` of a piece on, to its half of a tile:
  // eight rows of pairs for each vector of lanes.
  static void pack_run(float* tile, const uint16_t* from, const Copy& copy, int64_t slot,
                       int64_t count) {
    for (int64_t lane = 0; lane < copy.lanes; lane += L, tile += kTileFloats) {
      const int64_t lanes = smaller(L, copy.lanes - lane);
      const uint16_t* at = from + lane * copy.lane_step;
      if (copy.lane_step == 1) {
        for (int64_t k = 0; k < count; ++k) {
          const __m256i one = _mm256_maskz_loadu_epi16(lowest(lanes), at + k * copy.input_step);
          const __m512i wide = _mm512_cvtepu16_epi32(one);
          const int64_t row = slot + k;
          add_bits(tile + row / 2 * L, row % 2 ? _mm512_slli_epi32(wide, 16) : wide);
        }
      } else {
        // Inputs lie side by side: pairs are words already. Masked, nothing else is read.
        const auto seen = static_cast<__mmask16>(lowest(count) << slot);
        __m512i rows[L];
        for (int64_t n = 0; n < L; ++n) {
          rows[n] = n < lanes ? _mm512_zextsi256_si512(_mm256_maskz_loadu_epi16(
                                    seen, at + n * copy.lane_step - slot))
                              : _mm512_setzero_si512();
        }
        transpose(rows);
        for (int64_t n = 0; n < L / 2; ++n) add_bits(tile + n * L, rows[n]);
      }
    }
  }

  static void pack_panel(const PanelsView& view, const Panel& panel, int64_t pieces,
                         const uint16_t* weight, float* to) {
    const int64_t step = panel.vectors * kTileFloats;
    for (int64_t n = 0; n < (pieces + 1) / 2 * step; n += L) Isa::store(to + n, Isa::zero());
    const Copy* copy = view.copies + panel.copies;
    int64_t input = 0, n = 0;  // inputs of the panel, pieces
    Piece piece;
    for (Pieces all(view, panel); all.next(piece); ++n) {
      float* tile = to + n / 2 * step + n % 2 * (kTileFloats / 2);
      while (piece.seen != 0) {
        while (input == copy->row + copy->inputs) ++copy;
        const int64_t slot = __builtin_ctz(piece.seen);
        const int64_t run = __builtin_ctz(~(piece.seen >> slot));
        const bool words = copy->lane_step == 1 || copy->input_step == 1;
        const int64_t count = smaller(words ? run : 1, copy->row + copy->inputs - input);
        pack_run(tile, weight + copy->packed + (input - copy->row) * copy->input_step, *copy, slot,
                 count);
        piece.seen &= ~(static_cast<uint32_t>(lowest(count)) << slot);
        input += count;
      }
    }
  }

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
                   Dtype dtype, Place in_place, float* buffer) {
    if (dtype != Dtype::kBfloat16) {
      kAvx512.pack(view, begin, end, weight, dtype, in_place, buffer);
      return;
    }
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (const int64_t pieces = count_pieces(view, panel)) {
        pack_panel(view, panel, pieces, static_cast<const uint16_t*>(weight),
                   buffer + panel.buffer);
      } else {
        Float::pack(view, p, p + 1, weight, dtype, in_place, buffer);
      }
    }
  }

  // --- Rows ----------------------------------------------------------------------------------

  // All sizes in floats: a line of 32 slots is as long as one of 16 floats.
  static int64_t tile_rows(int64_t wanted) { return Float::round_up(wanted, kBlock); }
  static int64_t lines(int64_t slots) { return (slots + kLine - 1) / kLine; }

  static const uint16_t* row_of(const Matrix& m, int64_t row) {
    return static_cast<const uint16_t*>(m.data) + row * m.stride;
  }

  // Rows of a matrix to lines, with zeros behind the last feature.
  static void load_lines(float* to, int64_t line, const Matrix& m, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r, to += L) {
      const uint16_t* from = row_of(m, row + r);
      float* at = to;
      for (int64_t n = 0; n < m.features; n += kLine, at += line) {
        const int64_t count = smaller(kLine, m.features - n);
        if (m.order != nullptr) {
          uint16_t slots[kLine] = {};
          for (int64_t k = 0; k < count; ++k) slots[k] = from[m.order[n + k]];
          _mm512_storeu_si512(at, _mm512_loadu_si512(slots));
        } else if (count == kLine) {
          _mm512_storeu_si512(at, _mm512_loadu_si512(from + n));
        } else {
          _mm512_storeu_si512(at, _mm512_maskz_loadu_epi16((1u << count) - 1, from + n));
        }
      }
    }
  }

  // A tile of floats, rounded: lines of 16 to lines of 32.
  static void round_lines(float* to, const float* from, int64_t line, int64_t count,
                          int64_t rows) {
    for (int64_t n = 0; n < count; ++n) {
      const float* at = from + n * line;
      auto* half = reinterpret_cast<uint16_t*>(to + n / 2 * line) + n % 2 * L;
      for (int64_t r = 0; r < rows; ++r) Isa::store_bf16(half + r * kLine, Isa::load(at + r * L));
    }
  }

  // 16 rows of a step between zeros. `x`: the tile of lines, at the first row.
  static void copy_seen(float* to, const float* x, int64_t line, const Piece& a, const Piece& b) {
    const auto* low = reinterpret_cast<const uint16_t*>(x + a.index / 2 * line) + a.index % 2 * L;
    const auto* high = reinterpret_cast<const uint16_t*>(x + b.index / 2 * line) + b.index % 2 * L;
    const auto in_low = static_cast<__mmask16>(a.seen), in_high = static_cast<__mmask16>(b.seen);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTileRows; ++r, to += L) {
      const __m256i first = _mm256_maskz_loadu_epi16(in_low, low + r * kLine);
      const __m256i second = _mm256_maskz_loadu_epi16(in_high, high + r * kLine);
      _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
  }

  // --- The product: 16 or 32 rows by one or two vectors of lanes -------------------------------

  struct Product {
    const float* x;  // the tile of lines, at the first row
    int64_t line;
    const Piece* pieces;
    int64_t count;
    const float* weight;
    const float* bias;  // 32 floats, or null
    float* sums;        // 32 by 32
    float* seen;        // two tiles
  };

  // Registers: sums 0 to 3, x 4 and 5, weights 6 and 7.
  template <int R, int N>
  static void product(const Product& p) {
    if (p.bias != nullptr) {
      Tiles::load<0>(p.bias, 0);
      if constexpr (N == 2) Tiles::load<1>(p.bias + L, 0);
      if constexpr (R == 2) Tiles::load<2>(p.bias, 0);
      if constexpr (R == 2 && N == 2) Tiles::load<3>(p.bias + L, 0);
    } else {
      Tiles::zero<0>();
      if constexpr (N == 2) Tiles::zero<1>();
      if constexpr (R == 2) Tiles::zero<2>();
      if constexpr (R == 2 && N == 2) Tiles::zero<3>();
    }
    const float* w = p.weight;
    for (int64_t n = 0; n < p.count; n += 2, w += N * kTileFloats) {
      const Piece a = p.pieces[n];
      const Piece b = n + 1 < p.count ? p.pieces[n + 1] : Piece{a.index, 0};
      const bool whole = (a.seen & b.seen) == 0xffff && a.index % 2 == 0 && b.index == a.index + 1;
      const float* rows = whole ? p.x + a.index / 2 * p.line : p.seen;
      if (!whole) {
        copy_seen(p.seen, p.x, p.line, a, b);
        if constexpr (R == 2) {
          copy_seen(p.seen + kTileFloats, p.x + kTileFloats, p.line, a, b);
        }
      }
      Tiles::load<6>(w, kTileBytes);
      if constexpr (N == 2) Tiles::load<7>(w + kTileFloats, kTileBytes);
      Tiles::load<4>(rows, kTileBytes);
      Tiles::dot<0, 4, 6>();
      if constexpr (N == 2) Tiles::dot<1, 4, 7>();
      if constexpr (R == 2) {
        Tiles::load<5>(rows + kTileFloats, kTileBytes);
        Tiles::dot<2, 5, 6>();
        if constexpr (N == 2) Tiles::dot<3, 5, 7>();
      }
    }
    Tiles::store<0>(p.sums, kBlock * 4);
    if constexpr (N == 2) Tiles::store<1>(p.sums + L, kBlock * 4);
    if constexpr (R == 2) Tiles::store<2>(p.sums + L * kBlock, kBlock * 4);
    if constexpr (R == 2 && N == 2) Tiles::store<3>(p.sums + L * kBlock + L, kBlock * 4);
  }

  // Where results go, and what is done to them first.
  struct Results {
    const Matrix &y, *z;  // z null: the pre-activation is not kept
    Activation activation;
  };

  static void put(const Matrix& m, int64_t row, int64_t column, int64_t count, V a) {
    auto* to = static_cast<uint16_t*>(m.data) + row * m.stride;
    if (m.order == nullptr && count == L) {
      Isa::store_bf16(to + column, a);
      return;
    }
    alignas(32) uint16_t lanes[L];
    Isa::store_bf16(lanes, a);
    if (m.order == nullptr) {
      const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
      _mm256_mask_storeu_epi16(to + column, lowest(count), bits);
    } else {
      for (int64_t k = 0; k < count; ++k) to[m.order[column + k]] = lanes[k];
    }
  }

  template <Activation A>
  static void finish_as(const Results& to, int64_t row, int64_t rows, const Panel& panel,
                        const float* sums) {
    for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
      for (int64_t n = 0; n < panel.lanes; n += L) {
        const int64_t column = panel.first + n, count = smaller(L, panel.lanes - n);
        const V a = Isa::load(sums + n);
        if (to.z != nullptr) put(*to.z, row + r, column, count, a);
        put(to.y, row + r, column, count, activate<Isa, A>(a));
      }
    }
  }

  static void finish(const Results& to, int64_t row, int64_t rows, const Panel& panel,
                     const float* sums) {
    dispatch<Isa>(to.activation,
                  [&]<Activation A>() { finish_as<A>(to, row, rows, panel, sums); });
  }

  static int64_t pieces_size(int64_t count) {
    return Float::round_up(count * static_cast<int64_t>(sizeof(Piece)) / 4, L);
  }
  // Bias, sums, copied rows and pieces.
  static int64_t multiply_scratch(const Needs& needs) {
    return kBlock + kBlock * kBlock + 2 * kTileFloats + pieces_size(needs.pieces);
  }

  // All panels on rows [row, row + rows) of the results, from tiles of lines and of floats.
  static void multiply(const PanelsView& view, const float* x, const float* floats, int64_t line,
                       const float* buffer, const float* bias, const Results& to, int64_t row,
                       int64_t rows, float* scratch) {
    float* padded = scratch;
    float* sums = padded + kBlock;
    float* seen = sums + kBlock * kBlock;
    auto* pieces = reinterpret_cast<Piece*>(seen + 2 * kTileFloats);
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      if (const int64_t count = count_pieces(view, panel)) {
        Pieces all(view, panel);
        for (int64_t n = 0; n < count; ++n) all.next(pieces[n]);
        if (bias != nullptr) {
          for (int64_t n = 0; n < kBlock; ++n) {
            padded[n] = n < panel.lanes ? bias[panel.first + n] : 0;
          }
        }
        Product of{x, line, pieces, count, buffer + panel.buffer,
                   bias == nullptr ? nullptr : padded, sums, seen};
        for (int64_t r = 0; r < rows; r += kBlock, of.x += kBlock * L) {
          const int64_t here = smaller(kBlock, rows - r);
          if (here > kTileRows) {
            panel.vectors == 2 ? product<2, 2>(of) : product<2, 1>(of);
          } else {
            panel.vectors == 2 ? product<1, 2>(of) : product<1, 1>(of);
          }
          finish(to, row + r, here, panel, sums);
        }
      } else {
        Panel alone = panel;
        alone.first = 0;
        const PanelsView one{&alone, 1, view.lines, view.segments, view.copies};
        const int64_t most = 2 * Isa::kRows1;
        for (int64_t r = 0; r < rows; r += most) {
          const int64_t here = smaller(most, rows - r);
          Float::multiply(one, floats + r * L, line, nullptr, Place::kNowhere, buffer,
                          bias == nullptr ? nullptr : bias + panel.first, {sums, kBlock, 0},
                          Activation::kNone, here);
          finish(to, row + r, here, panel, sums);
        }
      }
    }
  }

  // --- Forward -------------------------------------------------------------------------------

  static int64_t forward_scratch(const Forward& f) {
    if (f.x.dtype != Dtype::kBfloat16) return kAvx512.forward_scratch(f);
    const Needs needs(f.panels);
    const int64_t line = Float::line_stride(tile_rows(f.tile_rows));
    return multiply_scratch(needs) + (needs.pieces > 0 ? lines(f.x.features) * line : 0) +
           (needs.floats ? Float::lines(f.x.features) * line : 0);
  }

  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    if (f.x.dtype != Dtype::kBfloat16) {
      kAvx512.forward(f, row, end, scratch);
      return;
    }
    const Needs needs(f.panels);
    const int64_t tile = tile_rows(f.tile_rows), line = Float::line_stride(tile);
    float* x = scratch + multiply_scratch(needs);
    float* floats = x + (needs.pieces > 0 ? lines(f.x.features) * line : 0);
    const Results to{f.y, f.z.data == nullptr ? nullptr : &f.z, f.activation};
    Tiles::configure();
    for (; row < end; row += tile) {
      const int64_t rows = smaller(tile, end - row);
      if (needs.pieces > 0) load_lines(x, line, f.x, row, rows);
      if (needs.floats) Float::load_tile(floats, line, f.x, row, rows);
      multiply(f.panels, x, floats, line, f.buffer, f.bias, to, row, rows, scratch);
    }
    Tiles::release();
  }

  // --- Backward ------------------------------------------------------------------------------

  // Pairs of rows, in words: the low halves are row 2n, the high ones row 2n + 1.
  static __m512i pair(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }

  // x, every 32 rows of 16 slots as a tile: its rows are slots, its columns rows of x. Where there
  // is no row there are zeros, for the weights' sums go down the rows.
  static void turn(float* to, const float* x, int64_t line, int64_t count, int64_t rows) {
    for (int64_t n = 0; n < count; ++n) {
      const auto* from = reinterpret_cast<const __m256i*>(x + n / 2 * line) + n % 2;
      for (int64_t r = 0; r < rows; r += kBlock, to += kTileFloats) {
        __m512i pairs[L];
        for (int64_t k = 0; k < L; ++k) {
          const int64_t at = r + 2 * k;
          const __m256i none = _mm256_setzero_si256();
          pairs[k] = pair(at < rows ? _mm256_load_si256(from + 2 * at) : none,
                          at + 1 < rows ? _mm256_load_si256(from + 2 * at + 2) : none);
        }
        transpose(pairs);
        for (int64_t k = 0; k < L; ++k) _mm512_store_si512(to + k * L, pairs[k]);
      }
    }
  }

  // A tile of floats, rounded: every 32 rows of a line as a tile of pairs of rows.
  static void pair_rows(float* to, const float* g, int64_t line, int64_t count, int64_t rows) {
    alignas(32) uint16_t both[2][L];
    for (int64_t n = 0; n < count; ++n) {
      const float* from = g + n * line;
      for (int64_t r = 0; r < rows; r += kBlock) {
        for (int64_t k = r; k < r + kBlock; k += 2, to += L) {
          Isa::store_bf16(both[0], k < rows ? Isa::load(from + k * L) : Isa::zero());
          Isa::store_bf16(both[1], k + 1 < rows ? Isa::load(from + (k + 1) * L) : Isa::zero());
          const auto* at = reinterpret_cast<const __m256i*>(both);
          _mm512_store_si512(to, pair(_mm256_load_si256(at), _mm256_load_si256(at + 1)));
        }
      }
    }
  }

  struct Outer {
    const float *x, *x2, *g;  // the pieces' tiles, and the panel's
    int64_t next;             // from one vector of lanes to the next
    int64_t blocks;           // of rows
  };

  // Sums 0 and 1: the first piece by the vectors of lanes; 2 and 3: the second piece.
  template <int K, int N>
  static void outer(const Outer& o) {
    for (int64_t n = 0; n < o.blocks * kTileFloats; n += kTileFloats) {
      Tiles::load<6>(o.g + n, kTileBytes);
      if constexpr (N == 2) Tiles::load<7>(o.g + o.next + n, kTileBytes);
      Tiles::load<4>(o.x + n, kTileBytes);
      Tiles::dot<0, 4, 6>();
      if constexpr (N == 2) Tiles::dot<1, 4, 7>();
      if constexpr (K == 2) {
        Tiles::load<5>(o.x2 + n, kTileBytes);
        Tiles::dot<2, 5, 6>();
        if constexpr (N == 2) Tiles::dot<3, 5, 7>();
      }
    }
  }

  // Sums T and, with two vectors, T + 1 start where the last tile of rows left them. Of a piece
  // that is seen in part, they start at zero.
  template <int T>
  static void begin_sums(const Piece& piece, const float* to, int64_t vectors, bool add) {
    if (add && piece.seen == 0xffff) {
      Tiles::load<T>(to, vectors * kTileBytes);
      if (vectors == 2) Tiles::load<T + 1>(to + L, 2 * kTileBytes);
    } else {
      Tiles::zero<T>();
      if (vectors == 2) Tiles::zero<T + 1>();
    }
  }

  // Returns where the next piece's sums go.
  template <int T>
  static float* end_sums(const Piece& piece, float* to, int64_t vectors, bool add,
                         float* scratch) {
    const int64_t width = vectors * L;
    float* rows = piece.seen == 0xffff ? to : scratch;
    Tiles::store<T>(rows, width * 4);
    if (vectors == 2) Tiles::store<T + 1>(rows + L, width * 4);
    if (rows == to) return to + L * width;
    for (uint32_t left = piece.seen; left != 0; left &= left - 1, to += width) {
      const float* from = scratch + __builtin_ctz(left) * width;
      for (int64_t n = 0; n < width; n += L) {
        const V sum = Isa::load(from + n);
        Isa::store(to + n, add ? Isa::add(Isa::load(to + n), sum) : sum);
      }
    }
    return to;
  }

  // Rows and columns of a dot product do not mix: slots and lanes that do not see each other are
  // computed as well, shared panels included, and never read.
  static void weight_sums(const PanelsView& view, const float* x, const float* g, int64_t rows,
                          float* grad_buffer, bool add, float* scratch) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock, line = blocks * kTileFloats;
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      float* to = grad_buffer + panel.buffer;
      Piece one, two;
      for (Pieces all(view, panel); all.next(one);) {
        const bool both = all.next(two);
        const Outer of{x + one.index * line, both ? x + two.index * line : nullptr,
                       g + panel.line * line, line, blocks};
        begin_sums<0>(one, to, panel.vectors, add);
        if (both) {
          begin_sums<2>(two, to + __builtin_popcount(one.seen) * panel.vectors * L, panel.vectors,
                        add);
          panel.vectors == 2 ? outer<2, 2>(of) : outer<2, 1>(of);
        } else {
          panel.vectors == 2 ? outer<1, 2>(of) : outer<1, 1>(of);
        }
        to = end_sums<0>(one, to, panel.vectors, add, scratch);
        if (both) to = end_sums<2>(two, to, panel.vectors, add, scratch);
      }
    }
  }

  // The parts of the scratch: offsets in floats.
  struct BackwardParts {
    int64_t tile, line;
    int64_t work = 0, g, rounded, pairs, x, turned, size;

    BackwardParts(const Backward& b, const Needs& needs) {
      tile = tile_rows(b.tile_rows);
      line = Float::line_stride(tile);
      const bool lines_of_g = b.grad_x.data != nullptr && needs.pieces > 0;
      g = larger(multiply_scratch(needs), 2 * kTileFloats);
      rounded = g + b.panels.lines * line;
      pairs = rounded + (lines_of_g ? (b.panels.lines + 1) / 2 * line : 0);
      x = pairs + (b.need_weight ? b.panels.lines * (tile / 2) * L : 0);
      turned = x + (b.need_weight ? lines(b.x.features) * line : 0);
      size = turned + (b.need_weight ? Float::lines(b.x.features) * (tile / 2) * L : 0);
    }
  };

  static int64_t backward_scratch(const Backward& b) {
    if (b.x.dtype != Dtype::kBfloat16) return kAvx512.backward_scratch(b);
    return BackwardParts(b, Needs(b.turned)).size;
  }

  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                       float* grad_buffer, float* grad_bias, float* scratch) {
    if (b.x.dtype != Dtype::kBfloat16) {
      kAvx512.backward(b, row, end, grad_weight, grad_buffer, grad_bias, scratch);
      return;
    }
    const Needs needs(b.turned);
    const BackwardParts at(b, needs);
    float *g = scratch + at.g, *rounded = scratch + at.rounded, *x = scratch + at.x;
    float *pairs = scratch + at.pairs, *turned = scratch + at.turned;
    const Results to{b.grad_x, nullptr, Activation::kNone};
    Tiles::configure();
    for (bool add = false; row < end; row += at.tile, add = true) {
      const int64_t rows = smaller(at.tile, end - row);
      Float::gradient(b, g, at.line, row, rows);
      if (b.grad_x.data != nullptr) {
        if (needs.pieces > 0) round_lines(rounded, g, at.line, b.panels.lines, rows);
        multiply(b.turned, rounded, g, at.line, b.turned_buffer, nullptr, to, row, rows,
                 scratch);
      }
      if (b.need_weight) {
        load_lines(x, at.line, b.x, row, rows);
        turn(turned, x, at.line, Float::lines(b.x.features), rows);
        pair_rows(pairs, g, at.line, b.panels.lines, rows);
        weight_sums(b.panels, turned, pairs, rows, grad_buffer, add, scratch);
      }
      if (b.need_bias) Float::bias_sums(b.panels, g, at.line, rows, grad_bias, add);
    }
    Tiles::release();
  }

  // Networks keep their activations in float32.
  static int64_t network_saved(const Network& n) { return kAvx512.network_saved(n); }
  static int64_t network_scratch(const Network& n) { return kAvx512.network_scratch(n); }
  static void network(const Network& n, int64_t begin, int64_t end, const LayerSums* sums,
                      const GemSums& gem, float* scratch) {
    kAvx512.network(n, begin, end, sums, gem, scratch);
  }

  static constexpr Kernels kernels(const char* name) {
    return {name,     L,          pack,        Float::unpack, forward_scratch, forward,
            backward_scratch, backward, Float::add, Float::load, Float::store, network_saved,
            network_scratch, network};
  }
};

}  // namespace amx

#ifdef MASKMOE_EMULATE_AMX
const Kernels kAmx = amx::Kernel::kernels("amx-emulated");
#else
const Kernels kAmx = amx::Kernel::kernels("amx");
#endif

}  // namespace maskmoe
