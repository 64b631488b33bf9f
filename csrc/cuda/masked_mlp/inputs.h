// The tensors that all ops share, checked before a kernel touches their memory.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "common/mlp_inputs.h"
#include "cuda/masked_mlp/arguments.h"
#include "cuda/plan_cache.h"

namespace maskmoe::fused {

// As the ops take them.
struct MlpTensors {
  std::optional<Tensor> x;  // (*, features)
  Tensors tables, ids;      // (rows, width) each; (*) each
  Integers parts;           // of the input: -n: the next n columns of x; n: table n
  Tensors weights, biases;  // packed, one a layer; biases may be empty
  Tensors serialized;       // serialized layouts, one a layer
  Integers layout_ids;
  Activation activation;
};

// May a float32 product be one TF32 product? That is torch's setting at the time of the call; see
// the op `single_products` of maskmoe_kernels/ops.
inline bool float32_products_are_tf32() {
  StableIValue answer{};
  STD_TORCH_CHECK(
      torch_call_dispatcher("maskmoe::single_products", "", &answer, TORCH_ABI_VERSION) == 0,
      "maskmoe: torch.get_float32_matmul_precision() fails, as it does where TF32 was set in "
      "torch's old way and its new one; call torch.set_float32_matmul_precision and nothing else");
  return torch::stable::detail::to<bool>(answer);
}

// f(a value of the number type that tensors of this dtype hold).
template <class F>
void with_number_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(Bfloat16{});
    case ScalarType::Half: return f(Float16{});
    default: STD_TORCH_CHECK(false, "maskmoe: the fused mlp takes float32, bfloat16 and float16");
  }
}

class MlpInputs {
 public:
  explicit MlpInputs(MlpTensors tensors)
      : tensors_(std::move(tensors)), checks_("masked_mlp", first_weight()) {
    MlpTensors& t = tensors_;
    check_lists(checks_.op(), t.serialized, t.layout_ids, t.weights, t.biases, t.tables, t.ids,
                t.x.has_value());
    STD_TORCH_CHECK(!t.x || t.x->dim() > 0, "maskmoe: x must be (*, features)");
    const auto parts = read_parts(checks_.op(), t.parts, t.tables,
                                  t.x ? t.x->size(t.x->dim() - 1) : 0);
    features_of(parts);  // refuses sums beyond 64 bits
    for (const PartOf& part : parts) part_widths_.push_back(part.width);
    with_number_type(dtype(), [](auto) {});
    check_readable();
    tf32_ = dtype() == ScalarType::Float && float32_products_are_tf32();
    for (Tensors* list : {&t.tables, &t.ids, &t.weights, &t.biases}) {
      for (Tensor& tensor : *list) tensor = dense(tensor);
    }
    if (t.x) make_matrix(*t.x);
    const Tensor& shaped = t.x ? *t.x : t.ids[0];
    for (int64_t d = 0; d < shaped.dim() - (t.x ? 1 : 0); ++d) {
      leading_.push_back(shaped.size(d));
      rows_ *= shaped.size(d);
    }
  }

  const MlpTensors& tensors() const { return tensors_; }
  const Checks& checks() const { return checks_; }
  const Tensor& like() const { return tensors_.weights.front(); }
  ScalarType dtype() const { return like().scalar_type(); }
  int item_size() const { return dtype() == ScalarType::Float ? 4 : 2; }
  bool tf32() const { return tf32_; }  // products of float32 are those of TF32
  int64_t rows() const { return rows_; }
  const Integers& leading() const { return leading_; }  // sizes before the last dimension
  PlanRequest plan_request() const {
    return {tensors_.serialized, tensors_.layout_ids, part_widths_};
  }

  // Holds the tensors to the sizes that the layouts say.
  void check_sizes(const CompiledPlan& plan) const {
    const MlpTensors& t = tensors_;
    for (size_t n = 0; n < t.weights.size(); ++n) {
      checks_.values(t.weights[n], "weights", n, plan.num_weights[n]);
      if (!t.biases.empty()) checks_.values(t.biases[n], "biases", n, plan.num_units[n]);
    }
    for (size_t n = 0; n < t.ids.size(); ++n) {
      STD_TORCH_CHECK(t.ids[n].numel() == rows_, checks_.named("ids", n), " must have ", rows_,
                      " entries, one a sample");
    }
  }

  // Where the parts of the input lie.
  void set_parts(Call& call) const {
    const MlpTensors& t = tensors_;
    int64_t column = 0;
    for (size_t p = 0; p < t.parts.size(); ++p) {
      const int64_t n = t.parts[p];
      if (n < 0) {
        const auto* data = static_cast<const unsigned char*>(t.x->data_ptr());
        call.parts[p] = {data + column * item_size(), nullptr, x_stride_, rows_};
        column -= n;
      } else {
        const Tensor& table = t.tables[n];
        call.parts[p] = {table.data_ptr(), static_cast<const int64_t*>(t.ids[n].data_ptr()),
                         table.size(1), table.size(0)};
      }
    }
  }

 private:
  const Tensor& first_weight() const {
    STD_TORCH_CHECK(!tensors_.weights.empty(), "maskmoe: the fused mlp has no weights");
    return tensors_.weights.front();
  }

  void check_readable() const {
    const MlpTensors& t = tensors_;
    if (t.x) checks_.readable(*t.x, "x", -1, checks_.dtype());
    for (size_t n = 0; n < t.tables.size(); ++n) {
      checks_.readable(t.tables[n], "tables", n, checks_.dtype());
      checks_.readable(t.ids[n], "ids", n, aoti_torch_dtype_int64());
      STD_TORCH_CHECK(t.tables[n].dim() == 2, checks_.named("tables", n),
                      " must be (rows, width)");
    }
    for (size_t n = 0; n < t.weights.size(); ++n) {
      checks_.readable(t.weights[n], "weights", n, checks_.dtype());
    }
    for (size_t n = 0; n < t.biases.size(); ++n) {
      checks_.readable(t.biases[n], "biases", n, checks_.dtype());
    }
  }

  // A matrix whose features lie side by side is read in place; anything else is copied.
  void make_matrix(Tensor& x) {
    const int64_t features = x.size(x.dim() - 1);
    x_stride_ = features;
    if (x.dim() == 2 && (features == 1 || x.stride(1) == 1) && x.stride(0) >= features) {
      x_stride_ = x.stride(0);
    } else {
      x = dense(x);
    }
  }

  MlpTensors tensors_;
  Checks checks_;
  Integers part_widths_, leading_;
  int64_t rows_ = 1, x_stride_ = 0;
  bool tf32_ = false;
};

}  // namespace maskmoe::fused
