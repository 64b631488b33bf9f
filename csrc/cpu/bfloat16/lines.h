// Tiles of rows in bfloat16, for one instruction set `I` of 16 lanes.
//
// The instructions for bfloat16 sum products of neighbours, two in each word of 32 bits. So a tile
// comes in two forms. For products, a line holds 32 slots of all rows, row under row: a word is two
// slots of a row. For sums over rows, a line of row pairs holds 16 slots of all rows, two by two: a
// word is a slot of row 2n, in its low half, and of row 2n + 1. Sizes are in floats: a row of a
// line is as long as 16 of them.
#pragma once

#include "cpu/activations.h"
#include "cpu/masked_linear/line_tile.h"
#include "cpu/simd_avx512.h"

namespace maskmoe {

template <class I>
struct Bfloat16Lines {
  using E = Elements<I>;
  using V = typename I::V;
  static constexpr int64_t L = I::kLanes;
  static constexpr int64_t kLine = 2 * L;  // slots
  static constexpr int64_t kBlock = 32;    // lanes of a panel, at most
  static_assert(L == 16);

  static int64_t lines(int64_t slots) { return (slots + kLine - 1) / kLine; }
  static constexpr __mmask16 lowest(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }

  // Slots 16 * index and up of the first row; those of the next are a line further.
  static const uint16_t* half(const float* tile, int64_t line, int64_t index) {
    return reinterpret_cast<const uint16_t*>(tile + index / 2 * line) + index % 2 * L;
  }
  static uint16_t* half(float* tile, int64_t line, int64_t index) {
    return reinterpret_cast<uint16_t*>(tile + index / 2 * line) + index % 2 * L;
  }

  // The first `count` <= 16 values at `from`, then zeros; no others are read.
  static __m256i load_half(const uint16_t* from, int64_t count) {
    return _mm256_maskz_loadu_epi16(lowest(count), from);
  }

  // Words of two values.
  static __m512i pair(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }

