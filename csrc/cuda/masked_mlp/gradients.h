// The gradients that a backward returns: allocated, given to the kernel, and completed after it.
#pragma once

#include <optional>
#include <vector>

#include "cuda/masked_mlp/launcher.h"
#include "cuda/masked_mlp/reduce_gradients.h"
#include "cuda/masked_mlp/table_gradients.h"

namespace maskmoe::fused {

struct GradientNeeds {
  bool x, tables, weights;
};

template <class Device>
class Gradients {
 public:
  // dtype: of the gradients.
  Gradients(Launcher<Device>& launcher, GradientNeeds needs, ScalarType dtype)
      : launcher_(launcher), needs_(needs), dtype_(dtype) {}

  bool any() const { return needs_.x || needs_.tables || needs_.weights; }

  // The blocks of weights that the kernel reads: the transposed ones of the first layer only if the
  // input has a gradient.
  int32_t num_blocks() const {
    const ExecutionPlan& plan = launcher_.host_plan();
    return needs_.x || needs_.tables ? plan.all_blocks : plan.inner_blocks;
  }

  // Allocates the input's gradients, those of table rows sample by sample, and has the kernel write
  // them.
  void set_inputs(Call& call) {
    const MlpTensors& t = launcher_.inputs().tensors();
    if (t.x && needs_.x) {
      Integers sizes = launcher_.inputs().leading();
      sizes.push_back(t.x->size(t.x->dim() - 1));
      grad_x_ = launcher_.buffers().empty(sizes, dtype_);
    }
    int64_t width = 0;
    if (needs_.tables) {
      for (int64_t p : t.parts) width += p < 0 ? 0 : t.tables[p].size(1);
      grad_rows_ = launcher_.buffers().empty({launcher_.rows(), width}, dtype_);
    }
    const int64_t item = dtype_ == ScalarType::Float ? 4 : 2;
    int64_t column = 0, table_column = 0;
    for (size_t n = 0; n < t.parts.size(); ++n) {
      const int64_t p = t.parts[n];
      if (p < 0) {
        if (grad_x_) {
          auto* data = static_cast<unsigned char*>(grad_x_->mutable_data_ptr());
          call.grad_parts[n] = {data + column * item, grad_x_->size(grad_x_->dim() - 1)};
        }
        column -= p;
      } else if (needs_.tables) {
        auto* data = static_cast<unsigned char*>(grad_rows_->mutable_data_ptr());
        call.grad_parts[n] = {data + table_column * item, width};
        table_column += t.tables[p].size(1);
      }
    }
    call.need_grad_inputs = grad_x_ || (needs_.tables && width > 0);
    call.float32_grad_inputs = dtype_ == ScalarType::Float;
  }

  // Allocates the sums of each thread block of Backward, T being the number type of the tensors.
  template <class T>
  void set_sums(Call& call) {
    call.sums_size = launcher_.sums_size();
    num_sums_ = launcher_.template num_blocks<Backward, T>();
    if (!needs_.weights) return;
    call.gradient_sums = launcher_.buffers().template take<float>(num_sums_ * call.sums_size);
  }
  int64_t num_sums() const { return num_sums_; }

  // The gradients of weights and biases from the sums of all blocks. Result: number type of dtype.
  template <class Result>
  void reduce(const Call& call, const float* scale, float factor) {
    if (!needs_.weights) return;
    const MlpTensors& t = launcher_.inputs().tensors();
    ReduceArguments g{};
    g.plan = launcher_.device_plan();
    g.sums = call.gradient_sums;
    g.sums_size = call.sums_size;
    g.num_sums = num_sums_;
    g.scale = scale;
    g.factor = factor;
    allocate_like(t.weights, grad_weights_, g.weights);
    allocate_like(t.biases, grad_biases_, g.biases);
    launcher_.device().template launch<ReduceGradients<Result>>(
        grid_size(kWarps * call.sums_size), ReduceGradients<Result>::kShared, g);
  }

  // The gradients of the tables from those of the rows that samples read.
  template <class Result>
  void add_tables() {
    if (!needs_.tables) return;
    const MlpTensors& t = launcher_.inputs().tensors();
    std::vector<int64_t> column(t.tables.size(), -1);  // in grad_rows_; -1: no part is this table
    int64_t width = 0;
    for (int64_t p : t.parts) {
      if (p < 0) continue;
      column[p] = width;
      width += t.tables[p].size(1);
    }
    for (size_t n = 0; n < t.tables.size(); ++n) {
      ScatterArguments s{};
      if (column[n] >= 0) s.grad = static_cast<const Result*>(grad_rows_->data_ptr()) + column[n];
      s.samples = launcher_.rows();
      s.stride = width;
      s.rows = t.tables[n].size(0);
      s.width = t.tables[n].size(1);
      grad_tables_.push_back(table_gradient<Result>(launcher_.device(), launcher_.buffers(), s,
                                                    t.ids[n], dtype_));
    }
  }

  // In the order of the ops: x, tables, weights, biases; those that are needed.
  Tensors list() const {
    Tensors all;
    if (grad_x_) all.push_back(*grad_x_);
    for (const Tensors* some : {&grad_tables_, &grad_weights_, &grad_biases_}) {
      all.insert(all.end(), some->begin(), some->end());
    }
    return all;
  }

 private:
  void allocate_like(const Tensors& parameters, Tensors& grads, void** addresses) {
    for (size_t l = 0; l < parameters.size(); ++l) {
      grads.push_back(launcher_.buffers().empty({parameters[l].numel()}, dtype_));
      addresses[l] = grads.back().mutable_data_ptr();
    }
  }

  Launcher<Device>& launcher_;
  GradientNeeds needs_;
  ScalarType dtype_;
  int64_t num_sums_ = 0;
  std::optional<Tensor> grad_x_, grad_rows_;
  Tensors grad_tables_, grad_weights_, grad_biases_;
};

}  // namespace maskmoe::fused
