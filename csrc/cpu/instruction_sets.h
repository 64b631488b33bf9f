// Which kernels this machine can run, and which of them do.
#pragma once

#include "cpu/kernels.h"

namespace maskmoe {

// The kernels that run: the best the machine has, or those that set_isa named. Null: none can run.
const Kernels* kernels();
// Names of what this build has and this machine can run, widest first, null at the end.
const char* const* isas();
// "" goes back to the best. False: no such kernels here.
bool set_isa(const char* name);

}  // namespace maskmoe
