// Gradients of weights and biases, summed by several threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace maskmoe {

// Gradients of one layer's weights and biases: every thread has sums of its own, which are added up
// in a fixed order. The sums of the first thread lie in the result where a panel's weights are in
// place.
class GradientSums {
 public:
  GradientSums(const ExecutionPlan& plan, Dtype dtype, Place in_place, bool weight, bool bias,
               int64_t threads)
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

  // Adds up the sums of all threads and writes the gradients. `scale`, where given, has a factor
  // for each row block.
  static void reduce(const Kernels& k, std::vector<GradientSums>& layers, int64_t rows,
                     const float* scale) {
    int64_t size = 0, threads = 1;
    bool packed = false, converted = scale != nullptr;
    for (const GradientSums& layer : layers) {
      size += layer.weight_ ? layer.layout_.num_weights : 0;
      threads = layer.threads_;
      packed = packed || layer.packed_ > 0;
      converted = converted || !layer.direct();
    }
    const int64_t tasks = tasks_for(size, threads);
    each(tasks, [&](int64_t t) {
      for (GradientSums& layer : layers) {
        layer.add_up(k, rows, t, tasks);
        if (t == 0) layer.write_bias(k, scale);
        if (!packed) layer.write_weight(k, scale, t, tasks);
      }
    });
    if (!packed) return;
    if (rows > 0) {
      each(tasks, [&](int64_t t) {
        for (GradientSums& layer : layers) layer.unpack(k, t, tasks);
      });
    }
    if (!converted) return;
    each(tasks, [&](int64_t t) {
      for (GradientSums& layer : layers) layer.write_weight(k, scale, t, tasks);
    });
  }

 private:
  // into += what the other threads have, in their order; without rows nobody has anything.
  template <class Of>
  void sum(const Kernels& k, const Of& of, int64_t count, int64_t rows, int64_t task,
           int64_t tasks) {
    const int64_t begin = count * task / tasks, size = count * (task + 1) / tasks - begin;
    if (rows == 0) std::fill_n(of(own_[0]) + begin, size, 0.0f);
    for (int64_t t = 1; t < threads_ && rows > 0; ++t) {
      k.add(of(own_[0]) + begin, of(own_[t]) + begin, size);
    }
  }

  void add_up(const Kernels& k, int64_t rows, int64_t task, int64_t tasks) {
    if (weight_ && (some_in_place_ || rows == 0)) {
      sum(k, [](const LayerSums& s) { return s.weight; }, layout_.num_weights, rows, task, tasks);
    }
    sum(k, [](const LayerSums& s) { return s.buffer; }, packed_, rows, task, tasks);
    if (bias_ && task == 0) {
      sum(k, [](const LayerSums& s) { return s.bias; }, layout_.out_features, rows, 0, 1);
    }
  }

  void unpack(const Kernels& k, int64_t task, int64_t tasks) {
    const PanelsView of = view(panels_);
    if (packed_ == 0) return;
    for (int64_t p = task; p < of.count; p += tasks) {
      k.unpack(of, p, p + 1, own_[0].buffer, in_place_, result_);
    }
  }

  void write_weight(const Kernels& k, const float* scale, int64_t task, int64_t tasks) {
    if (!weight_) return;
    const int64_t count = layout_.num_weights;
    const int64_t begin = count * task / tasks, end = count * (task + 1) / tasks;
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
