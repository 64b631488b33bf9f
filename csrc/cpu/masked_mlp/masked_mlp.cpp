#include "cpu/masked_mlp/masked_mlp.h"

#include <algorithm>

#include "cpu/masked_mlp/call.h"
#include "cpu/masked_mlp/input_gradients.h"

namespace maskmoe {
namespace {

constexpr int64_t kTileFloats = 1 << 18;  // of activations: few tiles, for each reads all weights

}  // namespace

int64_t weights_of(const MlpInputs& in) {
  int64_t sum = 0;
  for (const ExecutionPlan& plan : in.chain) sum += plan.layout.num_weights;
  return sum;
}

int64_t flops_of(const MlpInputs& in, bool forward, bool need_inputs, bool need_weights) {
  int64_t work = 0;
  for (size_t n = 0; n < in.chain.size(); ++n) {
    const Layout& l = in.chain[n].layout;
    work += (forward + need_weights) * l.num_weights + l.out_features;
    if (n > 0 || need_inputs) work += l.num_routed;
  }
  return 2 * in.rows * work;
}

Tiling tiles_of(const MlpInputs& in) {
  int64_t floats = in.chain[0].layout.in_features, most = 0;
  for (const ExecutionPlan& plan : in.chain) {
    floats += plan.layout.out_features;
    most = std::max(most, plan.layout.out_features);
  }
  const int64_t fit = std::clamp<int64_t>(kTileFloats / (floats + 2 * most), 56, 252) / 28 * 28;
  int64_t count = std::max<int64_t>((in.rows + fit / 2) / fit, 1);
  const int64_t threads = threads_for(6 * in.rows * weights_of(in), in.rows);
  if (count >= 8 * threads) return {fit, (in.rows + fit - 1) / fit};
  count = (count + threads - 1) / threads * threads;  // with few tiles, as many for each thread
  const int64_t rows = std::max<int64_t>((in.rows + count - 1) / count, 1);
  return {rows, (in.rows + rows - 1) / rows};
}

int64_t worth_keeping(const MlpInputs& in, const Kernels& k, const Tiling& tiling) {
  MlpCall call(in, k, tiling, 0);
  const int64_t floats = k.mlp_saved(call.mlp);
  return 4 * floats * tiling.count <= kKeptBytes ? floats : 0;
}

void masked_mlp_forward(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                        const Matrix& logits, float* saved) {
  MlpCall call(in, k, tiling, 2 * in.rows * weights_of(in));
  call.mlp.forward = true;
  call.mlp.logits = logits;
  call.mlp.saved = saved;
  call.mlp.saved_stride = k.mlp_saved(call.mlp);
  call.prepare({}, 0, 0);
  call.run();
}

void masked_mlp_mixture(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                        const Mixture& mixture) {
  MlpCall call(in, k, tiling, 2 * in.rows * weights_of(in));
  call.mlp.forward = true;
  call.mlp.mixture = &mixture;
  call.prepare({}, 0, 0);
  call.run();
}

void masked_mlp_backward(const MlpInputs& in, const Kernels& k, const Tiling& tiling,
                         const Matrix& grad_logits, const float* saved,
                         const MlpGradients& grads) {
  InputGradients inputs(in, grads, tiling);
  MlpCall call(in, k, tiling,
               flops_of(in, saved == nullptr, inputs.wanted(), !grads.weights.empty()));
  Mlp& n = call.mlp;
  n.forward = saved == nullptr;
  n.saved = const_cast<float*>(saved);  // read only, without `forward`
  n.saved_stride = k.mlp_saved(n);
  n.backward = true;
  n.grad_logits = grad_logits;
  n.need_inputs = inputs.wanted();
  call.prepare(grads, 0, inputs.scratch());
  n.grad_inputs = inputs.take(*call.scratch);
  inputs.run(call, k);
  call.reduce(nullptr);
}

}  // namespace maskmoe
