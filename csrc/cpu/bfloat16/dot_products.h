// How masked_linear.h and masked_mlp.h compute with AVX-512's dot products of bfloat16: with the
// float32 kernels, to which a word, a pair of bfloat16, is one input.
#pragma once

#include "cpu/bfloat16/packing.h"
#include "cpu/masked_linear/panel_product.h"
#include "cpu/masked_linear/weight_sums.h"
#include "cpu/simd_avx512bf16.h"

namespace maskmoe::avx512bf16 {

struct DotProducts {
  using Isa = avx512bf16::Isa;
  using E = Elements<Isa>;
  using Lines = Bfloat16Lines<Isa>;
  using Packing = Bfloat16Packing<Isa>;
  using Product = PanelProduct<Pairs>;
  static constexpr int64_t L = Isa::kLanes, kBlock = Lines::kBlock;
  static constexpr int64_t kRowStep = 2;  // rows of a tile are a multiple of it

  static void begin() {}
  static void end() {}

  static bool reads_floats(const PanelsView&) { return false; }
  static int64_t scratch(const PanelsView&) { return kMostRows * kBlock; }

  // --- Weights ---------------------------------------------------------------------------------

  // The words of a panel's segments, one segment after the other. Inputs ascend in a copy, and in
  // most panels from copy to copy.
  struct Cursor {
    const Segment *begin, *at;
    int64_t input = 0, word = 0;  // of the segment's first input: how many come before it

    explicit Cursor(const Segment* first) : begin(first), at(first) {}

    static int64_t words(const Segment& s) { return (s.first + s.length + 1) / 2 - s.first / 2; }

    void seek(int64_t wanted) {
      if (wanted < input) at = begin, input = word = 0;
      for (; wanted >= input + at->length; ++at) {
        input += at->length;
        word += words(*at);
      }
    }
  };

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const uint16_t* weight,
                   float* buffer) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      const int64_t width = panel.vectors * L;
      float* to = buffer + panel.buffer;
      for (int64_t n = 0; n < panel.depth * width; n += L) Isa::store(to + n, Isa::zero());
      Cursor cursor(view.segments + panel.segments);
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        for (int64_t done = 0, count; done < copy.inputs; done += count) {
          cursor.seek(copy.row + done);
          const Segment& segment = *cursor.at;
          const int64_t before = copy.row + done - cursor.input, slot = segment.first + before;
          const int64_t left = E::min(copy.inputs - done, segment.length - before);
          count = Packing::at_once(copy, E::min(left, 16 - slot % 2));
          const int64_t word = cursor.word + slot / 2 - segment.first / 2;
          Packing::pack_run({to + word * width + copy.lane, width, L},
                            weight + copy.packed + done * copy.input_step, copy, slot % 2, count);
        }
      }
    }
  }

  // --- Products --------------------------------------------------------------------------------

  // All panels on `rows` rows, from lines of 32 slots. `to(panel, row, rows, sums)` takes the
  // results of the rows from `row` on, which is even, 32 floats each.
  template <class To>
  static void multiply(const PanelsView& view, const float* x, const float*, int64_t line,
                       const float* buffer, const float* bias, const To& to, int64_t rows,
                       float* scratch) {
    const typename Product::Cut cut(E::max((rows + 1) / 2, 1), kMostRows / 2);
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      typename Product::Tile tile{x,
                                  line,
                                  buffer + panel.buffer,
                                  panel.vectors * L,
                                  view.segments + panel.segments,
                                  view.segments + panel.segments_end,
                                  bias == nullptr ? nullptr : bias + panel.first,
                                  scratch,
                                  kBlock,
                                  L,
                                  panel.lanes,
                                  true,
                                  Activation::kNone,
                                  nullptr,
                                  Activation::kNone};
      const auto* of = panel.vectors == 2
                           ? (panel.shared ? Product::table.shared_two : Product::table.two)
                           : (panel.shared ? Product::table.shared_one : Product::table.one);
      int64_t row = 0;
      for (uint32_t n = 0; n < cut.count; ++n) {
        const int64_t height = E::min(2 * cut[n], rows - row);
        of[height](tile);
        to(panel, row, height, scratch);
        tile.x += height * L;
        row += height;
      }
    }
  }

  // --- Sums over rows --------------------------------------------------------------------------

  // Lines of 32 slots to row pairs of `count` times 16 slots, with zeros after the last row.
  static void turn(float* to, int64_t row_line, const float* x, int64_t line, int64_t count,
                   int64_t rows) {
    for (int64_t n = 0; n < count; n += 2, x += line, to += 2 * row_line) {
      for (int64_t r = 0; r < rows; r += 2) {
        const __m512i even = _mm512_loadu_si512(x + r * L);
        const __m512i odd =
            r + 1 < rows ? _mm512_loadu_si512(x + (r + 1) * L) : _mm512_setzero_si512();
        float* at = to + r / 2 * L;
        _mm512_storeu_si512(at, Isa::pair_rows(even, odd, false));
        if (n + 1 < count) _mm512_storeu_si512(at + row_line, Isa::pair_rows(even, odd, true));
      }
    }
  }

  static void weight_sums(const PanelsView& view, const float* x, const float* g, int64_t row_line,
                          int64_t rows, float* grad_buffer, bool add, float*) {
    WeightSums<Pairs>::weight_sums(view, Place::kNowhere, x, g, row_line, (rows + 1) / 2, nullptr,
                                   grad_buffer, add);
  }

 private:
  static constexpr int64_t kMostRows = Pairs::kRows2;
  static_assert(Pairs::kRows1 == kMostRows && kMostRows % 2 == 0);
};

}  // namespace maskmoe::avx512bf16
