#include "cpu/execution_plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

namespace maskmoe {
namespace {

constexpr int64_t kNear = 128;       // floats between inputs that cost no more than neighbours
constexpr int64_t kSmall = 1 << 16;  // floats of a block row, a quarter of a 1 MiB cache

// One direction, before panels: blocks of lanes, blocks of inputs, and where each weight lies.
struct Direction {
  const std::vector<int64_t>&lane_sizes, &lane_offsets, &input_sizes, &input_offsets;
  std::vector<std::vector<int64_t>> seen;  // per lane block: input blocks, ascending
  // Of block (lanes a, inputs b), at seen[a][n] == b: first weight and its two steps.
  std::vector<std::vector<int64_t>> first;
  std::vector<std::vector<int64_t>> input_step, lane_step;
  bool in_place;  // lanes lie side by side in the packed weight
  const std::vector<int64_t>* slots;  // of each input, in block order; null: as they come
};

// `slots`: where the layer before leaves its units, which are this one's inputs; null: the inputs
// are the values of a row.
Direction forward_of(const Layout& l, const std::vector<int64_t>* slots) {
  Direction d{l.row_sizes, l.row_offsets, l.col_sizes, l.col_offsets, {}, {}, {}, {}, true, slots};
  const size_t rows = l.row_sizes.size(), cols = l.col_sizes.size();
  for (size_t i = 0; i < rows; ++i) {
    auto& seen = d.seen.emplace_back();
    auto& first = d.first.emplace_back();
    int64_t at = l.weight_offsets[i];
    for (size_t j = 0; j < cols; ++j) {
      if (!l.present[i * cols + j]) continue;
      seen.push_back(j);
      first.push_back(at);
      at += l.col_sizes[j] * l.row_sizes[i];
    }
    d.input_step.emplace_back(seen.size(), l.row_sizes[i]);
    d.lane_step.emplace_back(seen.size(), 1);
  }
  return d;
}

// Its inputs are the outputs of the forward, in their slots.
Direction backward_of(const Layout& l, const Panels& forward) {
  Direction d{l.col_sizes, l.col_offsets, l.row_sizes, l.row_offsets, {}, {}, {}, {}, false,
              &forward.slots};
  const size_t rows = l.row_sizes.size(), cols = l.col_sizes.size();
  d.seen.resize(cols);
  d.first.resize(cols);
  d.input_step.resize(cols);
  d.lane_step.resize(cols);
  for (size_t i = 0; i < rows; ++i) {
    int64_t at = l.weight_offsets[i];
    for (size_t j = 0; j < cols; ++j) {
      if (!l.present[i * cols + j]) continue;
      if (l.routes[i * cols + j]) {
        d.seen[j].push_back(i);
        d.first[j].push_back(at);
        d.input_step[j].push_back(1);
        d.lane_step[j].push_back(l.row_sizes[i]);
      }
      at += l.col_sizes[j] * l.row_sizes[i];
    }
  }
  return d;
}

// Where one panel's lanes begin, and how many there are.
struct Cut {
  int64_t first, lanes;
};

// Cuts at the ends of blocks, whatever they see: neighbours of at most half a vector share one, as
// many as fit. In a chain, one layer's outputs and the next one's gradients lie in the same lines.
std::vector<Cut> cut_blocks(const Direction& d, int width) {
  std::vector<Cut> cuts;
  const size_t blocks = d.lane_sizes.size();
  for (size_t a = 0, b; a < blocks; a = b) {
    b = a + 1;
    int64_t lanes = d.lane_sizes[a];
    if (2 * lanes <= width) {
      while (b < blocks && lanes + d.lane_sizes[b] <= width) lanes += d.lane_sizes[b++];
    }
    for (int64_t at = 0; at < lanes; at += 2 * width) {
      cuts.push_back({d.lane_offsets[a] + at, std::min<int64_t>(lanes - at, 2 * width)});
    }
  }
  return cuts;
}

// Cuts lanes into panels of at most two vectors, so that a row costs least. A panel may cross
// blocks: it then walks what any of its lanes sees, and masks what not all of them see. Where sorted
// blocks see nested sets of inputs (MADE), that is one step at the end of each panel.
class Cuts {
 public:
  Cuts(const Direction& direction, int width) : d_(direction), width_(width) {
    for (const std::vector<int64_t>& seen : d_.seen) {
      int64_t& depth = depths_.emplace_back(0);
      for (const int64_t b : seen) depth += d_.input_sizes[b];
    }
    seen_by_.resize(d_.input_sizes.size());
  }

