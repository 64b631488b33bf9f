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
    if constexpr (I::kTransposes) {
      if (copy.input_step == 1 && copy.inputs >= L && copy.lanes >= L) {
        return transpose_block(at, width, from, copy);
      }
    }
    for (int64_t k = 0; k < copy.inputs; ++k) {
      for (int64_t lane = 0; lane < copy.lanes; ++lane) {
        at[k * width + lane] = from[k * copy.input_step + lane * copy.lane_step];
      }
    }
  }

  // L x L values at a time; the last ones overlap those before them, which are copied twice.
  static void transpose_block(float* at, int64_t width, const float* from, const Copy& copy) {
    for (int64_t n = 0; n < copy.lanes; n += L) {
      const int64_t lane = E::min(n, copy.lanes - L);
      const float* lanes[L];
      for (int64_t k = 0; k < L; ++k) lanes[k] = from + (lane + k) * copy.lane_step;
      for (int64_t m = 0; m < copy.inputs; m += L) {
        const int64_t first = E::min(m, copy.inputs - L);
        const float* values[L];
        typename I::V inputs[L];
        for (int64_t k = 0; k < L; ++k) values[k] = lanes[k] + first;
        I::transpose(values, inputs);
        for (int64_t k = 0; k < L; ++k) I::store(at + (first + k) * width + lane, inputs[k]);
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
