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

// Copies 16 rows of a step, with zeros in place of what is not seen. `x`: the tile of lines, at the
// first row.
inline void copy_seen(float* to, const float* x, int64_t line, const Piece& a, const Piece& b) {
  const uint16_t *low = Lines::half(x, line, a.index), *high = Lines::half(x, line, b.index);
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
        const int64_t here = E::min(kBlock, rows - r);
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
        const int64_t here = E::min(most, rows - r);
        FloatProduct::multiply(one, floats + r * L, line, nullptr, Place::kNowhere, buffer,
                        bias == nullptr ? nullptr : bias + panel.first, {sums, kBlock, 0},
                        Activation::kNone, here);
        to(panel, r, here, sums);
      }
    }
  }
}

}  // namespace maskmoe::amx
