#include "cpu/instruction_sets.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

namespace maskmoe {
namespace {

#if defined(__x86_64__)

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// Emulated kernels are compiled for AVX2.
[[maybe_unused]] bool has_avx512() {
#ifdef MASKMOE_EMULATE
  return has_avx2();
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
}

[[maybe_unused]] bool has_avx512bf16() {
#ifdef MASKMOE_EMULATE
  return true;
#else
  return __builtin_cpu_supports("avx512bf16");
#endif
}

// Can AMX run? The processor must have it, the system must save its registers at context switches,
// and this process needs a permission.
[[maybe_unused]] bool may_use_tiles() {
#if defined(MASKMOE_EMULATE)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kXsaveOn = 1u << 27, kState = 3u << 17;
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsaveOn)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBf16 | kTile)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // One permission covers all threads, later ones included.
  return !(~low & kState) && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

// Kernels for bfloat16 whose instructions were emulated in all tests, so far, and all emulated ones.
bool only_where_named(const char* isa) {
  return std::strcmp(isa, "amx") == 0 || std::strcmp(isa, "avx512bf16") == 0 ||
         std::strstr(isa, "-emulated") != nullptr;
}

struct Choice {
  const Kernels* kernels[8] = {};
  const char* names[9] = {};
  const Kernels* best = nullptr;
  const Kernels* chosen = nullptr;
  Choice() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#ifndef MASKMOE_NO_AVX512
    if (has_avx512()) {
#ifndef MASKMOE_NO_AMX
      if (may_use_tiles()) kernels[n++] = &kAmx;
#endif
#ifndef MASKMOE_NO_AVX512BF16
      if (has_avx512bf16()) kernels[n++] = &kAvx512Bf16;
#endif
      kernels[n++] = &kAvx512;
    }
#endif
#ifndef MASKMOE_NO_AVX2
    if (has_avx2()) kernels[n++] = &kAvx2;
#endif
#endif
    for (int i = 0; i < n; ++i) names[i] = kernels[i]->name;
    for (int i = n - 1; i >= 0; --i) {
      if (!only_where_named(names[i])) best = kernels[i];
    }
    chosen = best;
  }
};

Choice& choice() {
  static Choice the;
  return the;
}

}  // namespace

const Kernels* kernels() { return choice().chosen; }

const char* const* isas() { return choice().names; }

bool set_isa(const char* name) {
  Choice& c = choice();
  if (*name == '\0') {
    c.chosen = c.best;
    return true;
  }
  for (int i = 0; c.kernels[i] != nullptr; ++i) {
    if (std::strcmp(c.kernels[i]->name, name) == 0) {
      c.chosen = c.kernels[i];
      return true;
    }
  }
  return false;
}

}  // namespace maskmoe
