// A layout's execution plan: the panels that the kernels iterate over, for vectors of one length.
#pragma once

#include <cstdint>
#include <vector>

#include "common/layout.h"
#include "cpu/panels.h"

namespace maskmoe {

// One direction of a layout for vectors of `width` lanes.
struct Panels {
  int width;
  std::vector<Panel> panels;
  std::vector<Segment> segments, runs;
  std::vector<Copy> copies;
  int64_t lines;          // of a tile of outputs
  bool shared;            // is any panel?
  std::vector<int64_t> slots;  // of each output, in block order, in such a tile
  int64_t buffer_size[4];  // floats that panels before each Place need; the last: all of them
};

struct ExecutionPlan {
  Layout layout;
  Panels forward;   // lanes are units
  Panels backward;  // lanes are features, routed blocks only
};

// One layer, or layers one after the other: the inputs of each lie where the one before leaves its
// units in a tile.
using Chain = std::vector<ExecutionPlan>;

// Plans for vectors of `width` lanes. Raises std::runtime_error for layouts that do not follow one
// another.
Chain plan_execution(int width, std::vector<Layout> layouts);

inline PanelsView view(const Panels& p) {
  return {p.panels.data(), static_cast<int64_t>(p.panels.size()), p.lines, p.segments.data(),
          p.runs.data(), p.copies.data(), p.shared};
}

// Floats of the buffer for a call that reads weights in place from `in_place` on.
inline int64_t buffer_size(const Panels& panels, Place in_place) {
  return panels.buffer_size[static_cast<int>(in_place)];
}

}  // namespace maskmoe
