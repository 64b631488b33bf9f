// The gradient of an embedding table: for each row, the sum over the samples that read it.
//
// Small tables (ScatterRows, ScatterSum): a block owns a span of table rows and reads a slice of
// the samples; the slices' sums are added in order. Large tables (NarrowIds, ScatterSorted), where
// every block would have to read all ids: the ids come sorted, and a warp adds up the samples of one
// id. A sum has one thread, which adds samples in order, or a fixed number of them; there are no
// atomics: deterministic.
#pragma once

#include "cuda/masked_mlp/sum_in_order.h"

namespace maskmoe::fused {

constexpr int kMaxSpanFloats = 8192;  // of shared memory
constexpr int kMaxSpans = 16;          // of a small table

struct ScatterArguments {
  const void* grad;  // (samples, stride), from column 0 of this table
  const int64_t* ids;
  const void* sorted;     // ids in ascending order, of a narrow type, -1 for those of no row
  const int64_t* order;   // the sample of each of `sorted`
  int64_t samples, stride;
  int64_t rows, width;    // of the table
  int64_t span, spans;    // table rows of a block; how many spans
  int64_t slice, slices;  // samples of a block; how many slices
  void* result;           // (rows, width)
  float* slice_sums;      // (slices, rows, width); null: one slice
};

// Cuts rows into spans and samples into slices.
inline void partition(ScatterArguments& s) {
  constexpr int64_t kMinSlice = 64, kMaxSlices = 1024, kMaxFloats = 1 << 22;
  const int64_t widest = s.width > 0 ? s.width : 1;
  s.span = kMaxSpanFloats / widest;
  if (s.span > s.rows) s.span = s.rows;
  if (s.span < 1) s.span = 1;
  s.spans = (s.rows + s.span - 1) / s.span;
  int64_t slices = s.samples / kMinSlice;
  const int64_t fit = kMaxFloats / (s.rows * widest > 0 ? s.rows * widest : 1);
  if (slices > fit) slices = fit;
  if (slices > kMaxSlices) slices = kMaxSlices;
  if (slices < 1) slices = 1;
  s.slice = (s.samples + slices - 1) / slices;
  s.slices = slices;
}

inline int64_t shared_bytes(const ScatterArguments& s) {
  return 4 * (s.span * s.width + kThreads + kWarps);
}

//   grad         : (samples, stride) T; ids: (samples,)
//   result       : (rows, width) T, if there is one slice; else slice_sums
//   grid         : spans * slices; block b owns span b % spans of slice b / spans
//   shared memory: shared_bytes: (span, width) float32 sums, the row of each thread's sample, a bit
//                  for each sample that reads the span
template <class T>
struct ScatterRows {
  using Arguments = ScatterArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static MASKMOE_DEVICE void run(const ScatterArguments& s, const GridPosition& grid) {
    const int64_t slice = grid.block / s.spans, low = grid.block % s.spans * s.span;
    const int64_t high = low + s.span < s.rows ? low + s.span : s.rows;
    const int width = static_cast<int>(s.width), cells = static_cast<int>(high - low) * width;
    float* sums = reinterpret_cast<float*>(grid.shared);
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
        if (s.slice_sums != nullptr) {
          s.slice_sums[slice * s.rows * width + at] = sums[n];
        } else {
          static_cast<T*>(s.result)[at] = rounded<T>(sums[n]);
        }
      }
    });
  }

 private:
  // Adds samples in order. A thread owns columns of the rows that are its own modulo `groups`. It
  // loads a few samples at a time, so that it seldom waits.
  static MASKMOE_DEVICE void add(const ScatterArguments& s, int64_t first, int width, float* sums,
                                 const int32_t* local, const uint32_t* hits) {
    constexpr int kInFlight = 8;
    const int across = width < kThreads ? width : kThreads;
    int groups = 1;  // a power of two
    while (2 * groups * across <= kThreads) groups *= 2;
    const T* grad = static_cast<const T*>(s.grad) + first * s.stride;
    each_thread([&](int thread) {
      const int group = thread / across;
      if (group >= groups) return;
      int warp = 0;
      uint32_t bits = hits[0];
      auto next = [&] {  // sample of an own row, or -1
        for (;;) {
          while (bits == 0) {
            if (++warp == kWarps) return --warp, -1;
            bits = hits[warp];
          }
          const int n = warp * 32 + first_bit(bits);
          bits &= bits - 1;
          if ((local[n] & (groups - 1)) == group) return n;
        }
      };
      for (bool more = true; more;) {
        int sample[kInFlight];
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) sample[m] = next();
        more = sample[kInFlight - 1] >= 0;
        for (int col = thread % across; col < width; col += across) {
          float value[kInFlight];
          MASKMOE_UNROLL
          for (int m = 0; m < kInFlight; ++m) {
            value[m] = sample[m] < 0 ? 0.0f : to_float(grad[sample[m] * s.stride + col]);
          }
          MASKMOE_UNROLL
          for (int m = 0; m < kInFlight; ++m) {
            if (sample[m] >= 0) sums[local[sample[m]] * width + col] += value[m];
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

// Adds the slices' sums, in order.
//   slice_sums   : (slices, rows, width) float32; result: (rows, width) T
//   grid         : grid_size(warps * rows * width); see add_columns
//   shared memory: of add_columns
template <class T>
struct ScatterSum {
  using Arguments = ScatterArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int64_t kShared = kColumnsShared;

  static MASKMOE_DEVICE void run(const ScatterArguments& s, const GridPosition& grid) {
    const int64_t cells = s.rows * s.width;
    add_columns(grid, s.slice_sums, cells, cells, s.slices, [&](int64_t n, float sum) {
      static_cast<T*>(s.result)[n] = rounded<T>(sum);
    });
  }
};

struct NarrowArguments {
  const int64_t* ids;
  int64_t samples, rows;
  void* narrow;
};

// Ids as a narrower type, which sorts in fewer passes; -1: an id of no row.
//   ids: (samples,); narrow: (samples,) Id; grid: grid_size(samples); no shared memory
template <class Id>
struct NarrowIds {
  using Arguments = NarrowArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static MASKMOE_DEVICE void run(const NarrowArguments& a, const GridPosition& grid) {
    each_thread([&](int thread) {
      const int64_t step = grid.num_blocks * kThreads;
      for (int64_t n = grid.block * kThreads + thread; n < a.samples; n += step) {
        const int64_t id = a.ids[n];
        static_cast<Id*>(a.narrow)[n] = static_cast<Id>(id >= 0 && id < a.rows ? id : -1);
      }
    });
  }
};

// The rows of sorted ids. A warp looks at a sample and adds up all samples of its id, if it is the
// first of them. Rows that no sample reads are not written.
//   grad         : (samples, stride) T
//   sorted, order: (samples,), of type Id and int64, sorted by id and then by sample
//   grid         : grid_size(32 * samples); no shared memory
template <class T, class Id>
struct ScatterSorted {
  using Arguments = ScatterArguments;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static MASKMOE_DEVICE void run(const ScatterArguments& s, const GridPosition& grid) {
    const Id* ids = static_cast<const Id*>(s.sorted);
    each_warp([&](int warp) {
      const int64_t step = grid.num_blocks * kWarps;
      for (int64_t first = grid.block * kWarps + warp; first < s.samples; first += step) {
        const Id id = ids[first];
        if (id < 0 || (first > 0 && ids[first - 1] == id)) continue;
        int64_t end = first + 1;
        while (end < s.samples && ids[end] == id) ++end;
        each_lane([&](int lane) {
          for (int64_t col = lane; col < s.width; col += 32) {
            static_cast<T*>(s.result)[id * s.width + col] =
                rounded<T>(sum_of(s, first, end, static_cast<const T*>(s.grad) + col));
          }
        });
      }
    });
  }

 private:
  // In order; a few loads are on their way at a time.
  static MASKMOE_DEVICE float sum_of(const ScatterArguments& s, int64_t first, int64_t end,
                                     const T* column) {
    constexpr int kInFlight = 8;
    float sum = 0.0f;
    for (int64_t n = first; n < end; n += kInFlight) {
      float value[kInFlight];
      MASKMOE_UNROLL
      for (int m = 0; m < kInFlight; ++m) {
        value[m] = n + m < end ? to_float(column[s.order[n + m] * s.stride]) : 0.0f;
      }
      MASKMOE_UNROLL
      for (int m = 0; m < kInFlight; ++m) {
        if (n + m < end) sum += value[m];
      }
    }
    return sum;
  }
};

}  // namespace maskmoe::fused