  // Rows of a matrix to lines, with zeros after the last feature.
  static void load_lines(float* to, int64_t line, const Matrix& m, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r, to += L) {
      const auto* from = static_cast<const uint16_t*>(m.data) + (row + r) * m.stride;
      float* at = to;
      for (int64_t n = 0; n < m.features; n += kLine, at += line) {
        const int64_t count = E::min(kLine, m.features - n);
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

  // Lines of 32 slots to lines of 16 floats.
  static void widen_lines(float* to, const float* from, int64_t line, int64_t count,
                          int64_t rows) {
    for (int64_t n = 0; n < count; ++n, to += line) {
      const uint16_t* at = half(from, line, n);
      for (int64_t r = 0; r < rows; ++r) I::store(to + r * L, I::load_bf16(at + r * kLine));
    }
  }

  // f(row, lane, 16 sums) for the results of a panel's rows, 32 sums each.
  template <class F>
  static void each_vector(const Panel& panel, int64_t rows, const float* sums, const F& f) {
    for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
      for (int64_t n = 0; n < panel.lanes; n += L) f(r, n, I::load(sums + n));
    }
  }

  // --- Results: where the sums of a panel's rows go --------------------------------------------

  // `count` results of a row, from `column` on; bfloat16 or float32.
  static void put(const Matrix& m, int64_t row, int64_t column, int64_t count, V a) {
    if (m.dtype == Dtype::kFloat32) {
      float lanes[L], *to = static_cast<float*>(m.data) + row * m.stride;
      I::store(lanes, a);
      if (m.order == nullptr) I::store(to + column, a, lowest(count));
      for (int64_t k = 0; m.order != nullptr && k < count; ++k) to[m.order[column + k]] = lanes[k];
      return;
    }
    auto* to = static_cast<uint16_t*>(m.data) + row * m.stride;
    if (m.order == nullptr && count == L) {
      I::store_bf16(to + column, a);
      return;
    }
    alignas(32) uint16_t lanes[L];
    I::store_bf16(lanes, a);
    if (m.order == nullptr) {
      const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
      _mm256_mask_storeu_epi16(to + column, lowest(count), bits);
    } else {
      for (int64_t k = 0; k < count; ++k) to[m.order[column + k]] = lanes[k];
    }
  }

  // Rows of matrices, from row `first` on.
  struct Rows {
    const Matrix &y, *z;  // z null: the pre-activation is not kept
    Activation activation;
    int64_t first;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      dispatch<I>(activation, [&]<Activation A>() {
        each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
          const int64_t at = first + row + r, column = panel.first + lane;
          const int64_t count = E::min(L, panel.lanes - lane);
          if (z != nullptr) put(*z, at, column, count, a);
          put(y, at, column, count, activate<I, A>(a));
        });
      });
    }
  };

  // Lines of 32 slots.
  struct Hidden {
    float *y, *z;  // z null: not kept
    int64_t line;
    Activation activation;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      dispatch<I>(activation, [&]<Activation A>() {
        each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
          const int64_t index = panel.line + lane / L, slot = (row + r) * kLine;
          if (z != nullptr) I::store_bf16(half(z, line, index) + slot, a);
          I::store_bf16(half(y, line, index) + slot, activate<I, A>(a));
        });
      });
    }
  };

  // Lines of 16 floats.
  struct Floats {
    float* to;
    int64_t line;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      each_vector(panel, rows, sums, [&](int64_t r, int64_t lane, V a) {
        I::store(to + (panel.line + lane / L) * line + (row + r) * L, a);
      });
    }
  };

  // Gradients of units, in every form that is not null.
  struct Gradients {
    float *lines, *row_pairs, *floats;
    int64_t line, row_line;  // from line to line; lines of floats are as long as those of slots

    // Rows `row`, which is even, and row + 1 of line `index`. The rows of all forms are even in
    // number, so there is room for both.
    void put(int64_t index, int64_t row, V first, V second) const {
      if (lines != nullptr) {
        uint16_t* to = half(lines, line, index) + row * kLine;
        I::store_bf16(to, first);
        I::store_bf16(to + kLine, second);
      }
      if (row_pairs != nullptr) {
        _mm512_storeu_si512(row_pairs + index * row_line + row / 2 * L, I::pair_bf16(first, second));
      }
      if (floats != nullptr) {
        float* to = floats + index * line + row * L;
        I::store(to, first);
        I::store(to + L, second);
      }
    }

    // Row pairs are zero from row `rows` on to the next multiple of `step`.
    void pad(int64_t index, int64_t rows, int64_t step) const {
      if (row_pairs == nullptr) return;
      const int64_t end = E::round_up(rows, step) / 2;
      for (int64_t n = (rows + 1) / 2; n < end; ++n) {
        I::store(row_pairs + index * row_line + n * L, I::zero());
      }
    }

    // From lines of floats.
    void put_lines(const float* from, int64_t count, int64_t rows, int64_t step) const {
      for (int64_t n = 0; n < count; ++n) {
        const float* at = from + n * line;
        for (int64_t r = 0; r < rows; r += 2, at += 2 * L) {
          put(n, r, I::load(at), r + 1 < rows ? I::load(at + L) : I::zero());
        }
        pad(n, rows, step);
      }
    }
  };

  // The gradients of a layer's inputs: sums times the derivative that the activation of the layer
  // before had at `saved`, lines of 32 slots.
  struct Derived {
    const Gradients& to;
    const float* saved;  // null with kNone
    Activation derivative;
    int64_t step;

    void operator()(const Panel& panel, int64_t row, int64_t rows, const float* sums) const {
      dispatch<I>(derivative, [&]<Activation A>() {
        for (int64_t lane = 0; lane < panel.lanes; lane += L) {
          const int64_t index = panel.line + lane / L;
          const auto value = [&](int64_t r) {
            const V a = I::load(sums + r * kBlock + lane);
            if constexpr (A == Activation::kNone) return a;
            return activation_grad<I, A>(
                a, I::load_bf16(half(saved, to.line, index) + (row + r) * kLine));
          };
          for (int64_t r = 0; r < rows; r += 2) {
            to.put(index, row + r, value(r), r + 1 < rows ? value(r + 1) : I::zero());
          }
          to.pad(index, row + rows, step);
        }
      });
    }
  };

  // --- Sums of biases, from row pairs ----------------------------------------------------------

  static void bias_sums(const PanelsView& view, const float* row_pairs, int64_t row_line,
                        int64_t rows, float* total, bool add) {
    for (int64_t p = 0; p < view.count; ++p) {
      const Panel& panel = view.panels[p];
      for (int64_t n = 0; n < panel.lanes; n += L) {
        const float* at = row_pairs + (panel.line + n / L) * row_line;
        V even = I::zero(), odd = I::zero();
        for (int64_t r = 0; r < rows; r += 2, at += L) {
          even = I::add(even, I::low_bf16(at));
          odd = I::add(odd, I::high_bf16(at));
        }
        float* to = total + panel.first + n;
        const auto stored = lowest(E::min(L, panel.lanes - n));
        const V sum = I::add(even, odd);
        I::store(to, add ? I::add(I::load(to, stored), sum) : sum, stored);
      }
    }
  }
};

}  // namespace maskmoe
