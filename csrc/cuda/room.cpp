#include <algorithm>
#include <stdexcept>

#include "network.h"

namespace maskmoe::fused {

Room room_for(const Tables& tables, int rows, int item_size, Use use, bool keep_slopes) {
  Room room{};
  room.rows = rows;
  const int64_t pad = 16 / item_size;  // rows begin in other banks
  int64_t elements = 0, high[2] = {0, 0};
  for (int l = 0; l < tables.layers; ++l) {
    const int64_t stride = int64_t{kSide} * tables.chunks[l] + pad;
    room.stride[l] = static_cast<int32_t>(stride);
    high[l % 2] = std::max(high[l % 2], stride * rows);
  }
  for (int l = 0; l < tables.layers; ++l) {
    const int64_t size = int64_t{room.stride[l]} * rows;
    room.slope_at[l] = -1;
    if (!holds_all(use)) {  // the input of the layer before is done with
      room.at[l] = static_cast<int32_t>(l % 2 == 0 ? 0 : high[0]);
      elements = high[0] + high[1];
      continue;
    }
    room.at[l] = static_cast<int32_t>(elements);
    elements += size;
    if (l > 0 && keep_slopes) {
      room.slope_at[l] = static_cast<int32_t>(elements);
      elements += size;
    }
  }
  room.floats = elements * item_size;
  const int64_t cells = int64_t{tables.experts} * rows;
  int64_t floats = 0;
  if (use == Use::kBackward) floats = cells + rows;
  if (use == Use::kMixture || use == Use::kGem) floats = 3 * (cells + rows);
  if (use == Use::kGem) floats += 2 * tables.experts + 1;
  room.bytes = (room.floats + 4 * floats + 15) / 16 * 16;
  return room;
}

void hold_near(Room& room, const Tables& tables, int64_t count, int64_t shared,
               int64_t shared_limit) {
  constexpr int64_t kReserved = 1024;   // of each block, by the system
  constexpr int64_t kSmall = 16 << 10;  // leaves L1 what it needs for weights
  const int64_t blocks = std::clamp<int64_t>(shared / (room.bytes + kReserved), 1, kMostResident);
  const int64_t spare = std::min(shared / blocks - kReserved, shared_limit) - room.bytes;
  const int64_t weights = int64_t{kBlock} * tables.forward_blocks, others = count - weights;
  const int64_t left = spare - 4 * others;  // for gradients of blocks
  room.near = room.bytes;
  room.near_from = count;
  if (left < 0) return;
  room.near_from = weights;
  if (4 * weights <= left && 4 * count <= kSmall) {
    room.near_from = 0;
  } else if (blocks == 1) {  // no weights stay in L1 anyway
    room.near_from -= std::min<int64_t>(tables.forward_blocks, left / (4 * kBlock)) * kBlock;
  }
  room.bytes += 4 * (count - room.near_from);
}

std::string obstacle(const Tables& tables, int item_size, Use use, bool keep_slopes,
                     int64_t shared_limit) {
  const int least = low_tile(item_size);
  const int64_t needed = room_for(tables, least, item_size, use, keep_slopes).bytes;
  if (needed <= shared_limit) return "";
  return "the fused network needs " + std::to_string(needed) + " bytes of shared memory for " +
         std::to_string(least) + " rows, " +
         (holds_all(use) ? "all layers together" : "two layers at a time") +
         ", and this device has " +
         std::to_string(shared_limit) + " a block; use " + (item_size == 4 ? "bfloat16, " : "") +
         "smaller widths, or layers one by one";
}

std::string obstacle(const std::vector<Encoded>& layouts, const std::vector<PartSize>& parts,
                     int item_size, Use use, bool keep_slopes, int64_t shared_limit) {
  try {
    const Network network(layouts, parts);
    return obstacle(network.at(network.bytes().data()), item_size, use, keep_slopes, shared_limit);
  } catch (const std::runtime_error& refusal) {
    return refusal.what();
  }
}

int rows_for(const Tables& tables, int item_size, Use use, bool keep_slopes, int64_t shared_limit,
             int64_t rows, int64_t processors) {
  auto fits = [&](int height) {
    return room_for(tables, height, item_size, use, keep_slopes).bytes <= shared_limit;
  };
  const int high = high_tile(item_size), low = low_tile(item_size);
  // Low tiles keep more processors busy, but each of their blocks writes partial gradients, which
  // all have to be read again.
  constexpr int64_t kCached = 32 << 20;  // bytes that stay in L2
  const int64_t written = holds_all(use) ? 4 * int64_t{kBlock} * tables.forward_blocks : 0;
  const bool enough = (rows + high - 1) / high >= processors;
  if (fits(high) && (enough || (rows + low - 1) / low * written > kCached)) return high;
  return fits(low) ? low : 0;
}

}  // namespace maskmoe::fused
