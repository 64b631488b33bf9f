#include "cpu/masked_linear/masked_linear.h"

#include <algorithm>
#include <vector>

#include "cpu/gradient_sums.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace maskmoe {
namespace {

// A tile of x and y, in floats. Backward, gradients of all weights are read and written once a tile.
constexpr int64_t kForwardTile = 1 << 16, kBackwardTile = 1 << 17;

// Rows of a tile of so many floats: a multiple of those that go through a panel together.
int64_t tile_rows_for(const Kernels& k, int64_t floats, int64_t features, int64_t rows) {
  const int64_t step = k.width == 8 ? 24 : 28, least = floats == kForwardTile ? 2 : 4;
  const int64_t fit = std::clamp<int64_t>(floats / features / step, least, 252 / step) * step;
  return std::max<int64_t>(1, std::min(fit, rows));
}

}  // namespace

void masked_linear(const ExecutionPlan& plan, const Kernels& k, const Matrix& x, const void* weight,
                   const void* bias, const Matrix& y, const Matrix& z, Activation activation,
                   int64_t rows) {
  if (rows == 0) return;
  const Layout& layout = plan.layout;
  const Panels& panels = plan.forward;
  const bool direct = x.dtype == Dtype::kFloat32;
  const int64_t threads = threads_for(2 * rows * layout.num_weights, rows);
  const Place in_place = place_for(x.dtype, rows);
  Forward f{view(panels), x, y, z, nullptr, nullptr, in_place, nullptr, activation, 0};
  f.tile_rows = tile_rows_for(k, kForwardTile, x.features + y.features, (rows + threads - 1) / threads);
  const int64_t each_needs = Scratch::round_up(k.forward_scratch(f));
  const int64_t packed = Scratch::round_up(buffer_size(panels, in_place));
  const bool copy_bias = bias != nullptr && (!direct || y.order != nullptr);
  const int64_t bias_size = Scratch::round_up(copy_bias ? y.features : 0);
  Scratch scratch(packed + bias_size + threads * each_needs);
  float* buffer = scratch.take(packed);
  pack(k, panels, weight, x.dtype, in_place, buffer, threads);
  f.buffer = buffer;
  f.weight = direct ? static_cast<const float*>(weight) : nullptr;
  if (copy_bias) {
    float* ordered = scratch.take(bias_size);
    k.load(ordered, bias, x.dtype, y.order, y.features);
    f.bias = ordered;
  } else {
    f.bias = static_cast<const float*>(bias);
  }
  float* tiles = scratch.take(threads * each_needs);
  each(threads, [&](int64_t t) {
    k.forward(f, rows * t / threads, rows * (t + 1) / threads, tiles + t * each_needs);
  });
}

void masked_linear_backward(const ExecutionPlan& plan, const Kernels& k, const Matrix& grad_y,
                            const Matrix& saved, const Matrix& x, const void* weight,
                            const Gradients& grads, Activation activation, int64_t rows) {
  const Layout& layout = plan.layout;
  const Panels& panels = plan.forward;
  const bool need_weight = grads.weight != nullptr, need_bias = grads.bias != nullptr;
  const int64_t work = (grads.x != nullptr ? layout.num_routed : 0) +
                       (need_weight ? layout.num_weights : 0) + layout.out_features;
  const int64_t threads = threads_for(2 * rows * work, rows);
  const Place in_place = place_for(x.dtype, rows);
  Matrix grad_x = x;
  grad_x.data = grads.x;
  grad_x.stride = x.features;
  Backward b{view(panels), view(plan.backward), grad_y,    saved, x, grad_x, nullptr, in_place,
             need_weight,  need_bias,           activation, 0};
  b.tile_rows = tile_rows_for(k, kBackwardTile, x.features + grad_y.features, (rows + threads - 1) / threads);
  const int64_t each_needs = Scratch::round_up(k.backward_scratch(b));
  const int64_t transposed =
      Scratch::round_up(grads.x != nullptr ? buffer_size(plan.backward, Place::kNowhere) : 0);
  std::vector<GradientSums> sums;
  sums.emplace_back(plan, x.dtype, in_place, need_weight, need_bias, threads);
  Scratch scratch(transposed + sums[0].scratch() + threads * each_needs);
  float* transposed_buffer = scratch.take(transposed);
  if (grads.x != nullptr) {
    pack(k, plan.backward, weight, x.dtype, Place::kNowhere, transposed_buffer, threads);
    b.transposed_buffer = transposed_buffer;
  }
  sums[0].take(scratch, grads.weight, grads.bias, grad_y.order);
  float* tiles = scratch.take(threads * each_needs);
  each(threads, [&](int64_t t) {
    const int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
    const LayerSums& own = sums[0].of(t);
    k.backward(b, begin, end, own.weight, own.buffer, own.bias, tiles + t * each_needs);
  });
  GradientSums::reduce(k, sums, rows, nullptr);
}

}  // namespace maskmoe
