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

// A sum over some of the blocks' partial gradients, in their order; eight are on their way at a time.
MASKMOE_DEVICE float sum_of(const Gradients& g, int64_t at, int64_t begin, int64_t end) {
  float sum = 0.0f;
  const float* from = g.partial + at;
  int64_t n = begin;
  for (; n + 8 <= end; n += 8) {
    float part[8];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) part[m] = from[(n + m) * g.partial_size];
    MASKMOE_UNROLL
    for (int m = 0; m < 8; ++m) sum += part[m];
  }
  for (; n < end; ++n) sum += from[n * g.partial_size];
  return sum;
}

// The blocks' partial gradients, summed, scaled for their expert and packed. A block takes 32 values
// at a time: a lane each, and each warp an eighth of the partial gradients, so that a small network's
// few values keep many threads busy.
template <class T>
struct Reduce {
  using Arguments = Gradients;
  static constexpr int kResident = 4;
  static constexpr int64_t kShared = kThreads * sizeof(float);

  static MASKMOE_DEVICE void run(const Gradients& g, const Place& place) {
    float* sums = reinterpret_cast<float*>(place.shared);  // (kWarps, 32)
    const int64_t count = partial_biases(g.tables) + g.tables.num_biases;
    const int64_t share = (g.partials + kWarps - 1) / kWarps;
    for (int64_t first = 32 * place.block; first < count; first += 32 * place.blocks) {
      each_thread([&](int thread) {
        const int64_t n = first + thread % 32, begin = thread / 32 * share;
        const int64_t end = begin + share < g.partials ? begin + share : g.partials;
        sums[thread] = n < count ? sum_of(g, n, begin, end) : 0.0f;
      });
      barrier();
      each_thread([&](int thread) {
        if (thread >= 32 || first + thread >= count) return;
        float sum = 0.0f;
        MASKMOE_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) sum += sums[32 * warp + thread];
        pack(g, first + thread, sum);
      });
      barrier();
    }
  }

 private:
  // Sum n, to its place in the packed gradients; padding has none.
  static MASKMOE_DEVICE void pack(const Gradients& g, int64_t n, float sum) {
    const Tables& t = g.tables;
    const int64_t entries = partial_entries(t), biases = partial_biases(t);
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
    if (to == nullptr || at < 0) return;
    const float scaled = g.scale == nullptr ? sum : sum * g.scale[expert];
    static_cast<T*>(to)[at] = rounded<T>(scaled * g.factor);
  }
};

// One over the number of samples that count, as the loss is their mean. One block, which reads 64
// samples a thread at a time.
struct Count {
  using Arguments = Samples;
  static constexpr int kResident = 4;
  static constexpr int64_t kShared = kThreads * sizeof(int64_t);

  static MASKMOE_DEVICE void run(const Samples& s, const Place& place) {
    int64_t* counts = reinterpret_cast<int64_t*>(place.shared);  // (kThreads,)
    constexpr int kWide = sizeof(Quad), kAtOnce = 4;
    const int64_t wide = aligned<Quad>(s.mask) ? s.rows / kWide : 0;  // words; the rest one by one
    each_thread([&](int thread) {
      int64_t count = 0;
      for (int64_t n = thread; n < wide; n += kAtOnce * kThreads) {
        Quad quads[kAtOnce];
        MASKMOE_UNROLL
        for (int m = 0; m < kAtOnce; ++m) {
          const int64_t at = n + m * kThreads;
          quads[m] = at < wide ? read_only(reinterpret_cast<const Quad*>(s.mask) + at) : Quad{};
        }
        MASKMOE_UNROLL
        for (int m = 0; m < kAtOnce; ++m) count += ones(quads[m]);
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
      *s.share = 1.0f / static_cast<float>(count < 1 ? 1 : count);
    });
  }

 private:
  // Bytes of a word that are not 0.
  static MASKMOE_DEVICE int ones(const Quad& quad) {
    int count = 0;
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      MASKMOE_UNROLL
      for (int shift = 0; shift < 32; shift += 8) count += (quad.word[m] >> shift & 255) != 0;
    }
    return count;
  }
};

// The loss, and what each expert's gradient is to be multiplied with, or its weights divided by.
// One block: each warp adds up an eighth of the blocks' sums, in their order, and then the eighths
// are added.
struct Finish {
  using Arguments = Totals;
  static constexpr int kResident = 4;

  static MASKMOE_BOTH int64_t shared(int64_t experts) {
    const int64_t count = 2 * experts + 1;
    return 8 * (kWarps * count + experts) + 4 * (count + experts);
  }

  static MASKMOE_DEVICE void run(const Totals& t, const Place& place) {
    const int count = 2 * t.experts + 1;
    double* parts = reinterpret_cast<double*>(place.shared);  // (kWarps, count)
    double* terms = parts + kWarps * count;                   // (experts,): of the loss
    float* sums = reinterpret_cast<float*>(terms + t.experts);  // (count,): of all blocks
    int32_t* small = reinterpret_cast<int32_t*>(sums + count);  // (experts,): a divisor
    const int64_t share = (t.blocks + kWarps - 1) / kWarps;
    each_thread([&](int thread) {
      const int64_t begin = thread / 32 * share;
      const int64_t end = begin + share < t.blocks ? begin + share : t.blocks;
      for (int n = thread % 32; n < count; n += 32) {
        parts[thread / 32 * count + n] = sum_of(t.sums + n, count, begin, end);
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
        const float scale = t.known ? t.scale[i] : part(t, i, sums + t.experts, small[i]);
        terms[i] = static_cast<double>(sums[i]) * scale;
      }
    });
    barrier();
    each_thread([&](int thread) {
      if (thread != 0) return;
      double sum = 0.0;
      int32_t again = 0;
      for (int i = 0; i < t.experts; ++i) sum += terms[i], again |= small[i];
      *t.loss = static_cast<float>(sum);
      if (!t.known) *t.again = again;
    });
  }

 private:
  // The sum of every `step`th value, of these; eight are on their way at a time.
  static MASKMOE_DEVICE double sum_of(const float* from, int64_t step, int64_t begin,
                                      int64_t end) {
    double sum = 0.0;
    int64_t b = begin;
    for (; b + 8 <= end; b += 8) {
      float part[8];
      MASKMOE_UNROLL
      for (int m = 0; m < 8; ++m) part[m] = from[(b + m) * step];
      MASKMOE_UNROLL
      for (int m = 0; m < 8; ++m) sum += part[m];
    }
    for (; b < end; ++b) sum += from[b * step];
    return sum;
  }

  // Expert i's scale. A sum that is small divides its weights before anything is multiplied by
  // them; others may wait.
  static MASKMOE_DEVICE float part(const Totals& t, int i, const float* weight, int32_t& small) {
    const float samples = weight[t.experts];
    float by = samples < 1.0f ? 1.0f : samples;
    if (t.normalize == 2) by = weight[i];
    if (t.normalize == 3) {
      double total = 0.0;
      for (int j = 0; j < t.experts; ++j) total += weight[j];
      by = static_cast<float>(total);
    }
    small = t.normalize >= 2 && by > 0.0f && by < t.least ? 1 : 0;
    const float scale = small || by == 0.0f ? 1.0f : 1.0f / by;
    t.divisor[i] = small ? by : 1.0f;
    t.scale[i] = scale;
    return scale;
  }
};

}  // namespace maskmoe::fused
