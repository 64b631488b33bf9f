// Options that ops take by name, as enums.
#pragma once

namespace maskmoe::fused {

enum class Activation : int { kNone, kRelu, kLeakyRelu, kGelu, kTanh, kSilu };
enum class Confidence : int { kAbs, kSquare, kSmooth, kRare };
enum class Weighting : int { kDeselection, kSelection };
enum class Normalization : int { kNone, kSample, kExpert, kBatch };

}  // namespace maskmoe::fused
