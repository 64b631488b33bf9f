#include "plan.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace maskmoe {
namespace {

constexpr int64_t kVersion = 1;  // PLAN_VERSION of layout/plan.py
constexpr int64_t kHeader = 5;
constexpr int64_t kWord = 32;
constexpr int64_t kMostFeatures = (int64_t{1} << 31) - 1;  // MOST_FEATURES of layout/blocks.py
constexpr int64_t kNear = 128;       // floats from input to input that cost no more than side by side
constexpr int64_t kSmall = 1 << 16;  // floats of a block row, a quarter of a 1 MiB cache

std::vector<int64_t> offsets_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> offsets(sizes.size() + 1, 0);
  std::partial_sum(sizes.begin(), sizes.end(), offsets.begin() + 1);
  return offsets;
}

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

// Its inputs are the units of the layer before, in the slots that those have; null: a row's values.
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

// Its inputs are the outputs of the forward, in the slots that those have.
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
      b > a + 1 ? share(a, b) : split(a);
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

  // Inputs [first, first + length) for the lanes in `mask`, as one segment with the last if both
  // lie side by side.
  void add_segment(const Panel& panel, int64_t first, int64_t length, uint32_t mask) {
    if (d_.slots != nullptr) {
      // Pieces of neighbouring slots.
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
  void share(size_t a, size_t b) {
    const int64_t first = d_.lane_offsets[a];
    Panel panel = begin(first, d_.lane_offsets[b] - first);
    panel.shared = true;
    std::map<int64_t, std::vector<std::pair<size_t, size_t>>> seen_by;  // input block -> (a, n)
    for (size_t k = a; k < b; ++k) {
      for (size_t n = 0; n < d_.seen[k].size(); ++n) seen_by[d_.seen[k][n]].push_back({k, n});
    }
    for (const auto& [block, who] : seen_by) {
      const int64_t inputs = d_.input_sizes[block];
      uint32_t mask = 0;
      for (auto [k, n] : who) {
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

Layout decode(const Encoded& encoded) {
  const auto [values, count] = encoded;
  if (count < kHeader || values[0] != kVersion) {
    throw std::runtime_error("maskmoe: plan has version " +
                             std::to_string(count > 0 ? values[0] : 0) + ", this build reads " +
                             std::to_string(kVersion) + "; export again");
  }
  const int64_t* at = values + kHeader;
  int64_t left = count - kHeader;
  auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("maskmoe: plan ") + what);
  };
  auto take = [&](int64_t n) {
    expect(n <= left, "is too short");
    const int64_t* from = at;
    at += n;
    left -= n;
    return from;
  };
  auto take_sizes = [&](int64_t blocks, std::vector<int64_t>& sizes) {
    expect(blocks >= 1, "has no blocks");
    const int64_t* from = take(blocks);
    int64_t features = 0;
    for (int64_t n = 0; n < blocks; ++n) {
      expect(from[n] >= 1 && from[n] <= kMostFeatures - features, "has sizes that no layout has");
      features += from[n];
    }
    sizes.assign(from, from + blocks);
    return offsets_of(sizes);
  };
  Layout layout;
  layout.row_offsets = take_sizes(values[1], layout.row_sizes);
  layout.col_offsets = take_sizes(values[2], layout.col_sizes);
  layout.out_features = layout.row_offsets.back();
  layout.in_features = layout.col_offsets.back();
  // Both were taken from `count` values: their product is far from an overflow.
  const int64_t rows = values[1], cols = values[2], blocks = rows * cols;
  auto take_bits = [&](std::vector<uint8_t>& bits) {
    const int64_t words = (blocks + kWord - 1) / kWord;
    const int64_t* word = take(words);
    for (int64_t n = 0; n < words; ++n) {
      const int64_t used = std::min(kWord, blocks - n * kWord);
      expect(word[n] >= 0 && word[n] < int64_t{1} << used, "has bits of no block");
    }
    bits.resize(blocks);
    for (int64_t n = 0; n < blocks; ++n) bits[n] = (word[n / kWord] >> (n % kWord)) & 1;
  };
  take_bits(layout.present);
  take_bits(layout.routes);
  auto take_order = [&](int64_t flag, int64_t features, std::vector<int64_t>& order) {
    expect(flag == 0 || flag == 1, "has an order or not, which is 1 or 0");
    if (flag == 0) return;
    const int64_t* from = take(features);
    std::vector<uint8_t> met(features, 0);
    for (int64_t n = 0; n < features; ++n) {
      expect(from[n] >= 0 && from[n] < features && !met[from[n]], "has an order that repeats");
      met[from[n]] = 1;
    }
    order.assign(from, from + features);
  };
  take_order(values[3], layout.out_features, layout.row_order);
  take_order(values[4], layout.in_features, layout.col_order);
  expect(left == 0, "is too long");
  std::vector<int64_t> weights(rows);
  layout.num_blocks = layout.num_routed = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t fan_in = 0;
    for (int64_t j = 0; j < cols; ++j) {
      const bool routed = layout.routes[i * cols + j];
      expect(!routed || layout.present[i * cols + j], "routes a gradient through no block");
      if (!layout.present[i * cols + j]) continue;
      fan_in += layout.col_sizes[j];
      ++layout.num_blocks;
      if (routed) layout.num_routed += layout.row_sizes[i] * layout.col_sizes[j];
    }
    weights[i] = fan_in * layout.row_sizes[i];
  }
  layout.weight_offsets = offsets_of(weights);  // less than kMostFeatures squared
  layout.num_weights = layout.weight_offsets.back();
  return layout;
}

bool too_fine(const Layout& layout) {
  return layout.num_blocks > (1 << 16) && layout.num_weights < 16 * layout.num_blocks;
}

Chain compile(int width, std::vector<Layout> layouts) {
  Chain chain;
  chain.reserve(layouts.size());  // a layer refers to the slots of the one before
  for (Layout& layout : layouts) {
    Plan plan{std::move(layout), {}, {}};
    const Plan* before = chain.empty() ? nullptr : &chain.back();
    if (before != nullptr && (plan.layout.col_sizes != before->layout.row_sizes ||
                              plan.layout.col_order != before->layout.row_order)) {
      throw std::runtime_error("maskmoe: the units of one layer are not the inputs of the next");
    }
    if (too_fine(plan.layout)) return {};
    const auto* slots = before == nullptr ? nullptr : &before->forward.slots;
    plan.forward = Builder(forward_of(plan.layout, slots), width).take();
    plan.backward = Builder(backward_of(plan.layout, plan.forward), width).take();
    chain.push_back(std::move(plan));
  }
  return chain;
}

// --- The cache -----------------------------------------------------------------------------------

namespace {

constexpr size_t kMostChains = 4096;
constexpr int64_t kMostBytes = int64_t{1} << 29;

template <class V>
int64_t bytes_of(const V& of) {
  return static_cast<int64_t>(of.size() * sizeof(of[0]));
}

struct Compiled {
  Contents contents;
  Chain chain;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& content : contents) sum += bytes_of(content);
    for (const Plan& plan : chain) {
      const Layout& l = plan.layout;
      for (const auto* sizes : {&l.row_sizes, &l.col_sizes, &l.row_offsets, &l.col_offsets,
                                &l.weight_offsets, &l.row_order, &l.col_order}) {
        sum += bytes_of(*sizes);
      }
      sum += bytes_of(l.present) + bytes_of(l.routes);
      for (const Panels* p : {&plan.forward, &plan.backward}) {
        sum += bytes_of(p->panels) + bytes_of(p->segments) + bytes_of(p->copies);
        sum += bytes_of(p->slots);
      }
    }
    return sum;
  }
};

struct Entry {
  std::vector<int64_t> ids;
  int width;
  std::vector<Encoded> plans;  // where their values lie
  std::shared_ptr<const void> held;
  std::shared_ptr<const Compiled> compiled;
  int64_t bytes;

  bool is_for(Names named, int lanes) const {
    return width == lanes && std::equal(ids.begin(), ids.end(), named.begin(), named.end());
  }
};

using Entries = std::list<Entry>;  // the last used first

struct Cache {
  std::mutex mutex;
  Entries entries;
  std::unordered_multimap<int64_t, Entries::iterator> by_name;  // the first of their ids
  int64_t bytes = 0;

  template <class Matches>
  std::shared_ptr<const Compiled> find(Names ids, int width, const Matches& matches) {
    const auto [begin, end] = by_name.equal_range(ids.front());
    for (auto found = begin; found != end; ++found) {
      const Entries::iterator entry = found->second;
      if (!entry->is_for(ids, width) || !matches(*entry)) continue;
      if (entry != entries.begin()) entries.splice(entries.begin(), entries, entry);
      return entry->compiled;
    }
    return nullptr;
  }

  // Moves an entry to `dropped`. What it holds is freed after the lock: a tensor that Python knows
  // waits for Python's own lock, whose owner may be waiting for this one.
  void drop(Entries::iterator entry, Entries& dropped) {
    const auto [begin, end] = by_name.equal_range(entry->ids.front());
    by_name.erase(std::find_if(begin, end, [&](const auto& of) { return of.second == entry; }));
    bytes -= entry->bytes;
    dropped.splice(dropped.end(), entries, entry);
  }
};

// Never destroyed: at exit, threads may still compute, and torch may be gone before.
Cache& cache() {
  static Cache* const the = new Cache;
  return *the;
}

std::shared_ptr<const Chain> chain_in(std::shared_ptr<const Compiled> compiled) {
  if (compiled == nullptr) return nullptr;
  const Chain* chain = &compiled->chain;
  return {std::move(compiled), chain};
}

}  // namespace

