// The kernels on the host, warps taking turns: a library for the tests, which load it with
// torch.ops.load_library. Its ops are those of `maskmoe`, on CPU tensors.

#include <ucontext.h>

#include <functional>

#include "cuda/boxed.h"

namespace maskmoe::fused {
namespace {

// What a test chooses about the machine.
struct Settings {
  int64_t blocks = 3;
  int64_t processors = 1;  // of the device: more make tiles lower
  int64_t shared_limit = 227 * 1024;
};
Settings settings;

// The warps of a block, each with a stack of its own; they take turns at barriers.
class Warps {
 public:
  explicit Warps(const std::function<void()>& kernel) : kernel_(kernel) {
    static std::vector<char> stacks(kWarps * kStack);
    the_ = this;
    reach_barrier = [] { the_->leave(); };
    for (int w = 0; w < kWarps; ++w) {
      getcontext(&warps_[w]);
      warps_[w].uc_stack.ss_sp = stacks.data() + w * kStack;
      warps_[w].uc_stack.ss_size = kStack;
      warps_[w].uc_link = nullptr;
      makecontext(&warps_[w], &Warps::start, 0);
    }
  }

  void run() {
    for (int done = 0; done == 0;) {
      for (int n = 0; n < kWarps; ++n) {
        running_warp = reversed ? kWarps - 1 - n : n;
        swapcontext(&between_, &warps_[running_warp]);
      }
      for (bool d : done_) done += d;
      STD_TORCH_CHECK(done == 0 || done == kWarps, "a barrier that not every warp reaches");
    }
  }

 private:
  static constexpr size_t kStack = 256 * 1024;

  static void start() {
    the_->kernel_();
    the_->done_[running_warp] = true;
    the_->leave();
  }
  void leave() { swapcontext(&warps_[running_warp], &between_); }

  inline static Warps* the_ = nullptr;
  const std::function<void()>& kernel_;
  ucontext_t between_, warps_[kWarps];
  bool done_[kWarps] = {};
};

class Twin {
 public:
  class Memory {
   public:
    explicit Memory(const std::vector<unsigned char>& bytes) : bytes_((bytes.size() + 15) / 16) {
      std::memcpy(bytes_.data(), bytes.data(), bytes.size());
    }
    const void* data() const { return bytes_.data(); }

   private:
    std::vector<Quad> bytes_;
  };

  explicit Twin(const Tensor&) {}

  int64_t device() const { return 0; }
  int64_t processors() const { return settings.processors; }
  int64_t shared() const { return settings.shared_limit + 1024; }
  int64_t shared_limit() const { return settings.shared_limit; }
  template <class Kernel>
  int64_t resident(int64_t) const {
    return settings.blocks;
  }

  std::vector<int64_t> read(const Tensor& plan) const {
    const auto* from = static_cast<const int64_t*>(plan.data_ptr());
    return {from, from + plan.numel()};
  }

  template <class Kernel>
  void launch(int64_t blocks, int64_t shared, const typename Kernel::Arguments& arguments) const {
    // Exactly as large as it was asked for, and full of NaN.
    const std::unique_ptr<Quad[]> memory(new Quad[(shared + 15) / 16]);
    auto* bytes = reinterpret_cast<unsigned char*>(memory.get());
    for (int64_t n = 0; n < blocks; ++n) {
      std::memset(bytes, 0xff, shared);
      const Place place{reversed ? blocks - 1 - n : n, blocks, bytes};
      const std::function<void()> kernel = [&] { Kernel::run(arguments, place); };
      Warps(kernel).run();
    }
  }
};

// Sets how the twin runs: blocks at a time, processors, bytes of shared memory, order of threads.
bool configure(int64_t blocks, int64_t processors, int64_t shared_limit, bool backwards) {
  settings = {blocks, processors, shared_limit};
  reversed = backwards;
  return true;
}

}  // namespace
}  // namespace maskmoe::fused

STABLE_TORCH_LIBRARY(maskmoe_twin, m) {
  m.def("configure(int blocks, int processors, int shared_limit, bool backwards) -> bool");
  m.def(
      "masked_mlp(Tensor? x, Tensor[] tables, Tensor[] ids, int[] parts, Tensor[] weights, "
      "Tensor[] biases, Tensor[] plans, int[] layouts, SymInt out_features, str activation, "
      "bool keep) -> (Tensor, Tensor)");
  m.def(
      "masked_mlp_backward(Tensor grad_logits, Tensor? x, Tensor[] tables, Tensor[] ids, "
      "int[] parts, Tensor[] weights, Tensor[] biases, Tensor saved, Tensor[] plans, "
      "int[] layouts, str activation, bool need_x, bool need_tables, bool need_weights) "
      "-> Tensor[]");
  m.def(
      "masked_mlp_mixture(Tensor? x, Tensor[] tables, Tensor[] ids, int[] parts, "
      "Tensor[] weights, Tensor[] biases, Tensor[] plans, int[] layouts, str activation, "
      "Tensor strict, str confidence, float sharpness) -> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_mlp_gem(Tensor? x, Tensor[] tables, Tensor[] ids, int[] parts, Tensor[] weights, "
      "Tensor[] biases, Tensor[] plans, int[] layouts, str activation, Tensor target, "
      "Tensor? mask, Tensor strict, str confidence, float sharpness, str weighting, "
      "str normalize, bool need_x, bool need_tables, bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(maskmoe_twin, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&maskmoe::fused::configure));
}

STABLE_TORCH_LIBRARY_IMPL(maskmoe_twin, CPU, m) {
  using Ops = maskmoe::fused::Ops<maskmoe::fused::Twin>;
  m.impl("masked_mlp", TORCH_BOX(&Ops::forward));
  m.impl("masked_mlp_backward", TORCH_BOX(&Ops::backward));
  m.impl("masked_mlp_mixture", TORCH_BOX(&Ops::mixture));
  m.impl("masked_mlp_gem", TORCH_BOX(&Ops::gem));
}
