#include "cuda/execution_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace maskmoe::fused {
namespace {

constexpr int32_t kStripBlocks = 8;

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error("maskmoe: the fused mlp " + why);
}

void check(const std::vector<Layout>& layouts) {
  if (layouts.empty()) refuse("has no layer");
  if (layouts.size() > kMaxLayers) {
    refuse("has " + std::to_string(layouts.size()) + " layers, and at most " +
           std::to_string(kMaxLayers) + " can run in one kernel; use fewer, or another backend");
  }
  const size_t experts = layouts[0].rows();
  for (size_t l = 0; l < layouts.size(); ++l) {
    const Layout& layout = layouts[l];
    const std::string name = "'s layer " + std::to_string(l) + " ";
    if (layout.rows() != experts) refuse(name + "has another number of experts than the first");
    if (!layout.row_order.empty()) refuse(name + "permutes its units; use another backend");
    if (l == 0) continue;
    if (layout.col_sizes != layouts[l - 1].row_sizes || !layout.col_order.empty()) {
      refuse(name + "does not read the units of the layer before as they lie");
    }
    for (size_t i = 0; i < experts; ++i) {
      for (size_t j = 0; j < experts; ++j) {
        if (layout.routed(i, j) != (i == j)) {
          refuse(name + "routes a gradient beside the diagonal, or not along it");
        }
      }
    }
  }
  for (int64_t size : layouts.back().row_sizes) {
    if (size != 1) refuse("ends in an expert of " + std::to_string(size) + " units, not 1");
  }
}

int32_t chunks_of(int64_t size) { return static_cast<int32_t>((size + kChunk - 1) / kChunk); }

std::vector<int32_t> chunk_offsets(const std::vector<int64_t>& sizes) {
  std::vector<int32_t> offsets{0};
  for (int64_t size : sizes) offsets.push_back(offsets.back() + chunks_of(size));
  return offsets;
}

uint8_t valid_in(int64_t size, int32_t chunk) {
  return static_cast<uint8_t>(std::min<int64_t>(kChunk, size - chunk * kChunk));
}

// Shares items out to workers: the most costly first, each to the worker with the least work.
template <class Cost>
void assign(std::vector<int32_t> items, int workers, const Cost& cost,
            std::vector<int32_t>& schedule, std::vector<int32_t>& bounds) {
  std::stable_sort(items.begin(), items.end(),
                   [&](int32_t a, int32_t b) { return cost(a) > cost(b); });
  std::vector<std::vector<int32_t>> lists(workers);
  std::vector<int64_t> load(workers, 0);
  for (int32_t item : items) {
    const size_t w = std::min_element(load.begin(), load.end()) - load.begin();
    lists[w].push_back(item);
    load[w] += cost(item);
  }
  for (int w = 0; w <= kMostWarps; ++w) {
    bounds.push_back(static_cast<int32_t>(schedule.size()));
    if (w < workers) schedule.insert(schedule.end(), lists[w].begin(), lists[w].end());
  }
}

template <class V>
int32_t count(const V& of) {
  return static_cast<int32_t>(of.size());
}

// The tables while they grow.
struct Builder {
  const std::vector<Layout>& layouts;
  std::vector<ChunkRun> runs;
  std::vector<Product> products;
  std::vector<WeightBlock> blocks;
  std::vector<GradientStrip> strips;
  std::vector<HeadWeights> head;
  std::vector<int32_t> head_begin, routed_head, routed_head_begin, schedule, bounds;
  std::vector<InputColumn> columns;
  std::vector<InputQuad> quads;
  std::vector<PaddedBias> biases;
  std::vector<std::vector<int32_t>> passes[3];  // of each pass and layer: products or strips
  ExecutionPlan shape{};

  Builder(const std::vector<Layout>& of, const std::vector<int64_t>& part_widths) : layouts(of) {
    const int layers = static_cast<int>(layouts.size());
    shape.layers = layers;
    shape.experts = static_cast<int32_t>(layouts[0].rows());
    for (auto& pass : passes) pass.resize(layers);
    for (int l = 0; l < layers; ++l) shape.chunks[l] = chunk_offsets(layouts[l].col_sizes).back();
    for (int l = 0; l + 1 < layers; ++l) add_forward(l);
    shape.forward_blocks = count(blocks);
    for (int l = layers - 2; l >= 0; --l) {
      if (l == 0) shape.inner_blocks = count(blocks);
      add_backward(l);
    }
    shape.all_blocks = count(blocks);
    if (layers == 1) shape.inner_blocks = shape.all_blocks;
    add_head();
    shape.num_head = count(head);
    for (int l = 0; l < layers; ++l) add_biases(l);
    shape.num_biases = count(biases);
    add_schedule();
    add_columns(part_widths);
    add_quads();
  }

