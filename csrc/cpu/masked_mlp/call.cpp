#include "cpu/masked_mlp/call.h"

namespace maskmoe {

MlpCall::MlpCall(const MlpInputs& in, const Kernels& k, const Tiling& tiling, int64_t flops)
    : in_(in), k_(k), tiling_(tiling),
      threads_(std::min(threads_for(flops, in.rows), std::max<int64_t>(tiling.count, 1))) {
  const Layout& first = in.chain[0].layout;
  mlp.depth = static_cast<int64_t>(in.chain.size());
  mlp.activation = in.activation;
  mlp.in_place = place_for(in.dtype, in.rows);
  mlp.dtype = in.dtype;
  mlp.parts = in.parts.data();
  mlp.num_parts = static_cast<int64_t>(in.parts.size());
  mlp.in_features = first.in_features;
  mlp.in_order = first.col_order.empty() ? nullptr : first.col_order.data();
  mlp.rows = in.rows;
  mlp.mask = in.mask;
  mlp.tile_rows = tiling.rows;
  for (const ExecutionPlan& plan : in.chain) {
    layers_.push_back(
        {view(plan.forward), view(plan.backward), nullptr, nullptr, nullptr, nullptr});
  }
  mlp.layers = layers_.data();
}

void MlpCall::prepare(const MlpGradients& grads, int64_t experts, int64_t own) {
  const bool weights = !grads.weights.empty();
  mlp.need_weights = weights;
  const Place in_place = mlp.in_place;
  int64_t size = own;
  for (size_t n = 0; n < in_.chain.size(); ++n) {
    const ExecutionPlan& plan = in_.chain[n];
    size += Scratch::round_up(buffer_size(plan.forward, in_place));
    if (transposes(n)) size += Scratch::round_up(buffer_size(plan.backward, Place::kNowhere));
    if (copies_bias(n)) size += Scratch::round_up(plan.layout.out_features);
    if (mlp.backward) {
      sums_.emplace_back(plan, grads.dtype, in_place, weights, !grads.biases.empty(), threads_);
      size += sums_.back().scratch();
    }
  }
  const int64_t tile = Scratch::round_up(k_.mlp_scratch(mlp));
  const int64_t totals = Scratch::round_up(4 * experts);  // two doubles each
  scratch = std::make_unique<Scratch>(size + threads_ * (tile + totals));
  copy_weights();
  for (size_t n = 0; n < sums_.size(); ++n) {
    const auto& order = in_.chain[n].layout.row_order;
    sums_[n].take(*scratch, weights ? grads.weights[n] : nullptr,
                  grads.biases.empty() ? nullptr : grads.biases[n],
                  order.empty() ? nullptr : order.data());
  }
  for (int64_t t = 0; t < threads_; ++t) {
    double* of = reinterpret_cast<double*>(scratch->take(totals));
    totals_.push_back({of, of + experts});
    tiles_.push_back(scratch->take(tile));
  }
}

void MlpCall::copy_bias(size_t n) {
  MlpLayer& layer = layers_[n];
  if (copies_bias(n)) {
    const Layout& layout = in_.chain[n].layout;
    float* bias = scratch->take(layout.out_features);
    const auto& order = layout.row_order;
    k_.load(bias, in_.biases[n], in_.dtype, order.empty() ? nullptr : order.data(),
            layout.out_features);
    layer.bias = bias;
  } else if (!in_.biases.empty()) {
    layer.bias = static_cast<const float*>(in_.biases[n]);
  }
}

void MlpCall::copy_weights() {
  std::vector<float*> forward, transposed;
  int64_t size = 0;
  for (size_t n = 0; n < in_.chain.size(); ++n) {
    const ExecutionPlan& plan = in_.chain[n];
    MlpLayer& layer = layers_[n];
    const int64_t copied = buffer_size(plan.forward, mlp.in_place);
    const int64_t back = transposes(n) ? buffer_size(plan.backward, Place::kNowhere) : 0;
    size += copied + back;
    forward.push_back(scratch->take(copied));
    transposed.push_back(scratch->take(back));
    layer.buffer = forward[n];
    if (in_.dtype == Dtype::kFloat32) layer.weight = static_cast<const float*>(in_.weights[n]);
    if (transposes(n)) layer.transposed_buffer = transposed[n];
    copy_bias(n);
  }
  const int64_t tasks = tasks_for(size, threads_);
  each(tasks, [&](int64_t t) {
    for (size_t n = 0; n < in_.chain.size(); ++n) {
      const auto copy = [&](const Panels& panels, Place in_place, float* to) {
        pack_task(k_, panels, in_.weights[n], in_.dtype, in_place, to, t, tasks);
      };
      copy(in_.chain[n].forward, mlp.in_place, forward[n]);
      if (transposes(n)) copy(in_.chain[n].backward, Place::kNowhere, transposed[n]);
    }
  });
}

void MlpCall::run_tiles(int64_t begin, int64_t end) {
  each(threads_, [&](int64_t t) {
    std::vector<LayerSums> own;
    for (const GradientSums& layer : sums_) own.push_back(layer.of(t));
    const int64_t count = end - begin;
    k_.mlp(mlp, begin + count * t / threads_, begin + count * (t + 1) / threads_, own.data(),
           totals_[t], tiles_[t]);
  });
}

void MlpCall::add_totals(int64_t experts, double* loss, double* weight) const {
  std::fill_n(loss, experts, 0.0);
  std::fill_n(weight, experts, 0.0);
  for (int64_t t = 0; t < threads_ && in_.rows > 0; ++t) {
    for (int64_t i = 0; i < experts; ++i) {
      loss[i] += totals_[t].loss[i];
      weight[i] += totals_[t].weight[i];
    }
  }
}

int64_t MlpCall::slots_of_units() const {
  return Scratch::round_up(in_.chain[0].forward.lines * in_.chain[0].forward.width);
}

void MlpCall::expand_to_units(const float* factor, float* slots) const {
  const Layout& first = in_.chain[0].layout;
  std::fill_n(slots, slots_of_units(), 0.0f);
  for (size_t i = 0; i < first.rows(); ++i) {
    for (int64_t u = first.row_offsets[i]; u < first.row_offsets[i + 1]; ++u) {
      slots[in_.chain[0].forward.slots[u]] = factor[i];
    }
  }
}

}  // namespace maskmoe
