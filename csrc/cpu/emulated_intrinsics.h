// The AVX-512 and AVX512-BF16 intrinsics that csrc/cpu uses, in plain C++: a build with
// MASKMOE_EMULATE has them instead of <immintrin.h>, so that a processor without such instructions
// runs the same kernels.
//
// Each has the bits that Intel's manual defines, in the default floating-point environment, except
// for the payload of a NaN that arithmetic gives. Where the processor would fault (an address that
// is not aligned), and where an argument asks for what is not written here, it traps.
#pragma once

#if defined(_IMMINTRIN_H_INCLUDED) || defined(__IMMINTRIN_H)
#error "one file has either <immintrin.h> or these"
#endif

#include <cstdint>

#define MASKMOE_INTRINSIC [[gnu::always_inline]] inline

namespace maskmoe {

using __m512 [[gnu::vector_size(64), gnu::may_alias]] = float;
using __m512i [[gnu::vector_size(64), gnu::may_alias]] = long long;
using __m256i [[gnu::vector_size(32), gnu::may_alias]] = long long;
using __m512bh [[gnu::vector_size(64), gnu::may_alias]] = short;
using __m256bh [[gnu::vector_size(32), gnu::may_alias]] = short;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

// --- Lanes ---------------------------------------------------------------------------------------

namespace emulated {

using U16 [[gnu::vector_size(64)]] = uint16_t;
using U32 [[gnu::vector_size(64)]] = uint32_t;
using I32 [[gnu::vector_size(64)]] = int32_t;
using U64 [[gnu::vector_size(64)]] = uint64_t;
using F32 [[gnu::vector_size(64)]] = float;
using HalfU16 [[gnu::vector_size(32)]] = uint16_t;
using HalfU64 [[gnu::vector_size(32)]] = uint64_t;

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);

// A vector whose lane n is `lane(n)`.
template <class V, class F>
MASKMOE_INTRINSIC V lanes(F lane) {
  V v;
#pragma GCC unroll 32
  for (int n = 0; n < kLanes<V>; ++n) v[n] = lane(n);
  return v;
}

template <class V, class T>
MASKMOE_INTRINSIC V all(T a) {
  return lanes<V>([&](int) { return a; });
}

template <class V>
MASKMOE_INTRINSIC V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
MASKMOE_INTRINSIC void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The processor faults where an address is no multiple of the vector's size.
template <class V>
MASKMOE_INTRINSIC const void* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) __builtin_trap();
  return p;
}

// What the mask leaves out is not touched.
template <class V>
MASKMOE_INTRINSIC V load(uint32_t mask, const void* p) {
  const auto* from = static_cast<const char*>(p);
  V v{};
  for (int n = 0; n < kLanes<V>; ++n) {
    auto a = v[n];
    if (mask >> n & 1) __builtin_memcpy(&a, from + n * sizeof a, sizeof a);
    v[n] = a;
  }
  return v;
}

template <class V>
MASKMOE_INTRINSIC void store(void* p, uint32_t mask, V v) {
  auto* to = static_cast<char*>(p);
  for (int n = 0; n < kLanes<V>; ++n) {
    const auto a = v[n];
    if (mask >> n & 1) __builtin_memcpy(to + n * sizeof a, &a, sizeof a);
  }
}

// Lanes of `yes` where the mask has a one, else of `no`.
template <class V>
MASKMOE_INTRINSIC V select(uint32_t mask, V yes, V no) {
  const V bit = lanes<V>([](int n) { return static_cast<decltype(V{}[0] + 0u)>(1u << n); });
  return (bit & all<V>(mask)) != 0 ? yes : no;
}

// One bit for each lane of a comparison.
MASKMOE_INTRINSIC __mmask16 bits_of(I32 lanes) {
  uint32_t mask = 0;
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) mask |= static_cast<uint32_t>(lanes[n]) >> 31 << n;
  return static_cast<__mmask16>(mask);
}

// In every 128 bits: the lanes of the lower half of `a` and of `b` by turns, or of the upper.
template <class V>
MASKMOE_INTRINSIC V unpack(__m512i a, __m512i b, bool upper) {
  constexpr int kHalf = kLanes<V> / 8;
  return lanes<V>([&](int n) {
    const int from = n / (2 * kHalf) * (2 * kHalf) + upper * kHalf + n % (2 * kHalf) / 2;
    return n % 2 == 0 ? ((V)a)[from] : ((V)b)[from];
  });
}

