// The CPU implementation of the ops that maskmoe_kernels/ops/networks.py defines.

#include "tensors.h"

namespace maskmoe {
namespace {

using Tensors = std::vector<Tensor>;

std::vector<const void*> pointers(const Tensors& tensors) {
  std::vector<const void*> to;
  for (const Tensor& t : tensors) to.push_back(t.data_ptr());
  return to;
}

// What a call was given, as the kernels see it, and what keeps that alive.
struct Given {
  NetworkInputs in;
  Tensors held;
  int64_t columns;               // of x
  std::vector<size_t> table_at;  // the part that is each table
};

Tensor first_of(const std::optional<Tensor>& x, const Tensors& weights) {
  return x ? *x : weights.front();
}

Given given(const Chain& chain, const std::optional<Tensor>& x, const Tensors& tables,
            const Tensors& ids, const std::vector<int64_t>& parts, const Tensors& weights,
            const Tensors& biases, const std::string& activation) {
  const Tensor like = first_of(x, weights);
  const Dtype dtype = *dtype_of(like);
  Given g{{chain, dtype, activation_of(activation), {}, {}, {}, {}, 0, nullptr}, {}, 0, {}};
  const bool fits = weights.size() == chain.size() && ids.size() == tables.size() &&
                    (biases.empty() || biases.size() == chain.size()) &&
                    (x.has_value() ? x->dim() > 0 : !ids.empty());
  STD_TORCH_CHECK(fits, "maskmoe::masked_mlp: weights, biases, layouts, tables and ids do not match");
  Matrix columns{};
  if (x) {
    Tensor kept;
    columns = matrix_of(*x, kept, dtype, {});
    g.held.push_back(kept);
    g.in.rows = rows_of(*x);
    g.columns = columns.features;
  } else {
    g.in.rows = ids.front().numel();
  }
  int64_t features = 0, column = 0;
  g.table_at.resize(tables.size(), parts.size());
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p] < 0) {
      const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
      g.in.parts.push_back({static_cast<char*>(columns.data) + column * size, columns.stride,
                            nullptr, -parts[p]});
      g.in.table_rows.push_back(0);
      column -= parts[p];
    } else {
      const size_t t = static_cast<size_t>(parts[p]);
      STD_TORCH_CHECK(t < tables.size() && g.table_at[t] == parts.size() &&
                          tables[t].dim() == 2 && tables[t].scalar_type() == like.scalar_type() &&
                          ids[t].scalar_type() == ScalarType::Long && ids[t].numel() == g.in.rows,
                      "maskmoe::masked_mlp: table ", t, " and its ids do not fit the input");
      g.held.push_back(dense(tables[t]));
      const void* rows = g.held.back().data_ptr();
      g.held.push_back(dense(ids[t]));
      const auto* of = static_cast<const int64_t*>(g.held.back().data_ptr());
      const int64_t count = tables[t].size(0), width = tables[t].size(1);
      for (int64_t r = 0; r < g.in.rows; ++r) {
        STD_TORCH_CHECK(of[r] >= 0 && of[r] < count, "maskmoe::masked_mlp: ids[", t, "] has ", of[r],
                        ", its table has rows 0 to ", count - 1);
      }
      g.in.parts.push_back({rows, width, of, width});
      g.in.table_rows.push_back(count);
      g.table_at[t] = p;
    }
    features += g.in.parts.back().width;
  }
  STD_TORCH_CHECK(features == chain.front().layout.in_features && column == g.columns,
                  "maskmoe::masked_mlp: the parts have ", features, " features, the first layer ",
                  chain.front().layout.in_features);
  for (size_t n = 0; n < chain.size(); ++n) {
    const Layout& l = chain[n].layout;
    STD_TORCH_CHECK(weights[n].numel() == l.num_weights &&
                        weights[n].scalar_type() == like.scalar_type() &&
                        (biases.empty() || (biases[n].numel() == l.out_features &&
                                            biases[n].scalar_type() == like.scalar_type())),
                    "maskmoe::masked_mlp: weight or bias ", n, " does not fit its layout");
    g.held.push_back(dense(weights[n]));
    g.in.weights.push_back(g.held.back().data_ptr());
    if (biases.empty()) continue;
    g.held.push_back(dense(biases[n]));
    g.in.biases.push_back(g.held.back().data_ptr());
  }
  return g;
}

