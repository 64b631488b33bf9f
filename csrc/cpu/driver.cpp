#include "driver.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

#include "sharing.h"

namespace maskmoe {
namespace {

constexpr int64_t kTileFloats = 1 << 16;  // a tile of x and y: a quarter of a 1 MiB cache

int64_t tile_rows_for(int64_t features, int64_t rows) {
  const int64_t fit = std::clamp<int64_t>(kTileFloats / features, 56, 252);
  return std::max<int64_t>(1, std::min(fit / 28 * 28, rows));
}

}  // namespace

void masked_linear(const Plan& plan, const Kernels& k, const Matrix& x, const void* weight,
                   const void* bias, const Matrix& y, const Matrix& z, Activation activation,
                   int64_t rows) {
  if (rows == 0) return;
  const Layout& layout = plan.layout;
  const Panels& panels = plan.forward;
  const bool direct = x.dtype == Dtype::kFloat32;
  const int64_t threads = threads_for(2 * rows * layout.num_weights, rows);
  const Place in_place = place_for(x.dtype, rows);
  Forward f{view(panels), x, y, z, nullptr, nullptr, in_place, nullptr, activation, 0};
  f.tile_rows = tile_rows_for(x.features + y.features, (rows + threads - 1) / threads);
  const int64_t each_needs = Scratch::round_up(k.forward_scratch(f));
  const int64_t packed = Scratch::round_up(buffer_size(panels, in_place));
  const bool copy_bias = bias != nullptr && (!direct || y.order != nullptr);
  const int64_t bias_size = Scratch::round_up(copy_bias ? y.features : 0);
  Scratch scratch(packed + bias_size + threads * each_needs);
  float* buffer = scratch.take(packed);
  pack(k, panels, weight, x.dtype, in_place, buffer, threads);
  f.buffer = buffer;
  f.weight = direct ? static_cast<const float*>(weight) : nullptr;
  if (copy_bias) {
    float* ordered = scratch.take(bias_size);
    k.load(ordered, bias, x.dtype, y.order, y.features);
    f.bias = ordered;
  } else {
    f.bias = static_cast<const float*>(bias);
  }
  float* tiles = scratch.take(threads * each_needs);
  each(threads, [&](int64_t t) {
    k.forward(f, rows * t / threads, rows * (t + 1) / threads, tiles + t * each_needs);
  });
}

void masked_linear_backward(const Plan& plan, const Kernels& k, const Matrix& grad_y,
                            const Matrix& saved, const Matrix& x, const void* weight,
                            const Gradients& grads, Activation activation, int64_t rows) {
  const Layout& layout = plan.layout;
  const Panels& panels = plan.forward;
  const bool need_weight = grads.weight != nullptr, need_bias = grads.bias != nullptr;
  const int64_t work = (grads.x != nullptr ? layout.num_routed : 0) +
                       (need_weight ? layout.num_weights : 0) + layout.out_features;
  const int64_t threads = threads_for(2 * rows * work, rows);
  const Place in_place = place_for(x.dtype, rows);
  Matrix grad_x = x;
  grad_x.data = grads.x;
  grad_x.stride = x.features;
  Backward b{view(panels), view(plan.backward), grad_y,    saved, x, grad_x, nullptr, in_place,
             need_weight,  need_bias,           activation, 0};
  b.tile_rows = tile_rows_for(x.features + grad_y.features, (rows + threads - 1) / threads);
  const int64_t each_needs = Scratch::round_up(k.backward_scratch(b));
  const int64_t turned =
      Scratch::round_up(grads.x != nullptr ? buffer_size(plan.backward, Place::kNowhere) : 0);
  std::vector<ThreadSums> sums;
  sums.emplace_back(plan, x.dtype, in_place, need_weight, need_bias, threads);
  Scratch scratch(turned + sums[0].scratch() + threads * each_needs);
  float* turned_buffer = scratch.take(turned);
  if (grads.x != nullptr) {
    pack(k, plan.backward, weight, x.dtype, Place::kNowhere, turned_buffer, threads);
    b.turned_buffer = turned_buffer;
  }
  sums[0].take(scratch, grads.weight, grads.bias, grad_y.order);
  float* tiles = scratch.take(threads * each_needs);
  each(threads, [&](int64_t t) {
    const int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
    const LayerSums& own = sums[0].of(t);
    k.backward(b, begin, end, own.weight, own.buffer, own.bias, tiles + t * each_needs);
  });
  ThreadSums::finish(k, sums, rows, nullptr);
}

namespace {

// AMX: the processor has the tiles, the system keeps them across switches, and lets us use them.
[[maybe_unused]] bool may_use_tiles() {
#if defined(MASKMOE_EMULATE_AMX)
  return true;
#elif defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kXsaveOn = 1u << 27, kState = 3u << 17;
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsaveOn)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBf16 | kTile)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // Once for all threads, those that come later included.
  return !(~low & kState) && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Choice {
  const Kernels* kernels[8] = {};
  const char* names[9] = {};
  // AMX runs where it is named only: its kernels are tested on emulated tiles, and have yet to meet
  // real ones.
  const Kernels* best = nullptr;
  const Kernels* chosen = nullptr;
  Choice() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#ifndef MASKMOE_NO_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
#ifndef MASKMOE_NO_AMX
      if (may_use_tiles()) kernels[n++] = &kAmx;
#endif
      kernels[n++] = &kAvx512;
    }
#endif
#ifndef MASKMOE_NO_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      kernels[n++] = &kAvx2;
    }
#endif
#endif
    for (int i = 0; i < n; ++i) names[i] = kernels[i]->name;
    best = n > 1 && std::strncmp(names[0], "amx", 3) == 0 ? kernels[1] : kernels[0];
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
