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

class Builder {
 public:
  Builder(const Direction& direction, int width) : d_(direction) {
    out_.width = width;
    out_.lines = 0;
    out_.slots.resize(d_.lane_offsets.back());
    const size_t blocks = d_.lane_sizes.size();
    for (size_t a = 0; a < blocks;) {
      // Neighbours of at most half a vector share one, as many as fit.
      size_t b = a + 1;
      if (2 * d_.lane_sizes[a] <= width) {
        int64_t lanes = d_.lane_sizes[a];
        while (b < blocks && lanes + d_.lane_sizes[b] <= width) lanes += d_.lane_sizes[b++];
      }
      b > a + 1 ? combine(a, b) : split(a);
      a = b;
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
  Panel begin(int64_t first, int64_t lanes) const {
    Panel panel{};
    panel.first = first;
    panel.lanes = static_cast<int32_t>(lanes);
    panel.vectors = lanes > out_.width ? 2 : 1;
    panel.segments = static_cast<int64_t>(out_.segments.size());
    panel.copies = static_cast<int64_t>(out_.copies.size());
    return panel;
  }

  void end(Panel panel) {
    panel.segments_end = static_cast<int64_t>(out_.segments.size());
    panel.copies_end = static_cast<int64_t>(out_.copies.size());
    panel.line = out_.lines;
    out_.lines += panel.vectors;
    for (int64_t n = 0; n < panel.lanes; ++n) {
      out_.slots[panel.first + n] = panel.line * out_.width + n;
    }
    out_.panels.push_back(panel);
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

  // Block a alone, in panels of up to two vectors.
  void split(size_t a) {
    const int64_t size = d_.lane_sizes[a];
    int64_t depth = 0;
    for (const int64_t b : d_.seen[a]) depth += d_.input_sizes[b];
    const bool near = size <= 2 * out_.width || (size <= kNear && size * depth <= kSmall);
    for (int64_t start = 0; start < size; start += 2 * out_.width) {
      const int64_t lanes = std::min<int64_t>(size - start, 2 * out_.width);
      Panel panel = begin(d_.lane_offsets[a] + start, lanes);
      if (d_.in_place && lanes % out_.width == 0) {
        panel.place = near ? Place::kTogether : Place::kApart;
      }
      for (size_t n = 0; n < d_.seen[a].size(); ++n) {
        const int64_t b = d_.seen[a][n], inputs = d_.input_sizes[b];
        add_segment(panel, d_.input_offsets[b], inputs, ~0u);
        const int64_t from = d_.first[a][n] + start * d_.lane_step[a][n];
        if (n == 0) panel.weight = from;
        out_.copies.push_back({from, d_.input_step[a][n], d_.lane_step[a][n], panel.depth, inputs,
                               0, static_cast<int32_t>(lanes)});
        panel.depth += inputs;
      }
      panel.stride = d_.in_place ? size : 0;
      end(panel);
    }
  }

  // Blocks a .. b-1 in one vector.
  void combine(size_t a, size_t b) {
    const int64_t first = d_.lane_offsets[a];
    Panel panel = begin(first, d_.lane_offsets[b] - first);
    panel.shared = true;
    std::map<int64_t, std::vector<std::pair<size_t, size_t>>> seen_by;  // input block -> (a, n)
    for (size_t k = a; k < b; ++k) {
      for (size_t n = 0; n < d_.seen[k].size(); ++n) seen_by[d_.seen[k][n]].push_back({k, n});
    }
    for (const auto& [block, readers] : seen_by) {
      const int64_t inputs = d_.input_sizes[block];
      uint32_t mask = 0;
      for (auto [k, n] : readers) {
        const int64_t lane = d_.lane_offsets[k] - first, lanes = d_.lane_sizes[k];
        mask |= ((1u << lanes) - 1u) << lane;
        out_.copies.push_back({d_.first[k][n], d_.input_step[k][n], d_.lane_step[k][n], panel.depth,
                               inputs, static_cast<int32_t>(lane), static_cast<int32_t>(lanes)});
      }
      add_segment(panel, d_.input_offsets[block], inputs, mask);
      panel.depth += inputs;
    }
    end(panel);
  }

  const Direction& d_;
  Panels out_;
};

}  // namespace

Chain plan_execution(int width, std::vector<Layout> layouts) {
  Chain chain;
  chain.reserve(layouts.size());  // a layer refers to the slots of the one before
  for (Layout& layout : layouts) {
    ExecutionPlan plan{std::move(layout), {}, {}};
    const ExecutionPlan* before = chain.empty() ? nullptr : &chain.back();
    if (before != nullptr && (plan.layout.col_sizes != before->layout.row_sizes ||
                              plan.layout.col_order != before->layout.row_order)) {
      throw std::runtime_error("maskmoe: the units of one layer are not the inputs of the next");
    }
    const auto* slots = before == nullptr ? nullptr : &before->forward.slots;
    plan.forward = Builder(forward_of(plan.layout, slots), width).take();
    plan.backward = Builder(backward_of(plan.layout, plan.forward), width).take();
    chain.push_back(std::move(plan));
  }
  return chain;
}

}  // namespace maskmoe
