// Sums of 16 rows by 16 lanes, 32 inputs a step.
//
// Where the two pieces of a step are the halves of a line and all of both is seen, the tile is read
// in place. Otherwise the inputs that are seen are copied and zeros put in place of the others: an
// input that is not seen must not be multiplied, not even by zero.
#pragma once

#include "cpu/amx/panels.h"
#include "cpu/masked_linear/panel_product.h"

namespace maskmoe::amx {

using FloatProduct = PanelProduct<Isa>;

// --- Rows ----------------------------------------------------------------------------------

// All sizes in floats: a line of 32 slots is as long as one of 16 floats.
inline int64_t tile_rows(int64_t wanted) { return E::round_up(wanted, kBlock); }
inline int64_t lines(int64_t slots) { return (slots + kLine - 1) / kLine; }

// Slots 16 * index and up of the first row; those of the next are a line further.
inline const uint16_t* half(const float* tile, int64_t line, int64_t index) {
  return reinterpret_cast<const uint16_t*>(tile + index / 2 * line) + index % 2 * L;
}
inline uint16_t* half(float* tile, int64_t line, int64_t index) {
  return reinterpret_cast<uint16_t*>(tile + index / 2 * line) + index % 2 * L;
}

// Rows of a matrix to lines, with zeros after the last feature.
inline void load_lines(float* to, int64_t line, const Matrix& m, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, to += L) {
    const auto* from = static_cast<const uint16_t*>(m.data) + (row + r) * m.stride;
    float* at = to;
    for (int64_t n = 0; n < m.features; n += kLine, at += line) {
      const int64_t count = min(kLine, m.features - n);
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
inline void round_lines(float* to, const float* from, int64_t line, int64_t count,
                        int64_t rows) {
  for (int64_t n = 0; n < count; ++n) {
    const float* at = from + n * line;
    uint16_t* rounded = half(to, line, n);
    for (int64_t r = 0; r < rows; ++r) Isa::store_bf16(rounded + r * kLine, Isa::load(at + r * L));
  }
}

// The reverse of round_lines.
inline void widen_lines(float* to, const float* from, int64_t line, int64_t count, int64_t rows) {
  for (int64_t n = 0; n < count; ++n, to += line) {
    const uint16_t* at = half(from, line, n);
    for (int64_t r = 0; r < rows; ++r) Isa::store(to + r * L, Isa::load_bf16(at + r * kLine));
  }
}

// Copies 16 rows of a step, with zeros in place of what is not seen. `x`: the tile of lines, at the
// first row.
inline void copy_seen(float* to, const float* x, int64_t line, const Piece& a, const Piece& b) {
  const uint16_t *low = half(x, line, a.index), *high = half(x, line, b.index);
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
void product(const Product& p) {
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

// --- Results: 32 sums a row ------------------------------------------------------------------

// f(row, lane, 16 sums) for all of a panel.
template <class F>
void each_vector(const Panel& panel, int64_t rows, const float* sums, const F& f) {
  for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
    for (int64_t n = 0; n < panel.lanes; n += L) f(r, n, Isa::load(sums + n));
  }
}

// `count` results of a row, from `column` on; bfloat16 or float32.
inline void put(const Matrix& m, int64_t row, int64_t column, int64_t count, V a) {
  if (m.dtype == Dtype::kFloat32) {
    float lanes[L], *to = static_cast<float*>(m.data) + row * m.stride;
    Isa::store(lanes, a);
    if (m.order == nullptr) Isa::store(to + column, a, lowest(count));
    for (int64_t k = 0; m.order != nullptr && k < count; ++k) to[m.order[column + k]] = lanes[k];
    return;
  }
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

// To rows of matrices, from row `first` on.
struct Rows {
  const Matrix &y, *z;  // z null: the pre-activation is not kept
  Activation activation;
  int64_t first;

  void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
    dispatch<Isa>(activation, [&]<Activation A>() {
      each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
        const int64_t at = first + row + r, column = panel.first + lane;
        const int64_t count = min(L, panel.lanes - lane);
        if (z != nullptr) put(*z, at, column, count, a);
        put(y, at, column, count, activate<Isa, A>(a));
      });
    });
  }
};

// --- All panels ------------------------------------------------------------------------------

inline int64_t pieces_size(int64_t count) {
  return E::round_up(count * static_cast<int64_t>(sizeof(Piece)) / 4, L);
}
// Bias, sums, copied rows and pieces.
inline int64_t multiply_scratch(const Needs& needs) {
  return kBlock + kBlock * kBlock + 2 * kTileFloats + pieces_size(needs.pieces);
}

// All panels on `rows` rows, from tiles of lines and of floats. `to(panel, row, rows, sums)` takes
// the results of the rows from `row` on, 32 floats each.
template <class To>
void multiply(const PanelsView& view, const float* x, const float* floats, int64_t line,
              const float* buffer, const float* bias, const To& to, int64_t rows,
              float* scratch) {
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
        const int64_t here = min(kBlock, rows - r);
        if (here > kTileRows) {
          panel.vectors == 2 ? product<2, 2>(of) : product<2, 1>(of);
        } else {
          panel.vectors == 2 ? product<1, 2>(of) : product<1, 1>(of);
        }
        to(panel, r, here, sums);
      }
    } else {
      Panel alone = panel;
      alone.first = 0;
      const PanelsView one{&alone, 1, view.lines, view.segments, view.runs, view.copies,
                           view.shared};
      const int64_t most = 2 * Isa::kRows1;
      for (int64_t r = 0; r < rows; r += most) {
        const int64_t here = min(most, rows - r);
        FloatProduct::multiply(one, floats + r * L, line, nullptr, Place::kNowhere, buffer,
                        bias == nullptr ? nullptr : bias + panel.first, {sums, kBlock, 0},
                        Activation::kNone, here);
        to(panel, r, here, sums);
      }
    }
  }
}

}  // namespace maskmoe::amx
