// Serialized layouts that came with a call, checked before they are decoded.
#pragma once

#include "common/layout.h"

namespace maskmoe {

// Layouts from serialized layouts that this process has not met. The Python op
// `check_serialized_layout` reads each first: its content has to be that of the id. `contents` are
// copies, which nobody can change between the check and the use.
std::vector<Layout> verified(const Contents& contents, const std::vector<int64_t>& ids);

}  // namespace maskmoe
