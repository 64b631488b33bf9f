// Launches the kernels of one call on a Device: the GPU (gpu.h) or the host emulator.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/masked_mlp/backward.h"
#include "cuda/masked_mlp/inputs.h"
#include "cuda/masked_mlp/mixture.h"
#include "cuda/masked_mlp/pack_weights.h"

namespace maskmoe::fused {

// How much each expert is to count.
struct SelectionOptions {
  Tensor is_proper_subset;  // (experts, experts) bool, [i, j]: expert j is a proper subset of i
  Confidence confidence;
  double sharpness;
  Weighting weighting;

  // Checks the options and makes the tensor contiguous.
  void check(const Checks& checks, int64_t experts) {
    checks.readable(is_proper_subset, "strict", -1, aoti_torch_dtype_bool());
    STD_TORCH_CHECK(is_proper_subset.dim() == 2 && is_proper_subset.size(0) == experts &&
                        is_proper_subset.size(1) == experts,
                    "maskmoe: the family does not fit the mlp, it has ", experts, " logits");
    sharpness = checked_sharpness(sharpness);
    is_proper_subset = dense(is_proper_subset);
  }
};

template <class Device>
class Launcher {
 public:
  Launcher(MlpTensors tensors, Op op)
      : inputs_(std::move(tensors)),
        device_(inputs_.like()),
        buffers_(inputs_.like()),
        plan_(PlanCache<Device>::find_or_compile(device_, inputs_.checks(),
                                                 inputs_.plan_request())) {
    inputs_.check_sizes(plan_->compiled);
    choose_tile(op);
  }

  const MlpInputs& inputs() const { return inputs_; }
  const Device& device() const { return device_; }
  Buffers& buffers() { return buffers_; }
  const ExecutionPlan& host_plan() const { return plan_->host; }
  const ExecutionPlan& device_plan() const { return plan_->device; }
  int64_t rows() const { return inputs_.rows(); }
  int64_t experts() const { return plan_->compiled.out_features; }

  // float32 sums of gradients of a thread block: whole words of 16 bytes.
  int64_t sums_size() const {
    return (first_bias_sum(plan_->host) + plan_->host.num_biases + 3) / 4 * 4;
  }

  // A result: (*, experts) or (*).
  Tensor empty_per_expert(ScalarType dtype) const {
    Integers sizes = inputs_.leading();
    sizes.push_back(experts());
    return buffers_.empty(sizes, dtype);
  }
  Tensor empty_per_row(ScalarType dtype) const { return buffers_.empty(inputs_.leading(), dtype); }

  // The arguments that all kernels of a tile share.
  Call call() const {
    Call call{};
    call.plan = plan_->device;
    call.smem = smem_;
    call.activation = inputs_.tensors().activation;
    call.rows = rows();
    call.grad_input_scale = 1.0f;
    inputs_.set_parts(call);
    return call;
  }

  // Packs weights and biases, and lists the subsets of a selection if there is one.
  template <class T>
  void pack_weights(Call& call, int32_t num_blocks, const SelectionOptions* selection) {
    const MlpTensors& t = inputs_.tensors();
    const ExecutionPlan& plan = plan_->host;
    PackArguments p{};
    p.plan = plan_->device;
    for (size_t l = 0; l < t.weights.size(); ++l) {
      p.weights[l] = t.weights[l].data_ptr();
      p.biases[l] = t.biases.empty() ? nullptr : t.biases[l].data_ptr();
    }
    p.num_blocks = num_blocks;
    p.packed = buffers_.template take<T>(int64_t{kBlockSize} * num_blocks);
    p.head = buffers_.template take<float>(int64_t{kChunk} * plan.num_head);
    p.padded_biases = buffers_.template take<float>(plan.num_biases);
    if (selection != nullptr) {
      p.is_proper_subset = static_cast<const uint8_t*>(selection->is_proper_subset.data_ptr());
      p.subsets = buffers_.template take<int16_t>(int64_t{plan.experts} * plan.experts);
      p.num_subsets = buffers_.template take<int32_t>(plan.experts);
      p.has_superset = buffers_.template take<uint8_t>(plan.experts);
      call.selection = {p.subsets,
                        p.num_subsets,
                        p.has_superset,
                        static_cast<float>(selection->sharpness),
                        selection->confidence,
                        selection->weighting};
    }
    call.weights = p.packed, call.head_weights = p.head, call.biases = p.padded_biases;
    device_.template launch<PackWeights<T>>(
        grid_size(int64_t{kBlockSize} * num_blocks + plan.num_biases), 0, p);
  }

  // The grid size of Forward, Mix or Backward. T: the number type of the tensors.
  template <template <class, int> class Kernel, class T>
  int64_t num_blocks() const {
    int64_t blocks = 0;
    with_kernel<Kernel, T>(
        [&](auto kernel) { blocks = blocks_of<typename decltype(kernel)::type>(); });
    return blocks;
  }

  // Launches Forward, Mix or Backward for all tiles.
  template <template <class, int> class Kernel, class T>
  void launch_tiles(const Call& call) const {
    if (rows() == 0) return;
    with_kernel<Kernel, T>([&](auto kernel) {
      using K = typename decltype(kernel)::type;
      device_.template launch<K>(blocks_of<K>(), smem_.bytes, call, 32 * smem_.warps);
    });
  }

 private:
  void choose_tile(Op op) {
    const ExecutionPlan& plan = plan_->host;
    const bool keep_dact =
        keeps_all_layers(op) && !follows_from_value(inputs_.tensors().activation);
    const TileKind kind{op, inputs_.item_size(), keep_dact};
    const DeviceLimits limits = device_.limits();
    const std::string reason = unsupported_reason(plan, kind, limits);
    STD_TORCH_CHECK(reason.empty(), "maskmoe: ", reason);
    smem_ = smem_layout(plan, kind, choose_tile_rows(plan, kind, limits, rows()));
    if (keeps_all_layers(op)) {
      place_sums(smem_, plan, sums_size(), limits);
    } else if (blocks_that_fit(smem_, limits) == 1) {
      smem_.warps = kMostWarps;
    }
  }

  template <class Kernel>
  int64_t blocks_of() const {
    const int64_t tiles = (rows() + smem_.rows - 1) / smem_.rows;
    return std::min(tiles, device_.template resident_blocks<Kernel>(smem_.bytes,
                                                                      32 * smem_.warps));
  }

  // f(std::type_identity of the kernel for these products and this tile).
  template <template <class, int> class Kernel, class T, class F>
  void with_kernel(const F& f) const {
    if constexpr (std::is_same_v<T, float>) {
      if (inputs_.tf32()) return with_tile_rows<Kernel, Tf32>(f);
    }
    with_tile_rows<Kernel, T>(f);
  }
  template <template <class, int> class Kernel, class T, class F>
  void with_tile_rows(const F& f) const {
    constexpr int kTall = max_tile_rows(sizeof(T)), kLow = min_tile_rows(sizeof(T));
    if (smem_.rows == kTall) return f(std::type_identity<Kernel<T, kTall>>{});
    return f(std::type_identity<Kernel<T, kLow>>{});
  }

  MlpInputs inputs_;
  Device device_;
  Buffers buffers_;
  std::shared_ptr<const DevicePlan<Device>> plan_;
  SmemLayout smem_{};
};

}  // namespace maskmoe::fused
