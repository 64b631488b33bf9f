// Gradients of weights and biases: sums over rows, which a thread block keeps for all its tiles.
//
// Each block has its own float32 sums, the last of them in shared memory as far as that suffices,
// the others in global memory (L2). A sum belongs to one thread or warp, which adds the block's
// tiles in order. So there are no atomics, and results are deterministic.
#pragma once

#include "cuda/masked_mlp/forward.h"

namespace maskmoe::fused {

// The sums of a thread block.
struct GradientSums {
  float *in_shared, *in_global;  // in_global null: nobody needs gradients of weights
  int64_t first_shared;          // index of the first sum in shared memory
  bool empty;                    // no tile has been added yet

  MASKMOE_DEVICE bool needed() const { return in_global != nullptr; }
  MASKMOE_DEVICE float* at(int64_t n) const {
    return n < first_shared ? in_global + n : in_shared + (n - first_shared);
  }

  MASKMOE_DEVICE void add(int64_t n, float value) const {
    float* to = at(n);
    *to = empty ? value : *to + value;
  }

  // Copies those in shared memory to global memory, where ReduceGradients reads them.
  MASKMOE_DEVICE void store(int64_t count) const {
    each_thread([&](int thread) {
      for (int64_t n = first_shared + thread; n < count; n += num_threads()) {
        in_global[n] = in_shared[n - first_shared];
      }
    });
  }
};

MASKMOE_DEVICE void load_sum(PerLane<Accumulator>& sum, const Float4* from) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int n = 0; n < 8; ++n) sum[lane].x[n] = from[n / 4 * 32 + lane].value[n % 4];
  });
}

MASKMOE_DEVICE void store_sum(Float4* to, const PerLane<Accumulator>& sum,
                              const PerLane<Accumulator>& acc) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      Float4 total;
      MASKMOE_UNROLL
      for (int k = 0; k < 4; ++k) {
        total.value[k] = sum[lane].x[half * 4 + k] + acc[lane].x[half * 4 + k];
      }
      to[half * 32 + lane] = total;
    }
  });
}

// The gradient of a strip's weight blocks: columns of inputs times columns of units, over kR rows.
// Sums of earlier tiles are loaded kAhead blocks before they are needed. prefetch(): called once
// the first loads are on their way.
template <class T, int kR, class F>
MASKMOE_DEVICE void grad_strip(const Call& c, const GradientStrip& strip, const T* inputs,
                               int in_stride, const T* units, int out_stride,
                               const GradientSums& sums, const F& prefetch) {
  constexpr int kSteps = kR / 16;
  constexpr bool kHold = sizeof(T) == 2;  // registers suffice for all rows of the units
  constexpr int kAhead = kHold ? 4 : 2;
  const int end = strip.block + strip.blocks;
  auto sums_of = [&](int b) { return reinterpret_cast<Float4*>(sums.at(int64_t{kBlockSize} * b)); };
  PerLane<Accumulator> loaded[kAhead];
  int chunk[kAhead];  // of inputs
  auto load = [&](int m, int b) {
    if (b >= end) return;
    chunk[m] = c.plan.blocks[b].chunk;
    if (!sums.empty) load_sum(loaded[m], sums_of(b));
  };
  MASKMOE_UNROLL
  for (int m = 0; m < kAhead; ++m) {
    clear(loaded[m]);
    load(m, strip.block + m);
  }
  prefetch();
  PerLane<typename Mma<T>::B> right[kHold ? kSteps : 1];
  MASKMOE_UNROLL
  for (int s = 0; kHold && s < kSteps; ++s) {
    Mma<T>::load_right(right[s], units + s * 16 * out_stride, out_stride);
  }
  for (int group = strip.block; group < end; group += kAhead) {
    MASKMOE_UNROLL
    for (int m = 0; m < kAhead; ++m) {
      const int b = group + m;
      if (b >= end) break;
      const T* from = inputs + chunk[m] * kChunk;
      PerLane<Accumulator> acc;
      clear(acc);
      auto step = [&](int s) {
        PerLane<typename Mma<T>::A> a;
        if (!kHold) Mma<T>::load_right(right[0], units + s * 16 * out_stride, out_stride);
        Mma<T>::load_transposed(a, from + s * 16 * in_stride, in_stride);
        Mma<T>::multiply(acc, a, right[kHold ? s : 0]);
      };
      if constexpr (kHold) {
        MASKMOE_UNROLL
        for (int s = 0; s < kSteps; ++s) step(s);
      } else {
        MASKMOE_NO_UNROLL
        for (int s = 0; s < kSteps; ++s) step(s);
      }
      store_sum(sums_of(b), loaded[m], acc);
      load(m, b + kAhead);
    }
  }
}

