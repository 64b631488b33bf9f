// What the kernels iterate over: panels of output lanes, each with the inputs it sees.
//
// A kernel never meets a layout. It meets panels: up to two vectors of outputs ("lanes"), of one
// block or of neighbours that share it; and segments: runs of inputs that the same lanes of a panel
// see. Forward, lanes are units and inputs are features; for grad_x it is the
// other way round, over routed blocks. These structures are plain: they cross into code compiled
// for one instruction set.
#pragma once

#include <cstdint>

namespace maskmoe {

// A run of inputs that the lanes in `mask` see. Inputs lie in slots: kernels hold a tile of rows
// line by line, a line being as many slots as a vector has lanes.
struct Segment {
  int64_t first;  // slot
  int64_t length;
  uint32_t mask;  // bits of lanes; all ones: every lane. Only shared panels read it
};

// Where a kernel reads a panel's weights: in a buffer, or in place. Inputs whose weights lie far
// apart share few cache sets, so with many rows the copy to a buffer pays. A call names the first
// place that it reads in place; kNowhere: it copies all weights.
enum class Place : int { kBuffer, kApart, kTogether, kNowhere };

struct Panel {
  int64_t first;   // its first lane, in block order of the outputs
  int64_t line;    // where its lanes lie in a tile of outputs: every panel begins a line
  int32_t lanes;   // how many lanes hold an output
  int32_t vectors;  // 1 or 2
  bool shared;     // several blocks: not every lane sees every segment
  Place place;     // where float32 weights can be read
  int64_t segments, segments_end;
  int64_t runs, runs_end;  // the same inputs without masks: neighbouring segments are one
  int64_t copies, copies_end;
  int64_t depth;   // inputs in all segments
  int64_t weight;  // in place: offset in the packed weight; `stride` floats from input to input
  int64_t stride;
  int64_t buffer;  // offset in a buffer of (depth, vectors * lanes of a vector), for all panels
};

// One block's weights, between the packed order and a panel's buffer of (depth, width).
struct Copy {
  int64_t packed, input_step, lane_step;  // where in the packed weight, and its strides
  int64_t row;                            // first input, counted in the panel's depth
  int64_t inputs;
  int32_t lane, lanes;
};

// All panels of one direction.
struct PanelsView {
  const Panel* panels;
  int64_t count;
  int64_t lines;  // of a tile of outputs
  const Segment *segments, *runs;
  const Copy* copies;
  bool shared;  // is any of them?
};

}  // namespace maskmoe