// Over arrays, which compilers make vectors of again; of subscripts of vectors they do not.
MASKMOE_INTRINSIC F32 fma(F32 a, F32 b, F32 c) {
  float x[16], y[16], z[16];
  store(x, a), store(y, b), store(z, c);
  for (int n = 0; n < 16; ++n) z[n] = __builtin_fmaf(x[n], y[n], z[n]);
  return load<F32>(z);
}

constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000, kQuiet = 0x400000;

MASKMOE_INTRINSIC U32 size_of(U32 bits) { return bits & ~kSign; }

// Denormals as zeros of the same sign.
MASKMOE_INTRINSIC F32 flush(F32 a) {
  const U32 bits = (U32)a;
  return (F32)(size_of(bits) < 0x800000 ? bits & kSign : bits);
}

// To bfloat16, in the lower half of each lane.
MASKMOE_INTRINSIC U32 to_bf16(F32 a) {
  const U32 bits = (U32)flush(a), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (size_of(bits) > kInfinity ? bits | kQuiet : rounded) >> 16;
}

// A finite value that is not zero as a normal one, and the power of two that it was multiplied by.
struct Normal {
  U32 bits;
  I32 power;
  MASKMOE_INTRINSIC explicit Normal(F32 a) {
    const I32 tiny = size_of((U32)a) < 0x800000;
    bits = tiny ? (U32)(a * 0x1p24f) : (U32)a;
    power = tiny & 24;
  }
};

}  // namespace emulated

// --- From memory and to memory -------------------------------------------------------------------

MASKMOE_INTRINSIC __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
MASKMOE_INTRINSIC __m512 _mm512_load_ps(const void* p) {
  return emulated::load<__m512>(emulated::aligned<__m512>(p));
}
MASKMOE_INTRINSIC __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) {
  return (__m512)emulated::load<emulated::U32>(k, p);
}
MASKMOE_INTRINSIC void _mm512_storeu_ps(void* p, __m512 a) { emulated::store(p, a); }
MASKMOE_INTRINSIC void _mm512_store_ps(void* p, __m512 a) {
  emulated::aligned<__m512>(p);
  emulated::store(p, a);
}
MASKMOE_INTRINSIC void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 a) {
  emulated::store(p, k, (emulated::U32)a);
}

MASKMOE_INTRINSIC __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
MASKMOE_INTRINSIC __m512i _mm512_load_si512(const void* p) {
  return emulated::load<__m512i>(emulated::aligned<__m512i>(p));
}
MASKMOE_INTRINSIC __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* p) {
  return (__m512i)emulated::load<emulated::U16>(k, p);
}
MASKMOE_INTRINSIC __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void* p) {
  return (__m512i)emulated::load<emulated::U32>(k, p);
}
MASKMOE_INTRINSIC void _mm512_storeu_si512(void* p, __m512i a) { emulated::store(p, a); }
MASKMOE_INTRINSIC void _mm512_store_si512(void* p, __m512i a) {
  emulated::aligned<__m512i>(p);
  emulated::store(p, a);
}
MASKMOE_INTRINSIC void _mm512_mask_storeu_epi16(void* p, __mmask32 k, __m512i a) {
  emulated::store(p, k, (emulated::U16)a);
}

MASKMOE_INTRINSIC __m256i _mm256_loadu_si256(const __m256i* p) { return emulated::load<__m256i>(p); }
MASKMOE_INTRINSIC __m256i _mm256_load_si256(const __m256i* p) {
  return emulated::load<__m256i>(emulated::aligned<__m256i>(p));
}
MASKMOE_INTRINSIC __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
  return (__m256i)emulated::load<emulated::HalfU16>(k, p);
}
MASKMOE_INTRINSIC void _mm256_storeu_si256(__m256i* p, __m256i a) { emulated::store(p, a); }
MASKMOE_INTRINSIC void _mm256_store_si256(__m256i* p, __m256i a) {
  emulated::aligned<__m256i>(p);
  emulated::store(p, a);
}
MASKMOE_INTRINSIC void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i a) {
  emulated::store(p, k, (emulated::HalfU16)a);
}

