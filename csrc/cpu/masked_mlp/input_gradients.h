// Where gradients of an MLP's inputs go: straight to x if x is the only part, else to rows of
// all parts. From those they are distributed to x and to the tables some tiles at a time, while
// they are in the cache.
#pragma once

#include <vector>

#include "cpu/masked_mlp/call.h"

namespace maskmoe {

class InputGradients {
 public:
  InputGradients(const MlpInputs& in, const MlpGradients& grads, const Tiling& tiling);

  bool wanted() const { return tables_ || grads_.x.data != nullptr; }

  // Floats of scratch, which `take` takes. It returns where the kernels write.
  int64_t scratch() const;
  Matrix take(Scratch& scratch);

  // Runs the call, which has to go back. Every table row sums the samples that named it, in the
  // order of the batch.
  void run(MlpCall& call, const Kernels& k) const;

 private:
  bool direct() const { return grads_.dtype == Dtype::kFloat32; }
  int64_t features() const { return in_.chain[0].layout.in_features; }
  bool is_table(size_t p) const { return in_.table_rows[p] > 0; }
  // Floats of a table's sums, where they cannot be summed in the result.
  int64_t wide(size_t p) const {
    return direct() || grads_.tables[p] == nullptr ? 0 : in_.table_rows[p] * in_.parts[p].width;
  }

  // f(part, its sums) for every table that wants a gradient.
  template <class F>
  void each_table(const F& f) const {
    for (size_t p = 0; p < in_.parts.size(); ++p) {
      if (!is_table(p) || grads_.tables[p] == nullptr) continue;
      f(p, direct() ? static_cast<float*>(grads_.tables[p]) : wide_[p]);
    }
  }

  void distribute(const MlpCall& call, const Kernels& k, int64_t first, int64_t rows,
                  bool fresh) const;
  void copy_columns(const Kernels& k, int64_t first, int64_t begin, int64_t end) const;
  void add_rows(const Kernels& k, size_t p, int64_t first, int64_t rows, int64_t begin,
                int64_t end, float* to) const;

  const MlpInputs& in_;
  const MlpGradients& grads_;
  const bool tables_, straight_;
  const int64_t step_, rows_;  // tiles at a time, and the rows that they have at most
  float* values_ = nullptr;    // (rows_, features)
  std::vector<float*> wide_;
};

}  // namespace maskmoe
