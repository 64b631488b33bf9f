// The execution plans of the layouts that a call names.
#pragma once

#include <memory>
#include <vector>

#include "common/checks.h"
#include "cpu/execution_plan.h"

namespace maskmoe {

// The features that a call brings, and the units that it expects.
struct Widths {
  int64_t in, out;
};

// The plans for these serialized layouts with these ids, from the cache or made now. Layouts that
// the kernels cannot run are refused; Python's dispatch does not call the op with them.
std::shared_ptr<const Chain> chain_of(const Checks& checks, const std::vector<Tensor>& serialized,
                                      const std::vector<int64_t>& ids, Widths widths);

}  // namespace maskmoe