std::vector<int64_t> leading(const std::optional<Tensor>& x, const Tensors& ids) {
  std::vector<int64_t> sizes;
  const Tensor& of = x ? *x : ids.front();
  for (int64_t d = 0; d < of.dim() - (x ? 1 : 0); ++d) sizes.push_back(of.size(d));
  return sizes;
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

// Of what a forward keeps, `kept` floats a tile: the first size is a tile's rows, so that backward
// can cut the batch alike.
std::vector<int64_t> saved_shape(const Tiling& tiling, int64_t kept) {
  if (kept == 0) return {0, 0};
  return {tiling.rows, (tiling.count * kept + tiling.rows - 1) / tiling.rows};
}

std::tuple<Tensor, Tensor> forward(std::optional<Tensor> x, Tensors tables, Tensors ids,
                                   std::vector<int64_t> parts, Tensors weights, Tensors biases,
                                   Tensors plans, std::vector<int64_t> layouts,
                                   int64_t out_features, std::string activation, bool keep) {
  using torch::stable::detail::from;
  const Tensor like = first_of(x, weights);
  const auto chain = chain_of(like, plans, layouts);
  if (chain == nullptr) {
    std::array<StableIValue, 11> stack{
        from(x),      from(tables), from(ids),     from(parts),        from(weights),   from(biases),
        from(plans),  from(layouts), from(out_features), from(activation), from(keep)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("maskmoe::layered_mlp", "", stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]),
            torch::stable::detail::to<Tensor>(stack[1])};
  }
  const Given g = given(*chain, x, tables, ids, parts, weights, biases, activation);
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
                 Tensors plans, std::vector<int64_t> layouts, std::string activation, bool need_x,
                 bool need_tables, bool need_weights) {
  using torch::stable::detail::from;
  const auto chain = chain_of(first_of(x, weights), plans, layouts);
  if (chain == nullptr) {
    std::array<StableIValue, 14> stack{
        from(grad_logits), from(x),       from(tables),     from(ids),     from(parts),
        from(weights),     from(biases),  from(saved),      from(plans),   from(layouts),
        from(activation),  from(need_x),  from(need_tables), from(need_weights)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("maskmoe::layered_mlp_backward", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensors>(stack[0]);
  }
  const Given g = given(*chain, x, tables, ids, parts, weights, biases, activation);
  Results results(g, g.in.dtype, x, tables, weights, biases, need_x, need_tables, need_weights);
  if (results.all.empty()) return {};
  Tensor held;
  const Layout& last = chain->back().layout;
  STD_TORCH_CHECK(rows_of(grad_logits) == g.in.rows &&
                      grad_logits.size(grad_logits.dim() - 1) == last.out_features,
                  "maskmoe::masked_mlp_backward: grad_logits does not fit");
  const Matrix from_logits = logits_of(grad_logits, held, last, g.in.dtype);
  Tiling tiling = tiles_of(g.in);
  const bool kept = saved.numel() > 0;
  if (kept) {  // cut as the forward cut them, however many threads there are now
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
  if (name == "abs") return Confidence::kAbs;
  if (name == "square") return Confidence::kSquare;
  if (name == "smooth") return Confidence::kSmooth;
  STD_TORCH_CHECK(name == "rare", "maskmoe: unknown confidence ", name);
  return Confidence::kRare;
}

Normalize normalize_of(const std::string& name) {
  if (name == "none") return Normalize::kNone;
  if (name == "sample") return Normalize::kSample;
  if (name == "expert") return Normalize::kExpert;
  STD_TORCH_CHECK(name == "batch", "maskmoe: unknown normalization ", name);
  return Normalize::kBatch;
}

// Who is inside whom, for the kernels.
struct Chosen {
  std::vector<int64_t> inside, inside_at{0};
  std::vector<uint8_t> larger;
  Selection selection;

  Chosen(const Chain& chain, Tensor strict, const std::string& confidence, double sharpness,
         bool own)
      : larger(chain.back().layout.out_features, 0) {
    const int64_t experts = chain.back().layout.out_features;
    STD_TORCH_CHECK(strict.scalar_type() == ScalarType::Bool && strict.dim() == 2 &&
                        strict.size(0) == experts && strict.size(1) == experts,
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
                 static_cast<float>(sharpness),
                 own};
  }
  Chosen(const Chosen&) = delete;  // `selection` points into it
};

const char* const kNone = "maskmoe: no kernels for networks of this dtype or layout";

Tensors gem(std::optional<Tensor> x, Tensors tables, Tensors ids, std::vector<int64_t> parts,
            Tensors weights, Tensors biases, Tensors plans, std::vector<int64_t> layouts,
            std::string activation, Tensor target, std::optional<Tensor> mask, Tensor strict,
            std::string confidence, double sharpness, std::string weighting, std::string normalize,
            bool need_x, bool need_tables, bool need_weights) {
  const auto chain = chain_of(first_of(x, weights), plans, layouts);
  STD_TORCH_CHECK(chain != nullptr, kNone);
  Given g = given(*chain, x, tables, ids, parts, weights, biases, activation);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Float && target.numel() == g.in.rows &&
                      (!mask || (mask->scalar_type() == ScalarType::Bool &&
                                 mask->numel() == g.in.rows)) &&
                      (weighting == "selection" || weighting == "deselection"),
                  "maskmoe::masked_mlp_gem: target or mask do not fit the network");
  target = dense(target);
  if (mask) mask = dense(*mask);
  g.in.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  const Chosen chosen(*chain, strict, confidence, sharpness, weighting == "selection");
  const Gem loss{chosen.selection, static_cast<const float*>(target.data_ptr()), false, 1.0f,
                 nullptr};
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
                                           std::vector<int64_t> layouts, std::string activation,
                                           Tensor strict, std::string confidence,
                                           double sharpness) {
  const Tensor like = first_of(x, weights);
  const auto chain = chain_of(like, plans, layouts);
  STD_TORCH_CHECK(chain != nullptr, kNone);
  const Given g = given(*chain, x, tables, ids, parts, weights, biases, activation);
  const Chosen chosen(*chain, strict, confidence, sharpness, true);
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