// --- The same value, or any, in every lane; the same bits as another type ------------------------

MASKMOE_INTRINSIC __m512 _mm512_setzero_ps() { return __m512{}; }
MASKMOE_INTRINSIC __m512i _mm512_setzero_si512() { return __m512i{}; }
MASKMOE_INTRINSIC __m256i _mm256_setzero_si256() { return __m256i{}; }
MASKMOE_INTRINSIC __m512 _mm512_set1_ps(float a) { return emulated::all<__m512>(a); }
MASKMOE_INTRINSIC __m512i _mm512_set1_epi32(int a) {
  return (__m512i)emulated::all<emulated::I32>(a);
}
MASKMOE_INTRINSIC __m512i _mm512_set1_epi16(short a) {
  return (__m512i)emulated::all<emulated::U16>(static_cast<uint16_t>(a));
}
template <class... Floats>
MASKMOE_INTRINSIC __m512 _mm512_setr_ps(Floats... a) {
  static_assert(sizeof...(a) == 16);
  return __m512{static_cast<float>(a)...};
}

MASKMOE_INTRINSIC __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
MASKMOE_INTRINSIC __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
MASKMOE_INTRINSIC __m512i _mm512_zextsi256_si512(__m256i a) {
  return __m512i{a[0], a[1], a[2], a[3], 0, 0, 0, 0};
}
// The upper half is undefined: what reads it gets ones.
MASKMOE_INTRINSIC __m512i _mm512_castsi256_si512(__m256i a) {
  return __m512i{a[0], a[1], a[2], a[3], -1, -1, -1, -1};
}
MASKMOE_INTRINSIC __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  const int from = half % 2 * 4;
  return __m256i{a[from], a[from + 1], a[from + 2], a[from + 3]};
}
MASKMOE_INTRINSIC __m256i _mm512_castsi512_si256(__m512i a) {
  return _mm512_extracti64x4_epi64(a, 0);
}
MASKMOE_INTRINSIC __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  return emulated::lanes<__m512i>([&](int n) { return n / 4 == half % 2 ? b[n % 4] : a[n]; });
}

// --- Arithmetic ----------------------------------------------------------------------------------

MASKMOE_INTRINSIC __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
MASKMOE_INTRINSIC __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
MASKMOE_INTRINSIC __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
MASKMOE_INTRINSIC __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
MASKMOE_INTRINSIC __m512 _mm512_sqrt_ps(__m512 a) {
  return emulated::lanes<__m512>([&](int n) { return __builtin_sqrtf(a[n]); });
}
// b where either is NaN, and where both are zero.
MASKMOE_INTRINSIC __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
MASKMOE_INTRINSIC __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
MASKMOE_INTRINSIC __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::fma(a, b, c);
}
MASKMOE_INTRINSIC __m512 _mm512_mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 k) {
  using emulated::U32;
  return (__m512)emulated::select<U32>(k, (U32)emulated::fma(a, b, c), (U32)c);
}

MASKMOE_INTRINSIC __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return (__m512i)((emulated::U32)a + (emulated::U32)b);
}
MASKMOE_INTRINSIC __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
MASKMOE_INTRINSIC __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
MASKMOE_INTRINSIC __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
MASKMOE_INTRINSIC __m512i _mm512_slli_epi32(__m512i a, unsigned bits) {
  return bits > 31 ? __m512i{} : (__m512i)((emulated::U32)a << bits);
}
MASKMOE_INTRINSIC __m512i _mm512_srli_epi32(__m512i a, unsigned bits) {
  return bits > 31 ? __m512i{} : (__m512i)((emulated::U32)a >> bits);
}

// --- Masks ---------------------------------------------------------------------------------------

constexpr int _CMP_EQ_OQ = 0x00, _CMP_LT_OQ = 0x11, _CMP_LE_OQ = 0x12, _CMP_UNORD_Q = 0x03;
constexpr int _CMP_NEQ_UQ = 0x04, _CMP_ORD_Q = 0x07, _CMP_GE_OQ = 0x1d, _CMP_GT_OQ = 0x1e;

