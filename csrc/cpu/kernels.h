// What the driver and the code compiled for one instruction set agree on: plain structures only,
// so that no inline function of a library is ever compiled for more than the baseline.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "activations.h"

namespace maskmoe {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

// A (rows, features) matrix whose rows lie `stride` elements apart. `order`, where given, is the
// feature at each position of the block order.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t features;
  int64_t stride;
  const int64_t* order;
};

struct PanelsView {
  const Panel* panels;
  int64_t count;
  int64_t lines;
  const Segment* segments;
  const Copy* copies;
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
// `in_place` and beyond, packed order) and `grad_buffer` (all others), bias gradients in block order.
struct Backward {
  PanelsView panels, turned;  // turned: lanes are features, inputs are units
  Matrix grad_y, saved, x, grad_x;  // grad_x.data null: not wanted
  const float* turned_buffer;
  Place in_place;
  bool need_weight, need_bias;
  Activation activation;
  int64_t tile_rows;
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
};

extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAmx;  // bfloat16 only; calls kAvx512 for the rest

}  // namespace maskmoe
