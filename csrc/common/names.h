// Options that ops take by name, as enums. Names are parsed here and nowhere else.
//
// This header includes nothing: the kernels of one instruction set and of CUDA include it.
#pragma once

namespace maskmoe {

struct Text;  // common/text.h

enum class Activation : int { kNone, kRelu, kLeakyRelu, kGelu, kTanh, kSilu };
enum class Confidence : int { kAbs, kSquare, kSmooth, kRare };
enum class Weighting : int { kDeselection, kSelection, kUniform };
// The loss of an expert: binary or K-class cross-entropy, squared error.
enum class Objective : int { kBinary, kMulticlass, kRegression };
enum class Normalization : int { kNone, kSample, kExpert, kBatch };

// The option with this name; an unknown name is an error that lists the known ones.
Activation activation_named(const Text& name);
Confidence confidence_named(const Text& name);
Weighting weighting_named(const Text& name);
Objective objective_named(const Text& name);
Normalization normalization_named(const Text& name);

}  // namespace maskmoe
