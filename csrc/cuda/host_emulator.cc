// The host emulator: the kernels compiled for the CPU, warps taking turns. A library for the tests,
// which load it with torch.ops.load_library; its ops are those of `maskmoe`, on CPU tensors.

#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/bindings.h"
#include "cuda/shared_memory_limit.h"

namespace maskmoe::fused {
namespace {

// What a test chooses about the emulated device.
struct Settings {
  int64_t resident_blocks = 3;
  int64_t multiprocessors = 1;  // with more of them, tiles are low
  int64_t shared_per_block = 227 * 1024;
  bool alone = false;  // has a multiprocessor room for one thread block only?
};
Settings settings;
int64_t limits_set = 0;  // how often a kernel was allowed more shared memory

// The warps of a thread block, each with a stack of its own; at a barrier the next warp runs.
class Warps {
 public:
  Warps(const std::function<void()>& kernel, int count) : kernel_(kernel) {
    static std::vector<char> stacks(kMostWarps * kStack);
    running_warps = count;
    the_ = this;
    reach_barrier = [] { the_->leave(); };
    for (int w = 0; w < count; ++w) {
      getcontext(&warps_[w]);
      warps_[w].uc_stack.ss_sp = stacks.data() + w * kStack;
      warps_[w].uc_stack.ss_size = kStack;
      warps_[w].uc_link = nullptr;
      makecontext(&warps_[w], &Warps::start, 0);
    }
  }

  void run() {
    for (int done = 0; done == 0;) {
      for (int n = 0; n < running_warps; ++n) {
        running_warp = reversed ? running_warps - 1 - n : n;
        swapcontext(&between_, &warps_[running_warp]);
      }
      for (bool d : done_) done += d;
      STD_TORCH_CHECK(done == 0 || done == running_warps, "a barrier that not every warp reaches");
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
  ucontext_t between_, warps_[kMostWarps];
  bool done_[kMostWarps] = {};
};

class HostEmulator {
 public:
  class Memory {
   public:
    explicit Memory(const std::vector<unsigned char>& bytes) : words_((bytes.size() + 15) / 16) {
      std::memcpy(words_.data(), bytes.data(), bytes.size());
    }
    const void* data() const { return words_.data(); }

   private:
    std::vector<UInt4> words_;
  };

  explicit HostEmulator(const Tensor&) {}

  int64_t index() const { return 0; }
  DeviceLimits limits() const {
    return {settings.multiprocessors, settings.alone ? 0 : settings.shared_per_block + 1024,
            settings.shared_per_block};
  }
  template <class Kernel>
  int64_t resident_blocks(int64_t, int) const {
    return settings.resident_blocks;
  }

  std::vector<int64_t> copy_to_host(const Tensor& serialized) const {
    const auto* from = static_cast<const int64_t*>(serialized.data_ptr());
    return {from, from + serialized.numel()};
  }

  // Shared memory is exactly as large as asked for and full of NaN.
  template <class Kernel>
  void launch(int64_t blocks, int64_t shared, const typename Kernel::Arguments& arguments,
              int threads = kThreads) const {
    if (shared > kDefaultSharedMemory) raise_shared_memory_limit<Kernel>(*this);
    STD_TORCH_CHECK(shared <= kDefaultSharedMemory || limit_is_set<Kernel>,
                    "a kernel is launched with more shared memory than it may have");
    const std::unique_ptr<UInt4[]> memory(new UInt4[(shared + 15) / 16]);
    auto* bytes = reinterpret_cast<unsigned char*>(memory.get());
    for (int64_t n = 0; n < blocks; ++n) {
      std::memset(bytes, 0xff, shared);
      const GridPosition grid{reversed ? blocks - 1 - n : n, blocks, bytes};
      const std::function<void()> kernel = [&] { Kernel::run(arguments, grid); };
      Warps(kernel, threads / 32).run();
    }
  }

  template <class Kernel>
  void set_shared_memory_limit() const {
    limit_is_set<Kernel> = true;
    ++limits_set;
  }

 private:
  template <class Kernel>
  inline static bool limit_is_set = false;
};

// Chooses how the emulator runs: thread blocks at a time, multiprocessors, bytes of shared memory a
// block, one block a multiprocessor, threads from the last to the first.
bool configure(int64_t resident_blocks, int64_t multiprocessors, int64_t shared_per_block,
               bool alone, bool reverse) {
  settings = {resident_blocks, multiprocessors, shared_per_block, alone};
  reversed = reverse;
  return true;
}

int64_t shared_memory_limits_set() { return limits_set; }

}  // namespace
}  // namespace maskmoe::fused

STABLE_TORCH_LIBRARY(maskmoe_host_emulator, m) {
  m.def("configure(int blocks, int multiprocessors, int shared, bool alone, bool reverse) -> bool");
  m.def("shared_memory_limits_set() -> int");
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
      "Tensor? mask, Tensor? sample_weight, Tensor strict, str confidence, float sharpness, str weighting, "
      "str normalize, bool need_x, bool need_tables, bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(maskmoe_host_emulator, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&maskmoe::fused::configure));
  m.impl("shared_memory_limits_set", TORCH_BOX(&maskmoe::fused::shared_memory_limits_set));
}

STABLE_TORCH_LIBRARY_IMPL(maskmoe_host_emulator, CPU, m) {
  using Bindings = maskmoe::fused::Bindings<maskmoe::fused::HostEmulator>;
  m.impl("masked_mlp", TORCH_BOX(&Bindings::forward));
  m.impl("masked_mlp_backward", TORCH_BOX(&Bindings::backward));
  m.impl("masked_mlp_mixture", TORCH_BOX(&Bindings::mixture));
  m.impl("masked_mlp_gem", TORCH_BOX(&Bindings::gem));
}
