// Weights and biases from the layouts' packed order into the order that the kernels read.
#pragma once

#include "cuda/masked_mlp/arguments.h"
#include "cuda/mma.h"

namespace maskmoe::fused {

//   weights, biases: of each layer, as the layouts pack them
//   packed         : (num_blocks, 256) T, blocks of 16 x 16 in the order of Mma<T>
//   head           : (num_head, 16) float32; padded_biases: (num_biases,) float32. Padding is zero
//   subsets, num_subsets, has_superset: from is_proper_subset, if there is a selection
//   grid           : grid_size(elements); no shared memory
// Each element is written once, by one thread: deterministic.
template <class T>
struct PackWeights {
  using Arguments = PackArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static MASKMOE_DEVICE void run(const PackArguments& p, const GridPosition& grid) {
    each_thread([&](int thread) {
      const int64_t step = grid.num_blocks * kThreads, first = grid.block * kThreads + thread;
      pack_blocks(p, first, step);
      pack_head(p, first, step);
      if (p.is_proper_subset != nullptr) list_subsets(p, first, step);
    });
  }

 private:
  static MASKMOE_DEVICE void pack_blocks(const PackArguments& p, int64_t first, int64_t step) {
    T* packed = static_cast<T*>(p.packed);
    for (int64_t n = first; n < int64_t{kBlockSize} * p.num_blocks; n += step) {
      const WeightBlock block = p.plan.blocks[n / kBlockSize];
      int k, unit;
      Mma<T>::weight_position(static_cast<int>(n % kBlockSize), k, unit);
      T value = rounded<T>(0.0f);
      if (k < block.k && unit < block.n) {
        const int64_t at = block.from + int64_t{k} * block.step_k + int64_t{unit} * block.step_n;
        value = static_cast<const T*>(p.weights[block.layer])[at];
      }
      packed[n] = value;
    }
  }

  // The weights of the head, and the biases of all layers.
  static MASKMOE_DEVICE void pack_head(const PackArguments& p, int64_t first, int64_t step) {
    const int layer = p.plan.layers - 1;
    for (int64_t n = first; n < int64_t{kChunk} * p.plan.num_head; n += step) {
      const HeadWeights head = p.plan.head[n / kChunk];
      const int k = static_cast<int>(n % kChunk);
      const T* weight = static_cast<const T*>(p.weights[layer]);
      p.head[n] = k < head.valid ? to_float(weight[head.from + k]) : 0.0f;
    }
    for (int64_t n = first; n < p.plan.num_biases; n += step) {
      const PaddedBias bias = p.plan.biases[n];
      const T* from = static_cast<const T*>(p.biases[bias.layer]);
      p.padded_biases[n] = from == nullptr || bias.index < 0 ? 0.0f : to_float(from[bias.index]);
    }
  }

  static MASKMOE_DEVICE void list_subsets(const PackArguments& p, int64_t first, int64_t step) {
    const int experts = p.plan.experts;
    for (int64_t i = first; i < experts; i += step) {
      int32_t count = 0;
      bool has_superset = false;
      for (int j = 0; j < experts; ++j) {
        if (p.is_proper_subset[i * experts + j]) {
          p.subsets[i * experts + count++] = static_cast<int16_t>(j);
        }
        has_superset = has_superset || p.is_proper_subset[int64_t{j} * experts + i];
      }
      p.num_subsets[i] = count;
      p.has_superset[i] = has_superset ? 1 : 0;
    }
  }
};

}  // namespace maskmoe::fused
