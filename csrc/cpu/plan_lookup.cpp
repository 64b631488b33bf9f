#include "cpu/plan_lookup.h"

#include <array>
#include <span>

#include "common/serialized_layout.h"
#include "cpu/instruction_sets.h"
#include "cpu/plan_cache.h"

namespace maskmoe {
namespace {

void check_widths(const char* op, Widths widths, const Layout& first, const Layout& last) {
  STD_TORCH_CHECK(widths.in == first.in_features && widths.out == last.out_features,
                  "maskmoe::", op, ": the layout has ", first.in_features, " features and ",
                  last.out_features, " units, the call ", widths.in, " and ", widths.out);
}

void check_not_too_fine(const char* op, const std::vector<Layout>& layouts) {
  for (size_t n = 0; n < layouts.size(); ++n) {
    const Layout& layout = layouts[n];
    STD_TORCH_CHECK(!too_fine(layout), "maskmoe::", op, ": layout ", n,
                    " has too many blocks of too few weights: ", layout.num_blocks, " blocks and ",
                    layout.num_weights, " weights. The CPU kernels take up to 65,536 blocks, or 16 "
                    "weights a block on average; choose another backend: backend='torch'");
  }
}

// Copies, which nobody can change between the check and the use.
Contents contents_of(const Checks& checks, const std::vector<Tensor>& serialized,
                     std::span<const Encoded> encoded) {
  Contents contents;
  for (size_t n = 0; n < serialized.size(); ++n) {
    checks.readable(serialized[n], "serialized layouts", n, aoti_torch_dtype_int64());
    STD_TORCH_CHECK(serialized[n].dim() == 1 && serialized[n].is_contiguous(),
                    checks.named("serialized layouts", n), " must be a contiguous vector");
    contents.emplace_back(encoded[n].values, encoded[n].values + encoded[n].count);
  }
  return contents;
}

}  // namespace

std::shared_ptr<const Chain> chain_of(const Checks& checks, const std::vector<Tensor>& serialized,
                                      const std::vector<int64_t>& ids, Widths widths) {
  const char* const op = checks.op();
  STD_TORCH_CHECK(!serialized.empty() && serialized.size() == ids.size(), "maskmoe::", op, ": ",
                  serialized.size(), " serialized layouts for ", ids.size(), " ids");
  std::array<Encoded, 16> few;
  std::vector<Encoded> many(serialized.size() > few.size() ? serialized.size() : 0);
  Encoded* const encoded = many.empty() ? few.data() : many.data();
  for (size_t n = 0; n < serialized.size(); ++n) {
    encoded[n] = {static_cast<const int64_t*>(serialized[n].data_ptr()), serialized[n].numel()};
  }
  const PlanKey key{ids, kernels()->width, {encoded, serialized.size()}};
  auto found = find_plans(key);
  if (found == nullptr) {
    found = keep_plans(key, std::make_shared<const std::vector<Tensor>>(serialized),
                       contents_of(checks, serialized, key.serialized),
                       [&](const Contents& contents) {
                         auto layouts = verified(contents, ids);
                         // Before memory is taken.
                         check_widths(op, widths, layouts.front(), layouts.back());
                         check_not_too_fine(op, layouts);
                         return plan_execution(key.width, std::move(layouts));
                       });
  }
  check_widths(op, widths, found->front().layout, found->back().layout);
  return found;
}

}  // namespace maskmoe
