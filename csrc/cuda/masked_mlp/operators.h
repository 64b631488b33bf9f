// The ops: tensors in, launches, tensors out; on the GPU or on the host emulator.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "cuda/masked_mlp/gradients.h"
#include "cuda/masked_mlp/reduce_loss.h"

namespace maskmoe::fused {

// The logits (*, experts), and an empty tensor in place of saved activations: a backward recomputes
// them.
template <class Device>
std::tuple<Tensor, Tensor> forward(MlpTensors tensors) {
  Launcher<Device> launcher(std::move(tensors), Op::kForward);
  const ScalarType dtype = launcher.inputs().dtype();
  Tensor logits = launcher.empty_per_expert(dtype);
  with_number_type(dtype, [&](auto t) {
    using T = decltype(t);
    Call call = launcher.call();
    call.logits = logits.mutable_data_ptr();
    launcher.template pack_weights<T>(call, launcher.host_plan().forward_blocks, nullptr);
    launcher.template launch_tiles<Forward, T>(call);
  });
  return {logits, launcher.buffers().empty({0, 0}, ScalarType::Float)};
}

// The gradients that are needed, from the gradient (*, experts) of the logits.
template <class Device>
Tensors backward(MlpTensors tensors, const Tensor& grad_logits, GradientNeeds needs) {
  Launcher<Device> launcher(std::move(tensors), Op::kBackward);
  launcher.inputs().checks().matrix(grad_logits, "grad_logits", launcher.rows(),
                                    launcher.experts());
  Tensor given = dense(grad_logits);
  const ScalarType dtype = launcher.inputs().dtype();
  Gradients<Device> gradients(launcher, needs, dtype);
  if (!gradients.any()) return {};
  with_number_type(dtype, [&](auto t) {
    using T = decltype(t);
    Call call = launcher.call();
    call.logits = given.data_ptr();
    launcher.template pack_weights<T>(call, gradients.num_blocks(), nullptr);
    gradients.set_inputs(call);
    gradients.template set_sums<T>(call);
    launcher.template launch_tiles<Backward, T>(call);
    gradients.template reduce<T>(call, nullptr, 1.0f);
    gradients.template add_tables<T>();
  });
  return gradients.list();
}

// The probability (*), alpha and the experts' shares (*, experts); float32.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> mixture(MlpTensors tensors, SelectionOptions selection) {
  Launcher<Device> launcher(std::move(tensors), Op::kMixture);
  selection.check(launcher.inputs().checks(), launcher.experts());
  Tensor probability = launcher.empty_per_row(ScalarType::Float);
  Tensor alpha = launcher.empty_per_expert(ScalarType::Float);
  Tensor share = launcher.empty_per_expert(ScalarType::Float);
  with_number_type(launcher.inputs().dtype(), [&](auto t) {
    using T = decltype(t);
    Call call = launcher.call();
    call.mixture = {static_cast<float*>(probability.mutable_data_ptr()),
                    static_cast<float*>(alpha.mutable_data_ptr()),
                    static_cast<float*>(share.mutable_data_ptr())};
    launcher.template pack_weights<T>(call, launcher.host_plan().forward_blocks, &selection);
    launcher.template launch_tiles<Mix, T>(call);
  });
  return {probability, alpha, share};
}

struct LossOptions {
  Tensor target;               // (*) float32
  std::optional<Tensor> mask;  // (*) bool
  std::optional<Tensor> sample_weight;  // (*) float32, of mean 1 over the samples that count
  Normalization normalization;

  // Checks the tensors and makes them contiguous.
  void check(const Checks& checks, int64_t rows) {
    checks.readable(target, "target", -1, aoti_torch_dtype_float32());
    if (mask) checks.readable(*mask, "mask", -1, aoti_torch_dtype_bool());
    if (sample_weight) {
      checks.readable(*sample_weight, "sample_weight", -1, aoti_torch_dtype_float32());
    }
    STD_TORCH_CHECK(target.numel() == rows && (!mask || mask->numel() == rows) &&
                        (!sample_weight || sample_weight->numel() == rows),
                    "maskmoe: target, mask or sample_weight do not fit the logits");
    target = dense(target);
    if (mask) mask = dense(*mask);
    if (sample_weight) sample_weight = dense(*sample_weight);
  }

  // Is the loss divided by sums over the batch, which are known only after it?
  bool divides_by_batch_sums() const {
    return normalization == Normalization::kExpert || normalization == Normalization::kBatch;
  }
};

