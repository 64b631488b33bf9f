#include "driver.h"

#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace maskmoe {
namespace {

constexpr int64_t kFlopsPerThread = 1 << 21;  // below, another thread costs more than it brings
constexpr int64_t kTileFloats = 1 << 16;      // a tile of x and y: a quarter of a 1 MiB cache
constexpr int64_t kFewRows = 64;
constexpr int64_t kKept = 1 << 24;            // floats of scratch a thread keeps between calls

// Scratch for one call; kept by the calling thread while it is small.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    static thread_local Buffer kept;
    Buffer& buffer = size <= kKept ? kept : own_;
    if (buffer.size < size) {
      buffer.data.reset(static_cast<float*>(::operator new(size * sizeof(float), kAligned)));
      buffer.size = size;
    }
    at_ = buffer.data.get();
  }

  float* take(int64_t size) {
    float* from = at_;
    at_ += round_up(size);
    return from;
  }

  static int64_t round_up(int64_t size) { return (size + 15) / 16 * 16; }

 private:
  static constexpr std::align_val_t kAligned{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAligned); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t size = 0;
  };
  Buffer own_;
  float* at_;
};

// f(n) for n in [0, tasks); which thread runs which task changes nothing.
template <class F>
void each(int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

int64_t threads_for(int64_t flops, int64_t rows) {
  if (flops < 2 * kFlopsPerThread) return 1;
  const int64_t useful = std::min(flops / kFlopsPerThread, (rows + 15) / 16);
  return std::max<int64_t>(1, std::min<int64_t>(useful, torch::stable::get_num_threads()));
}

int64_t tile_rows_for(int64_t features, int64_t rows) {
  const int64_t fit = std::clamp<int64_t>(kTileFloats / features, 56, 252);
  return std::max<int64_t>(1, std::min(fit / 28 * 28, rows));
}

PanelsView view(const Panels& p) {
  return {p.panels.data(), static_cast<int64_t>(p.panels.size()), p.lines, p.segments.data(),
          p.copies.data()};
}

int64_t buffer_size(const Panels& panels, Place in_place) {
  return panels.buffer_size[static_cast<int>(in_place)];
}

// Which weights are read and written in place: with few rows a copy would cost more than it saves.
Place place_for(Dtype dtype, int64_t rows) {
  if (dtype != Dtype::kFloat32) return Place::kNowhere;
  return rows < kFewRows ? Place::kApart : Place::kTogether;
}

// f(begin, end) on ranges of panels that together have `size` weights.
template <class F>
void each_panel(const Panels& panels, int64_t size, int64_t threads, const F& f) {
  if (size == 0) return;
  const int64_t count = static_cast<int64_t>(panels.panels.size());
  const int64_t tasks = size < (1 << 16) ? 1 : std::min(threads, count);
  each(tasks, [&](int64_t t) { f(count * t / tasks, count * (t + 1) / tasks); });
}

void pack(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
          Place in_place, float* buffer, int64_t threads) {
  each_panel(panels, buffer_size(panels, in_place), threads, [&](int64_t begin, int64_t end) {
    k.pack(view(panels), begin, end, weight, dtype, in_place, buffer);
  });
}

void sum(const Kernels& k, float* into, const std::vector<float*>& parts, int64_t count,
         int64_t threads) {
  const int64_t tasks = count < (1 << 15) ? 1 : threads;
  each(tasks, [&](int64_t t) {
    const int64_t begin = count * t / tasks, end = count * (t + 1) / tasks;
    for (float* part : parts) k.add(into + begin, part + begin, end - begin);
  });
}

void zero(float* p, int64_t count) { std::fill(p, p + count, 0.0f); }

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
  const bool direct = x.dtype == Dtype::kFloat32;
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
  // Direct panels of the first task write where the result goes.
  const int64_t each_needs = Scratch::round_up(k.backward_scratch(b));
  const int64_t turned =
      Scratch::round_up(grads.x != nullptr ? buffer_size(plan.backward, Place::kNowhere) : 0);
  const int64_t packed = Scratch::round_up(need_weight ? buffer_size(panels, in_place) : 0);
  const bool some_in_place =
      need_weight && buffer_size(panels, in_place) < buffer_size(panels, Place::kNowhere);
  const int64_t weights = Scratch::round_up(some_in_place ? layout.num_weights : 0);
  const int64_t biases = Scratch::round_up(need_bias ? layout.out_features : 0);
  const int64_t own = packed + biases;
  const int64_t wide = Scratch::round_up(need_weight && !direct ? layout.num_weights : 0);
  Scratch scratch(turned + wide + threads * (each_needs + own) + (threads - 1) * weights);
  float* turned_buffer = scratch.take(turned);
  if (grads.x != nullptr) {
    pack(k, plan.backward, weight, x.dtype, Place::kNowhere, turned_buffer, threads);
    b.turned_buffer = turned_buffer;
  }
  float* result = direct ? static_cast<float*>(grads.weight) : scratch.take(wide);
  std::vector<float*> weight_parts, buffer_parts, bias_parts;
  for (int64_t t = 0; t < threads; ++t) {
    weight_parts.push_back(t == 0 ? result : scratch.take(weights));
    buffer_parts.push_back(scratch.take(packed));
    bias_parts.push_back(scratch.take(biases));
  }
  float* tiles = scratch.take(threads * each_needs);
  each(threads, [&](int64_t t) {
    const int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
    k.backward(b, begin, end, weight_parts[t], buffer_parts[t], bias_parts[t],
               tiles + t * each_needs);
  });
  float* first_buffer = buffer_parts[0];
  float* first_bias = bias_parts[0];
  for (auto* parts : {&weight_parts, &buffer_parts, &bias_parts}) parts->erase(parts->begin());
  if (need_weight) {
    if (rows == 0) {
      zero(result, layout.num_weights);
    } else {
      sum(k, first_buffer, buffer_parts, packed, threads);
      if (some_in_place) sum(k, result, weight_parts, layout.num_weights, threads);
      each_panel(panels, packed, threads, [&](int64_t begin, int64_t end) {
        k.unpack(view(panels), begin, end, first_buffer, in_place, result);
      });
    }
    if (!direct) k.store(grads.weight, x.dtype, nullptr, result, layout.num_weights);
  }
  if (need_bias) {
    if (rows == 0) zero(first_bias, layout.out_features);
    sum(k, first_bias, bias_parts, rows == 0 ? 0 : layout.out_features, threads);
    k.store(grads.bias, x.dtype, grad_y.order, first_bias, layout.out_features);
  }
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
