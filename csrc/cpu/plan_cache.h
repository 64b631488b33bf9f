// The cache of execution plans, the only one of the CPU's ops. It belongs to the layouts: Python
// calls `forget_plans` when nobody holds a layout any more, so a plan lives as long as its layout.
// What calls bring with serialized layouts of their own is bounded by number and by size.
#pragma once

#include <functional>
#include <memory>
#include <span>

#include "cpu/execution_plan.h"

namespace maskmoe {

// A call names layouts by id and brings them as tensors; an id alone finds nothing. Tensors that a
// chain was kept with are known by their address, for the cache holds them and the address stays
// theirs; what they contained then is what counts. All others are compared by content.
struct PlanKey {
  std::span<const int64_t> ids;
  int width;                            // lanes of a vector
  std::span<const Encoded> serialized;  // the call's tensors
};

// The chain kept with tensors at these addresses; null: there is none.
std::shared_ptr<const Chain> find_plans(const PlanKey& key);

// Keeps one with these tensors, which `held` keeps alive: the chain of another entry with this
// content, else the one that `make` returns, which has to check the content first.
std::shared_ptr<const Chain> keep_plans(const PlanKey& key, std::shared_ptr<const void> held,
                                        Contents contents,
                                        const std::function<Chain(const Contents&)>& make);

// Drops the chains of the layout with this id: nobody holds it any more.
void forget_plans(int64_t id);

// How many chains are kept.
int64_t count_plans();

}  // namespace maskmoe
