// The loss of a GEM step: what divides it, and the sums of all thread blocks of Backward.
#pragma once

#include "cuda/masked_mlp/arguments.h"
#include "cuda/masked_mlp/sum_in_order.h"

namespace maskmoe::fused {

// One over the number of samples that count: the loss is a mean over them.
//   mask         : (rows,) uint8
//   inverse      : (1,) float32; 1 if no sample counts
//   grid         : 1 block; a thread reads 64 samples at a time
//   shared memory: (threads,) int64
// Sums of integers, by one thread in the end: deterministic.
struct CountSamples {
  using Arguments = CountArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int64_t kShared = kThreads * sizeof(int64_t);

  static MASKMOE_DEVICE void run(const CountArguments& s, const GridPosition& grid) {
    int64_t* counts = reinterpret_cast<int64_t*>(grid.shared);  // (kThreads,)
    constexpr int kWide = sizeof(UInt4), kInFlight = 4;
    const int64_t wide = aligned<UInt4>(s.mask) ? s.rows / kWide : 0;  // words; the rest one by one
    each_thread([&](int thread) {
      int64_t count = 0;
      for (int64_t n = thread; n < wide; n += kInFlight * kThreads) {
        UInt4 words[kInFlight];
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) {
          const int64_t at = n + m * kThreads;
          words[m] = at < wide ? read_only(reinterpret_cast<const UInt4*>(s.mask) + at) : UInt4{};
        }
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) count += count_nonzero(words[m]);
      }
      for (int64_t n = wide * kWide + thread; n < s.rows; n += kThreads) {
        count += s.mask[n] != 0 ? 1 : 0;
      }
      counts[thread] = count;
    });
    barrier();
    each_thread([&](int thread) {
      if (thread != 0) return;
      int64_t count = 0;
      for (int n = 0; n < kThreads; ++n) count += counts[n];
      *s.inverse = 1.0f / static_cast<float>(count < 1 ? 1 : count);
    });
  }

 private:
  // Bytes of a word that are not 0.
  static MASKMOE_DEVICE int count_nonzero(const UInt4& words) {
    int count = 0;
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      MASKMOE_UNROLL
      for (int shift = 0; shift < 32; shift += 8) count += (words.word[m] >> shift & 255) != 0;
    }
    return count;
  }
};

// The loss, and for each expert what its gradients are multiplied by or its weights are divided by.
//   sums          : (num_sums, 2 experts + 1) float32: losses, weights (per expert), samples
//   scale, divisor: (experts,) float32; rerun: (1,) int32; loss: (1,) float32
//   grid          : 1 block; each warp adds an eighth of num_sums
//   shared memory : shared(experts) bytes
// Sums in float64, in a fixed order: deterministic.
struct ReduceLoss {
  using Arguments = LossArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static MASKMOE_HOST_DEVICE int64_t shared(int64_t experts) {
    const int64_t count = 2 * experts + 1;
    return 8 * (kWarps * count + experts) + 4 * (count + experts);
  }

  static MASKMOE_DEVICE void run(const LossArguments& t, const GridPosition& grid) {
    const int count = 2 * t.experts + 1;
    double* parts = reinterpret_cast<double*>(grid.shared);  // (kWarps, count)
    double* terms = parts + kWarps * count;                  // (experts,): of the loss
    float* sums = reinterpret_cast<float*>(terms + t.experts);  // (count,): of all blocks
    int32_t* small = reinterpret_cast<int32_t*>(sums + count);  // (experts,): is its sum small?
    const int64_t share = (t.num_sums + kWarps - 1) / kWarps;
    each_thread([&](int thread) {
      const int64_t begin = thread / 32 * share;
      const int64_t end = begin + share < t.num_sums ? begin + share : t.num_sums;
      for (int n = thread % 32; n < count; n += 32) {
        parts[thread / 32 * count + n] = sum_in_order<double>(t.sums + n, count, begin, end);
      }
    });
    barrier();
    each_thread([&](int thread) {
      for (int n = thread; n < count; n += kThreads) {
        double sum = 0.0;
        for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp * count + n];
        sums[n] = static_cast<float>(sum);
      }
    });
    barrier();
    each_thread([&](int thread) {
      for (int i = thread; i < t.experts; i += kThreads) {
        small[i] = 0;
        const float scale = t.known ? t.scale[i] : set_scale(t, i, sums + t.experts, small[i]);
        terms[i] = static_cast<double>(sums[i]) * scale;
      }
    });
    barrier();
    each_thread([&](int thread) {
      if (thread != 0) return;
      double sum = 0.0;
      int32_t rerun = 0;
      for (int i = 0; i < t.experts; ++i) sum += terms[i], rerun |= small[i];
      *t.loss = static_cast<float>(sum);
      if (!t.known) *t.rerun = rerun;
    });
  }

 private:
  // Writes scale and divisor of expert i and returns its scale. A small sum of weights divides the
  // weights before they are multiplied with anything, in a second sweep; other sums divide the
  // results.
  static MASKMOE_DEVICE float set_scale(const LossArguments& t, int i, const float* weights,
                                        int32_t& small) {
    const float samples = weights[t.experts];
    float by = samples < 1.0f ? 1.0f : samples;
    if (t.normalization == Normalization::kExpert) by = weights[i];
    if (t.normalization == Normalization::kBatch) {
      double total = 0.0;
      for (int j = 0; j < t.experts; ++j) total += weights[j];
      by = static_cast<float>(total);
    }
    const bool sum_divides =
        t.normalization == Normalization::kExpert || t.normalization == Normalization::kBatch;
    small = sum_divides && by > 0.0f && by < t.min_divisor ? 1 : 0;
    const float scale = small || by == 0.0f ? 1.0f : 1.0f / by;
    t.divisor[i] = small ? by : 1.0f;
    t.scale[i] = scale;
    return scale;
  }
};

}  // namespace maskmoe::fused
