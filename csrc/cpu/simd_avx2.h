// AVX2 with FMA and F16C as an instruction-set policy: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>
#include <cstdint>

namespace maskmoe::avx2 {

struct Isa {
  static constexpr int kLanes = 8;
  static constexpr int kRows1 = 8;  // rows of a tile one vector wide
  static constexpr int kRows2 = 6;  // rows of a tile two vectors wide: 12 sums, 2 weights, 1 x
  static constexpr int kSums1 = 8;  // inputs by one vector of lanes whose weight sums are kept
  static constexpr int kSums2 = 4;  // inputs by two vectors
  using V = __m256;
  using M = __m256i;  // a lane is all ones or all zeros

  static V zero() { return _mm256_setzero_ps(); }
  static V set(float a) { return _mm256_set1_ps(a); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  // p[at[n]]: loads and shuffles, which are faster than a gather where that is slowed down.
  static V gather(const float* p, const int64_t* at) {
    return _mm256_setr_ps(p[at[0]], p[at[1]], p[at[2]], p[at[3]], p[at[4]], p[at[5]], p[at[6]],
                          p[at[7]]);
  }
  static constexpr bool kTransposes = true;
  static constexpr bool kPairs = false;  // are x and w pairs of bfloat16, and fma their dot product?
  // The first K values of 8 rows, turned: to[n] holds the n-th value of each. K is 2, 4 or 8.
  template <int K>
  [[gnu::always_inline]] static void transpose(const float* const (&from)[8], V (&to)[K]) {
    if constexpr (K == 2) {
      V row[2];  // two values of two rows, and of the two four below
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        row[n] = _mm256_insertf128_ps(_mm256_castps128_ps256(pairs(from[2 * n], from[2 * n + 1])),
                                      pairs(from[2 * n + 4], from[2 * n + 5]), 1);
      }
      to[0] = _mm256_shuffle_ps(row[0], row[1], 0x88);
      to[1] = _mm256_shuffle_ps(row[0], row[1], 0xdd);
      return;
    }
#pragma GCC unroll 2
    for (int part = 0; part + 4 <= K; part += 4) {
      V row[4];  // four values of one row, and of the one four below
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        row[n] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[n] + part)),
                                      _mm_loadu_ps(from[n + 4] + part), 1);
      }
      const V a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
      const V c = _mm256_unpacklo_ps(row[2], row[3]), d = _mm256_unpackhi_ps(row[2], row[3]);
      to[part] = _mm256_shuffle_ps(a, c, 0x44);
      to[part + 1] = _mm256_shuffle_ps(a, c, 0xee);
      to[part + 2] = _mm256_shuffle_ps(b, d, 0x44);
      to[part + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
  }
  static __m128 pairs(const float* low, const float* high) {
    const __m128 first = _mm_loadl_pi(_mm_setzero_ps(), reinterpret_cast<const __m64*>(low));
    return _mm_loadh_pi(first, reinterpret_cast<const __m64*>(high));
  }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }  // b where either is NaN
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN

  // Lanes: bits of a mask, lowest first.
  static M mask(uint32_t bits) {
    __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane),
                              lane);
  }
  static V load(const float* p, M m) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, V a, M m) { _mm256_maskstore_ps(p, m, a); }
  // c + a * b where m; elsewhere c: a sum that is never -0 does not change by +0, and a is gone
  // before it is multiplied.
  static V fma(V a, V b, V c, M m) {
    return _mm256_fmadd_ps(_mm256_and_ps(a, _mm256_castsi256_ps(m)), b, c);
  }

  static M greater(V a, V b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static M less_equal(V a, V b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  static V select(M m, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }

  // Bits, for exponents and signs.
  static V and_bits(V a, V b) { return _mm256_and_ps(a, b); }
  static V or_bits(V a, V b) { return _mm256_or_ps(a, b); }
  static V xor_bits(V a, V b) { return _mm256_xor_ps(a, b); }
  // 2 to the integral power n, n in [-126, 127].
  static V power_of_two(V n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
  }
  // a * 2^n, n integral in [-252, 254]: denormals, then 0, below; infinity above.
  static V scale(V a, V n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(254));
    __m256i half = _mm256_srli_epi32(biased, 1);
    __m256i rest = _mm256_sub_epi32(biased, half);
    V first = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(half, 23)));
    return _mm256_mul_ps(first, _mm256_castsi256_ps(_mm256_slli_epi32(rest, 23)));
  }

  // Of a normal x > 0: n and m in [1, 2) with x = m 2^n.
  static V exponent(V a) {
    __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(a), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
  }
  static V mantissa(V a) {
    __m256 digits = _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff)));
    return _mm256_or_ps(digits, _mm256_set1_ps(1.0f));
  }

  static V load_bf16(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_bf16(uint16_t* p, V a) {  // to nearest, ties to even; NaN stays NaN
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
    up = _mm256_srli_epi32(up, 16);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static V load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_fp16(uint16_t* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace maskmoe::avx2
