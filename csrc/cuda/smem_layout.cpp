#include "cuda/smem_layout.h"

#include <algorithm>

namespace maskmoe::fused {
namespace {

constexpr int64_t kReserved = 1024;  // bytes of each thread block that the system takes

}  // namespace

SmemLayout smem_layout(const ExecutionPlan& plan, const TileKind& kind, int rows) {
  SmemLayout layout{};
  layout.rows = rows;
  layout.warps = kWarps;
  const int64_t pad = 16 / kind.item_size;  // so that neighbouring rows begin in different banks
  int64_t elements = 0, largest[2] = {0, 0};
  for (int l = 0; l < plan.layers; ++l) {
    const int64_t stride = int64_t{kChunk} * plan.chunks[l] + pad;
    layout.stride[l] = static_cast<int32_t>(stride);
    largest[l % 2] = std::max(largest[l % 2], stride * rows);
  }
  for (int l = 0; l < plan.layers; ++l) {
    const int64_t size = int64_t{layout.stride[l]} * rows;
    layout.dact_at[l] = -1;
    if (!keeps_all_layers(kind.op)) {  // a layer's output overwrites the input of the layer before
      layout.inputs_at[l] = static_cast<int32_t>(l % 2 == 0 ? 0 : largest[0]);
      elements = largest[0] + largest[1];
      continue;
    }
    layout.inputs_at[l] = static_cast<int32_t>(elements);
    elements += size;
    if (l > 0 && kind.keep_dact) {
      layout.dact_at[l] = static_cast<int32_t>(elements);
      elements += size;
    }
  }
  layout.floats_at = elements * kind.item_size;
  const int64_t cells = int64_t{plan.experts} * rows;  // see LogitTile of masked_mlp/selection.h
  int64_t floats = 0;
  if (kind.op == Op::kBackward) floats = cells + rows;
  if (kind.op == Op::kMixture || kind.op == Op::kGem) floats = 3 * (cells + rows);
  if (kind.op == Op::kGem) floats += 2 * plan.experts + 1;
  layout.bytes = (layout.floats_at + 4 * floats + 15) / 16 * 16;
  return layout;
}

int64_t blocks_that_fit(const SmemLayout& layout, const DeviceLimits& limits) {
  return std::max<int64_t>(limits.shared_per_multiprocessor / (layout.bytes + kReserved), 1);
}

void place_sums(SmemLayout& layout, const ExecutionPlan& plan, int64_t count,
                const DeviceLimits& limits) {
  constexpr int64_t kSmall = 16 << 10;  // sums of so few bytes leave L1 what it needs for weights
  const int64_t shared = limits.shared_per_multiprocessor;
  const int64_t blocks = std::min<int64_t>(blocks_that_fit(layout, limits), kBackwardBlocks);
  const int64_t spare =
      std::min(shared / blocks - kReserved, limits.shared_per_block) - layout.bytes;
  const int64_t weights = int64_t{kBlockSize} * plan.forward_blocks, others = count - weights;
  const int64_t left = spare - 4 * others;  // bytes for the gradients of weight blocks
  if (blocks == 1) layout.warps = kMostWarps;
  layout.sums_at = layout.bytes;
  layout.first_shared_sum = count;
  if (left < 0) return;
  layout.first_shared_sum = weights;
  if (4 * weights <= left && 4 * count <= kSmall) {
    layout.first_shared_sum = 0;
  } else if (blocks == 1) {  // with one block, L1 is too small to keep weights anyway
    layout.first_shared_sum -=
        std::min<int64_t>(plan.forward_blocks, left / (4 * kBlockSize)) * kBlockSize;
  }
  layout.bytes += 4 * (count - layout.first_shared_sum);
}

std::string unsupported_reason(const ExecutionPlan& plan, const TileKind& kind,
                               const DeviceLimits& limits) {
  const int rows = min_tile_rows(kind.item_size);
  const int64_t needed = smem_layout(plan, kind, rows).bytes;
  if (needed <= limits.shared_per_block) return "";
  return "the fused mlp needs " + std::to_string(needed) + " bytes of shared memory for " +
         std::to_string(rows) + " rows, " +
         (keeps_all_layers(kind.op) ? "all layers together" : "two layers at a time") +
         ", and this device has " + std::to_string(limits.shared_per_block) + " a block; use " +
         (kind.item_size == 4 ? "bfloat16, " : "") + "smaller widths, or layers one by one";
}

int choose_tile_rows(const ExecutionPlan& plan, const TileKind& kind, const DeviceLimits& limits,
                     int64_t rows) {
  auto fits = [&](int height) {
    return smem_layout(plan, kind, height).bytes <= limits.shared_per_block;
  };
  const int tall = max_tile_rows(kind.item_size), low = min_tile_rows(kind.item_size);
  // Low tiles keep more multiprocessors busy. But each of their thread blocks writes weight
  // gradients, which have to be read again: that pays only as long as they stay in L2.
  constexpr int64_t kCached = 32 << 20;  // bytes that stay in L2
  const int64_t written =
      keeps_all_layers(kind.op) ? 4 * int64_t{kBlockSize} * plan.forward_blocks : 0;
  const bool enough = (rows + tall - 1) / tall >= limits.multiprocessors;
  if (fits(tall) && (enough || (rows + low - 1) / low * written > kCached)) return tall;
  return fits(low) ? low : 0;
}

}  // namespace maskmoe::fused