// The gradient of a layer's weight blocks. While a warp computes a strip, the sums of its next one
// come from global memory into L2.
template <class T, int kR>
MASKMOE_DEVICE void grad_weights(const Call& c, const Tile<T>& tile, int layer,
                                 const GradientSums& sums) {
  const T* inputs = tile.inputs(c, layer);
  const T* units = tile.inputs(c, layer + 1);
  const int in_stride = c.smem.stride[layer], out_stride = c.smem.stride[layer + 1];
  const int32_t* bounds = c.plan.bounds + c.plan.bounds_at(Pass::kGradient, layer, num_warps());
  each_warp([&](int warp) {
    for (int n = bounds[warp]; n < bounds[warp + 1]; ++n) {
      const GradientStrip strip = c.plan.strips[c.plan.schedule[n]];
      auto prefetch_next = [&] {
        if (!sums.empty && n + 1 < bounds[warp + 1]) {
          const GradientStrip next = c.plan.strips[c.plan.schedule[n + 1]];
          const int64_t first = int64_t{kBlockSize} * next.block;
          if (first < sums.first_shared) {
            prefetch_l2(sums.in_global + first, 4 * kBlockSize * next.blocks);
          }
        }
      };
      grad_strip<T, kR>(c, strip, inputs, in_stride, units + strip.chunk * kChunk, out_stride, sums,
                        prefetch_next);
    }
  });
}

// The gradient of a layer's biases: sums over rows of the gradient before the activation.
template <class T, int kR>
MASKMOE_DEVICE void grad_biases(const Call& c, const Tile<T>& tile, int layer,
                                const GradientSums& sums) {
  const T* units = tile.inputs(c, layer + 1);
  const int stride = c.smem.stride[layer + 1], columns = kChunk * c.plan.chunks[layer + 1];
  const int64_t first = first_bias_sum(c.plan) + c.plan.bias_at[layer];
  each_thread([&](int thread) {
    for (int n = thread; n < columns; n += num_threads()) {
      float sum = 0.0f;
      MASKMOE_UNROLL_8
      for (int row = 0; row < kR; ++row) sum += to_float(units[row * stride + n]);
      sums.add(first + n, sum);
    }
  });
}

// The gradient of the head's weights and biases. grad: (experts, kR), of the logits.
template <class T, int kR>
MASKMOE_DEVICE void grad_head(const Call& c, const Tile<T>& tile, const float* grad,
                              const GradientSums& sums) {
  const ExecutionPlan& plan = c.plan;
  const int layer = plan.layers - 1, stride = c.smem.stride[layer];
  each_thread([&](int thread) {
    for (int n = thread; n < kChunk * plan.num_head; n += num_threads()) {
      const HeadWeights head = plan.head[n / kChunk];
      const T* from = tile.inputs(c, layer) + head.chunk * kChunk + n % kChunk;
      float sum = 0.0f;
      MASKMOE_UNROLL_8
      for (int row = 0; row < kR; ++row) {
        sum = fmaf(to_float(from[row * stride]), grad[head.expert * kR + row], sum);
      }
      sums.add(first_head_sum(plan) + n, sum);
    }
    for (int expert = thread; expert < plan.experts; expert += num_threads()) {
      float sum = 0.0f;
      MASKMOE_UNROLL_8
      for (int row = 0; row < kR; ++row) sum += grad[expert * kR + row];
      sums.add(first_bias_sum(plan) + plan.bias_at[layer] + expert, sum);
    }
  });
}

}  // namespace maskmoe::fused
