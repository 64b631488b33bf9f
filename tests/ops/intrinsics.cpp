// Intrinsics of AVX-512 on arrays, for test_emulated_intrinsics.py: emulated, or the processor's.
//
// Each function goes from vector to vector of 64 bytes; what has fewer leaves the rest at zero.
#include <sys/mman.h>
#include <unistd.h>

#include "cpu/simd_avx512.h"

namespace maskmoe {
namespace {

void put(char* to, __m512 a) { _mm512_storeu_ps(to, a); }
void put(char* to, __m512i a) { _mm512_storeu_si512(to, a); }
void put(char* to, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }
void put(char* to, __mmask16 a) { __builtin_memcpy(to, &a, sizeof a); }

template <int C>
__mmask16 compare(int condition, __m512 a, __m512 b) {
  if constexpr (C == 32) {
    __builtin_trap();
  } else {
    return condition == C ? _mm512_cmp_ps_mask(a, b, C) : compare<C + 1>(condition, a, b);
  }
}

template <int W>
__m512i shuffle(int which, __m512i a, __m512i b) {
  if constexpr (W == 256) {
    __builtin_trap();
  } else {
    return which == W ? _mm512_shuffle_i32x4(a, b, W) : shuffle<W + 1>(which, a, b);
  }
}

}  // namespace

// a, b, c: as floats; i, j: the first two as integers; half: the first 32 bytes of the first.
#define EXPORT(name, ...)                                                                       \
  extern "C" void name(const char* p, const char* q, const char* r, uint32_t k, char* to,       \
                       long count) {                                                            \
    for (long n = 0; n < count * 64; n += 64) {                                                 \
      [[maybe_unused]] const __m512 a = _mm512_loadu_ps(p + n), b = _mm512_loadu_ps(q + n);     \
      [[maybe_unused]] const __m512 c = _mm512_loadu_ps(r + n);                                 \
      [[maybe_unused]] const __m512i i = _mm512_loadu_si512(p + n);                             \
      [[maybe_unused]] const __m512i j = _mm512_loadu_si512(q + n);                             \
      [[maybe_unused]] const __m256i half = _mm512_castsi512_si256(i);                          \
      [[maybe_unused]] const auto k16 = static_cast<__mmask16>(k);                              \
      put(to + n, __VA_ARGS__);                                                                 \
    }                                                                                           \
    static_cast<void>(k);                                                                       \
  }

EXPORT(add, _mm512_add_ps(a, b))
EXPORT(sub, _mm512_sub_ps(a, b))
EXPORT(mul, _mm512_mul_ps(a, b))
EXPORT(divide, _mm512_div_ps(a, b))
EXPORT(root, _mm512_sqrt_ps(a))
EXPORT(min, _mm512_min_ps(a, b))
EXPORT(max, _mm512_max_ps(a, b))
EXPORT(fmadd, _mm512_fmadd_ps(a, b, c))
EXPORT(mask3_fmadd, _mm512_mask3_fmadd_ps(a, b, c, k16))
EXPORT(blend, _mm512_mask_blend_ps(k16, a, b))
EXPORT(blend_epi16, _mm512_mask_blend_epi16(k, i, j))
EXPORT(move, _mm512_mask_mov_epi32(i, k16, j))
EXPORT(cmp, compare<0>(static_cast<int>(k), a, b))

EXPORT(set1, _mm512_set1_ps(reinterpret_cast<const float*>(p + n)[5]))
EXPORT(set1_epi16, _mm512_set1_epi16(reinterpret_cast<const short*>(p + n)[5]))
EXPORT(set1_epi32, _mm512_set1_epi32(reinterpret_cast<const int*>(p + n)[5]))
EXPORT(setr, _mm512_setr_ps(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16))

EXPORT(add_epi32, _mm512_add_epi32(i, j))
EXPORT(bits_and, _mm512_and_si512(i, j))
EXPORT(bits_or, _mm512_or_si512(i, j))
EXPORT(bits_xor, _mm512_xor_si512(i, j))
EXPORT(left, _mm512_slli_epi32(i, k))
EXPORT(right, _mm512_srli_epi32(i, k))

EXPORT(unpacklo16, _mm512_unpacklo_epi16(i, j))
EXPORT(unpackhi16, _mm512_unpackhi_epi16(i, j))
EXPORT(unpacklo32, _mm512_unpacklo_epi32(i, j))
EXPORT(unpackhi32, _mm512_unpackhi_epi32(i, j))
EXPORT(unpacklo64, _mm512_unpacklo_epi64(i, j))
EXPORT(unpackhi64, _mm512_unpackhi_epi64(i, j))
EXPORT(shuffle_i32x4, shuffle<0>(static_cast<int>(k), i, j))
EXPORT(permutexvar, _mm512_permutexvar_epi16(j, i))
EXPORT(permutex2var, _mm512_permutex2var_epi16(i, j, _mm512_castps_si512(c)))
EXPORT(insert0, _mm512_inserti64x4(j, half, 0))
EXPORT(insert1, _mm512_inserti64x4(j, half, 1))
EXPORT(extract0, _mm512_extracti64x4_epi64(i, 0))
EXPORT(extract1, _mm512_extracti64x4_epi64(i, 1))
EXPORT(extended, _mm512_zextsi256_si512(half))

EXPORT(from_u16, _mm512_cvtepu16_epi32(half))
EXPORT(to_u16, _mm512_cvtepi32_epi16(i))
EXPORT(to_int, _mm512_cvtps_epi32(a))
EXPORT(from_fp16, _mm512_cvtph_ps(half))
EXPORT(to_fp16, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
EXPORT(scalef, _mm512_scalef_ps(a, b))
EXPORT(getexp, _mm512_getexp_ps(a))
EXPORT(getmant, _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src))

#if defined(MASKMOE_EMULATE) || defined(__AVX512BF16__)
EXPORT(to_bf16, (__m256i)_mm512_cvtneps_pbh(a))
EXPORT(two_to_bf16, (__m512i)_mm512_cvtne2ps_pbh(a, b))
EXPORT(dpbf16, _mm512_dpbf16_ps(c, (__m512bh)i, (__m512bh)j))
EXPORT(mask_dpbf16, _mm512_mask_dpbf16_ps(c, k16, (__m512bh)i, (__m512bh)j))
#endif

// --- Memory that must not be touched --------------------------------------------------------------

namespace {

// A page between two that cannot be touched.
char* guarded_page(long page) {
  void* all = mmap(nullptr, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* middle = static_cast<char*>(all) + page;
  if (all == MAP_FAILED || mprotect(middle, page, PROT_READ | PROT_WRITE) != 0) __builtin_trap();
  return middle;
}

// Loads and stores the lanes of a mask, and counts bytes that are not as they should be.
template <class T, int Lanes, class Load, class Store>
int wrong_bytes(char* page, long size, Load load, Store store) {
  int wrong = 0;
  for (int count = 0; count <= Lanes; ++count) {
    const uint32_t lowest = static_cast<uint32_t>((1ull << count) - 1);
    for (int at_end = 0; at_end < 2; ++at_end) {
      const int skipped = at_end ? 0 : Lanes - count;
      const uint32_t mask = lowest << (skipped % 32);
      char* at = (at_end ? page + size - count * long{sizeof(T)} : page) - skipped * long{sizeof(T)};
      for (long n = 0; n < size; ++n) page[n] = static_cast<char>(n % 251 + 1);
      alignas(64) T loaded[64 / sizeof(T)] = {};
      put(reinterpret_cast<char*>(loaded), load(mask, at));
      for (int n = 0; n < Lanes; ++n) {
        T expected = 0;
        if (mask >> n & 1) __builtin_memcpy(&expected, at + n * sizeof(T), sizeof(T));
        wrong += loaded[n] != expected;
      }
      const auto ones = _mm512_set1_epi32(-1);
      store(at, mask, ones);
      const long first = at + skipped * long{sizeof(T)} - page, stored = count * long{sizeof(T)};
      for (long n = 0; n < size; ++n) {
        const bool inside = n >= first && n < first + stored;
        wrong += page[n] != (inside ? static_cast<char>(-1) : static_cast<char>(n % 251 + 1));
      }
    }
  }
  return wrong;
}

}  // namespace

extern "C" int masked() {
  const long size = sysconf(_SC_PAGESIZE);
  char* page = guarded_page(size);
  const auto ps = [](__m512i a) { return _mm512_castsi512_ps(a); };
  return wrong_bytes<uint32_t, 16>(
             page, size, [](uint32_t k, char* p) { return _mm512_maskz_loadu_ps(k, p); },
             [&](char* p, uint32_t k, __m512i a) { _mm512_mask_storeu_ps(p, k, ps(a)); }) +
         wrong_bytes<uint32_t, 16>(
             page, size, [](uint32_t k, char* p) { return _mm512_maskz_loadu_epi32(k, p); },
             [&](char* p, uint32_t k, __m512i a) { _mm512_mask_storeu_ps(p, k, ps(a)); }) +
         wrong_bytes<uint16_t, 32>(
             page, size, [](uint32_t k, char* p) { return _mm512_maskz_loadu_epi16(k, p); },
             [](char* p, uint32_t k, __m512i a) { _mm512_mask_storeu_epi16(p, k, a); }) +
         wrong_bytes<uint16_t, 16>(
             page, size, [](uint32_t k, char* p) { return _mm256_maskz_loadu_epi16(k, p); },
             [](char* p, uint32_t k, __m512i a) {
               _mm256_mask_storeu_epi16(p, k, _mm512_castsi512_si256(a));
             });
}

// Stores or loads that fault unless the address, 64 and `offset`, is aligned; what was not kept.
extern "C" int aligned(int which, int offset) {
  alignas(64) static char memory[192];
  char* at = memory + 64 + offset;
  const __m512i ones = _mm512_set1_epi32(-1);
  const __m256i half = _mm512_castsi512_si256(ones);
  if (which < 2) put(at, ones);
  switch (which) {
    case 0: put(at, _mm512_load_si512(at)); break;
    case 1: put(at, _mm512_load_ps(at)); break;
    case 2: _mm512_store_si512(at, ones); break;
    case 3: _mm512_store_ps(at, _mm512_castsi512_ps(ones)); break;
    case 4: _mm256_store_si256(reinterpret_cast<__m256i*>(at), half); break;
    default:
      put(at, half);
      put(at, _mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
  }
  int wrong = 0;
  for (int n = 0; n < (which < 4 ? 64 : 32); ++n) wrong += at[n] != -1;
  return wrong;
}

}  // namespace maskmoe
