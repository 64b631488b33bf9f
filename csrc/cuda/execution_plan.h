// The execution plan of an MLP: its layouts compiled into products of 16 x 16 weights for tensor
// cores.
//
// Features of each group and units of each expert are padded to chunks of 16 columns, so that a
// product never mixes columns that an expert sees with columns that it does not. One chunk of
// outputs is the sum over the chunks that its expert sees: a Product. The last layer has one unit
// an expert and is called the head; it takes no products. Kernels read these tables and never a
// layout. This header needs neither torch nor CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "common/layout.h"

namespace maskmoe::fused {

constexpr int kChunk = 16;                   // columns of a chunk
constexpr int kBlockSize = kChunk * kChunk;  // weights between two chunks
constexpr int kWarps = 8;                    // of a thread block, unless it has a processor alone
constexpr int kThreads = 32 * kWarps;
constexpr int kMostWarps = 2 * kWarps;       // of a thread block that has one
constexpr int kMaxParts = 32;
constexpr int kMaxLayers = 16;

// Neighbouring chunks.
struct ChunkRun {
  int32_t first, count;
};

// One chunk of a product's result, for every row: the sum over chunks of chunk times block.
struct Product {
  int32_t to;              // the chunk that it computes
  int32_t valid;           // columns of that chunk that are not padding
  int32_t runs, runs_end;  // the chunks that it reads
  int32_t block, blocks;   // its first block of weights, and how many: one for each chunk it reads
};

// Where the 16 x 16 weights of a block lie in the packed weight: (k, n) at from + k step_k +
// n step_n. A product sums over k.
struct WeightBlock {
  int64_t from;
  int32_t step_k, step_n;
  int32_t layer, expert;
  int32_t chunk;            // of the layer's inputs
  uint8_t k, n, unused[2];  // rows and columns that are not padding
};

// Neighbouring blocks that end in the same chunk of units: a warp computes their gradient at once.
struct GradientStrip {
  int32_t chunk, block, blocks;
};

// Up to 16 weights of the head: of one expert, for one chunk of its inputs.
struct HeadWeights {
  int64_t from;
  int32_t chunk, expert, valid, unused;
};

// Where a column of the padded input comes from; part -1: padding.
struct InputColumn {
  int32_t part, column;
};

// Four columns of the padded input. count: how many of them lie side by side in `part` (the rest is
// padding); -1: they do not lie side by side, look each up in the InputColumns.
struct InputQuad {
  int32_t part, column, count;
};

// A padded unit's bias; index -1: padding.
struct PaddedBias {
  int32_t layer, index, expert;
};

enum class Pass : int { kForward, kBackward, kGradient };

// The tables as kernels see them: addresses of one memory, host or device.
struct ExecutionPlan {
  const ChunkRun* runs;
  const Product* products;
  const WeightBlock* blocks;
  const GradientStrip* strips;
  const HeadWeights* head;
  const int32_t* head_begin;         // (experts + 1,): the first HeadWeights of each expert
  const int32_t* routed_head;        // HeadWeights that route the gradient to a chunk
  const int32_t* routed_head_begin;  // (chunks + 1,): the first of them for each chunk
  const InputColumn* columns;
  const InputQuad* quads;
  const PaddedBias* biases;
  const int32_t* schedule;  // products or strips, in the order of the warps that compute them
  const int32_t* bounds;    // of each worker's part of the schedule: see bounds_at
  int32_t layers, experts;
  // Blocks are sorted: those of the forward, the transposed ones of all layers but the first (up to
  // `inner_blocks`), the transposed ones of the first layer.
  int32_t forward_blocks, inner_blocks, all_blocks;
  int32_t num_head, num_biases;
  int32_t chunks[kMaxLayers];   // of each layer's input
  int32_t bias_at[kMaxLayers];  // the first padded bias of each layer

  // Index of a pass's workers + 1 bounds. Work is cut for 4, 8 and 16 workers.
#ifdef __CUDACC__
  __host__ __device__
#endif
  int bounds_at(Pass pass, int layer, int workers) const {
    const int cut = workers == kMostWarps ? 2 : workers == kWarps ? 1 : 0;
    return ((static_cast<int>(pass) * layers + layer) * 3 + cut) * (kMostWarps + 1);
  }
};

// An execution plan with its tables in host memory, ready to be copied to a device.
class CompiledPlan {
 public:
  // part_widths: features of each part of the input, which lie side by side. Raises
  // std::runtime_error with the reason for an MLP that these kernels do not compute.
  CompiledPlan(const std::vector<Encoded>& layouts, const std::vector<int64_t>& part_widths);

  // The plan with the addresses that its tables have when `bytes()` lie at `base`.
  ExecutionPlan at(const void* base) const;
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  int64_t out_features = 0;
  std::vector<int64_t> num_weights, num_units;  // of each layer

 private:
  ExecutionPlan shape_{};  // without addresses
  std::vector<unsigned char> bytes_;
  std::vector<int64_t> offsets_;  // of each table in bytes_
};

}  // namespace maskmoe::fused
