// All kernels compiled for one instruction set `I` (simd_*.h).
#pragma once

#include "cpu/masked_linear/kernel.h"
#include "cpu/masked_linear/packed_weights.h"
#include "cpu/masked_mlp/kernel.h"
#include "cpu/splines/rational_quadratic.h"

namespace maskmoe {

template <class I>
constexpr Kernels kernels_of(const char* name) {
  using E = Elements<I>;
  using Weights = PackedWeights<I>;
  using Linear = MaskedLinear<I>;
  return {name,
          I::kLanes,
          Weights::pack,
          Weights::unpack,
          Linear::forward_scratch,
          Linear::forward,
          Linear::backward_scratch,
          Linear::backward,
          E::add,
          E::load,
          E::store,
          MaskedMlp<I>::saved,
          MaskedMlp<I>::units,
          MaskedMlp<I>::scratch,
          MaskedMlp<I>::run,
          RationalQuadratic<I>::forward,
          RationalQuadratic<I>::inverse,
          RationalQuadratic<I>::backward};
}

}  // namespace maskmoe
