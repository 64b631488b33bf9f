#include "common/names.h"

#include <array>

#include "common/text.h"

namespace maskmoe {
namespace {

template <class Option, size_t N>
Option option_named(const std::array<const char*, N>& names, const Text& name, const char* what) {
  for (size_t n = 0; n < N; ++n) {
    if (name == names[n]) return static_cast<Option>(n);
  }
  std::string known = names[0];
  for (size_t n = 1; n < N; ++n) known += std::string(", ") + names[n];
  STD_TORCH_CHECK(false, "maskmoe: unknown ", what, " '", name.c_str(), "'; choose one of ", known);
}

}  // namespace

Activation activation_named(const Text& name) {
  constexpr std::array names{"none", "relu", "leaky_relu", "gelu", "tanh", "silu"};
  return option_named<Activation>(names, name, "activation");
}

Confidence confidence_named(const Text& name) {
  constexpr std::array names{"abs", "square", "smooth", "rare"};
  return option_named<Confidence>(names, name, "confidence");
}

Weighting weighting_named(const Text& name) {
  constexpr std::array names{"deselection", "selection", "uniform"};
  return option_named<Weighting>(names, name, "weighting");
}

Objective objective_named(const Text& name) {
  constexpr std::array names{"binary", "multiclass", "regression"};
  return option_named<Objective>(names, name, "kind of loss");
}

Normalization normalization_named(const Text& name) {
  constexpr std::array names{"none", "sample", "expert", "batch"};
  return option_named<Normalization>(names, name, "normalization");
}

}  // namespace maskmoe
