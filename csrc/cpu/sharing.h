// How one call is shared out over threads: scratch, tasks, and sums that every thread makes for
// itself and that are added up in a fixed order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "pages.h"

namespace maskmoe {

// Scratch for one call; kept by the calling thread while it is small.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    static thread_local Buffer kept;
    Buffer& buffer = size <= kKept ? kept : own_;
    if (buffer.size < size) {
      const size_t bytes = size * sizeof(float);
      buffer.data.reset(static_cast<float*>(::operator new(bytes, kAligned)));
      buffer.size = size;
      prefer_large_pages(buffer.data.get(), static_cast<int64_t>(bytes));
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
  static constexpr int64_t kKept = 1 << 24;  // floats
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

constexpr int64_t kFlopsPerThread = 1 << 21;  // below, another thread costs more than it brings

inline int64_t threads_for(int64_t flops, int64_t rows) {
  if (flops < 2 * kFlopsPerThread) return 1;
  const int64_t useful = std::min(flops / kFlopsPerThread, (rows + 15) / 16);
  return std::max<int64_t>(1, std::min<int64_t>(useful, torch::stable::get_num_threads()));
}

inline PanelsView view(const Panels& p) {
  return {p.panels.data(), static_cast<int64_t>(p.panels.size()), p.lines, p.segments.data(),
          p.copies.data()};
}

inline int64_t buffer_size(const Panels& panels, Place in_place) {
  return panels.buffer_size[static_cast<int>(in_place)];
}

// Which weights are read and written in place: with few rows a copy would cost more than it saves.
inline Place place_for(Dtype dtype, int64_t rows) {
  constexpr int64_t kFewRows = 64;
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

inline void pack(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
                 Place in_place, float* buffer, int64_t threads) {
  each_panel(panels, buffer_size(panels, in_place), threads, [&](int64_t begin, int64_t end) {
    k.pack(view(panels), begin, end, weight, dtype, in_place, buffer);
  });
}

// into += parts[0], then parts[1], ...
inline void sum(const Kernels& k, float* into, const std::vector<float*>& parts, int64_t count,
                int64_t threads) {
  const int64_t tasks = count < (1 << 15) ? 1 : threads;
  each(tasks, [&](int64_t t) {
    const int64_t begin = count * t / tasks, end = count * (t + 1) / tasks;
    for (float* part : parts) k.add(into + begin, part + begin, end - begin);
  });
}

// Gradients of one layer's weights and biases: every thread has sums of its own, and the first
// writes what lies in place where the result goes.
class ThreadSums {
 public:
  ThreadSums(const Plan& plan, Dtype dtype, Place in_place, bool weight, bool bias, int64_t threads)
      : layout_(plan.layout), panels_(plan.forward), dtype_(dtype), in_place_(in_place),
        weight_(weight), bias_(bias), threads_(threads) {
    const int64_t copied = buffer_size(panels_, in_place);
    some_in_place_ = weight && copied < buffer_size(panels_, Place::kNowhere);
    packed_ = Scratch::round_up(weight ? copied : 0);
    weights_ = Scratch::round_up(some_in_place_ ? layout_.num_weights : 0);
    biases_ = Scratch::round_up(bias ? layout_.out_features : 0);
    wide_ = Scratch::round_up(weight && !direct() ? layout_.num_weights : 0);
  }

  int64_t scratch() const {
    return wide_ + threads_ * (packed_ + biases_) + (threads_ - 1) * weights_;
  }

  void take(Scratch& scratch, void* grad_weight) {
    result_ = direct() ? static_cast<float*>(grad_weight) : scratch.take(wide_);
    for (int64_t t = 0; t < threads_; ++t) {
      own_.push_back({t == 0 ? result_ : scratch.take(weights_), scratch.take(packed_),
                      scratch.take(biases_)});
    }
  }

  const LayerSums& of(int64_t thread) const { return own_[thread]; }

  // `order` is that of the biases; `scale`, where given, has a factor for each row block.
  void finish(const Kernels& k, void* grad_weight, void* grad_bias, const int64_t* order,
              int64_t rows, const float* scale = nullptr) {
    std::vector<float*> weights, buffers, biases;
    for (int64_t t = 1; t < threads_; ++t) {
      weights.push_back(own_[t].weight);
      buffers.push_back(own_[t].buffer);
      biases.push_back(own_[t].bias);
    }
    if (weight_) {
      if (rows == 0) {
        std::fill_n(result_, layout_.num_weights, 0.0f);
      } else {
        sum(k, own_[0].buffer, buffers, packed_, threads_);
        if (some_in_place_) sum(k, result_, weights, layout_.num_weights, threads_);
        each_panel(panels_, packed_, threads_, [&](int64_t begin, int64_t end) {
          k.unpack(view(panels_), begin, end, own_[0].buffer, in_place_, result_);
        });
      }
      multiply(result_, layout_.weight_offsets, scale);
      if (!direct()) k.store(grad_weight, dtype_, nullptr, result_, layout_.num_weights);
    }
    if (bias_) {
      float* total = own_[0].bias;
      if (rows == 0) std::fill_n(total, layout_.out_features, 0.0f);
      sum(k, total, biases, rows == 0 ? 0 : layout_.out_features, threads_);
      multiply(total, layout_.row_offsets, scale);
      k.store(grad_bias, dtype_, order, total, layout_.out_features);
    }
  }

 private:
  bool direct() const { return dtype_ == Dtype::kFloat32; }

  static void multiply(float* values, const std::vector<int64_t>& offsets, const float* scale) {
    if (scale == nullptr) return;
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      for (int64_t n = offsets[i]; n < offsets[i + 1]; ++n) values[n] *= scale[i];
    }
  }

  const Layout& layout_;
  const Panels& panels_;
  const Dtype dtype_;
  const Place in_place_;
  const bool weight_, bias_;
  const int64_t threads_;
  bool some_in_place_;
  int64_t packed_, weights_, biases_, wide_;
  float* result_ = nullptr;
  std::vector<LayerSums> own_;
};

}  // namespace maskmoe