// The 32 conditions are 16, and how a NaN is signalled: four; one bit puts NaN on the other side,
// another negates the whole.
MASKMOE_INTRINSIC __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int condition) {
  const emulated::I32 unordered = (a != a) | (b != b);
  emulated::I32 found = (condition & 3) == 0   ? a == b
                        : (condition & 3) == 1 ? a < b
                        : (condition & 3) == 2 ? a <= b
                                               : unordered;
  if (condition & 8) found ^= unordered;
  if (condition & 4) found = ~found;
  return emulated::bits_of(found);
}
MASKMOE_INTRINSIC __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
  using emulated::U32;
  return (__m512)emulated::select<U32>(k, (U32)b, (U32)a);
}
MASKMOE_INTRINSIC __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i a, __m512i b) {
  using emulated::U16;
  return (__m512i)emulated::lanes<U16>(
      [&](int n) { return k >> n & 1 ? ((U16)b)[n] : ((U16)a)[n]; });
}
MASKMOE_INTRINSIC __m512i _mm512_mask_mov_epi32(__m512i a, __mmask16 k, __m512i b) {
  using emulated::U32;
  return (__m512i)emulated::select<U32>(k, (U32)b, (U32)a);
}

// --- Lanes to other places -----------------------------------------------------------------------

MASKMOE_INTRINSIC __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U16>(a, b, false);
}
MASKMOE_INTRINSIC __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U16>(a, b, true);
}
MASKMOE_INTRINSIC __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U32>(a, b, false);
}
MASKMOE_INTRINSIC __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U32>(a, b, true);
}
MASKMOE_INTRINSIC __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U64>(a, b, false);
}
MASKMOE_INTRINSIC __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return (__m512i)emulated::unpack<emulated::U64>(a, b, true);
}
// 128 bits at a time: two of `a`, then two of `b`, by two bits of `which` each.
MASKMOE_INTRINSIC __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
  return emulated::lanes<__m512i>([&](int n) {
    const int from = (which >> n / 2 * 2 & 3) * 2 + n % 2;
    return n < 4 ? a[from] : b[from];
  });
}
MASKMOE_INTRINSIC __m512i _mm512_permutexvar_epi16(__m512i at, __m512i a) {
  using emulated::U16;
  return (__m512i)emulated::lanes<U16>([&](int n) { return ((U16)a)[((U16)at)[n] % 32]; });
}
MASKMOE_INTRINSIC __m512i _mm512_permutex2var_epi16(__m512i a, __m512i at, __m512i b) {
  using emulated::U16;
  return (__m512i)emulated::lanes<U16>([&](int n) {
    const int from = ((U16)at)[n] % 64;
    return from < 32 ? ((U16)a)[from] : ((U16)b)[from - 32];
  });
}

// --- Conversions ---------------------------------------------------------------------------------

MASKMOE_INTRINSIC __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i)__builtin_convertvector((emulated::HalfU16)a, emulated::U32);
}
MASKMOE_INTRINSIC __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return (__m256i)__builtin_convertvector((emulated::U32)a, emulated::HalfU16);
}
// To nearest, ties to even; INT_MIN where no int is near.
MASKMOE_INTRINSIC __m512i _mm512_cvtps_epi32(__m512 a) {
  return (__m512i)emulated::lanes<emulated::I32>([&](int n) {
    const bool fits = a[n] >= -0x1p31f && a[n] < 0x1p31f;
    return fits ? static_cast<int32_t>(__builtin_rintf(a[n])) : INT32_MIN;
  });
}

MASKMOE_INTRINSIC __m512 _mm512_cvtph_ps(__m256i a) {
  using namespace emulated;
  const U32 bits = (U32)_mm512_cvtepu16_epi32(a), sign = (bits & 0x8000) << 16;
  const U32 size = (bits & 0x7fff) << 13;
  const U32 normal = size + (112 << 23);
  const U32 tiny = (U32)((F32)(size | 113 << 23) - all<F32>(0x1p-14f));
  const U32 huge = size + (224 << 23), nan = huge | kQuiet;
  return (__m512)(sign | (size < 0x800000      ? tiny
                          : size < 0x0f800000  ? normal
                          : size == 0x0f800000 ? huge
                                               : nan));
}

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;

