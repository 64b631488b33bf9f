// How one call is split over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/execution_plan.h"
#include "cpu/kernels.h"

namespace maskmoe {

// f(n) for n in [0, tasks), on torch's threads. Results must not depend on which thread runs a
// task.
template <class F>
void each(int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

constexpr int64_t kFlopsPerThread = 1 << 21;  // below, another thread costs more than it brings

// The threads of a call with so much work.
inline int64_t threads_for(int64_t flops, int64_t rows) {
  if (flops < 2 * kFlopsPerThread) return 1;
  const int64_t useful = std::min(flops / kFlopsPerThread, (rows + 15) / 16);
  return std::max<int64_t>(1, std::min<int64_t>(useful, torch::stable::get_num_threads()));
}

// Which weights are read and written in place: with few rows a copy would cost more than it saves.
inline Place place_for(Dtype dtype, int64_t rows) {
  constexpr int64_t kFewRows = 64;
  if (dtype != Dtype::kFloat32) return Place::kNowhere;
  return rows < kFewRows ? Place::kApart : Place::kTogether;
}

// The tasks into which work on `size` weights is split.
inline int64_t tasks_for(int64_t size, int64_t threads) { return size < (1 << 15) ? 1 : threads; }

// One of `tasks` tasks that copy weights to the panels' buffer. It takes every `tasks`-th panel,
// for some panels see much more than others.
inline void pack_task(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
                       Place in_place, float* buffer, int64_t task, int64_t tasks) {
  if (buffer_size(panels, in_place) == 0) return;
  const PanelsView of = view(panels);
  for (int64_t p = task; p < of.count; p += tasks) {
    k.pack(of, p, p + 1, weight, dtype, in_place, buffer);
  }
}

inline void pack(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
                 Place in_place, float* buffer, int64_t threads) {
  const int64_t tasks = tasks_for(buffer_size(panels, in_place), threads);
  each(tasks, [&](int64_t t) {
    pack_task(k, panels, weight, dtype, in_place, buffer, t, tasks);
  });
}

}  // namespace maskmoe
