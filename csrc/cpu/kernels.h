// What the code compiled for one instruction set and the code that calls it agree on: plain
// structures only, so that no inline function of a library is ever compiled for more than the
// baseline.
#pragma once

#include <cstdint>

#include "common/names.h"
#include "cpu/panels.h"

namespace maskmoe {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

// A (rows, features) matrix whose rows lie `stride` elements apart. `order`, where given, is the
// feature at each position of the block order; `rank`, beside it or null, the position of each
// feature.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t features;
  int64_t stride;
  const int64_t* order;
  const int64_t* rank = nullptr;
};

// y = act(W x + b) on rows of one batch.
struct Forward {
  PanelsView panels;
  Matrix x, y, z;         // z.data null: the pre-activation is not kept
  const float* weight;    // packed; read by panels at `in_place` and beyond
  const float* buffer;    // the other panels' weights
  Place in_place;
  const float* bias;      // float32 in block order, or null
  Activation activation;
  int64_t tile_rows;
};

// All gradients on rows of one batch. Weight gradients are written to `grad_weight` (panels at
// `in_place` and beyond, packed order) and `grad_buffer` (all others), bias gradients in block
// order.
struct Backward {
  PanelsView panels, transposed;  // transposed: lanes are features, inputs are units
  Matrix grad_y, saved, x, grad_x;  // grad_x.data null: not wanted
  const float* transposed_buffer;
  Place in_place;
  bool need_weight, need_bias;
  Activation activation;
  int64_t tile_rows;
};

// --- masked_mlp: layers one after the other on a tile of rows ---------------------------------

struct MlpLayer {
  PanelsView panels, transposed;
  const float *weight, *buffer, *transposed_buffer;  // as in Forward and Backward
  const float* bias;                                 // float32 in block order, or null
};

// Columns of the input: those of a matrix, or the row of a table that `ids` names.
struct Part {
  const void* data;
  int64_t stride;
  const int64_t* ids;  // null: a sample's own row
  int64_t width;
};

// How much each of H experts answers for a sample, from the logits (section 3.3.2).
struct Selection {
  int64_t experts;
  const int64_t* slots;         // of each logit, in the last layer's tile
  // Strict subsets of expert i: subsets[subsets_at[i] .. subsets_at[i + 1]).
  const int64_t *subsets, *subsets_at;
  const uint8_t* has_superset;  // has expert i a strict superset?
  Confidence confidence;
  float sharpness;
  Weighting weighting;
};

// The loss of generalised EM over the logits (eq. 4, eq. 7); or, with another objective than
// binary, the loss of every expert on its `outputs` of the logits, each sample weighted alike.
struct Gem {
  Selection selection;
  Objective objective;
  int64_t outputs;      // logits of an expert
  const float* target;  // (rows,), or (rows, outputs) of a regression
  const float* sample_weight;  // how often each sample counts; null: once
  bool per_sample;  // weights of a sample are divided by their sum
  float scale;      // of every gradient
  float* kept;      // (rows, experts): gradients for a second pass; null: backward follows at once
  const float* divisors;  // of each expert's weights, where they are known and matter; or null
};

// The prediction and its attribution (eq. 1): (rows,), and (rows, experts) twice.
struct Mixture {
  Selection selection;
  float *probability, *alpha, *attribution;
};

// Sums over the rows of one thread, one entry an expert: of w BCE, and of w.
struct GemSums {
  double *loss, *weight;
};

// Sums of one thread for one layer, as in Backward.
struct LayerSums {
  float *weight, *buffer, *bias;
};

