#include "network.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace maskmoe::fused {
namespace {

constexpr int32_t kStripBlocks = 8;

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error("maskmoe: the fused network " + why);
}

void check(const std::vector<Layout>& layouts) {
  if (layouts.empty()) refuse("has no layer");
  if (layouts.size() > kMostLayers) {
    refuse("has " + std::to_string(layouts.size()) + " layers, and at most " +
           std::to_string(kMostLayers) + " can run in one kernel; use fewer, or another backend");
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

int32_t chunks_of(int64_t size) { return static_cast<int32_t>((size + kSide - 1) / kSide); }

std::vector<int32_t> chunk_offsets(const std::vector<int64_t>& sizes) {
  std::vector<int32_t> offsets{0};
  for (int64_t size : sizes) offsets.push_back(offsets.back() + chunks_of(size));
  return offsets;
}

uint8_t valid_in(int64_t size, int32_t chunk) {
  return static_cast<uint8_t>(std::min<int64_t>(kSide, size - chunk * kSide));
}

// Longest first, each to the worker that has least to do.
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
  for (int w = 0; w <= kWarps; ++w) {
    bounds.push_back(static_cast<int32_t>(schedule.size()));
    if (w < workers) schedule.insert(schedule.end(), lists[w].begin(), lists[w].end());
  }
}

// The tables while they grow.
struct Builder {
  const std::vector<Layout>& layouts;
  std::vector<Run> runs;
  std::vector<Product> products;
  std::vector<Block> blocks;
  std::vector<Strip> strips;
  std::vector<Entry> entries;
  std::vector<int32_t> entries_begin, readers, readers_begin, schedule, bounds;
  std::vector<Column> columns;
  std::vector<Piece> pieces;
  std::vector<Bias> biases;
  std::vector<std::vector<int32_t>> passes[3];  // of each order and layer: products or strips
  Tables shape{};

  explicit Builder(const std::vector<Layout>& of) : layouts(of) {
    const int layers = static_cast<int>(layouts.size());
    shape.layers = layers;
    shape.experts = static_cast<int32_t>(layouts[0].rows());
    for (auto& pass : passes) pass.resize(layers);
    for (int l = 0; l < layers; ++l) shape.chunks[l] = chunk_offsets(layouts[l].col_sizes).back();
    for (int l = 0; l + 1 < layers; ++l) forward(l);
    shape.forward_blocks = count(blocks);
    for (int l = layers - 2; l >= 0; --l) {
      if (l == 0) shape.inner_blocks = count(blocks);
      backward(l);
    }
    shape.all_blocks = count(blocks);
    if (layers == 1) shape.inner_blocks = shape.all_blocks;
    last();
    shape.num_entries = count(entries);
    for (int l = 0; l < layers; ++l) pad_biases(l);
    shape.num_biases = count(biases);
    for (int order = 0; order < 3; ++order) {
      const bool gradient = order == static_cast<int>(Order::kGradient);
      auto cost = [&](int32_t n) {
        return int64_t{4} + (gradient ? strips[n].blocks : products[n].blocks);
      };
      for (int l = 0; l < layers; ++l) {
        assign(passes[order][l], kWarps / 2, cost, schedule, bounds);
        assign(passes[order][l], kWarps, cost, schedule, bounds);
      }
    }
  }

  template <class V>
  static int32_t count(const V& of) {
    return static_cast<int32_t>(of.size());
  }

  Product begin(int32_t to, int32_t valid) const {
    return {to, valid, count(runs), 0, count(blocks), 0};
  }

  void see(const Product& product, int32_t first, int32_t chunks) {
    if (count(runs) > product.runs && runs.back().first + runs.back().count == first) {
      runs.back().count += chunks;
    } else {
      runs.push_back({first, chunks});
    }
  }

  void end(Product product, Order order, int l) {
    product.runs_end = count(runs);
    product.blocks = count(blocks) - product.block;
    passes[static_cast<int>(order)][l].push_back(count(products));
    products.push_back(product);
  }

  void forward(int l) {
    const Layout& layout = layouts[l];
    const auto inputs = chunk_offsets(layout.col_sizes);
    int32_t tile = 0;
    for (size_t i = 0; i < layout.rows(); ++i) {
      const int64_t units = layout.row_sizes[i];
      for (int32_t u = 0; u < chunks_of(units); ++u, ++tile) {
        Product product = begin(tile, valid_in(units, u));
        int64_t from = layout.weight_offsets[i] + u * kSide;
        for (size_t j = 0; j < layout.cols(); ++j) {
          if (!layout.sees(i, j)) continue;
          const int64_t size = layout.col_sizes[j];
          see(product, inputs[j], chunks_of(size));
          for (int32_t c = 0; c < chunks_of(size); ++c) {
            blocks.push_back({from + c * kSide * units, static_cast<int32_t>(units), 1, l,
                              static_cast<int32_t>(i), inputs[j] + c, valid_in(size, c),
                              valid_in(units, u), {}});
          }
          from += size * units;
        }
        end(product, Order::kForward, l);
        const Product& made = products.back();
        for (int32_t b = 0; b < made.blocks; b += kStripBlocks) {
          passes[static_cast<int>(Order::kGradient)][l].push_back(count(strips));
          strips.push_back({tile, made.block + b, std::min(kStripBlocks, made.blocks - b)});
        }
      }
    }
  }

  // From the units' gradient to the inputs', along routed blocks.
  void backward(int l) {
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
          see(product, units_at[i], chunks_of(units));
          for (int32_t u = 0; u < chunks_of(units); ++u) {
            blocks.push_back({from[i] + c * kSide * units + u * kSide, 1,
                              static_cast<int32_t>(units), l, static_cast<int32_t>(i),
                              inputs[j] + c, valid_in(units, u), valid_in(size, c), {}});
          }
        }
        end(product, Order::kBackward, l);
      }
      for (size_t i = 0; i < layout.rows(); ++i) {
        from[i] += layout.sees(i, j) * size * layout.row_sizes[i];
      }
    }
  }

  void last() {
    const Layout& layout = layouts.back();
    const auto inputs = chunk_offsets(layout.col_sizes);
    std::vector<std::vector<int32_t>> of_chunk(inputs.back());
    for (size_t i = 0; i < layout.rows(); ++i) {
      entries_begin.push_back(count(entries));
      int64_t from = layout.weight_offsets[i];
      for (size_t j = 0; j < layout.cols(); ++j) {
        if (!layout.sees(i, j)) continue;
        for (int32_t c = 0; c < chunks_of(layout.col_sizes[j]); ++c) {
          if (layout.routed(i, j)) of_chunk[inputs[j] + c].push_back(count(entries));
          entries.push_back({from + c * kSide, inputs[j] + c, static_cast<int32_t>(i),
                             valid_in(layout.col_sizes[j], c), 0});
        }
        from += layout.col_sizes[j];
      }
    }
    entries_begin.push_back(count(entries));
    for (const auto& of : of_chunk) {
      readers_begin.push_back(count(readers));
      readers.insert(readers.end(), of.begin(), of.end());
    }
    readers_begin.push_back(count(readers));
  }

  void pad_biases(int l) {
    shape.bias_at[l] = count(biases);
    const bool packed = l + 1 == shape.layers;  // one unit an expert, not padded
    int32_t index = 0;
    for (size_t i = 0; i < layouts[l].rows(); ++i) {
      const int64_t units = layouts[l].row_sizes[i];
      const int64_t padded = packed ? 1 : int64_t{kSide} * chunks_of(units);
      for (int64_t u = 0; u < padded; ++u) {
        biases.push_back({l, u < units ? index++ : -1, static_cast<int32_t>(i)});
      }
    }
  }

  void place_columns(const std::vector<PartSize>& parts) {
    const Layout& layout = layouts[0];
    std::vector<Column> features;
    for (size_t p = 0; p < parts.size(); ++p) {
      for (int32_t c = 0; c < parts[p].width; ++c) features.push_back({static_cast<int32_t>(p), c});
    }
    size_t at = 0;
    for (int64_t size : layout.col_sizes) {
      for (int64_t c = 0; c < int64_t{kSide} * chunks_of(size); ++c) {
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
    for (size_t n = 0; n < columns.size(); n += 4) {
      const Column& first = columns[n];
      Piece piece{first.part, first.column, 0};
      for (int32_t m = 0; m < 4 && piece.count >= 0; ++m) {
        const Column& column = columns[n + m];
        if (column.part < 0) continue;
        const bool next = column.part == first.part && column.column == first.column + m;
        piece.count = next ? piece.count + 1 : -1;
      }
      pieces.push_back(piece);
    }
  }
};

}  // namespace

