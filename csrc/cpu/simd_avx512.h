// AVX-512 as an instruction-set policy: 16 lanes, 32 registers, a mask register per condition.
#pragma once

#ifdef MASKMOE_EMULATE
#include "cpu/emulated_intrinsics.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

namespace maskmoe::avx512 {

struct Isa {
  static constexpr int kLanes = 16;
  static constexpr int kRows1 = 14;  // rows of a tile one vector wide
  static constexpr int kRows2 = 14;  // rows of a tile two vectors wide: 28 sums, 2 weights, 1 x
  static constexpr int kSums1 = 16;  // inputs by one vector of lanes whose weight sums are kept
  static constexpr int kSums2 = 8;  // inputs by two vectors
  using V = __m512;
  using M = __mmask16;

  static V zero() { return _mm512_setzero_ps(); }
  static V set(float a) { return _mm512_set1_ps(a); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  // p[at[n]]: loads and shuffles, which are faster than a gather where that is slowed down.
  static V gather(const float* p, const int64_t* at) {
    return _mm512_setr_ps(p[at[0]], p[at[1]], p[at[2]], p[at[3]], p[at[4]], p[at[5]], p[at[6]],
                          p[at[7]], p[at[8]], p[at[9]], p[at[10]], p[at[11]], p[at[12]], p[at[13]],
                          p[at[14]], p[at[15]]);
  }
  static constexpr bool kTransposes = false;
  static constexpr bool kPairs = false;  // are x and w pairs of bfloat16, and fma their dot product?
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }  // b where either is NaN
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN

  // Lanes: bits of a mask, lowest first.
  static M mask(uint32_t bits) { return static_cast<M>(bits); }
  static V load(const float* p, M m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, V a, M m) { _mm512_mask_storeu_ps(p, m, a); }
  // c + a * b where m; elsewhere c, and a is not multiplied at all.
  static V fma(V a, V b, V c, M m) { return _mm512_mask3_fmadd_ps(a, b, c, m); }

  static M greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M less_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static V select(M m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }

  // Bits, for exponents and signs.
  static V and_bits(V a, V b) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static V or_bits(V a, V b) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static V xor_bits(V a, V b) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  // 2 to the integral power n, n in [-126, 127].
  static V power_of_two(V n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
  }
  // a * 2^n, n integral in [-252, 254]: denormals, then 0, below; infinity above.
  static V scale(V a, V n) { return _mm512_scalef_ps(a, n); }

  // Of a normal x > 0: n and m in [1, 2) with x = m 2^n.
  static V exponent(V a) { return _mm512_getexp_ps(a); }
  static V mantissa(V a) { return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }

  static V load_bf16(const uint16_t* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V widen_bf16(__m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
  }
  // The nearest bfloat16, ties to even, in the high halves; NaN stays NaN.
  static __m512i round_bf16(V a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    M nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
  }
  static void store_bf16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16)));
  }
  // Words of a bfloat16 of `low` and one of `high`.
  static __m512i pair_bf16(V low, V high) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_or_si512(_mm512_srli_epi32(round_bf16(low), 16),
                           _mm512_and_si512(round_bf16(high), upper));
  }
  // The way back, from words at `p`.
  static V low_bf16(const float* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static V high_bf16(const float* p) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), upper));
  }
  static V load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_fp16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace maskmoe::avx512
