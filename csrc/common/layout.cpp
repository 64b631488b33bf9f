#include "common/layout.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace maskmoe {
namespace {

constexpr int64_t kVersion = 1;  // PLAN_VERSION of layout/plan.py
constexpr int64_t kHeader = 5;
constexpr int64_t kWord = 32;
constexpr int64_t kMostFeatures = (int64_t{1} << 31) - 1;  // MOST_FEATURES of layout/blocks.py

std::vector<int64_t> offsets_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> offsets(sizes.size() + 1, 0);
  std::partial_sum(sizes.begin(), sizes.end(), offsets.begin() + 1);
  return offsets;
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("maskmoe: the serialized layout ") + what);
}

// Reads a serialized layout from front to back and checks every value.
class Reader {
 public:
  explicit Reader(const Encoded& encoded)
      : at_(encoded.values + kHeader), left_(encoded.count - kHeader) {}

  // Fills `sizes` and returns their offsets.
  std::vector<int64_t> take_sizes(int64_t blocks, std::vector<int64_t>& sizes) {
    expect(blocks >= 1, "has no blocks");
    const int64_t* from = take(blocks);
    int64_t features = 0;
    for (int64_t n = 0; n < blocks; ++n) {
      expect(from[n] >= 1 && from[n] <= kMostFeatures - features, "has sizes that no layout has");
      features += from[n];
    }
    sizes.assign(from, from + blocks);
    return offsets_of(sizes);
  }

  void take_bits(int64_t blocks, std::vector<uint8_t>& bits) {
    const int64_t words = (blocks + kWord - 1) / kWord;
    const int64_t* word = take(words);
    for (int64_t n = 0; n < words; ++n) {
      const int64_t used = std::min(kWord, blocks - n * kWord);
      expect(word[n] >= 0 && word[n] < int64_t{1} << used, "has bits of no block");
    }
    bits.resize(blocks);
    for (int64_t n = 0; n < blocks; ++n) bits[n] = (word[n / kWord] >> (n % kWord)) & 1;
  }

  void take_order(int64_t flag, int64_t features, std::vector<int64_t>& order) {
    expect(flag == 0 || flag == 1, "has a flag for an order that is neither 1 nor 0");
    if (flag == 0) return;
    const int64_t* from = take(features);
    std::vector<uint8_t> met(features, 0);
    for (int64_t n = 0; n < features; ++n) {
      expect(from[n] >= 0 && from[n] < features && !met[from[n]], "has an order that repeats");
      met[from[n]] = 1;
    }
    order.assign(from, from + features);
  }

  void end() const { expect(left_ == 0, "is too long"); }

 private:
  const int64_t* take(int64_t n) {
    expect(n <= left_, "is too short");
    const int64_t* from = at_;
    at_ += n;
    left_ -= n;
    return from;
  }

  const int64_t* at_;
  int64_t left_;
};

std::vector<int64_t> rank_of(const std::vector<int64_t>& order) {
  std::vector<int64_t> rank(order.size());
  for (size_t n = 0; n < order.size(); ++n) rank[order[n]] = static_cast<int64_t>(n);
  return rank;
}

// Fills in where each row block's weights begin, and what is counted.
void count_weights(Layout& layout) {
  std::vector<int64_t> weights(layout.rows());
  layout.num_blocks = layout.num_routed = 0;
  for (size_t i = 0; i < layout.rows(); ++i) {
    int64_t fan_in = 0;
    for (size_t j = 0; j < layout.cols(); ++j) {
      expect(!layout.routed(i, j) || layout.sees(i, j), "routes a gradient through no block");
      if (!layout.sees(i, j)) continue;
      fan_in += layout.col_sizes[j];
      ++layout.num_blocks;
      if (layout.routed(i, j)) layout.num_routed += layout.row_sizes[i] * layout.col_sizes[j];
    }
    weights[i] = fan_in * layout.row_sizes[i];
  }
  layout.weight_offsets = offsets_of(weights);  // less than kMostFeatures squared
  layout.num_weights = layout.weight_offsets.back();
}

}  // namespace

Layout decode(const Encoded& encoded) {
  const auto [values, count] = encoded;
  if (count < kHeader || values[0] != kVersion) {
    throw std::runtime_error("maskmoe: the serialized layout has version " +
                             std::to_string(count > 0 ? values[0] : 0) + ", this build reads " +
                             std::to_string(kVersion) + "; export again");
  }
  const int64_t rows = values[1], cols = values[2];
  Reader reader(encoded);
  Layout layout;
  layout.row_offsets = reader.take_sizes(rows, layout.row_sizes);
  layout.col_offsets = reader.take_sizes(cols, layout.col_sizes);
  layout.out_features = layout.row_offsets.back();
  layout.in_features = layout.col_offsets.back();
  // Both numbers were taken from `count` values: their product is far from an overflow.
  reader.take_bits(rows * cols, layout.present);
  reader.take_bits(rows * cols, layout.routes);
  reader.take_order(values[3], layout.out_features, layout.row_order);
  reader.take_order(values[4], layout.in_features, layout.col_order);
  reader.end();
  layout.row_rank = rank_of(layout.row_order);
  layout.col_rank = rank_of(layout.col_order);
  count_weights(layout);
  return layout;
}

bool too_fine(const Layout& layout) {
  return layout.num_blocks > (1 << 16) && layout.num_weights < 16 * layout.num_blocks;
}

}  // namespace maskmoe
