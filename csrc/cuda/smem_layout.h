// The shared-memory layout: where the values of a tile of rows lie, and how many rows a tile has.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/execution_plan.h"

namespace maskmoe::fused {

// What is computed of a tile.
enum class Op : int { kForward, kMixture, kBackward, kGem };

// Does the kernel keep the inputs of all layers, or of two layers at a time?
constexpr bool keeps_all_layers(Op op) { return op == Op::kBackward || op == Op::kGem; }

// What the size of a tile depends on, besides the plan.
struct TileKind {
  Op op;
  int item_size;   // bytes of a value
  bool keep_dact;  // the derivative of the activation does not follow from its value
};

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // bytes
};

// Offsets of a tile in shared memory: first elements of the number type, then float32.
struct SmemLayout {
  int32_t rows, warps;          // of a tile; of the thread block that computes it
  int32_t inputs_at[kMaxLayers];  // of each layer's input, (rows, stride), in elements
  int32_t stride[kMaxLayers];
  int32_t dact_at[kMaxLayers];  // derivative of the activation that made this input; -1: not kept
  int64_t floats_at;            // in bytes: where the float32 begin
  int64_t sums_at;              // in bytes: where the block's sums of gradients begin, if any
  int64_t first_shared_sum;     // index of the first of them; those before lie in global memory
  int64_t bytes;                // in all
};

constexpr int kBackwardBlocks = 2;  // thread blocks of a backward for each multiprocessor

// The two heights of a tile that kernels are compiled for, in rows.
constexpr int max_tile_rows(int item_size) { return item_size == 4 ? 32 : 64; }
constexpr int min_tile_rows(int item_size) { return max_tile_rows(item_size) / 2; }

SmemLayout smem_layout(const ExecutionPlan& plan, const TileKind& kind, int rows);

// Thread blocks that a multiprocessor has shared memory for. One that is there alone gets more warps.
int64_t blocks_that_fit(const SmemLayout& layout, const DeviceLimits& limits);

// Keeps the last of a backward's `count` sums of weight gradients in shared memory: as many as do
// not lower the number of blocks that fit a multiprocessor. `count` is a multiple of 4. A block that
// has a multiprocessor alone gets more warps.
void place_sums(SmemLayout& layout, const ExecutionPlan& plan, int64_t count,
                const DeviceLimits& limits);

// Why not even the smallest tile fits the shared memory of a block, in words for the user; "": it
// fits.
std::string unsupported_reason(const ExecutionPlan& plan, const TileKind& kind,
                               const DeviceLimits& limits);

// The rows of a tile: the tall one where it fits, the low one if that would leave multiprocessors
// idle. `rows`: of the batch. 0: neither fits.
int choose_tile_rows(const ExecutionPlan& plan, const TileKind& kind, const DeviceLimits& limits,
                     int64_t rows);

}  // namespace maskmoe::fused
