// The CPU implementation of the ops that maskmoe_kernels/ops/networks.py defines.

#include "tensors.h"

namespace maskmoe {
namespace {

using Tensors = std::vector<Tensor>;

// What a call was given, as the kernels see it, and what keeps that alive.
struct Given {
  NetworkInputs in;
  Tensors held;
  int64_t columns;               // of x
  std::vector<size_t> table_at;  // the part that is each table
};

std::vector<int64_t> leading(const std::optional<Tensor>& x, const Tensors& ids) {
  std::vector<int64_t> sizes;
  const Tensor& of = x ? *x : ids.front();
  for (int64_t d = 0; d < of.dim() - (x ? 1 : 0); ++d) sizes.push_back(of.size(d));
  return sizes;
}

// What all ops of networks are called with.
struct Arguments {
  const char* op;
  const std::optional<Tensor>& x;
  const Tensors &tables, &ids;
  const std::vector<int64_t>& parts;
  const Tensors &weights, &biases, &plans;
  const std::vector<int64_t>& layouts;
  const std::string& activation;

  Checks checks;
  std::vector<PartOf> read;  // the parts
  std::optional<Dtype> dtype;

  Arguments(const char* op, const std::optional<Tensor>& x, const Tensors& tables,
            const Tensors& ids, const std::vector<int64_t>& parts, const Tensors& weights,
            const Tensors& biases, const Tensors& plans, const std::vector<int64_t>& layouts,
            const std::string& activation)
      : op(op), x(x), tables(tables), ids(ids), parts(parts), weights(weights), biases(biases),
        plans(plans), layouts(layouts), activation(activation), checks(op, first()),
        dtype(dtype_of(first())) {
    check_lists(op, plans, layouts, weights, biases, tables, ids, x.has_value());
    STD_TORCH_CHECK(!x || x->dim() > 0, "maskmoe::", op, ": x must be (*, columns)");
    read = read_parts(op, parts, tables, x ? x->size(x->dim() - 1) : 0);
  }

  const Tensor& first() const {
    STD_TORCH_CHECK(!weights.empty(), "maskmoe::", op, ": there are no weights");
    return weights.front();
  }

  // Of a network with so many outputs; null: the PyTorch path runs it.
  std::shared_ptr<const Chain> chain(int64_t outputs) const {
    return chain_of(checks, dtype, plans, layouts, {features_of(read), outputs});
  }
};

// Ids of a table, one for each row of the batch, which is `sizes`.
void check_ids(const Arguments& a, size_t t, const std::vector<int64_t>& sizes) {
  const Tensor& ids = a.ids[t];
  a.checks.readable(ids, "ids", t, aoti_torch_dtype_int64());
  bool fits = ids.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = ids.size(d) == sizes[d];
  STD_TORCH_CHECK(fits, a.checks.named("ids", t), " must have the shape of the batch");
}

Given given(const Chain& chain, const Arguments& a) {
  const Dtype dtype = *a.dtype;
  Given g{{chain, dtype, activation_of(a.activation), {}, {}, {}, {}, 1, nullptr}, {}, 0, {}};
  const std::vector<int64_t> sizes = leading(a.x, a.ids);
  Matrix columns{};
  if (a.x) {
    g.in.rows = rows_of(*a.x);
    const int64_t features = a.x->size(a.x->dim() - 1);
    a.checks.matrix(*a.x, "x", g.in.rows, features);
    Tensor kept;
    columns = matrix_of(*a.x, kept, dtype, {});
    g.held.push_back(kept);
    g.columns = features;
  } else {
    g.in.rows = a.ids.front().numel();
  }
  g.table_at.resize(a.tables.size(), a.parts.size());
  for (size_t t = 0; t < a.tables.size(); ++t) {
    a.checks.readable(a.tables[t], "tables", t, a.checks.dtype());
    STD_TORCH_CHECK(a.tables[t].dim() == 2, a.checks.named("tables", t), " must be (rows, width)");
    check_ids(a, t, sizes);
  }
  for (size_t p = 0; p < a.read.size(); ++p) {
    const PartOf& part = a.read[p];
    if (part.table < 0) {
      const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
      g.in.parts.push_back({static_cast<char*>(columns.data) + part.column * size, columns.stride,
                            nullptr, part.width});
      g.in.table_rows.push_back(0);
      continue;
    }
    const auto t = static_cast<size_t>(part.table);
    g.held.push_back(dense(a.tables[t]));
    const void* rows = g.held.back().data_ptr();
    g.held.push_back(dense(a.ids[t]));
    const auto* of = static_cast<const int64_t*>(g.held.back().data_ptr());
    const int64_t count = a.tables[t].size(0);
    for (int64_t r = 0; r < g.in.rows; ++r) {
      STD_TORCH_CHECK(of[r] >= 0 && of[r] < count, "maskmoe::masked_mlp: ids[", t, "] has ", of[r],
                      ", its table has rows 0 to ", count - 1);
    }
    g.in.parts.push_back({rows, part.width, of, part.width});
    g.in.table_rows.push_back(count);
    g.table_at[t] = p;
  }
  for (size_t n = 0; n < chain.size(); ++n) {
    const Layout& l = chain[n].layout;
    a.checks.values(a.weights[n], "weights", n, l.num_weights);
    g.held.push_back(dense(a.weights[n]));
    g.in.weights.push_back(g.held.back().data_ptr());
    if (a.biases.empty()) continue;
    a.checks.values(a.biases[n], "biases", n, l.out_features);
    g.held.push_back(dense(a.biases[n]));
    g.in.biases.push_back(g.held.back().data_ptr());
  }
  return g;
}

Matrix logits_of(const Tensor& t, Tensor& held, const Layout& last, Dtype dtype) {
  return matrix_of(t, held, dtype, last.row_order);
}

Tensor float_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_like_with(like, sizes.data(), static_cast<int64_t>(sizes.size()),
                         aoti_torch_dtype_float32());
}

// Gradients that are asked for, in the order in which the ops return them, as `dtype`: that of the
// input, or float32, the dtype of the sums.
struct Results {
  Tensors all;
  NetworkGradients grads{};