  // The cheapest cuts, by dynamic programming from the last lane to the first.
  std::vector<Cut> take() {
    const int64_t lanes = d_.lane_offsets.back();
    std::vector<double> cost(lanes + 1, 0);
    std::vector<int64_t> chosen(lanes + 1, 0);
    std::vector<uint8_t> met(lanes + 1, 0);
    reach(met);
    size_t block = d_.lane_sizes.size() - 1;
    for (int64_t first = lanes - 1; first >= 0; --first) {
      while (d_.lane_offsets[block] > first) --block;
      if (!met[first]) continue;
      each_length(first, block, [&](int64_t length) {
        const double total = cost_of(first, length, block) + cost[first + length];
        if (chosen[first] == 0 || total < cost[first]) cost[first] = total, chosen[first] = length;
      });
    }
    std::vector<Cut> cuts;
    for (int64_t first = 0; first < lanes; first += chosen[first]) {
      cuts.push_back({first, chosen[first]});
    }
    return cuts;
  }

 private:
  // Which lanes can a panel begin at?
  void reach(std::vector<uint8_t>& met) const {
    size_t block = 0;
    met[0] = 1;
    for (int64_t first = 0; first + 1 < static_cast<int64_t>(met.size()); ++first) {
      while (d_.lane_offsets[block + 1] <= first) ++block;
      if (!met[first]) continue;
      each_length(first, block, [&](int64_t length) { met[first + length] = 1; });
    }
  }

  // Lengths of panels worth a look: whole vectors, and to the end of each block in reach. The
  // longest comes first; among equals the first is chosen.
  template <class F>
  void each_length(int64_t first, size_t block, const F& f) const {
    const int64_t left = std::min<int64_t>(d_.lane_offsets.back() - first, 2 * width_);
    f(left);
    if (d_.lane_offsets[block + 1] - first >= left) return;
    if (width_ < left) f(width_);
    for (size_t k = block + 1; d_.lane_offsets[k] < first + left; ++k) {
      const int64_t length = d_.lane_offsets[k] - first;
      if (length != width_) f(length);
    }
  }

  // What a row costs, in steps of two whole vectors: one vector at a time is bound by loads, and a
  // panel has to be begun and stored.
  double cost_of(int64_t first, int64_t length, size_t block) {
    const double vectors = length > width_ ? 1.0 : 0.6;
    if (first + length <= d_.lane_offsets[block + 1]) return (3.0 + depths_[block]) * vectors;
    // Masks are skipped where all inputs are finite. But AMX has no products for shared panels.
    const bool wide = width_ > 8, two = length > width_;
    const double mask = wide && two ? 0.4 : 0.0, begin = !wide ? 0.2 : two ? 1.5 : 0.7;
    double all = 0, masked = 0;
    int64_t readers = 0;
    touched_.clear();
    for (size_t k = block; k < d_.lane_sizes.size() && d_.lane_offsets[k] < first + length; ++k) {
      ++readers;
      for (const int64_t b : d_.seen[k]) {
        if (seen_by_[b]++ == 0) touched_.push_back(b);
      }
    }
    for (const int64_t b : touched_) {
      all += d_.input_sizes[b];
      if (seen_by_[b] < readers) masked += mask * d_.input_sizes[b] + begin;
      seen_by_[b] = 0;
    }
    return (3.0 + all + masked) * vectors;
  }

  const Direction& d_;
  const int width_;
  std::vector<int64_t> depths_;   // of each block of lanes
  std::vector<int64_t> seen_by_;  // how many blocks see an input block; zeros between calls
  std::vector<int64_t> touched_;
};

class Builder {
 public:
  Builder(const Direction& direction, const std::vector<Cut>& cuts, int width) : d_(direction) {
    out_.width = width;
    out_.lines = 0;
    out_.shared = false;
    out_.slots.resize(d_.lane_offsets.back());
    row_of_.resize(d_.input_sizes.size());
    size_t block = 0;
    for (const Cut& cut : cuts) {
      while (d_.lane_offsets[block + 1] <= cut.first) ++block;
      add_panel(cut, block);
    }
    int64_t size = 0;
    for (int place = 0; place < 4; ++place) {
      out_.buffer_size[place] = size;
      for (Panel& panel : out_.panels) {
        if (static_cast<int>(panel.place) != place) continue;
        panel.buffer = size;
        size += panel.depth * panel.vectors * width;
      }
    }
  }

