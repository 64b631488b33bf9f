// A chain of layouts compiled for tensor cores: a network as products of 16 x 16 weights.
//
// Groups of features and experts of units are padded to chunks of 16 columns, so that a product
// never straddles what an expert sees and what it does not. One chunk of outputs is the sum over
// the chunks it sees: a Product. Kernels meet these tables, never a layout; no torch and no CUDA
// here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/layout.h"

namespace maskmoe::fused {

constexpr int kSide = 16;               // columns of a chunk
constexpr int kBlock = kSide * kSide;   // weights between two chunks
constexpr int kWarps = 8;               // of a thread block
constexpr int kThreads = 32 * kWarps;
constexpr int kMostParts = 32;
constexpr int kMostLayers = 16;

// Neighbouring chunks.
struct Run {
  int32_t first, count;
};

// One chunk of a product's result, for every row: the sum over chunks of chunk times block.
struct Product {
  int32_t to;              // chunk that it makes
  int32_t valid;           // columns of it that are not padding
  int32_t runs, runs_end;  // chunks that it reads
  int32_t block, blocks;   // its first block of weights, and how many: one a chunk
};

// Where the 16 x 16 weights of a block lie in the packed weight; a product sums over its rows, k.
struct Block {
  int64_t from;
  int32_t step_k, step_n;
  int32_t layer, expert;
  int32_t chunk;         // of the layer's inputs
  uint8_t k, n, unused[2];  // rows and columns that are not padding
};

// The gradient of neighbouring blocks that end in the same chunk of units.
struct Strip {
  int32_t tile, block, blocks;
};

// 16 weights of the last layer, which has one unit an expert.
struct Entry {
  int64_t from;
  int32_t chunk, expert, valid, unused;
};

// Where a column of the padded input comes from; part -1: padding.
struct Column {
  int32_t part, column;
};

// Four columns of the padded input. count: how many lie side by side in `part` (the rest is
// padding); -1: they lie apart, see Columns.
struct Piece {
  int32_t part, column, count;
};

// A padded unit's bias; index -1: padding.
struct Bias {
  int32_t layer, index, expert;
};

enum class Order : int { kForward, kBackward, kGradient };

// The tables as kernels see them. Pass n has kWarps + 1 bounds for each number of workers.
struct Tables {
  const Run* runs;
  const Product* products;
  const Block* blocks;
  const Strip* strips;
  const Entry* entries;
  const int32_t* entries_begin;  // of each expert, one more than experts
  const int32_t* readers;        // entries that route the gradient to a chunk
  const int32_t* readers_begin;  // of each chunk, one more than chunks
  const Column* columns;
  const Piece* pieces;
  const Bias* biases;
  const int32_t* schedule;  // products or strips, warp by warp
  const int32_t* bounds;
  int32_t layers, experts;
  int32_t forward_blocks, inner_blocks, all_blocks;  // inner: without the first layer's transposed
  int32_t num_entries, num_biases;
  int32_t chunks[kMostLayers];   // of each layer's input
  int32_t bias_at[kMostLayers];  // of each layer's padded biases

  // Index into `bounds` of a pass; `many`: as many workers as warps, else half as many.
#ifdef __CUDACC__
  __host__ __device__
#endif
  int pass(Order order, int layer, bool many) const {
    return ((static_cast<int>(order) * layers + layer) * 2 + (many ? 1 : 0)) * (kWarps + 1);
  }
};
// What a call reads beside its layouts: parts of the input, side by side.
struct PartSize {
  bool table;
  int64_t width;
};

class Network {
 public:
  // Raises std::runtime_error with a reason for what these kernels do not compute.
  Network(const std::vector<Encoded>& layouts, const std::vector<PartSize>& parts);

  // The tables with addresses as if `bytes()` lay at `base`.
  Tables at(const void* base) const;
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  int64_t in_features = 0, out_features = 0;
  std::vector<int64_t> num_weights, num_units;  // of each layer

 private:
  Tables shape_{};
  std::vector<unsigned char> bytes_;
  std::vector<int64_t> offsets_;
};

enum class Use : int { kForward, kMixture, kBackward, kGem };

// Does the kernel hold the inputs of all layers, or of two at a time?
constexpr bool holds_all(Use use) { return use == Use::kBackward || use == Use::kGem; }

// How a tile of rows lies in shared memory: offsets in elements, then floats, then bytes in total.
struct Room {
  int32_t rows;
  int32_t at[kMostLayers], stride[kMostLayers];  // of each layer's input
  int32_t slope_at[kMostLayers];                 // derivative of what made it; -1: not kept
  int64_t floats;                                // in bytes: where the floats begin
  int64_t near;                                  // and where partial gradients do, if there are any
  int64_t near_from;                             // the first of them that lies there
  int64_t bytes;
};

// keep_slopes: the activation's derivative does not follow from its value.
Room room_for(const Tables& tables, int rows, int item_size, Use use, bool keep_slopes);

constexpr int kMostResident = 2;  // blocks of a backward that a processor is to hold

// The tile heights that kernels are made for, in rows.
constexpr int high_tile(int item_size) { return item_size == 4 ? 32 : 64; }
constexpr int low_tile(int item_size) { return high_tile(item_size) / 2; }

// Lets the last of a backward's `count` partial gradients stay in shared memory, as many as cost no
// block its place. A processor has `shared` bytes, and a block may have `shared_limit`. `count` is a
// multiple of 4.
void hold_near(Room& room, const Tables& tables, int64_t count, int64_t shared,
               int64_t shared_limit);

// Why a network cannot run with so much shared memory a block, in words for the user; "": it can.
std::string obstacle(const Tables& tables, int item_size, Use use, bool keep_slopes,
                     int64_t shared_limit);

// The same from the layouts; also why they are no network for these kernels.
std::string obstacle(const std::vector<Encoded>& layouts, const std::vector<PartSize>& parts,
                     int item_size, Use use, bool keep_slopes, int64_t shared_limit);

// The rows of a tile: the most that fit, fewer if that leaves processors idle. 0: none fits.
int rows_for(const Tables& tables, int item_size, Use use, bool keep_slopes, int64_t shared_limit,
             int64_t rows, int64_t processors);

}  // namespace maskmoe::fused
