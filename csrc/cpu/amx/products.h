// How bfloat16/masked_linear.h and bfloat16/masked_mlp.h compute on tiles.
#pragma once

#include "cpu/amx/weight_sums.h"

namespace maskmoe::amx {

struct Products {
  using Isa = amx::Isa;
  static constexpr int64_t kRowStep = kBlock;  // rows of a tile are a multiple of it

  static void begin() { Tiles::configure(); }
  static void end() { Tiles::release(); }

  // Do any of the panels need lines of floats, too?
  static bool reads_floats(const PanelsView& view) { return Needs(view).floats; }
  static int64_t scratch(const PanelsView& view) {
    return E::max(multiply_scratch(Needs(view)), 2 * kTileFloats);
  }

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const uint16_t* weight,
                   float* buffer) {
    amx::pack(view, begin, end, weight, buffer);
  }

  template <class To>
  static void multiply(const PanelsView& view, const float* x, const float* floats, int64_t line,
                       const float* buffer, const float* bias, const To& to, int64_t rows,
                       float* scratch) {
    amx::multiply(view, x, floats, line, buffer, bias, to, rows, scratch);
  }

  static void turn(float* to, int64_t row_line, const float* x, int64_t line, int64_t count,
                   int64_t rows) {
    transpose_lines(to, row_line, x, line, count, rows);
  }

  static void weight_sums(const PanelsView& view, const float* x, const float* g, int64_t row_line,
                          int64_t rows, float* grad_buffer, bool add, float* scratch) {
    amx::weight_sums(view, x, g, row_line, rows, grad_buffer, add, scratch);
  }
};

}  // namespace maskmoe::amx
