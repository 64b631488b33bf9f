// The inputs and weights of a panel in the form that the tile instructions of AMX read.
//
// Rows lie in lines of 32 slots, two vectors of lanes long: 16 rows of a line are one tile. A panel
// sees `pieces`: halves of lines, of which it may see a part. Two pieces make a step. Weights are
// packed to match: per step and vector of lanes a tile of 16 pairs of inputs, in as much memory as
// their float32 values would take. Panels that do not fit there (their tiles would be more than
// half empty) and panels whose lanes see different segments are left to AVX-512.
#pragma once

#include "cpu/masked_linear/line_tile.h"
#include "cpu/masked_linear/packed_weights.h"
#include "cpu/simd_amx.h"
#include "cpu/simd_avx512.h"

namespace maskmoe::amx {

// A type of its own: the linker must not take what is compiled here for AMX in place of what
// another file compiled for AVX-512.
struct Isa : avx512::Isa {};

using E = Elements<Isa>;
using FloatTile = LineTile<Isa>;
using FloatWeights = PackedWeights<Isa>;
using V = Isa::V;
constexpr int64_t L = Isa::kLanes;
constexpr int64_t kLine = 2 * L;  // slots
constexpr int64_t kBlock = 32;    // rows that are computed together

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline __mmask16 lowest(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// --- What a panel sees ---------------------------------------------------------------------

// Slots 16 * index and up; `seen`: which of the 16.
struct Piece {
  int64_t index;
  uint32_t seen;
};

// Iterates over the pieces of a panel. Inputs lie in ascending order, within a piece too.
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
      const int64_t count = min(L - slot, segment->length - done);
      piece.seen |= static_cast<uint32_t>(lowest(count)) << slot;
      done += count;
      if (done == segment->length) ++segment, done = 0;
    }
    return true;
  }
};

// How many pieces a panel has; 0: it is left to AVX-512.
inline int64_t count_pieces(const PanelsView& view, const Panel& panel) {
  if (panel.shared) return 0;
  const int64_t most = panel.depth / L * 2;  // a step takes the memory of 16 inputs
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
      pieces = max(pieces, count);
      floats = floats || count == 0;
    }
  }
};

// --- Weights -------------------------------------------------------------------------------

// 16 by 16 words, rows to columns.
inline void transpose(__m512i (&r)[16]) {
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

inline void add_bits(float* to, __m512i bits) {
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_loadu_si512(to), bits));
}

// The weights of `count` neighbouring inputs, from `slot` of a piece on, to its half of a tile:
// eight rows of pairs for each vector of lanes.
inline void pack_run(float* tile, const uint16_t* from, const Copy& copy, int64_t slot,
                     int64_t count) {
  for (int64_t lane = 0; lane < copy.lanes; lane += L, tile += kTileFloats) {
    const int64_t lanes = min(L, copy.lanes - lane);
    const uint16_t* at = from + lane * copy.lane_step;
    if (copy.lane_step == 1) {
      for (int64_t k = 0; k < count; ++k) {
        const __m256i one = _mm256_maskz_loadu_epi16(lowest(lanes), at + k * copy.input_step);
        const __m512i wide = _mm512_cvtepu16_epi32(one);
        const int64_t row = slot + k;
        add_bits(tile + row / 2 * L, row % 2 ? _mm512_slli_epi32(wide, 16) : wide);
      }
    } else {
      // Inputs lie side by side, so pairs are words already. The mask keeps all others unread.
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

inline void pack_panel(const PanelsView& view, const Panel& panel, int64_t pieces,
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
      const int64_t count = min(words ? run : 1, copy->row + copy->inputs - input);
      pack_run(tile, weight + copy->packed + (input - copy->row) * copy->input_step, *copy, slot,
               count);
      piece.seen &= ~(static_cast<uint32_t>(lowest(count)) << slot);
      input += count;
    }
  }
}

inline void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
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
      FloatWeights::pack(view, p, p + 1, weight, dtype, in_place, buffer);
    }
  }
}

}  // namespace maskmoe::amx
