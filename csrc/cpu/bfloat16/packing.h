// Weights in bfloat16, in the words that the instructions read: pairs of inputs of one lane. For
// one instruction set `I` of 16 lanes.
#pragma once

#include "cpu/bfloat16/lines.h"

namespace maskmoe {

template <class I>
struct Bfloat16Packing {
  using E = Elements<I>;
  using Lines = Bfloat16Lines<I>;
  static constexpr int64_t L = I::kLanes;

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

  // Where the words of one copy's lanes lie: rows of pairs, and what is added for each 16 lanes.
  struct Words {
    float* first;
    int64_t row, vector;
  };

  // The weights of `count` neighbouring inputs, the first of which is input `slot` of the rows at
  // `to`: of rows of zeros, or of such as hold other inputs. `slot + count` <= 16.
  static void pack_run(const Words& to, const uint16_t* from, const Copy& copy, int64_t slot,
                       int64_t count) {
    float* vector = to.first;
    for (int64_t lane = 0; lane < copy.lanes; lane += L, vector += to.vector) {
      const int64_t lanes = E::min(L, copy.lanes - lane);
      const auto kept = Lines::lowest(lanes);
      const auto add = [&](int64_t row, __m512i words) {
        float* at = vector + row * to.row;
        I::store(at, I::or_bits(I::load(at, kept), _mm512_castsi512_ps(words)), kept);
      };
      const uint16_t* at = from + lane * copy.lane_step;
      if (copy.lane_step == 1) {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t row = (slot + k) / 2;
          const __m256i none = _mm256_setzero_si256();
          const __m256i one = Lines::load_half(at + k * copy.input_step, lanes);
          if ((slot + k) % 2 != 0) {
            add(row, Lines::pair(none, one));
          } else {
            const bool both = ++k < count;
            add(row, Lines::pair(
                         one, both ? Lines::load_half(at + k * copy.input_step, lanes) : none));
          }
        }
      } else {
        // Inputs lie side by side, so pairs are words already. The mask keeps all others unread.
        const auto seen = static_cast<__mmask16>(Lines::lowest(count) << slot);
        __m512i rows[L];
        for (int64_t n = 0; n < L; ++n) {
          rows[n] = n < lanes ? _mm512_zextsi256_si512(_mm256_maskz_loadu_epi16(
                                    seen, at + n * copy.lane_step - slot))
                              : _mm512_setzero_si512();
        }
        transpose(rows);
        for (int64_t n = slot / 2; n < (slot + count + 1) / 2; ++n) add(n, rows[n]);
      }
    }
  }

  // How many of `count` neighbouring inputs `pack_run` takes at once.
  static int64_t at_once(const Copy& copy, int64_t count) {
    return copy.lane_step == 1 || copy.input_step == 1 ? count : 1;
  }
};

}  // namespace maskmoe