  Product begin(int32_t to, int32_t valid) const {
    return {to, valid, count(runs), 0, count(blocks), 0};
  }

  void read_chunks(const Product& product, int32_t first, int32_t chunks) {
    if (count(runs) > product.runs && runs.back().first + runs.back().count == first) {
      runs.back().count += chunks;
    } else {
      runs.push_back({first, chunks});
    }
  }

  void end(Product product, Pass pass, int l) {
    product.runs_end = count(runs);
    product.blocks = count(blocks) - product.block;
    passes[static_cast<int>(pass)][l].push_back(count(products));
    products.push_back(product);
  }

  // From the layer's inputs to its units, along present blocks; and the strips of their gradients.
  void add_forward(int l) {
    const Layout& layout = layouts[l];
    const auto inputs = chunk_offsets(layout.col_sizes);
    int32_t chunk = 0;  // of units
    for (size_t i = 0; i < layout.rows(); ++i) {
      const int64_t units = layout.row_sizes[i];
      for (int32_t u = 0; u < chunks_of(units); ++u, ++chunk) {
        Product product = begin(chunk, valid_in(units, u));
        int64_t from = layout.weight_offsets[i] + u * kChunk;
        for (size_t j = 0; j < layout.cols(); ++j) {
          if (!layout.sees(i, j)) continue;
          const int64_t size = layout.col_sizes[j];
          read_chunks(product, inputs[j], chunks_of(size));
          for (int32_t c = 0; c < chunks_of(size); ++c) {
            blocks.push_back({from + c * kChunk * units, static_cast<int32_t>(units), 1, l,
                              static_cast<int32_t>(i), inputs[j] + c, valid_in(size, c),
                              valid_in(units, u), {}});
          }
          from += size * units;
        }
        end(product, Pass::kForward, l);
        const Product& made = products.back();
        for (int32_t b = 0; b < made.blocks; b += kStripBlocks) {
          passes[static_cast<int>(Pass::kGradient)][l].push_back(count(strips));
          strips.push_back({chunk, made.block + b, std::min(kStripBlocks, made.blocks - b)});
        }
      }
    }
  }

  // From the gradient of the units to that of the inputs, along routed blocks.
  void add_backward(int l) {
    const Layout& layout = layouts[l];
    const auto inputs = chunk_offsets(layout.col_sizes), units_at = chunk_offsets(layout.row_sizes);
    std::vector<int64_t> from(layout.weight_offsets.begin(), layout.weight_offsets.end() - 1);
    for (size_t j = 0; j < layout.cols(); ++j) {
      const int64_t size = layout.col_sizes[j];
      for (int32_t c = 0; c < chunks_of(size); ++c) {
        Product product = begin(inputs[j] + c, valid_in(size, c));
        for (size_t i = 0; i < layout.rows(); ++i) {
          if (!layout.routed(i, j)) continue;
          const int64_t units = layout.row_sizes[i];
          read_chunks(product, units_at[i], chunks_of(units));
          for (int32_t u = 0; u < chunks_of(units); ++u) {
            blocks.push_back({from[i] + c * kChunk * units + u * kChunk, 1,
                              static_cast<int32_t>(units), l, static_cast<int32_t>(i),
                              inputs[j] + c, valid_in(units, u), valid_in(size, c), {}});
          }
        }
        end(product, Pass::kBackward, l);
      }
      for (size_t i = 0; i < layout.rows(); ++i) {
        from[i] += layout.sees(i, j) * size * layout.row_sizes[i];
      }
    }
  }

  void add_head() {
    const Layout& layout = layouts.back();
    const auto inputs = chunk_offsets(layout.col_sizes);
    std::vector<std::vector<int32_t>> routed(inputs.back());  // HeadWeights of each chunk
    for (size_t i = 0; i < layout.rows(); ++i) {
      head_begin.push_back(count(head));
      int64_t from = layout.weight_offsets[i];
      for (size_t j = 0; j < layout.cols(); ++j) {
        if (!layout.sees(i, j)) continue;
        for (int32_t c = 0; c < chunks_of(layout.col_sizes[j]); ++c) {
          if (layout.routed(i, j)) routed[inputs[j] + c].push_back(count(head));
          head.push_back({from + c * kChunk, inputs[j] + c, static_cast<int32_t>(i),
                          valid_in(layout.col_sizes[j], c), 0});
        }
        from += layout.col_sizes[j];
      }
    }
    head_begin.push_back(count(head));
    for (const auto& of_chunk : routed) {
      routed_head_begin.push_back(count(routed_head));
      routed_head.insert(routed_head.end(), of_chunk.begin(), of_chunk.end());
    }
    routed_head_begin.push_back(count(routed_head));
  }

