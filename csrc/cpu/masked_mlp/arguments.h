// The arguments of the masked_mlp ops, checked, and as the kernels need them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "common/mlp_inputs.h"
#include "cpu/masked_mlp/masked_mlp.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace maskmoe {

// What all masked_mlp ops are called with.
struct MlpArguments {
  const char* op;
  const std::optional<Tensor>& x;
  const Tensors &tables, &ids;
  const Integers& parts;
  const Tensors &weights, &biases, &serialized;
  const Integers& layouts;

  Checks checks;
  Dtype dtype;
  std::vector<PartOf> read;  // the parts

  MlpArguments(const char* op, const std::optional<Tensor>& x, const Tensors& tables,
               const Tensors& ids, const Integers& parts, const Tensors& weights,
               const Tensors& biases, const Tensors& serialized, const Integers& layouts);

  const Tensor& first_weight() const;
  // Of the batch, (*,).
  Integers batch_sizes() const;
  // The execution plans of an MLP with so many outputs.
  std::shared_ptr<const Chain> chain(int64_t outputs) const;
};

// One call, as the kernels see it, and the tensors that keep its memory alive.
struct PreparedMlp {
  MlpInputs in;
  Tensors held;
  int64_t columns;               // of x
  std::vector<size_t> table_at;  // the part that is each table

  PreparedMlp(const Chain& chain, const MlpArguments& a, Activation activation);

 private:
  void add_parts(const MlpArguments& a);
  void add_table(const MlpArguments& a, const PartOf& part);
  void add_layers(const MlpArguments& a);

  Matrix x_{};
};

// Gradients that are asked for, in the order in which the ops return them, as `dtype`: that of the
// input, or float32, the dtype of the sums.
struct MlpResults {
  Tensors all;
  MlpGradients grads{};

  MlpResults(const PreparedMlp& call, Dtype dtype, const MlpArguments& a, bool need_x,
             bool need_tables, bool need_weights);

 private:
  void* add(const Tensor& like, const Integers& sizes);
};

Tensor empty_float(const Tensor& like, const Integers& sizes);

}  // namespace maskmoe