struct Mlp {
  const MlpLayer* layers;
  int64_t depth;
  Activation activation;  // of all layers but the last
  Place in_place;
  Dtype dtype;
  const Part* parts;
  int64_t num_parts, in_features;
  const int64_t* in_order;  // feature at each position of the block order, or null
  int64_t rows, tile_rows;
  int64_t done;           // rows of earlier calls: sums go on, and `grad_inputs` begins after them
  const uint8_t* mask;    // which samples count; null: all
  float* saved;           // activations of all tiles, (tiles, saved_stride); null: not kept
  int64_t saved_stride;
  float* unit_grads;      // of the first layer's units, (tiles, units_stride); null: not kept
  int64_t units_stride;
  const float* unit_scale;  // factor of each of their slots: only `grad_inputs` are made, from them
  bool forward;           // else the activations are those in `saved`
  bool backward, need_weights, need_inputs;
  Matrix logits;          // to write; data null: not wanted
  Matrix grad_logits;     // data null: `gem` has them
  const float* scale;     // factor of each expert's grad_logits, or null
  Matrix grad_inputs;     // with `need_inputs`
  const Gem* gem;         // or null, as the next
  const Mixture* mixture;
};

// --- rational_quadratic: a spline an element --------------------------------------------------

constexpr int64_t kMaxBins = 64;

// Rows of numbers, `stride` apart.
struct Strided {
  const float* data;
  int64_t stride;
};

struct Splines {
  int64_t bins;
  float bound;     // the domain is [-bound, bound]
  bool squashed;   // what parameters mean (splines/parameters.h)
  float slope;     // the least
  float steepest;  // |log| of it
  float least_width, least_height;  // of a bin: fractions of the domain and of the range
  const float* x;
  Strided widths, heights, derivatives;  // a row an element: bins, bins, bins - 1 parameters
  float *y, *log_slope;                  // of a forward; an inverse takes x for y and y for x
};

struct SplineGradients {
  const float *y, *log_slope;  // null: zero
  float *x, *parameters;       // parameters: dense rows of widths, heights and derivatives
};

// One instruction set. Scratch is in floats; pointers to it are 64-byte aligned.
struct Kernels {
  const char* name;
  int width;  // lanes of a vector
  // Copies the weights of panels [begin, end) that come before `in_place` into `buffer`.
  void (*pack)(const PanelsView&, int64_t begin, int64_t end, const void* weight, Dtype,
               Place in_place, float* buffer);
  // The way back, from buffer to packed order.
  void (*unpack)(const PanelsView&, int64_t begin, int64_t end, const float* buffer,
                 Place in_place, float* weight);
  int64_t (*forward_scratch)(const Forward&);
  void (*forward)(const Forward&, int64_t row, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const Backward&);
  void (*backward)(const Backward&, int64_t row, int64_t end, float* grad_weight,
                   float* grad_buffer, float* grad_bias, float* scratch);
  // into[n] += from[n]
  void (*add)(float* into, const float* from, int64_t count);
  // Converts `count` values, `order[n]` giving the place of each in the result where it is given.
  void (*load)(float* to, const void* from, Dtype, const int64_t* order, int64_t count);
  void (*store)(void* to, Dtype, const int64_t* order, const float* from, int64_t count);
  // Floats of a tile in `saved` and in `unit_grads`.
  int64_t (*mlp_saved)(const Mlp&);
  int64_t (*mlp_units)(const Mlp&);
  int64_t (*mlp_scratch)(const Mlp&);
  // Tiles [begin, end) through all layers, and back if asked for; `sums` has a layer each.
  void (*mlp)(const Mlp&, int64_t begin, int64_t end, const LayerSums* sums, const GemSums& gem,
              float* scratch);
  // Elements [begin, end).
  void (*spline)(const Splines&, int64_t begin, int64_t end);
  void (*spline_inverse)(const Splines&, int64_t begin, int64_t end);
  void (*spline_backward)(const Splines&, const SplineGradients&, int64_t begin, int64_t end);
};

// The name of an instruction set, other than AVX2, in a build that may emulate it.
#ifdef MASKMOE_EMULATE
#define MASKMOE_ISA(name) name "-emulated"
#else
#define MASKMOE_ISA(name) name
#endif

extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16, kAmx;  // bfloat16 only; they call kAvx512 for the rest

}  // namespace maskmoe
