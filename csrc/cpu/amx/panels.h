// The inputs and weights of a panel in the form that the tile instructions of AMX read.
//
// Rows lie in lines of 32 slots, two vectors of lanes long: 16 rows of a line are one tile. A panel
// sees `pieces`: halves of lines, of which it may see a part. Two pieces make a step. Weights are
// packed to match: per step and vector of lanes a tile of 16 pairs of inputs, in as much memory as
// their float32 values would take. Panels that do not fit there (their tiles would be more than
// half empty) and panels whose lanes see different segments are left to AVX-512.
#pragma once

#include "cpu/bfloat16/packing.h"
#include "cpu/masked_linear/packed_weights.h"
#include "cpu/simd_amx.h"
#include "cpu/simd_avx512.h"

namespace maskmoe::amx {

// A type of its own: the linker must not take what is compiled here for AMX in place of what
// another file compiled for AVX-512.
struct Isa : avx512::Isa {};

using E = Elements<Isa>;
using Lines = Bfloat16Lines<Isa>;
using Packing = Bfloat16Packing<Isa>;
using V = Isa::V;
constexpr int64_t L = Isa::kLanes;
constexpr int64_t kLine = Lines::kLine;  // slots
constexpr int64_t kBlock = 32;           // rows that are computed together

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
      const int64_t count = E::min(L - slot, segment->length - done);
      piece.seen |= static_cast<uint32_t>(Lines::lowest(count)) << slot;
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
      pieces = E::max(pieces, count);
      floats = floats || count == 0;
    }
  }
};

// --- Weights -------------------------------------------------------------------------------

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
      const int64_t count =
          E::min(Packing::at_once(*copy, run), copy->row + copy->inputs - input);
      const uint16_t* from = weight + copy->packed + (input - copy->row) * copy->input_step;
      Packing::pack_run({tile, L, kTileFloats}, from, *copy, slot, count);
      piece.seen &= ~(static_cast<uint32_t>(Lines::lowest(count)) << slot);
      input += count;
    }
  }
}

inline void pack(const PanelsView& view, int64_t begin, int64_t end, const uint16_t* weight,
                 float* buffer) {
  for (int64_t p = begin; p < end; ++p) {
    const Panel& panel = view.panels[p];
    if (const int64_t pieces = count_pieces(view, panel)) {
      pack_panel(view, panel, pieces, weight, buffer + panel.buffer);
    } else {
      PackedWeights<Isa>::pack(view, p, p + 1, weight, Dtype::kBfloat16, Place::kNowhere, buffer);
    }
  }
}

}  // namespace maskmoe::amx
