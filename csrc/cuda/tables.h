// Gradients of tables: for each row of a table, the sum over the samples whose id it is, in their
// order; no atomics.
//
// Small tables: a block owns a span of table rows and reads a slice of the ids; the slices' sums
// are added in order. Large ones would have every block read all ids: there, ids come sorted, and
// a warp adds up the samples of one id.
#pragma once

#include "cuda/call.h"

namespace maskmoe::fused {

constexpr int kCellsOfSpan = 8192;  // floats of shared memory that a span may take
constexpr int kMostSpans = 16;      // of a small table

struct Scatter {
  const void* grad;  // (samples, stride), from column 0 of this table
  const int64_t* ids;
  const int64_t* order;  // sample of each id, where ids are sorted; else null
  int64_t samples, stride;
  int64_t rows, width;   // of the table
  int64_t span, spans;   // table rows of a block; blocks of a slice
  int64_t slice, slices;  // samples of a slice; how many
  void* result;          // (rows, width)
  float* partial;        // (slices, rows, width); null: one slice
};

// How a table is cut for so many samples.
inline void cut(Scatter& s) {
  constexpr int64_t kFewest = 512, kMostSlices = 256, kMostFloats = 1 << 22;
  const int64_t widest = s.width > 0 ? s.width : 1;
  s.span = kCellsOfSpan / widest;
  if (s.span > s.rows) s.span = s.rows;
  if (s.span < 1) s.span = 1;
  s.spans = (s.rows + s.span - 1) / s.span;
  int64_t slices = s.samples / kFewest;
  const int64_t fit = kMostFloats / (s.rows * widest > 0 ? s.rows * widest : 1);
  if (slices > fit) slices = fit;
  if (slices > kMostSlices) slices = kMostSlices;
  if (slices < 1) slices = 1;
  s.slice = (s.samples + slices - 1) / slices;
  s.slices = slices;
}

inline int64_t shared_bytes(const Scatter& s) {
  return 4 * (s.span * s.width + kThreads + kWarps);
}

template <class T>
struct ScatterRows {
  using Arguments = Scatter;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Scatter& s, const Place& place) {
    const int64_t slice = place.block / s.spans, low = place.block % s.spans * s.span;
    const int64_t high = low + s.span < s.rows ? low + s.span : s.rows;
    const int width = static_cast<int>(s.width), cells = static_cast<int>(high - low) * width;
    float* sums = reinterpret_cast<float*>(place.shared);
    int32_t* local = reinterpret_cast<int32_t*>(sums + s.span * s.width);  // row of each sample
    uint32_t* hits = reinterpret_cast<uint32_t*>(local + kThreads);        // of each warp
    each_thread([&](int thread) {
      for (int n = thread; n < cells; n += kThreads) sums[n] = 0.0f;
    });
    int64_t end = (slice + 1) * s.slice;
    if (end > s.samples) end = s.samples;
    for (int64_t first = slice * s.slice; first < end; first += kThreads) {
      barrier();
      each_warp([&](int warp) {
        PerLane<bool> hit;
        each_lane([&](int lane) {
          const int64_t sample = first + warp * 32 + lane;
          const int64_t id = sample < end ? s.ids[sample] : -1;
          hit[lane] = id >= low && id < high;
          local[warp * 32 + lane] = static_cast<int32_t>(hit[lane] ? id - low : -1);
        });
        const uint32_t bits = ballot(hit);
        each_lane([&](int lane) {
          if (lane == 0) hits[warp] = bits;
        });
      });
      barrier();
      add(s, first, width, sums, local, hits);
    }
    barrier();
    each_thread([&](int thread) {
      for (int n = thread; n < cells; n += kThreads) {
        const int64_t at = low * width + n;
        if (s.partial != nullptr) {
          s.partial[slice * s.rows * width + at] = sums[n];
        } else {
          static_cast<T*>(s.result)[at] = rounded<T>(sums[n]);
        }
      }
    });
  }

 private:
  // Samples in order; a thread owns columns of the rows that are its own modulo `turns`.
  static MASKMOE_DEVICE void add(const Scatter& s, int64_t first, int width, float* sums,
                                 const int32_t* local, const uint32_t* hits) {
    const int across = width < kThreads ? width : kThreads, turns = kThreads / across;
    each_thread([&](int thread) {
      const int turn = thread / across;
      if (turn >= turns) return;
      for (int warp = 0; warp < kWarps; ++warp) {
        for (uint32_t bits = hits[warp]; bits != 0; bits &= bits - 1) {
          const int n = warp * 32 + first_bit(bits);
          if (local[n] % turns != turn) continue;
          const T* from = static_cast<const T*>(s.grad) + (first + n) * s.stride;
          for (int col = thread % across; col < width; col += across) {
            sums[local[n] * width + col] += to_float(from[col]);
          }
        }
      }
    });
  }

  static MASKMOE_DEVICE int first_bit(uint32_t bits) {
#ifdef __CUDACC__
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
  }
};

// The slices' sums, in order.
template <class T>
struct ScatterSum {
  using Arguments = Scatter;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Scatter& s, const Place& place) {
    each_thread([&](int thread) {
      const int64_t cells = s.rows * s.width;
      for (int64_t n = place.block * kThreads + thread; n < cells; n += place.blocks * kThreads) {
        float sum = 0.0f;
        for (int64_t slice = 0; slice < s.slices; ++slice) sum += s.partial[slice * cells + n];
        static_cast<T*>(s.result)[n] = rounded<T>(sum);
      }
    });
  }
};

// Sorted ids: a warp for each sample, which goes on if its id is the first of its kind. Rows that
// nobody reads are left as they are.
template <class T>
struct ScatterSorted {
  using Arguments = Scatter;
  static constexpr int kResident = 4;

  static MASKMOE_DEVICE void run(const Scatter& s, const Place& place) {
    each_warp([&](int warp) {
      const int64_t step = place.blocks * kWarps;
      for (int64_t first = place.block * kWarps + warp; first < s.samples; first += step) {
        const int64_t id = s.ids[first];
        if (id < 0 || id >= s.rows || (first > 0 && s.ids[first - 1] == id)) continue;
        each_lane([&](int lane) {
          for (int64_t col = lane; col < s.width; col += 32) {
            float sum = 0.0f;
            for (int64_t n = first; n < s.samples && s.ids[n] == id; ++n) {
              sum += to_float(static_cast<const T*>(s.grad)[s.order[n] * s.stride + col]);
            }
            static_cast<T*>(s.result)[id * s.width + col] = rounded<T>(sum);
          }
        });
      }
    });
  }
};

}  // namespace maskmoe::fused