Network::Network(const std::vector<Encoded>& encoded, const std::vector<PartSize>& parts) {
  std::vector<Layout> layouts;
  for (const Encoded& layout : encoded) layouts.push_back(decode(layout));
  check(layouts);
  if (parts.size() > kMostParts) {
    refuse("reads " + std::to_string(parts.size()) + " tables and runs of columns, and at most " +
           std::to_string(kMostParts) + " can be gathered in one kernel; join some");
  }
  for (const Layout& layout : layouts) {
    num_weights.push_back(layout.weight_offsets.back());
    num_units.push_back(
        std::accumulate(layout.row_sizes.begin(), layout.row_sizes.end(), int64_t{0}));
  }
  for (const PartSize& part : parts) in_features += part.width;
  out_features = num_units.back();
  Builder built(layouts);
  built.place_columns(parts);
  shape_ = built.shape;
  auto add = [&](const auto& table) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    offsets_.push_back(static_cast<int64_t>(bytes_.size()));
    const auto* from = reinterpret_cast<const unsigned char*>(table.data());
    bytes_.insert(bytes_.end(), from, from + table.size() * sizeof(table[0]));
  };
  add(built.runs), add(built.products), add(built.blocks), add(built.strips), add(built.entries);
  add(built.entries_begin), add(built.readers), add(built.readers_begin), add(built.columns);
  add(built.pieces), add(built.biases), add(built.schedule), add(built.bounds);
}

Tables Network::at(const void* base) const {
  Tables tables = shape_;
  size_t n = 0;
  auto point = [&](auto*& to) {
    using To = std::remove_reference_t<decltype(to)>;
    to = reinterpret_cast<To>(static_cast<const unsigned char*>(base) + offsets_[n++]);
  };
  point(tables.runs), point(tables.products), point(tables.blocks), point(tables.strips);
  point(tables.entries), point(tables.entries_begin), point(tables.readers);
  point(tables.readers_begin), point(tables.columns), point(tables.pieces), point(tables.biases);
  point(tables.schedule), point(tables.bounds);
  return tables;
}

}  // namespace maskmoe::fused
