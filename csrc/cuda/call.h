// What the kernels are given: one structure a launch, passed by value.
#pragma once

#include "cuda/numbers.h"

namespace maskmoe::fused {

// Columns of the input: a matrix, or rows of a table that ids choose.
struct Part {
  const void* data;
  const int64_t* ids;  // null: row r is sample r
  int64_t stride;      // elements from row to row
  int64_t rows;        // of a table
};

// Where a part's gradient goes, sample by sample.
struct Sink {
  void* data;
  int64_t stride;
};

// How much each expert counts.
struct Selection {
  const int16_t* above;        // (experts, experts): strict subsets of each expert
  const int32_t* above_count;  // how many
  const uint8_t* larger;       // is an expert a strict subset of another?
  float sharpness;
  Confidence confidence;
  bool own;  // alpha, or without the own confidence
};

struct Objective {
  const float* target;  // null: there is none
  const uint8_t* mask;  // null: every sample counts
  const float* scale;   // of each expert, known before; null: after the launch
  const float* divisor; // of each expert's weights, known before; null: none
  const int32_t* again; // the launch does nothing where this is 0; null: it does
  float gain;           // of every gradient: a power of two that the results are without
  float* sums;          // of each block: losses, weights (per expert), samples; or null
  bool sample;          // weights divided by their sum over the experts
};

struct Mixture {
  float* probability;    // (rows,)
  float *alpha, *share;  // (rows, experts)
};

struct Call {
  Tables tables;
  Room room;
  Activation activation;
  int64_t rows;
  const void* image;       // blocks of weights, in the order of Core<T>
  const float* last;       // 16 weights an entry
  const float* biases;     // padded
  void* logits;            // (rows, experts); the gradient of them for a backward
  float* partial;          // of each block: gradients of blocks, entries and biases; null: none
  int64_t partial_size;
  bool sinks_wanted;
  bool sinks_wide;         // sinks of 16-bit networks are float32
  float drain;             // what the inputs' gradients are multiplied with,
  const float* drain_by;   // and with what lies there on the device; null: 1
  Part parts[kMostParts];
  Sink sinks[kMostParts];
  Selection selection;
  Objective objective;
  Mixture mixture;
};

// What the packing and the reduction know of the parameters.
struct Parameters {
  Tables tables;
  const void* weights[kMostLayers];
  const void* biases[kMostLayers];  // null: none
  void* image;
  float* last;
  float* padded_biases;
  int32_t blocks;                  // how many to pack
  const uint8_t* strict;           // (experts, experts); null: no selection
  int16_t* above;
  int32_t* above_count;
  uint8_t* larger;
};

struct Gradients {
  Tables tables;
  const float* partial;
  int64_t partial_size, partials;
  const float* scale;  // of each expert; null: 1
  float factor;        // of all
  void* weights[kMostLayers];
  void* biases[kMostLayers];  // null: none
};

// How many samples count.
struct Samples {
  const uint8_t* mask;
  int64_t rows;
  float* share;  // 1 / that
};

struct Totals {
  const float* sums;  // (blocks, 2 experts + 1)
  int64_t blocks;
  int32_t experts;
  int32_t normalize;  // 0 none, 1 sample, 2 expert, 3 batch
  float* scale;       // (experts,): of the gradients, where nothing scales them before
  float* divisor;     // (experts,): of weights whose sum is below `least`, else 1
  int32_t* again;     // is there such a sum?
  float least;
  bool known;         // these three are, and weights were divided
  float* loss;
};

// Passed by value: so much fits on every chip.
static_assert(sizeof(Call) <= 4096 && sizeof(Parameters) <= 4096 && sizeof(Gradients) <= 4096);

// A block's partial gradients: those of blocks of weights, then of entries, then of biases.
MASKMOE_BOTH int64_t partial_entries(const Tables& t) {
  return int64_t{kBlock} * t.forward_blocks;
}
MASKMOE_BOTH int64_t partial_biases(const Tables& t) {
  return partial_entries(t) + int64_t{kSide} * t.num_entries;
}

}  // namespace maskmoe::fused