MASKMOE_INTRINSIC __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  using namespace emulated;
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  const U32 bits = (U32)a, sign = bits >> 16 & 0x8000, size = size_of(bits);
  const U32 nan = 0x7e00 | (size >> 13 & 0x3ff);
  const U32 normal = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  // The last bit of a float between 1/2 and 1 has the value of fp16's last bit below 2^-14.
  const U32 tiny = (U32)((F32)size + all<F32>(0.5f)) - 0x3f000000;
  return _mm512_cvtepi32_epi16((__m512i)(sign | (size > kInfinity           ? nan
                                                 : size >= 143u << 23       ? all<U32>(0x7c00u)
                                                 : size >= 113u << 23       ? normal
                                                                            : tiny)));
}

// --- Exponents -----------------------------------------------------------------------------------

// a times two to the power of floor(b), rounded once: the product is exact in double.
MASKMOE_INTRINSIC __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return emulated::lanes<__m512>([&](int n) {
    const float x = a[n], power = __builtin_floorf(b[n]), infinity = __builtin_inff();
    if (x != x || power != power) {
      const bool signalling = !(__builtin_bit_cast(uint32_t, x) & emulated::kQuiet);
      if (x != x && !signalling && power == infinity) return infinity;
      if (x != x && !signalling && power == -infinity) return 0.0f;
      return (x != x ? x : power) + 0.0f;
    }
    // Beyond these, every float but 0 becomes 0 or infinity.
    const float near = power > 300 ? 300 : power < -300 ? -300 : power;
    const double scale = power == infinity    ? __builtin_inf()
                         : power == -infinity ? 0
                                              : __builtin_bit_cast(
                                                    double, (1023 + int64_t(near)) << 52);
    return static_cast<float>(x * scale);
  });
}

// The exponent of the first digit: -infinity of 0, infinity of infinity.
MASKMOE_INTRINSIC __m512 _mm512_getexp_ps(__m512 a) {
  using namespace emulated;
  const Normal of(a);
  const U32 size = size_of((U32)a);
  const F32 exponent = __builtin_convertvector((I32)(size_of(of.bits) >> 23) - 127 - of.power, F32);
  const F32 special = size == 0 ? -all<F32>(__builtin_inff()) : (F32)size;
  const F32 nan = (F32)((U32)a | kQuiet);
  return size > kInfinity ? nan : size == 0 || size == kInfinity ? special : exponent;
}

enum MantissaInterval { _MM_MANT_NORM_1_2 };
enum MantissaSign { _MM_MANT_SIGN_src };

// The digits, from 1 to below 2, with the sign of a; 1 of zero and infinity.
MASKMOE_INTRINSIC __m512 _mm512_getmant_ps(__m512 a, MantissaInterval, MantissaSign) {
  using namespace emulated;
  const U32 bits = (U32)a, size = size_of(bits);
  const U32 digits = size == 0 ? size : Normal(a).bits & 0x7fffff;
  return (__m512)(size > kInfinity ? bits | kQuiet : (bits & kSign) | 127 << 23 | digits);
}

// --- bfloat16 ------------------------------------------------------------------------------------

// To nearest, ties to even; denormals become zero.
MASKMOE_INTRINSIC __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return (__m256bh)_mm512_cvtepi32_epi16((__m512i)emulated::to_bf16(a));
}
// b in the lower half, a in the upper.
MASKMOE_INTRINSIC __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  return (__m512bh)_mm512_inserti64x4(_mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh(b)),
                                      (__m256i)_mm512_cvtneps_pbh(a), 1);
}
// The products of the second values of all pairs are added first, then those of the first; each
// addition is rounded once. Denormals are zero going in and coming out.
MASKMOE_INTRINSIC __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  using namespace emulated;
  const U32 x = (U32)a, y = (U32)b;
  const F32 upper = fma(flush((F32)(x & 0xffff0000)), flush((F32)(y & 0xffff0000)), flush(c));
  return flush(fma(flush((F32)(x << 16)), flush((F32)(y << 16)), flush(upper)));
}
MASKMOE_INTRINSIC __m512 _mm512_mask_dpbf16_ps(__m512 c, __mmask16 k, __m512bh a, __m512bh b) {
  return _mm512_mask_blend_ps(k, c, _mm512_dpbf16_ps(c, a, b));
}

}  // namespace maskmoe

#undef MASKMOE_INTRINSIC