  void add_biases(int l) {
    shape.bias_at[l] = count(biases);
    const bool is_head = l + 1 == shape.layers;  // one unit an expert, not padded
    int32_t index = 0;
    for (size_t i = 0; i < layouts[l].rows(); ++i) {
      const int64_t units = layouts[l].row_sizes[i];
      const int64_t padded = is_head ? 1 : int64_t{kChunk} * chunks_of(units);
      for (int64_t u = 0; u < padded; ++u) {
        biases.push_back({l, u < units ? index++ : -1, static_cast<int32_t>(i)});
      }
    }
  }

  void add_schedule() {
    for (int pass = 0; pass < 3; ++pass) {
      const bool gradient = pass == static_cast<int>(Pass::kGradient);
      auto cost = [&](int32_t n) {
        return int64_t{4} + (gradient ? strips[n].blocks : products[n].blocks);
      };
      for (int l = 0; l < shape.layers; ++l) {
        for (int workers : {kWarps / 2, kWarps, kMostWarps}) {
          assign(passes[pass][l], workers, cost, schedule, bounds);
        }
      }
    }
  }

  void add_columns(const std::vector<int64_t>& part_widths) {
    const Layout& layout = layouts[0];
    std::vector<InputColumn> features;
    for (size_t p = 0; p < part_widths.size(); ++p) {
      for (int32_t c = 0; c < part_widths[p]; ++c) {
        features.push_back({static_cast<int32_t>(p), c});
      }
    }
    size_t at = 0;
    for (int64_t size : layout.col_sizes) {
      for (int64_t c = 0; c < int64_t{kChunk} * chunks_of(size); ++c) {
        if (c >= size) {
          columns.push_back({-1, 0});
          continue;
        }
        if (at >= features.size()) refuse("reads more features than its input has");
        columns.push_back(features[layout.col_order.empty() ? at : layout.col_order[at]]);
        ++at;
      }
    }
    if (at != features.size()) refuse("reads fewer features than its input has");
  }

  void add_quads() {
    for (size_t n = 0; n < columns.size(); n += 4) {
      const InputColumn& first = columns[n];
      InputQuad quad{first.part, first.column, 0};
      for (int32_t m = 0; m < 4 && quad.count >= 0; ++m) {
        const InputColumn& column = columns[n + m];
        if (column.part < 0) continue;
        const bool next = column.part == first.part && column.column == first.column + m;
        quad.count = next ? quad.count + 1 : -1;
      }
      quads.push_back(quad);
    }
  }
};

// f(table) for every table of a Builder or an ExecutionPlan, in the order in which they are stored.
template <class Of, class F>
void each_table(Of& of, const F& f) {
  f(of.runs), f(of.products), f(of.blocks), f(of.strips), f(of.head), f(of.head_begin);
  f(of.routed_head), f(of.routed_head_begin), f(of.columns), f(of.quads), f(of.biases);
  f(of.schedule), f(of.bounds);
}

}  // namespace

CompiledPlan::CompiledPlan(const std::vector<Encoded>& encoded,
                           const std::vector<int64_t>& part_widths) {
  std::vector<Layout> layouts;
  for (const Encoded& layout : encoded) layouts.push_back(decode(layout));
  check(layouts);
  if (part_widths.size() > kMaxParts) {
    refuse("reads " + std::to_string(part_widths.size()) +
           " tables and runs of columns, and at most " + std::to_string(kMaxParts) +
           " can be gathered in one kernel; join some");
  }
  for (const Layout& layout : layouts) {
    num_weights.push_back(layout.weight_offsets.back());
    num_units.push_back(
        std::accumulate(layout.row_sizes.begin(), layout.row_sizes.end(), int64_t{0}));
  }
  out_features = num_units.back();
  const Builder built(layouts, part_widths);
  shape_ = built.shape;
  each_table(built, [&](const auto& table) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    offsets_.push_back(static_cast<int64_t>(bytes_.size()));
    const auto* from = reinterpret_cast<const unsigned char*>(table.data());
    bytes_.insert(bytes_.end(), from, from + table.size() * sizeof(table[0]));
  });
}

ExecutionPlan CompiledPlan::at(const void* base) const {
  ExecutionPlan plan = shape_;
  size_t n = 0;
  each_table(plan, [&](auto*& table) {
    using To = std::remove_reference_t<decltype(table)>;
    table = reinterpret_cast<To>(static_cast<const unsigned char*>(base) + offsets_[n++]);
  });
  return plan;
}

}  // namespace maskmoe::fused