std::shared_ptr<const Chain> find_chain(Names ids, int width, std::span<const Encoded> plans) {
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return chain_in(all.find(ids, width, [&](const Entry& entry) {
    return std::equal(plans.begin(), plans.end(), entry.plans.begin(), entry.plans.end(),
                      [](const Encoded& a, const Encoded& b) {
                        return a.values == b.values && a.count == b.count;
                      });
  }));
}

std::shared_ptr<const Chain> keep_chain(Names ids, int width, std::span<const Encoded> plans,
                                        std::shared_ptr<const void> held, Contents contents,
                                        const std::function<Chain(const Contents&)>& compile) {
  Cache& all = cache();
  std::shared_ptr<const Compiled> compiled;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    compiled = all.find(ids, width, [&](const Entry& entry) {
      return entry.compiled->contents == contents;
    });
  }
  if (compiled == nullptr) {
    Chain chain = compile(contents);
    compiled = std::make_shared<const Compiled>(Compiled{std::move(contents), std::move(chain)});
  }
  const int64_t bytes = compiled->bytes();
  Entries added, dropped;
  added.push_back({{ids.begin(), ids.end()}, width, {plans.begin(), plans.end()}, std::move(held),
                   compiled, bytes});
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_name.emplace(ids.front(), added.begin());
  all.entries.splice(all.entries.begin(), added);
  all.bytes += bytes;
  while (all.entries.size() > 1 &&
         (all.entries.size() > kMostChains || all.bytes > kMostBytes)) {
    all.drop(std::prev(all.entries.end()), dropped);
  }
  return chain_in(std::move(compiled));
}

void forget_chains(int64_t id) {
  Cache& all = cache();
  Entries dropped;
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto entry = all.entries.begin(); entry != all.entries.end();) {
    const auto next = std::next(entry);
    if (std::find(entry->ids.begin(), entry->ids.end(), id) != entry->ids.end()) {
      all.drop(entry, dropped);
    }
    entry = next;
  }
}

int64_t count_chains() {
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return static_cast<int64_t>(all.entries.size());
}

}  // namespace maskmoe
