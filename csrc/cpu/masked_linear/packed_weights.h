// Weights between their packed order and the buffers of panels, for one instruction set `I`.
#pragma once

#include "cpu/masked_linear/elements.h"

namespace maskmoe {

template <class I>
struct PackedWeights {
  using E = Elements<I>;
  static constexpr int L = I::kLanes;

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
                   Dtype dtype, Place in_place, float* buffer) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (panel.place >= in_place) continue;
      const int64_t width = panel.vectors * L;
      float* to = buffer + panel.buffer;
      if (panel.shared || panel.lanes < width) {
        for (int64_t n = 0; n < panel.depth * width; n += L) I::store(to + n, I::zero());
      }
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        float* at = to + copy.row * width + copy.lane;
        if (dtype == Dtype::kFloat32) {
          copy_block(at, width, static_cast<const float*>(weight) + copy.packed, copy);
        } else if (copy.lane_step == 1) {
          const uint16_t* from = static_cast<const uint16_t*>(weight) + copy.packed;
          for (int64_t k = 0; k < copy.inputs; ++k) {
            E::load(at + k * width, from + k * copy.input_step, dtype, nullptr, copy.lanes);
          }
        } else {
          float line[64];  // where lanes lie apart, inputs are neighbours
          for (int64_t lane = 0; lane < copy.lanes; ++lane) {
            const uint16_t* from =
                static_cast<const uint16_t*>(weight) + copy.packed + lane * copy.lane_step;
            for (int64_t k = 0; k < copy.inputs; k += 64) {
              const int64_t count = E::min(64, copy.inputs - k);
              E::load(line, from + k, dtype, nullptr, count);
              for (int64_t n = 0; n < count; ++n) at[(k + n) * width + lane] = line[n];
            }
          }
        }
      }
    }
  }

  static void copy_block(float* at, int64_t width, const float* from, const Copy& copy) {
    if (copy.lane_step == 1) {
      for (int64_t k = 0; k < copy.inputs; ++k) {
        E::copy(at + k * width, from + k * copy.input_step, copy.lanes);
      }
      return;
    }
    for (int64_t k = 0; k < copy.inputs; ++k) {
      for (int64_t lane = 0; lane < copy.lanes; ++lane) {
        at[k * width + lane] = from[k * copy.input_step + lane * copy.lane_step];
      }
    }
  }

  static void unpack(const PanelsView& view, int64_t begin, int64_t end, const float* buffer,
                     Place in_place, float* weight) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = view.panels[p];
      if (panel.place >= in_place) continue;
      const int64_t width = panel.vectors * L;
      for (int64_t c = panel.copies; c < panel.copies_end; ++c) {
        const Copy& copy = view.copies[c];
        const float* from = buffer + panel.buffer + copy.row * width + copy.lane;
        float* to = weight + copy.packed;
        if (copy.lane_step == 1) {
          for (int64_t k = 0; k < copy.inputs; ++k) {
            E::copy(to + k * copy.input_step, from + k * width, copy.lanes);
          }
          continue;
        }
        for (int64_t k = 0; k < copy.inputs; ++k) {
          for (int64_t lane = 0; lane < copy.lanes; ++lane) {
            to[k * copy.input_step + lane * copy.lane_step] = from[k * width + lane];
          }
        }
      }
    }
  }
};

}  // namespace maskmoe
