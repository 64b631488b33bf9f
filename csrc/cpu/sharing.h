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

// How many threads share out work on `size` weights.
inline int64_t tasks_for(int64_t size, int64_t threads) { return size < (1 << 15) ? 1 : threads; }

// One share of bringing weights where panels want them: every `shares`-th panel, for some see much
// more than others.
inline void pack_share(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
                       Place in_place, float* buffer, int64_t share, int64_t shares) {
  if (buffer_size(panels, in_place) == 0) return;
  const PanelsView of = view(panels);
  for (int64_t p = share; p < of.count; p += shares) {
    k.pack(of, p, p + 1, weight, dtype, in_place, buffer);
  }
}

inline void pack(const Kernels& k, const Panels& panels, const void* weight, Dtype dtype,
                 Place in_place, float* buffer, int64_t threads) {
  const int64_t shares = tasks_for(buffer_size(panels, in_place), threads);
  each(shares, [&](int64_t t) {
    pack_share(k, panels, weight, dtype, in_place, buffer, t, shares);
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

  // `order` is that of the biases.
  void take(Scratch& scratch, void* grad_weight, void* grad_bias, const int64_t* order) {
    grad_weight_ = grad_weight;
    grad_bias_ = grad_bias;
    order_ = order;
    result_ = direct() ? static_cast<float*>(grad_weight) : scratch.take(wide_);
    for (int64_t t = 0; t < threads_; ++t) {
      own_.push_back({t == 0 ? result_ : scratch.take(weights_), scratch.take(packed_),
                      scratch.take(biases_)});
    }
  }

  const LayerSums& of(int64_t thread) const { return own_[thread]; }

  // What threads have summed becomes gradients. `scale`, where given, has a factor for each row
  // block.
  static void finish(const Kernels& k, std::vector<ThreadSums>& layers, int64_t rows,
                     const float* scale) {
    int64_t size = 0, threads = 1;
    bool packed = false, later = scale != nullptr;
    for (const ThreadSums& layer : layers) {
      size += layer.weight_ ? layer.layout_.num_weights : 0;
      threads = layer.threads_;
      packed = packed || layer.packed_ > 0;
      later = later || !layer.direct();
    }
    const int64_t shares = tasks_for(size, threads);
    each(shares, [&](int64_t t) {
      for (ThreadSums& layer : layers) {
        layer.add_up(k, rows, t, shares);
        if (t == 0) layer.write_bias(k, scale);
        if (!packed) layer.write_weight(k, scale, t, shares);
      }
    });
    if (!packed) return;
    if (rows > 0) {
      each(shares, [&](int64_t t) {
        for (ThreadSums& layer : layers) layer.unpack(k, t, shares);
      });
    }
    if (!later) return;
    each(shares, [&](int64_t t) {
      for (ThreadSums& layer : layers) layer.write_weight(k, scale, t, shares);
    });
  }

 private:
  // into += what the other threads have, in their order; without rows nobody has anything.
  template <class Of>
  void sum(const Kernels& k, const Of& of, int64_t count, int64_t rows, int64_t share,
           int64_t shares) {
    const int64_t begin = count * share / shares, size = count * (share + 1) / shares - begin;
    if (rows == 0) std::fill_n(of(own_[0]) + begin, size, 0.0f);
    for (int64_t t = 1; t < threads_ && rows > 0; ++t) {
      k.add(of(own_[0]) + begin, of(own_[t]) + begin, size);
    }
  }

  void add_up(const Kernels& k, int64_t rows, int64_t share, int64_t shares) {
    if (weight_ && (some_in_place_ || rows == 0)) {
      sum(k, [](const LayerSums& s) { return s.weight; }, layout_.num_weights, rows, share, shares);
    }
    sum(k, [](const LayerSums& s) { return s.buffer; }, packed_, rows, share, shares);
    if (bias_ && share == 0) {
      sum(k, [](const LayerSums& s) { return s.bias; }, layout_.out_features, rows, 0, 1);
    }
  }

  void unpack(const Kernels& k, int64_t share, int64_t shares) {
    const PanelsView of = view(panels_);
    if (packed_ == 0) return;
    for (int64_t p = share; p < of.count; p += shares) {
      k.unpack(of, p, p + 1, own_[0].buffer, in_place_, result_);
    }
  }

  void write_weight(const Kernels& k, const float* scale, int64_t share, int64_t shares) {
    if (!weight_) return;
    const int64_t count = layout_.num_weights;
    const int64_t begin = count * share / shares, end = count * (share + 1) / shares;
    multiply(result_, layout_.weight_offsets, scale, begin, end);
    if (direct()) return;
    k.store(static_cast<uint16_t*>(grad_weight_) + begin, dtype_, nullptr, result_ + begin,
            end - begin);
  }

  void write_bias(const Kernels& k, const float* scale) {
    if (!bias_) return;
    multiply(own_[0].bias, layout_.row_offsets, scale, 0, layout_.out_features);
    k.store(grad_bias_, dtype_, order_, own_[0].bias, layout_.out_features);
  }

  bool direct() const { return dtype_ == Dtype::kFloat32; }

  // Those of [begin, end), each by its block's factor.
  static void multiply(float* values, const std::vector<int64_t>& offsets, const float* scale,
                       int64_t begin, int64_t end) {
    if (scale == nullptr) return;
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      const int64_t last = std::min(offsets[i + 1], end);
      for (int64_t n = std::max(offsets[i], begin); n < last; ++n) values[n] *= scale[i];
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
  void *grad_weight_ = nullptr, *grad_bias_ = nullptr;
  const int64_t* order_ = nullptr;
  float* result_ = nullptr;
  std::vector<LayerSums> own_;
};

}  // namespace maskmoe
