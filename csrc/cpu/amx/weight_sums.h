// Gradients of weights on tiles: sums down the rows, 16 inputs by 16 lanes, 32 rows a step.
#pragma once

#include "cpu/amx/product.h"

namespace maskmoe::amx {

// x, every 32 rows of 16 slots as a tile: its rows are slots, its columns rows of x. After the last
// row there are zeros, because the sums go over all 32 rows. `next`: from one 16 slots to the next.
inline void transpose_lines(float* to, int64_t next, const float* x, int64_t line, int64_t count,
                            int64_t rows) {
  for (int64_t n = 0; n < count; ++n) {
    const uint16_t* from = Lines::half(x, line, n);
    float* tile = to + n * next;
    for (int64_t r = 0; r < rows; r += kBlock, tile += kTileFloats) {
      __m512i pairs[L];
      for (int64_t k = 0; k < L; ++k) {
        const int64_t at = r + 2 * k;
        const uint16_t* slots = from + at * kLine;
        const __m256i none = _mm256_setzero_si256();
        pairs[k] = Lines::pair(at < rows ? Lines::load_half(slots, L) : none,
                               at + 1 < rows ? Lines::load_half(slots + kLine, L) : none);
      }
      Packing::transpose(pairs);
      for (int64_t k = 0; k < L; ++k) _mm512_store_si512(tile + k * L, pairs[k]);
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
void outer(const Outer& o) {
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
void begin_sums(const Piece& piece, const float* to, int64_t vectors, bool add) {
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
float* end_sums(const Piece& piece, float* to, int64_t vectors, bool add,
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

// Each sum of a dot product depends on its row and its column alone. Sums for slots and lanes that
// do not see each other are computed as well, in shared panels too, and never read.
// `line`: from 16 slots of x to the next, and from line to line of g.
inline void weight_sums(const PanelsView& view, const float* x, const float* g, int64_t line,
                        int64_t rows, float* grad_buffer, bool add, float* scratch) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
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

}  // namespace maskmoe::amx
