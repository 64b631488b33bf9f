#include "cpu/masked_mlp/arguments.h"

#include "cpu/plan_lookup.h"

namespace maskmoe {

MlpArguments::MlpArguments(const char* op, const std::optional<Tensor>& x, const Tensors& tables,
                           const Tensors& ids, const Integers& parts, const Tensors& weights,
                           const Tensors& biases, const Tensors& serialized,
                           const Integers& layouts)
    : op(op), x(x), tables(tables), ids(ids), parts(parts), weights(weights), biases(biases),
      serialized(serialized), layouts(layouts), checks(op, first_weight()),
      dtype(checked_dtype(checks, first_weight(), "weights", 0)) {
  check_lists(op, serialized, layouts, weights, biases, tables, ids, x.has_value());
  STD_TORCH_CHECK(!x || x->dim() > 0, "maskmoe::", op, ": x must be (*, columns)");
  read = read_parts(op, parts, tables, x ? x->size(x->dim() - 1) : 0);
}

const Tensor& MlpArguments::first_weight() const {
  STD_TORCH_CHECK(!weights.empty(), "maskmoe::", op, ": there are no weights");
  return weights.front();
}

Integers MlpArguments::batch_sizes() const {
  Integers sizes;
  const Tensor& of = x ? *x : ids.front();
  for (int64_t d = 0; d < of.dim() - (x ? 1 : 0); ++d) sizes.push_back(of.size(d));
  return sizes;
}

std::shared_ptr<const Chain> MlpArguments::chain(int64_t outputs) const {
  return chain_of(checks, serialized, layouts, {features_of(read), outputs});
}

PreparedMlp::PreparedMlp(const Chain& chain, const MlpArguments& a, Activation activation)
    : in{chain, a.dtype, activation, {}, {}, {}, {}, 1, nullptr}, columns(0) {
  if (a.x) {
    in.rows = rows_of(*a.x);
    columns = a.x->size(a.x->dim() - 1);
    a.checks.matrix(*a.x, "x", in.rows, columns);
    Tensor kept;
    x_ = matrix_of(*a.x, kept, a.dtype, {});
    held.push_back(kept);
  } else {
    in.rows = a.ids.front().numel();
  }
  add_parts(a);
  add_layers(a);
}

void PreparedMlp::add_parts(const MlpArguments& a) {
  const Integers sizes = a.batch_sizes();
  table_at.resize(a.tables.size(), a.parts.size());
  for (size_t t = 0; t < a.tables.size(); ++t) {
    a.checks.readable(a.tables[t], "tables", t, a.checks.dtype());
    STD_TORCH_CHECK(a.tables[t].dim() == 2, a.checks.named("tables", t), " must be (rows, width)");
    const Tensor& ids = a.ids[t];  // one for each row of the batch
    a.checks.readable(ids, "ids", t, aoti_torch_dtype_int64());
    bool fits = ids.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; fits && d < sizes.size(); ++d) fits = ids.size(d) == sizes[d];
    STD_TORCH_CHECK(fits, a.checks.named("ids", t), " must have the shape of the batch");
  }
  for (const PartOf& part : a.read) {
    if (part.table >= 0) {
      add_table(a, part);
      continue;
    }
    const int64_t size = in.dtype == Dtype::kFloat32 ? 4 : 2;
    in.parts.push_back({static_cast<char*>(x_.data) + part.column * size, x_.stride, nullptr,
                        part.width});
    in.table_rows.push_back(0);
  }
}

void PreparedMlp::add_table(const MlpArguments& a, const PartOf& part) {
  const auto t = static_cast<size_t>(part.table);
  held.push_back(dense(a.tables[t]));
  const void* rows = held.back().data_ptr();
  held.push_back(dense(a.ids[t]));
  const auto* ids = static_cast<const int64_t*>(held.back().data_ptr());
  const int64_t count = a.tables[t].size(0);
  for (int64_t r = 0; r < in.rows; ++r) {
    STD_TORCH_CHECK(ids[r] >= 0 && ids[r] < count, a.checks.named("ids", t), " has ", ids[r],
                    ", its table has rows 0 to ", count - 1);
  }
  table_at[t] = in.parts.size();
  in.parts.push_back({rows, part.width, ids, part.width});
  in.table_rows.push_back(count);
}

void PreparedMlp::add_layers(const MlpArguments& a) {
  for (size_t n = 0; n < in.chain.size(); ++n) {
    const Layout& l = in.chain[n].layout;
    a.checks.values(a.weights[n], "weights", n, l.num_weights);
    held.push_back(dense(a.weights[n]));
    in.weights.push_back(held.back().data_ptr());
    if (a.biases.empty()) continue;
    a.checks.values(a.biases[n], "biases", n, l.out_features);
    held.push_back(dense(a.biases[n]));
    in.biases.push_back(held.back().data_ptr());
  }
}

MlpResults::MlpResults(const PreparedMlp& call, Dtype dtype, const MlpArguments& a, bool need_x,
                       bool need_tables, bool need_weights) {
  grads.dtype = dtype;
  grads.tables.resize(call.in.parts.size(), nullptr);
  if (need_x && a.x) {
    Integers sizes;
    for (int64_t d = 0; d < a.x->dim(); ++d) sizes.push_back(a.x->size(d));
    void* to = add(*a.x, sizes);
    const auto& order = call.in.chain.front().layout.col_order;
    const bool ordered = call.in.parts.size() == 1 && !order.empty();
    grads.x = {to, dtype, call.columns, call.columns, ordered ? order.data() : nullptr};
  }
  for (size_t t = 0; need_tables && t < a.tables.size(); ++t) {
    void* to = add(a.tables[t], {a.tables[t].size(0), a.tables[t].size(1)});
    if (call.table_at[t] < call.in.parts.size()) grads.tables[call.table_at[t]] = to;
  }
  if (!need_weights) return;
  for (const Tensor& w : a.weights) grads.weights.push_back(add(w, {w.numel()}));
  for (const Tensor& b : a.biases) grads.biases.push_back(add(b, {b.numel()}));
}

void* MlpResults::add(const Tensor& like, const Integers& sizes) {
  const auto count = static_cast<int64_t>(sizes.size());
  all.push_back(grads.dtype == Dtype::kFloat32 ? empty_float(like, sizes)
                                               : empty_like_with(like, sizes.data(), count));
  return all.back().data_ptr();
}

Tensor empty_float(const Tensor& like, const Integers& sizes) {
  return empty_like_with(like, sizes.data(), static_cast<int64_t>(sizes.size()),
                         aoti_torch_dtype_float32());
}

}  // namespace maskmoe
