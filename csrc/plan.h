// A layout compiled for vector kernels: panels of output lanes, each with the inputs it sees.
//
// The kernels never meet a layout. They meet panels: up to two vectors of outputs ("lanes") of one
// block, or one vector that several small blocks share; and segments: runs of inputs that the same
// lanes of a panel see. Forward, lanes are units and inputs are features; for grad_x it is the
// other way round, over routed blocks. Only these plain structures cross into code compiled for
// one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace maskmoe {

// A run of inputs that the lanes in `mask` see. Inputs lie in slots: kernels hold a tile of rows
// line by line, a line being as many slots as a vector has lanes.
struct Segment {
  int64_t first;  // slot
  int64_t length;
  uint32_t mask;  // bits of lanes; only shared panels look at it
};

// Where a panel's weights lie as it needs them. Inputs that lie far apart share few cache sets, so
// with many rows they are worth a copy.
enum class Place : int { kBuffer, kApart, kTogether, kNowhere };

struct Panel {
  int64_t first;   // its first lane, in block order of the outputs
  int64_t line;    // where its lanes lie in a tile of outputs: every panel begins a line
  int32_t lanes;   // how many lanes hold an output
  int32_t vectors;  // 1 or 2
  bool shared;     // several blocks: not every lane sees every segment
  Place place;     // where float32 weights can be read
  int64_t segments, segments_end;
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

// One direction of a layout for vectors of `width` lanes.
struct Panels {
  int width;
  std::vector<Panel> panels;
  std::vector<Segment> segments;
  std::vector<Copy> copies;
  int64_t lines;          // of a tile of outputs
  std::vector<int64_t> slots;  // of each output, in block order, in such a tile
  int64_t buffer_size[4];  // floats that panels before each Place need; the last: all of them
};

// What a layout is, decoded from the tensor that layout/plan.py encodes.
struct Layout {
  std::vector<int64_t> row_sizes, col_sizes;
  std::vector<int64_t> row_offsets, col_offsets, weight_offsets;  // one longer
  std::vector<uint8_t> present, routes;                           // (rows, cols)
  std::vector<int64_t> row_order, col_order;                      // empty: in order
  int64_t in_features, out_features, num_weights, num_routed, num_blocks;

  size_t rows() const { return row_sizes.size(); }
  size_t cols() const { return col_sizes.size(); }
  bool sees(size_t row, size_t col) const { return present[row * cols() + col]; }
  bool routed(size_t row, size_t col) const { return routes[row * cols() + col]; }
};

// A layout as layout/plan.py encodes it.
struct Encoded {
  const int64_t* values;
  int64_t count;
};

// Raises std::runtime_error for all that the kernels could not walk: a layout comes from whoever
// wrote the program that runs.
Layout decode(const Encoded& encoded);

struct Plan {
  Layout layout;
  Panels forward;   // lanes are units
  Panels backward;  // lanes are features, routed blocks only
};

// Layouts of so many single weights would need tables larger than their weights. The library knows
// it, too (`BlockLayout.too_fine`), and sends them elsewhere.
bool too_fine(const Layout& layout);

// One layer, or layers one after the other: the inputs of each lie where the one before leaves its
// units in a tile. Empty: one of them is too fine.
using Chain = std::vector<Plan>;

// Chains are kept, up to some number and size, with the content that each was compiled from. A call
// names layouts by id and brings them as tensors; an id alone finds nothing. Tensors that a chain
// was kept with are known by their address, for it is theirs as long as the cache holds them, and
// what they contained then is what counts. All others are compared by content.
using Names = std::span<const int64_t>;
using Contents = std::vector<std::vector<int64_t>>;

// The chain kept with tensors at these addresses; null: there is none.
std::shared_ptr<const Chain> find_chain(Names ids, int width, std::span<const Encoded> plans);

// Keeps one with these tensors, which `held` keeps alive: the chain of another entry with this
// content, else one that `compile` makes, which has to verify the content first.
std::shared_ptr<const Chain> keep_chain(Names ids, int width, std::span<const Encoded> plans,
                                        std::shared_ptr<const void> held, Contents contents,
                                        const std::function<Chain(const Contents&)>& compile);

// Panels for vectors of `width` lanes.
Chain compile(int width, std::vector<Layout> layouts);

// Drops the chains of the layout with this id: nobody has it any more.
void forget_chains(int64_t id);

// How many are kept.
int64_t count_chains();

}  // namespace maskmoe
