// AVX-512 with its instructions for bfloat16 as instruction-set policies. They take denormals for
// zero, in what they read and in what they sum.
#pragma once

#include "cpu/simd_avx512.h"

namespace maskmoe::avx512bf16 {

struct Isa : avx512::Isa {
  static void store_bf16(uint16_t* p, V a) {  // to nearest, ties to even; NaN stays NaN
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
  }
  // Words of a bfloat16 of `low` and one of `high`.
  static __m512i pair_bf16(V low, V high) {
    const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // `low` in the first 16 halves
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(kAlternate), both);
  }
  // Words of slots 0 to 15, or 16 to 31, of two rows of 32.
  static __m512i pair_rows(__m512i even, __m512i odd, bool upper) {
    const __m512i from = _mm512_loadu_si512(upper ? kUpper : kLower);
    return _mm512_permutex2var_epi16(even, from, odd);
  }

 private:
  static constexpr uint16_t kAlternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                              21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  static constexpr uint16_t kLower[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                          37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                          11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  static constexpr uint16_t kUpper[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                          53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                          27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
};

// What is multiplied are words, pairs of bfloat16 in the bits of a float; sums are floats.
struct Pairs : Isa {
  static constexpr bool kPairs = true;
  // c + a[0] * b[0] + a[1] * b[1]
  static V fma(V a, V b, V c) { return _mm512_dpbf16_ps(c, words(a), words(b)); }
  // The same where m; elsewhere c, and a is not multiplied at all.
  static V fma(V a, V b, V c, M m) { return _mm512_mask_dpbf16_ps(c, m, words(a), words(b)); }

 private:
  static __m512bh words(V a) { return (__m512bh)_mm512_castps_si512(a); }
};

}  // namespace maskmoe::avx512bf16
