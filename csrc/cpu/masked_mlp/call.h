// One call of the MLP's kernels: weights where the kernels read them, scratch, and each
// thread's sums.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/gradient_sums.h"
#include "cpu/masked_mlp/masked_mlp.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace maskmoe {

class MlpCall {
 public:
  MlpCall(const MlpInputs& in, const Kernels& k, const Tiling& tiling, int64_t flops);

  Mlp mlp{};  // what the kernels get; the caller fills in what it asks for

  int64_t threads() const { return threads_; }

  // Allocates; afterwards `own` floats can be taken from `scratch`. `experts`: of the loss, or 0.
  void prepare(const MlpGradients& grads, int64_t experts, int64_t own);

  // Runs `step` tiles at a time; after each step, `then(row, rows)`.
  template <class F>
  void run(int64_t step, const F& then) {
    for (int64_t begin = 0, end; begin < tiling_.count; begin = end) {
      end = std::min(begin + step, tiling_.count);
      mlp.done = begin * tiling_.rows;
      run_tiles(begin, end);
      then(mlp.done, std::min(end * tiling_.rows, in_.rows) - mlp.done);
    }
  }
  void run() {
    run(std::max<int64_t>(tiling_.count, 1), [](int64_t, int64_t) {});
  }

  // Adds up the sums of all threads. `scale`, where given, has a factor for each expert.
  void reduce(const float* scale) { GradientSums::reduce(k_, sums_, in_.rows, scale); }

  // Sums of all threads, of w BCE and of w, for every expert.
  void add_totals(int64_t experts, double* loss, double* weight) const;

  // The slots of the first layer's units, and each expert's `factor` in those of its units.
  int64_t slots_of_units() const;
  void expand_to_units(const float* factor, float* slots) const;

  std::unique_ptr<Scratch> scratch;

 private:
  bool transposes(size_t layer) const { return mlp.backward && (layer > 0 || mlp.need_inputs); }
  bool copies_bias(size_t layer) const {
    return !in_.biases.empty() &&
           (in_.dtype != Dtype::kFloat32 || !in_.chain[layer].layout.row_order.empty());
  }
  void copy_bias(size_t layer);
  void copy_weights();
  void run_tiles(int64_t begin, int64_t end);

  const MlpInputs& in_;
  const Kernels& k_;
  const Tiling tiling_;
  const int64_t threads_;
  std::vector<MlpLayer> layers_;
  std::vector<GradientSums> sums_;
  std::vector<GemSums> totals_;
  std::vector<float*> tiles_;
};

}  // namespace maskmoe
