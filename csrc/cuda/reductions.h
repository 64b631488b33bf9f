// Around the network: weights into the kernels' order, partial gradients into the packed one.
#pragma once

#include "cuda/call.h"
#include "cuda/tensor_core.h"

namespace maskmoe::fused {

// Weights into the image of 16 x 16 blocks, the last layer's and biases into float32; every padded
// place is zero. Also lists each expert's strict subsets.
template <class T>
struct Pack {
  using Arguments = Parameters;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Parameters& p, const Place& place) {
    each_thread([&](int thread) {
      const int64_t step = place.blocks * kThreads, first = place.block * kThreads + thread;
      T* image = static_cast<T*>(p.image);
      for (int64_t n = first; n < int64_t{kBlock} * p.blocks; n += step) {
        const Block block = p.tables.blocks[n / kBlock];
        int k, unit;
        Core<T>::unplace(static_cast<int>(n % kBlock), k, unit);
        T value = rounded<T>(0.0f);
        if (k < block.k && unit < block.n) {
          const int64_t at = block.from + int64_t{k} * block.step_k + int64_t{unit} * block.step_n;
          value = static_cast<const T*>(p.weights[block.layer])[at];
        }
        image[n] = value;
      }
      const int last = p.tables.layers - 1;
      for (int64_t n = first; n < int64_t{kSide} * p.tables.num_entries; n += step) {
        const Entry entry = p.tables.entries[n / kSide];
        const int k = static_cast<int>(n % kSide);
        const T* weight = static_cast<const T*>(p.weights[last]);
        p.last[n] = k < entry.valid ? to_float(weight[entry.from + k]) : 0.0f;
      }
      for (int64_t n = first; n < p.tables.num_biases; n += step) {
        const Bias bias = p.tables.biases[n];
        const T* from = static_cast<const T*>(p.biases[bias.layer]);
        p.padded_biases[n] = from == nullptr || bias.index < 0 ? 0.0f : to_float(from[bias.index]);
      }
      if (p.strict == nullptr) return;
      const int experts = p.tables.experts;
      for (int64_t i = first; i < experts; i += step) {
        int32_t count = 0;
        bool larger = false;
        for (int j = 0; j < experts; ++j) {
          if (p.strict[i * experts + j]) p.above[i * experts + count++] = static_cast<int16_t>(j);
          larger = larger || p.strict[int64_t{j} * experts + i];
        }
        p.above_count[i] = count;
        p.larger[i] = larger ? 1 : 0;
      }
    });
  }
};

// A sum over the blocks' partial gradients, in their order; eight are on their way at a time.
MASKMOE_DEVICE float sum_of(const Gradients& g, int64_t at) {
  float sum = 0.0f;
  const float* from = g.partial + at;
  int64_t n = 0;
  for (; n + 8 <= g.partials; n += 8) {
    float part[8];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) part[m] = from[(n + m) * g.partial_size];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) sum += part[m];
  }
  for (; n < g.partials; ++n) sum += from[n * g.partial_size];
  return sum;
}

// The blocks' partial gradients, summed, scaled for their expert and packed.
template <class T>
struct Reduce {
  using Arguments = Gradients;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Gradients& g, const Place& place) {
    each_thread([&](int thread) {
      const Tables& t = g.tables;
      const int64_t step = place.blocks * kThreads;
      const int64_t entries = partial_entries(t), biases = partial_biases(t);
      for (int64_t n = place.block * kThreads + thread; n < biases + t.num_biases; n += step) {
        void* to = nullptr;
        int64_t at = -1;
        int expert = 0;
        if (n < entries) {
          const Block block = t.blocks[n / kBlock];
          const int within = static_cast<int>(n % kBlock), lane = within % 128 / 4;
          const int value = within / 128 * 4 + within % 4;
          const int k = acc_row(lane, value), unit = acc_col(lane, value);
          to = g.weights[block.layer];
          expert = block.expert;
          if (k < block.k && unit < block.n) at = block.from + int64_t{k} * block.step_k + unit;
        } else if (n < biases) {
          const Entry entry = t.entries[(n - entries) / kSide];
          const int k = static_cast<int>((n - entries) % kSide);
          to = g.weights[t.layers - 1];
          expert = entry.expert;
          if (k < entry.valid) at = entry.from + k;
        } else {
          const Bias bias = t.biases[n - biases];
          to = g.biases[bias.layer];
          expert = bias.expert;
          at = bias.index;
        }
        if (to == nullptr || at < 0) continue;
        const float sum = sum_of(g, n);
        const float scaled = g.scale == nullptr ? sum : sum * g.scale[expert];
        static_cast<T*>(to)[at] = rounded<T>(scaled * g.factor);
      }
    });
  }
};

// One over the number of samples that count, as the loss is their mean. One block.
struct Count {
  using Arguments = Samples;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Samples& s, const Place& place) {
    int64_t* counts = reinterpret_cast<int64_t*>(place.shared);  // (kThreads,)
    each_thread([&](int thread) {
      int64_t count = 0;
      for (int64_t n = thread; n < s.rows; n += kThreads) count += s.mask[n] != 0 ? 1 : 0;
      counts[thread] = count;
    });
    barrier();
    each_thread([&](int thread) {
      if (thread != 0) return;
      int64_t count = 0;
      for (int n = 0; n < kThreads; ++n) count += counts[n];
      *s.share = 1.0f / static_cast<float>(count < 1 ? 1 : count);
    });
  }
};

// The loss, and what each expert's gradient is to be multiplied with, or its weights divided by.
// One block.
struct Finish {
  using Arguments = Totals;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Totals& t, const Place& place) {
    float* loss = reinterpret_cast<float*>(place.shared);  // (2 experts + 1,): as the sums
    const int count = 2 * t.experts + 1;
    each_thread([&](int thread) {
      for (int n = thread; n < count; n += kThreads) {
        double sum = 0.0;
        for (int64_t b = 0; b < t.blocks; ++b) sum += t.sums[b * count + n];
        loss[n] = static_cast<float>(sum);
      }
    });
    barrier();
    each_thread([&](int thread) {
      if (thread != 0) return;
      if (!t.known) part(t, loss + t.experts);
      double sum = 0.0;
      for (int i = 0; i < t.experts; ++i) sum += static_cast<double>(loss[i]) * t.scale[i];
      *t.loss = static_cast<float>(sum);
    });
  }

 private:
  // A sum that is small divides its weights before anything is multiplied by them; others may wait.
  static MASKMOE_DEVICE void part(const Totals& t, const float* weight) {
    double total = 0.0;
    for (int i = 0; i < t.experts; ++i) total += weight[i];
    *t.again = 0;
    for (int i = 0; i < t.experts; ++i) {
      const float samples = weight[t.experts];
      float by = samples < 1.0f ? 1.0f : samples;
      if (t.normalize == 2) by = weight[i];
      if (t.normalize == 3) by = static_cast<float>(total);
      const bool small = t.normalize >= 2 && by > 0.0f && by < t.least;
      t.divisor[i] = small ? by : 1.0f;
      t.scale[i] = small || by == 0.0f ? 1.0f : 1.0f / by;
      if (small) *t.again = 1;
    }
  }
};

}  // namespace maskmoe::fused
