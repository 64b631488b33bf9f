// The arguments of the masked_mlp ops that name an input, and lists of one entry a layer.
#pragma once

#include <limits>
#include <vector>

#include "common/checks.h"

namespace maskmoe {

// Lists that belong together are equally long, and there is something in them.
inline void check_lists(const char* op, const std::vector<Tensor>& serialized,
                        const std::vector<int64_t>& layouts, const std::vector<Tensor>& weights,
                        const std::vector<Tensor>& biases, const std::vector<Tensor>& tables,
                        const std::vector<Tensor>& ids, bool has_x) {
  const size_t layers = layouts.size();
  STD_TORCH_CHECK(layers > 0 && serialized.size() == layers && weights.size() == layers &&
                      (biases.empty() || biases.size() == layers) && ids.size() == tables.size() &&
                      (has_x || !ids.empty()),
                  "maskmoe::", op,
                  ": weights, biases, serialized layouts, their ids, tables and ids do not match");
}

// A part of an input: `column` and on of x, or rows of a table.
struct PartOf {
  int64_t table;  // -1: x
  int64_t column, width;
};

// The parts of an input, side by side. Every table is named at most once, and every column of x is
// read once.
inline std::vector<PartOf> read_parts(const char* op, const std::vector<int64_t>& parts,
                                      const std::vector<Tensor>& tables, int64_t columns) {
  std::vector<PartOf> found;
  std::vector<bool> met(tables.size(), false);
  int64_t column = 0;
  for (const int64_t p : parts) {
    if (p < 0) {
      STD_TORCH_CHECK(p >= column - columns, "maskmoe::", op, ": parts name more columns than the ",
                      columns, " of x");
      found.push_back({-1, column, -p});
      column -= p;
      continue;
    }
    const auto t = static_cast<size_t>(p);
    STD_TORCH_CHECK(t < tables.size() && !met[t], "maskmoe::", op, ": parts name table ", p,
                    " twice, or there are fewer than that: ", tables.size());
    STD_TORCH_CHECK(tables[t].dim() == 2, "maskmoe::", op, ": tables[", p,
                    "] must be (rows, width)");
    met[t] = true;
    found.push_back({p, 0, tables[t].size(1)});
  }
  STD_TORCH_CHECK(column == columns, "maskmoe::", op, ": parts name ", column,
                  " columns of x, it has ", columns);
  return found;
}

inline int64_t features_of(const std::vector<PartOf>& parts) {
  int64_t features = 0;
  for (const PartOf& part : parts) {
    STD_TORCH_CHECK(part.width <= std::numeric_limits<int64_t>::max() - features,
                    "maskmoe: the parts of an input have too many features");
    features += part.width;
  }
  return features;
}

}  // namespace maskmoe
