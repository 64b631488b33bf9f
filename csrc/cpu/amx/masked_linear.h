// One layer in bfloat16 on tiles. Other dtypes use AVX-512.
#pragma once

#include "cpu/amx/product.h"
#include "cpu/amx/weight_sums.h"
#include "cpu/masked_linear/kernel.h"

namespace maskmoe::amx {

using FloatLinear = MaskedLinear<Isa>;
using FloatSums = WeightSums<Isa>;

// --- Forward -------------------------------------------------------------------------------

inline int64_t forward_scratch(const Forward& f) {
  if (f.x.dtype != Dtype::kBfloat16) return kAvx512.forward_scratch(f);
  const Needs needs(f.panels);
  const int64_t line = FloatTile::line_stride(tile_rows(f.tile_rows));
  return multiply_scratch(needs) + (needs.pieces > 0 ? lines(f.x.features) * line : 0) +
         (needs.floats ? FloatTile::lines(f.x.features) * line : 0);
}

inline void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
  if (f.x.dtype != Dtype::kBfloat16) {
    kAvx512.forward(f, row, end, scratch);
    return;
  }
  const Needs needs(f.panels);
  const int64_t tile = tile_rows(f.tile_rows), line = FloatTile::line_stride(tile);
  float* x = scratch + multiply_scratch(needs);
  float* floats = x + (needs.pieces > 0 ? lines(f.x.features) * line : 0);
  const Matrix* z = f.z.data == nullptr ? nullptr : &f.z;
  Tiles::configure();
  for (; row < end; row += tile) {
    const int64_t rows = min(tile, end - row);
    if (needs.pieces > 0) load_lines(x, line, f.x, row, rows);
    if (needs.floats) FloatTile::load_tile(floats, line, f.x, row, rows);
    multiply(f.panels, x, floats, line, f.buffer, f.bias, Rows{f.y, z, f.activation, row}, rows,
             scratch);
  }
  Tiles::release();
}

// --- Backward ------------------------------------------------------------------------------

// The parts of the scratch: offsets in floats.
struct BackwardParts {
  int64_t tile, line;
  int64_t work = 0, g, rounded, pairs, x, transposed, size;

  BackwardParts(const Backward& b, const Needs& needs) {
    tile = tile_rows(b.tile_rows);
    line = FloatTile::line_stride(tile);
    const bool lines_of_g = b.grad_x.data != nullptr && needs.pieces > 0;
    g = max(multiply_scratch(needs), 2 * kTileFloats);
    rounded = g + b.panels.lines * line;
    pairs = rounded + (lines_of_g ? (b.panels.lines + 1) / 2 * line : 0);
    x = pairs + (b.need_weight ? b.panels.lines * (tile / 2) * L : 0);
    transposed = x + (b.need_weight ? lines(b.x.features) * line : 0);
    size = transposed + (b.need_weight ? FloatTile::lines(b.x.features) * (tile / 2) * L : 0);
  }
};

inline int64_t backward_scratch(const Backward& b) {
  if (b.x.dtype != Dtype::kBfloat16) return kAvx512.backward_scratch(b);
  return BackwardParts(b, Needs(b.transposed)).size;
}

inline void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                     float* grad_buffer, float* grad_bias, float* scratch) {
  if (b.x.dtype != Dtype::kBfloat16) {
    kAvx512.backward(b, row, end, grad_weight, grad_buffer, grad_bias, scratch);
    return;
  }
  const Needs needs(b.transposed);
  const BackwardParts at(b, needs);
  float *g = scratch + at.g, *rounded = scratch + at.rounded, *x = scratch + at.x;
  float *pairs = scratch + at.pairs, *transposed = scratch + at.transposed;
  Tiles::configure();
  for (bool add = false; row < end; row += at.tile, add = true) {
    const int64_t rows = min(at.tile, end - row);
    FloatLinear::gradient(b, g, at.line, row, rows, nullptr);
    if (b.grad_x.data != nullptr) {
      if (needs.pieces > 0) round_lines(rounded, g, at.line, b.panels.lines, rows);
      multiply(b.transposed, rounded, g, at.line, b.transposed_buffer, nullptr,
               Rows{b.grad_x, nullptr, Activation::kNone, row}, rows, scratch);
    }
    if (b.need_weight) {
      load_lines(x, at.line, b.x, row, rows);
      transpose_lines(transposed, x, at.line, FloatTile::lines(b.x.features), rows);
      pair_rows(pairs, g, at.line, b.panels.lines, rows);
      weight_sums(b.panels, transposed, pairs, rows, grad_buffer, add, scratch);
    }
    if (b.need_bias) FloatSums::bias_sums(b.panels, g, at.line, rows, grad_bias, add);
  }
  Tiles::release();
}

}  // namespace maskmoe::amx