  Results(const Given& g, Dtype dtype, const std::optional<Tensor>& x, const Tensors& tables,
          const Tensors& weights, const Tensors& biases, bool need_x, bool need_tables,
          bool need_weights) {
    grads.dtype = dtype;
    grads.tables.resize(g.in.parts.size(), nullptr);
    if (need_x && x) {
      std::vector<int64_t> sizes;
      for (int64_t d = 0; d < x->dim(); ++d) sizes.push_back(x->size(d));
      void* to = add(*x, sizes);
      const auto& order = g.in.chain.front().layout.col_order;
      const bool ordered = g.in.parts.size() == 1 && !order.empty();
      grads.x = {to, dtype, g.columns, g.columns, ordered ? order.data() : nullptr};
    }
    for (size_t t = 0; need_tables && t < tables.size(); ++t) {
      void* to = add(tables[t], {tables[t].size(0), tables[t].size(1)});
      if (g.table_at[t] < g.in.parts.size()) grads.tables[g.table_at[t]] = to;
    }
    if (!need_weights) return;
    for (const Tensor& w : weights) grads.weights.push_back(add(w, {w.numel()}));
    for (const Tensor& b : biases) grads.biases.push_back(add(b, {b.numel()}));
  }

 private:
  void* add(const Tensor& like, const std::vector<int64_t>& sizes) {
    const auto count = static_cast<int64_t>(sizes.size());
    all.push_back(grads.dtype == Dtype::kFloat32 ? float_like(like, sizes)
                                                 : empty_like_with(like, sizes.data(), count));
    return all.back().data_ptr();
  }
};

constexpr int64_t kMostTileRows = 378;  // that tiles_of gives: 252, and half of that where it rounds

// Of what a forward keeps, `kept` floats a tile: the first size is a tile's rows, so that backward
// can cut the batch alike.
std::vector<int64_t> saved_shape(const Tiling& tiling, int64_t kept) {
  if (kept == 0) return {0, 0};
  return {tiling.rows, (tiling.count * kept + tiling.rows - 1) / tiling.rows};
}

std::tuple<Tensor, Tensor> forward(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                   std::vector<int64_t> parts, Tensors weights, Tensors biases,
                                   Tensors plans, std::vector<int64_t> layouts,
                                   int64_t out_features, Text activation, bool keep) {
  using torch::stable::detail::from;
  const Arguments a("masked_mlp", x, tables, ids, parts, weights, biases, plans, layouts, activation);
  const Tensor& like = a.first();
  const auto chain = a.chain(out_features);
  if (chain == nullptr) {
    std::array<StableIValue, 11> stack{
        from(x),      from(tables), from(ids),     from(parts),        from(weights),   from(biases),
        from(plans),  from(layouts), from(out_features), from(activation), from(keep)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("maskmoe::layered_mlp", "", stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]),
            torch::stable::detail::to<Tensor>(stack[1])};
  }
  const Given g = given(*chain, a);
  const Layout& last = chain->back().layout;
  std::vector<int64_t> sizes = leading(x, ids);
  sizes.push_back(last.out_features);
  Tensor logits = empty_like_with(like, sizes.data(), static_cast<int64_t>(sizes.size()));
  const Tiling tiling = tiles_of(g.in);
  const int64_t kept = keep ? worth_keeping(g.in, *kernels(), tiling) : 0;
  Tensor saved = float_like(like, saved_shape(tiling, kept));
  Tensor held;
  network_forward(g.in, *kernels(), tiling, logits_of(logits, held, last, g.in.dtype),
                  kept > 0 ? static_cast<float*>(saved.data_ptr()) : nullptr);
  return {logits, saved};
}