// The launches of a GEM step; T: the number type of the tensors. Gradients are float32, because
// what scales them may follow only once all losses are known.
template <class Device, class T>
class GemStep {
 public:
  GemStep(Launcher<Device>& launcher, const LossOptions& loss, const SelectionOptions& selection,
          Gradients<Device>& gradients, float* result)
      : launcher_(launcher), loss_(loss), gradients_(gradients), call_(launcher.call()) {
    GemObjective& gem = call_.gem;
    gem.target = static_cast<const float*>(loss.target.data_ptr());
    gem.mask = loss.mask ? static_cast<const uint8_t*>(loss.mask->data_ptr()) : nullptr;
    gem.sample_weight =
        loss.sample_weight ? static_cast<const float*>(loss.sample_weight->data_ptr()) : nullptr;
    gem.normalize_sample = loss.normalization == Normalization::kSample;
    gem.loss_scale = kLossScale<T>;
    call_.grad_input_scale = 1.0f / kLossScale<T>;
    launcher.template pack_weights<T>(call_, gradients.num_blocks(), &selection);
    gradients.set_inputs(call_);
    gradients.template set_sums<T>(call_);
    set_reduction(result);
  }

  void run() {
    if (loss_.divides_by_batch_sums()) {
      sweep_for_sums();
    } else if (call_.need_grad_inputs) {
      divide_grad_inputs();
    }
    sweep(call_);
    // Weights' gradients are scaled here, unless the second sweep did that already.
    gradients_.template reduce<float>(call_, call_.gem.scale ? nullptr : reduction_.scale,
                                      1.0f / kLossScale<T>);
    gradients_.template add_tables<float>();
  }

 private:
  void set_reduction(float* result) {
    const int64_t experts = launcher_.experts();
    Buffers& buffers = launcher_.buffers();
    reduction_.experts = static_cast<int32_t>(experts);
    reduction_.normalization = loss_.normalization;
    reduction_.scale = buffers.take<float>(experts);
    reduction_.divisor = buffers.take<float>(experts);
    reduction_.rerun = buffers.take<int32_t>(1);
    reduction_.min_divisor = kMinDivisor<T>;
    reduction_.loss = result;
    reduction_.num_sums = gradients_.num_sums();
    call_.gem.sums = buffers.take<float>(gradients_.num_sums() * (2 * experts + 1));
    reduction_.sums = call_.gem.sums;
  }

  // All tiles, and then the loss.
  void sweep(const Call& call) const {
    launcher_.template launch_tiles<Backward, T>(call);
    launcher_.device().template launch<ReduceLoss>(1, ReduceLoss::shared(reduction_.experts),
                                                   reduction_);
  }

  // A first sweep, for the sums that divide. Where the input has a gradient, which adds up experts
  // with different divisors, a second sweep always follows, and only that computes gradients.
  // Elsewhere the second sweep runs only if a sum is so small that it must divide the weights
  // first.
  void sweep_for_sums() {
    Call first = call_;
    first.need_grad_inputs = false;
    if (call_.need_grad_inputs) first.gradient_sums = nullptr;
    sweep(first);
    reduction_.known = true;
    call_.gem.divisor = reduction_.divisor;
    if (call_.need_grad_inputs) {
      call_.gem.scale = reduction_.scale;
    } else {
      call_.gem.rerun = reduction_.rerun;
    }
  }

  // The loss is a mean over the samples that count: so are the gradients of the inputs.
  void divide_grad_inputs() {
    const int64_t rows = launcher_.rows();
    if (call_.gem.mask == nullptr) {
      call_.grad_input_scale /= static_cast<float>(std::max<int64_t>(rows, 1));
      return;
    }
    const CountArguments count{call_.gem.mask, rows, launcher_.buffers().template take<float>(1)};
    launcher_.device().template launch<CountSamples>(1, CountSamples::kShared, count);
    call_.grad_input_factor = count.inverse;
  }

  Launcher<Device>& launcher_;
  const LossOptions& loss_;
  Gradients<Device>& gradients_;
  Call call_;
  LossArguments reduction_{};
};

// The GEM loss, float32 (), and then the gradients that are needed, float32.
template <class Device>
Tensors gem(MlpTensors tensors, LossOptions loss, SelectionOptions selection, GradientNeeds needs) {
  Launcher<Device> launcher(std::move(tensors), Op::kGem);
  loss.check(launcher.inputs().checks(), launcher.rows());
  selection.check(launcher.inputs().checks(), launcher.experts());
  Gradients<Device> gradients(launcher, needs, ScalarType::Float);
  Tensor result = launcher.buffers().empty({}, ScalarType::Float);
  with_number_type(launcher.inputs().dtype(), [&](auto t) {
    GemStep<Device, decltype(t)>(launcher, loss, selection, gradients,
                                 static_cast<float*>(result.mutable_data_ptr()))
        .run();
  });
  Tensors all{result};
  for (Tensor& grad : gradients.list()) all.push_back(grad);
  return all;
}

}  // namespace maskmoe::fused
