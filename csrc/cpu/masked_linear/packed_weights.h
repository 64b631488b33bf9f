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
          const float* from = static_cast<const float*>(weight);
          if (c + kCopiesAhead < panel.copies_end) prefetch(from, view.copies[c + kCopiesAhead]);
          copy_block(at, width, from + copy.packed, copy);
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

  // Nothing below is where the hardware expects it, so all that is read is prefetched.
  static constexpr int64_t kCopiesAhead = 8, kLinesAhead = 16;

  static void prefetch(const float* weight, const Copy& copy) {
    const int64_t size = E::min(copy.inputs * copy.lanes, 256);
    for (int64_t n = 0; n < size; n += 16) __builtin_prefetch(weight + copy.packed + n);
  }

  // `count` lines of N values each.
  template <int N>
  static void copy_lines(float* to, int64_t to_step, const float* from, int64_t from_step,
                         int64_t count) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, to += to_step, from += from_step) {
      __builtin_prefetch(from + kLinesAhead * from_step);
      E::copy(to, from, N);
    }
  }

  // By the number of values.
  using CopyLines = void (*)(float*, int64_t, const float*, int64_t, int64_t);
  struct Copies {
    CopyLines of[2 * L + 1]{};
    constexpr Copies() { fill<2 * L>(); }
    template <int N>
    constexpr void fill() {
      of[N] = copy_lines<N>;
      if constexpr (N > 1) fill<N - 1>();
    }
  };
  static constexpr Copies copies{};

  static void copy_block(float* at, int64_t width, const float* from, const Copy& copy) {
    if (copy.lane_step == 1) {
      copies.of[copy.lanes](at, width, from, copy.input_step, copy.inputs);
      return;
    }
    if constexpr (I::kTransposes) {
      if (copy.input_step == 1 && copy.inputs > 1 && copy.lanes >= L) {
        if (copy.inputs >= 8) return transpose_block<8>(at, width, from, copy);
        if (copy.inputs >= 4) return transpose_block<4>(at, width, from, copy);
        return transpose_block<2>(at, width, from, copy);
      }
    }
    for (int64_t k = 0; k < copy.inputs; ++k) {
      for (int64_t lane = 0; lane < copy.lanes; ++lane) {
        at[k * width + lane] = from[k * copy.input_step + lane * copy.lane_step];
      }
    }
  }

  // K inputs of L lanes at a time; the last ones overlap those before them, which are copied twice.
  template <int K>
  static void transpose_block(float* at, int64_t width, const float* from, const Copy& copy) {
    for (int64_t n = 0; n < copy.lanes; n += L) {
      const int64_t lane = E::min(n, copy.lanes - L);
      const float* lanes[L];
      for (int64_t k = 0; k < L; ++k) lanes[k] = from + (lane + k) * copy.lane_step;
      for (int64_t m = 0; m < copy.inputs; m += K) {
        const int64_t first = E::min(m, copy.inputs - K);
        const float* values[L];
        typename I::V inputs[K];
        for (int64_t k = 0; k < L; ++k) values[k] = lanes[k] + first;
        I::transpose(values, inputs);
        for (int64_t k = 0; k < K; ++k) I::store(at + (first + k) * width + lane, inputs[k]);
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
          copies.of[copy.lanes](to, copy.input_step, from, width, copy.inputs);
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