Tensors backward(Tensor grad_logits, std::optional<Tensor> x, Tensors tables, Tensors ids,
                 std::vector<int64_t> parts, Tensors weights, Tensors biases, Tensor saved,
                 Tensors plans, std::vector<int64_t> layouts, Text activation, bool need_x,
                 bool need_tables, bool need_weights) {
  using torch::stable::detail::from;
  const Arguments a("masked_mlp_backward", x, tables, ids, parts, weights, biases, plans, layouts,
                    activation);
  const int64_t dims = grad_logits.dim();
  const auto chain = a.chain(dims > 0 ? grad_logits.size(dims - 1) : 0);
  if (chain == nullptr) {
    std::array<StableIValue, 14> stack{
        from(grad_logits), from(x),       from(tables),     from(ids),     from(parts),
        from(weights),     from(biases),  from(saved),      from(plans),   from(layouts),
        from(activation),  from(need_x),  from(need_tables), from(need_weights)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("maskmoe::layered_mlp_backward", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensors>(stack[0]);
  }
  const Given g = given(*chain, a);
  Results results(g, g.in.dtype, x, tables, weights, biases, need_x, need_tables, need_weights);
  if (results.all.empty()) return {};
  Tensor held;
  const Layout& last = chain->back().layout;
  a.checks.matrix(grad_logits, "grad_logits", g.in.rows, last.out_features);
  const Matrix from_logits = logits_of(grad_logits, held, last, g.in.dtype);
  Tiling tiling = tiles_of(g.in);
  const bool kept = saved.numel() > 0;
  if (kept) {  // cut as the forward cut them, however many threads there are now
    a.checks.readable(saved, "saved", -1, aoti_torch_dtype_float32());
    STD_TORCH_CHECK(saved.dim() == 2 && saved.is_contiguous() && saved.size(0) <= kMostTileRows,
                    "maskmoe::masked_mlp_backward: saved is not what a forward returned");
    tiling.rows = saved.size(0);
    tiling.count = (g.in.rows + tiling.rows - 1) / tiling.rows;
    const auto shape = saved_shape(tiling, worth_keeping(g.in, *kernels(), tiling));
    STD_TORCH_CHECK(saved.size(0) == shape[0] && saved.size(1) == shape[1],
                    "maskmoe::masked_mlp_backward: activations were kept by other kernels; "
                    "leave the instruction set alone between forward and backward");
  }
  network_backward(g.in, *kernels(), tiling, from_logits,
                   kept ? static_cast<const float*>(saved.data_ptr()) : nullptr, results.grads);
  return results.all;
}

Confidence confidence_of(const std::string& name) {
  constexpr std::array names{"abs", "square", "smooth", "rare"};
  return named_of<Confidence>(names, name, "confidence");
}

Normalize normalize_of(const std::string& name) {
  constexpr std::array names{"none", "sample", "expert", "batch"};
  return named_of<Normalize>(names, name, "normalization");
}

bool weighs_own(const std::string& name) {
  constexpr std::array names{"deselection", "selection"};
  return named_of<int>(names, name, "weighting") == 1;
}

int64_t experts_in(const Tensor& strict) { return strict.dim() > 0 ? strict.size(0) : 0; }

// Who is inside whom, for the kernels.
struct Chosen {
  std::vector<int64_t> inside, inside_at{0};
  std::vector<uint8_t> larger;
  Selection selection;

  Chosen(const Checks& checks, const Chain& chain, Tensor strict, const std::string& confidence,
         double sharpness, bool own)
      : larger(chain.back().layout.out_features, 0) {
    const int64_t experts = chain.back().layout.out_features;
    checks.readable(strict, "strict", -1, aoti_torch_dtype_bool());
    STD_TORCH_CHECK(strict.dim() == 2 && strict.size(0) == experts && strict.size(1) == experts,
                    "maskmoe: the family does not fit the network, it has ", experts, " logits");
    strict = dense(strict);
    const auto* inside_of = static_cast<const uint8_t*>(strict.data_ptr());
    for (int64_t i = 0; i < experts; ++i) {
      for (int64_t j = 0; j < experts; ++j) {
        if (!inside_of[i * experts + j]) continue;
        inside.push_back(j);
        larger[j] = 1;
      }
      inside_at.push_back(static_cast<int64_t>(inside.size()));
    }
    selection = {experts,
                 chain.back().forward.slots.data(),
                 inside.data(),
                 inside_at.data(),
                 larger.data(),
                 confidence_of(confidence),
                 checked_sharpness(sharpness),
                 own};
  }
  Chosen(const Chosen&) = delete;  // `selection` points into it
};

const char* const kNone = "maskmoe: no kernels for networks of this dtype or layout";

// Do the targets that count lie in [0, 1]? NaN does not.
bool all_labels(const float* target, const uint8_t* mask, int64_t rows) {
  bool all = true;
  for (int64_t r = 0; r < rows; ++r) {
    const bool inside = target[r] >= 0.0f && target[r] <= 1.0f;
    all &= inside || (mask != nullptr && mask[r] == 0);
  }
  return all;
}

Tensors gem(std::optional<Tensor> x, Tensors tables, Tensors ids, std::vector<int64_t> parts,
            Tensors weights, Tensors biases, Tensors plans, std::vector<int64_t> layouts,
            Text activation, Tensor target, std::optional<Tensor> mask, Tensor strict,
            Text confidence, double sharpness, Text weighting, Text normalize,
            bool need_x, bool need_tables, bool need_weights) {
  const Arguments a("masked_mlp_gem", x, tables, ids, parts, weights, biases, plans, layouts,
                    activation);
  const auto chain = a.chain(experts_in(strict));
  STD_TORCH_CHECK(chain != nullptr, kNone);
  Given g = given(*chain, a);
  a.checks.readable(target, "target", -1, aoti_torch_dtype_float32());
  if (mask) a.checks.readable(*mask, "mask", -1, aoti_torch_dtype_bool());
  STD_TORCH_CHECK(target.numel() == g.in.rows && (!mask || mask->numel() == g.in.rows),
                  "maskmoe::masked_mlp_gem: target and mask must have a value for each of ",
                  g.in.rows, " samples");
  target = dense(target);
  if (mask) mask = dense(*mask);
  g.in.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  const auto* labels = static_cast<const float*>(target.data_ptr());
  STD_TORCH_CHECK(all_labels(labels, g.in.mask, g.in.rows),
                  "maskmoe::masked_mlp_gem: target must hold labels in [0, 1]");
  const Chosen chosen(a.checks, *chain, strict, confidence, sharpness, weighs_own(weighting));
  const Gem loss{chosen.selection, labels, false, 1.0f, nullptr};
  // In float32 whatever the weights are: what scales the loss is yet to come.
  Results results(g, Dtype::kFloat32, x, tables, weights, biases, need_x, need_tables, need_weights);
  Tensor total = float_like(target, {});
  *static_cast<float*>(total.data_ptr()) = network_gem(
      g.in, *kernels(), tiles_of(g.in), loss, normalize_of(normalize), results.grads);
  results.all.insert(results.all.begin(), total);
  return results.all;
}

std::tuple<Tensor, Tensor, Tensor> mixture(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                           std::vector<int64_t> parts, Tensors weights,
                                           Tensors biases, Tensors plans,
                                           std::vector<int64_t> layouts, Text activation,
                                           Tensor strict, Text confidence,
                                           double sharpness) {
  const Arguments a("masked_mlp_mixture", x, tables, ids, parts, weights, biases, plans, layouts,
                    activation);
  const Tensor& like = a.first();
  const auto chain = a.chain(experts_in(strict));
  STD_TORCH_CHECK(chain != nullptr, kNone);
  const Given g = given(*chain, a);
  const Chosen chosen(a.checks, *chain, strict, confidence, sharpness, true);
  std::vector<int64_t> sizes = leading(x, ids);
  Tensor probability = float_like(like, sizes);
  sizes.push_back(chosen.selection.experts);
  Tensor alpha = float_like(like, sizes), share = float_like(like, sizes);
  network_mixture(g.in, *kernels(), tiles_of(g.in),
                  {chosen.selection, static_cast<float*>(probability.data_ptr()),
                   static_cast<float*>(alpha.data_ptr()), static_cast<float*>(share.data_ptr())});
  return {probability, alpha, share};
}

}  // namespace
}  // namespace maskmoe

STABLE_TORCH_LIBRARY_IMPL(maskmoe, CPU, m) {
  m.impl("masked_mlp", TORCH_BOX(&maskmoe::forward));
  m.impl("masked_mlp_backward", TORCH_BOX(&maskmoe::backward));
  m.impl("masked_mlp_gem", TORCH_BOX(&maskmoe::gem));
  m.impl("masked_mlp_mixture", TORCH_BOX(&maskmoe::mixture));
}