  Panels take() { return std::move(out_); }

 private:
  // The lanes of `cut`, the first of which is in block `a`.
  void add_panel(const Cut& cut, size_t a) {
    Panel panel{};
    panel.first = cut.first;
    panel.lanes = static_cast<int32_t>(cut.lanes);
    panel.vectors = cut.lanes > out_.width ? 2 : 1;
    panel.segments = static_cast<int64_t>(out_.segments.size());
    panel.copies = static_cast<int64_t>(out_.copies.size());
    if (cut.first + cut.lanes <= d_.lane_offsets[a + 1]) {
      read_in_place(panel, a);
    } else {
      panel.shared = out_.shared = true;
    }
    add_inputs(panel, a);
    panel.segments_end = static_cast<int64_t>(out_.segments.size());
    panel.copies_end = static_cast<int64_t>(out_.copies.size());
    add_runs(panel);
    panel.line = out_.lines;
    out_.lines += panel.vectors;
    for (int64_t n = 0; n < panel.lanes; ++n) {
      out_.slots[panel.first + n] = panel.line * out_.width + n;
    }
    out_.panels.push_back(panel);
  }

  // Where the weights of a panel of block `a` alone lie.
  void read_in_place(Panel& panel, size_t a) const {
    const int64_t size = d_.lane_sizes[a];
    int64_t depth = 0;
    for (const int64_t b : d_.seen[a]) depth += d_.input_sizes[b];
    const bool near = size <= 2 * out_.width || (size <= kNear && size * depth <= kSmall);
    if (d_.in_place && panel.lanes % out_.width == 0) {
      panel.place = near ? Place::kTogether : Place::kApart;
    }
    if (depth > 0) {
      panel.weight = d_.first[a][0] + (panel.first - d_.lane_offsets[a]) * d_.lane_step[a][0];
    }
    panel.stride = d_.in_place ? size : 0;
  }

  // Segments and copies of all that a lane of the panel sees, in ascending order.
  void add_inputs(Panel& panel, size_t a) {
    const int64_t end = panel.first + panel.lanes;
    std::map<int64_t, uint32_t> masks;  // input block -> lanes that see it
    for (size_t k = a; k < d_.lane_sizes.size() && d_.lane_offsets[k] < end; ++k) {
      const auto [lane, lanes] = lanes_of(panel, k);
      for (const int64_t b : d_.seen[k]) masks[b] |= ones(lanes) << lane;
    }
    for (const auto [b, mask] : masks) {
      add_segment(panel, d_.input_offsets[b], d_.input_sizes[b],
                  mask == ones(panel.lanes) ? ~0u : mask);
      row_of_[b] = panel.depth;
      panel.depth += d_.input_sizes[b];
    }
    // Forward, neighbouring inputs of a block lie side by side in the weight; backward, those of
    // neighbouring lanes do. In this order, such copies become one.
    std::vector<Copy> copies;
    for (size_t k = a; k < d_.lane_sizes.size() && d_.lane_offsets[k] < end; ++k) {
      const auto [lane, lanes] = lanes_of(panel, k);
      const int64_t before = std::max<int64_t>(panel.first - d_.lane_offsets[k], 0);
      for (size_t n = 0; n < d_.seen[k].size(); ++n) {
        const int64_t b = d_.seen[k][n];
        copies.push_back({d_.first[k][n] + before * d_.lane_step[k][n], d_.input_step[k][n],
                          d_.lane_step[k][n], row_of_[b], d_.input_sizes[b], lane, lanes});
      }
    }
    if (!d_.in_place) {
      std::stable_sort(copies.begin(), copies.end(),
                       [](const Copy& one, const Copy& other) { return one.row < other.row; });
    }
    for (const Copy& copy : copies) add_copy(panel.copies, copy);
  }

