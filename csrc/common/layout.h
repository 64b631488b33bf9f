// A layout, decoded from the int64 tensor that layout/plan.py encodes: the serialized layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace maskmoe {

struct Layout {
  std::vector<int64_t> row_sizes, col_sizes;
  std::vector<int64_t> row_offsets, col_offsets, weight_offsets;  // one longer
  std::vector<uint8_t> present, routes;                           // (rows, cols)
  std::vector<int64_t> row_order, col_order;                      // empty: in order
  std::vector<int64_t> row_rank, col_rank;  // the position of each in them
  int64_t in_features, out_features, num_weights, num_routed, num_blocks;

  size_t rows() const { return row_sizes.size(); }
  size_t cols() const { return col_sizes.size(); }
  bool sees(size_t row, size_t col) const { return present[row * cols() + col]; }
  bool routed(size_t row, size_t col) const { return routes[row * cols() + col]; }
};

// Where the values of a serialized layout lie.
struct Encoded {
  const int64_t* values;
  int64_t count;

  bool operator==(const Encoded&) const = default;
};

// Copies of the values of serialized layouts.
using Contents = std::vector<std::vector<int64_t>>;

// Raises std::runtime_error for everything that the kernels could not iterate over: a layout comes
// from whoever wrote the program that runs.
Layout decode(const Encoded& encoded);

// Has the layout so many blocks of so few weights that the execution plan would be larger than the
// weights? `BlockLayout.too_fine` is the same condition: Python chooses another backend then.
bool too_fine(const Layout& layout);

}  // namespace maskmoe