  // The lanes of a panel that belong to block `k`: the first, and how many.
  std::pair<int32_t, int32_t> lanes_of(const Panel& panel, size_t k) const {
    const int64_t first = std::max(d_.lane_offsets[k], panel.first);
    const int64_t end = std::min(d_.lane_offsets[k + 1], panel.first + panel.lanes);
    return {static_cast<int32_t>(first - panel.first), static_cast<int32_t>(end - first)};
  }

  static uint32_t ones(int32_t count) { return ~0u >> (32 - count); }

  // A copy that goes on where the last one ends, in the weight and in the panel, is added to it.
  void add_copy(int64_t begin, const Copy& copy) {
    if (static_cast<int64_t>(out_.copies.size()) > begin) {
      Copy& last = out_.copies.back();
      const int64_t from = copy.packed - last.packed;
      if (last.input_step == copy.input_step && last.lane_step == copy.lane_step) {
        if (last.lane == copy.lane && last.lanes == copy.lanes &&
            last.row + last.inputs == copy.row && from == last.inputs * last.input_step) {
          last.inputs += copy.inputs;
          return;
        }
        if (last.row == copy.row && last.inputs == copy.inputs &&
            last.lane + last.lanes == copy.lane && from == last.lanes * last.lane_step) {
          last.lanes += copy.lanes;
          return;
        }
      }
    }
    out_.copies.push_back(copy);
  }

  void add_runs(Panel& panel) {
    panel.runs = static_cast<int64_t>(out_.runs.size());
    for (int64_t n = panel.segments; n < panel.segments_end; ++n) {
      const Segment& next = out_.segments[n];
      const bool joins = n > panel.segments &&
                         out_.runs.back().first + out_.runs.back().length == next.first;
      if (joins) {
        out_.runs.back().length += next.length;
      } else {
        out_.runs.push_back({next.first, next.length, ~0u});
      }
    }
    panel.runs_end = static_cast<int64_t>(out_.runs.size());
  }

  // Adds inputs [first, first + length) for the lanes in `mask`; neighbours of the last segment
  // are added to it.
  void add_segment(const Panel& panel, int64_t first, int64_t length, uint32_t mask) {
    if (d_.slots != nullptr) {
      // One segment for each run of neighbouring slots.
      const std::vector<int64_t>& slots = *d_.slots;
      for (int64_t end = first + length; first < end;) {
        int64_t n = 1;
        while (first + n < end && slots[first + n] == slots[first] + n) ++n;
        add_slots(panel, slots[first], n, mask);
        first += n;
      }
      return;
    }
    add_slots(panel, first, length, mask);
  }

  void add_slots(const Panel& panel, int64_t first, int64_t length, uint32_t mask) {
    if (static_cast<int64_t>(out_.segments.size()) > panel.segments) {
      Segment& last = out_.segments.back();
      if (last.first + last.length == first && last.mask == mask) {
        last.length += length;
        return;
      }
    }
    out_.segments.push_back({first, length, mask});
  }

  const Direction& d_;
  Panels out_;
  std::vector<int64_t> row_of_;  // of each input block in the panel at hand
};

}  // namespace

Chain plan_execution(int width, std::vector<Layout> layouts) {
  Chain chain;
  const bool alone = layouts.size() == 1;
  const auto panels_of = [&](const Direction& d) {
    return Builder(d, alone ? Cuts(d, width).take() : cut_blocks(d, width), width).take();
  };
  chain.reserve(layouts.size());  // a layer refers to the slots of the one before
  for (Layout& layout : layouts) {
    ExecutionPlan plan{std::move(layout), {}, {}};
    const ExecutionPlan* before = chain.empty() ? nullptr : &chain.back();
    if (before != nullptr && (plan.layout.col_sizes != before->layout.row_sizes ||
                              plan.layout.col_order != before->layout.row_order)) {
      throw std::runtime_error("maskmoe: the units of one layer are not the inputs of the next");
    }
    const auto* slots = before == nullptr ? nullptr : &before->forward.slots;
    plan.forward = panels_of(forward_of(plan.layout, slots));
    plan.backward = panels_of(backward_of(plan.layout, plan.forward));
    chain.push_back(std::move(plan));
  }
  return chain;
}

}  // namespace maskmoe
