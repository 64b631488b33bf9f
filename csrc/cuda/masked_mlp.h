// The network forward: a tile of rows stays in shared memory through all layers.
//
// A warp takes chunks of 16 units for 16 or 32 rows (the schedule gives warps equal work), and sums
// over the 16-column chunks that the expert sees: the left-hand side from shared memory, weights
// in the instruction's order through L2. What an expert does not see is never read.
//
//   x, ids      : read once
//   logits      : (rows, experts), written once
//   weights     : the image, rows / kR times through L2
//   grid        : persistent; block b takes tiles b, b + blocks, ...
#pragma once

#include "cuda/call.h"
#include "cuda/tensor_core.h"

namespace maskmoe::fused {

template <class T, int kR>
struct Tiling {
  static constexpr int kFragments = kR >= 32 ? 2 : 1;           // of 16 rows a warp takes
  static constexpr int kGroups = kR / (16 * kFragments);        // of rows, beside one another
  static constexpr bool kMany = kGroups == 1;                   // every warp is a worker of its own
  static constexpr int kWorkers = kWarps / kGroups;
};

// A tile in shared memory.
template <class T>
struct Tile {
  T* elements;
  float* floats;
  MASKMOE_DEVICE Tile(const Call& c, const Place& p)
      : elements(reinterpret_cast<T*>(p.shared)),
        floats(reinterpret_cast<float*>(p.shared + c.room.floats)) {}
  MASKMOE_DEVICE T* inputs(const Call& c, int layer) const { return elements + c.room.at[layer]; }
  MASKMOE_DEVICE T* slopes(const Call& c, int layer) const {
    return c.room.slope_at[layer] < 0 ? nullptr : elements + c.room.slope_at[layer];
  }
};

// Columns `column` and on of a part, for a sample; where its id names no row of a table: null.
template <class T>
MASKMOE_DEVICE const T* find(const Part& part, int32_t column, int64_t sample) {
  int64_t at = sample;
  if (part.ids != nullptr) {
    at = read_only(part.ids + sample);
    if (at < 0 || at >= part.rows) return nullptr;
  }
  return static_cast<const T*>(part.data) + at * part.stride + column;
}

// Piece n of a sample's padded input; NaN where a table has no such row.
template <class T>
MASKMOE_DEVICE Several<T, 4> gather(const Call& c, const Piece& piece, int n, int64_t sample) {
  const T zero = rounded<T>(0.0f), unknown = rounded<T>(float_of(0x7fc00000u));
  Several<T, 4> four{{zero, zero, zero, zero}};
  if (piece.count > 0) {
    const T* from = find<T>(c.parts[piece.part], piece.column, sample);
    if (from != nullptr && piece.count == 4 && aligned<Several<T, 4>>(from)) {
      return *reinterpret_cast<const Several<T, 4>*>(from);
    }
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      if (m < piece.count) four.value[m] = from == nullptr ? unknown : from[m];
    }
  } else if (piece.count < 0) {
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      const Column column = c.tables.columns[4 * n + m];
      if (column.part < 0) continue;
      const T* from = find<T>(c.parts[column.part], column.column, sample);
      four.value[m] = from == nullptr ? unknown : *from;
    }
  }
  return four;
}

// The input of a tile, padded; rows that do not count are zero. live: (kR,) or null: rows in x.
template <class T, int kR>
MASKMOE_DEVICE void load_inputs(const Call& c, const Tile<T>& tile, int64_t first,
                                const float* live) {
  constexpr int kAtOnce = kR / kWarps < 4 ? kR / kWarps : 4;  // rows on their way
  const int pieces = kSide / 4 * c.tables.chunks[0], stride = c.room.stride[0];
  each_thread([&](int thread) {
    T* to = tile.inputs(c, 0);
    for (int n = thread % 32; n < pieces; n += 32) {
      const Piece piece = c.tables.pieces[n];
      for (int row = thread / 32; row < kR; row += kAtOnce * kWarps) {
        Several<T, 4> four[kAtOnce];
        MASKMOE_UNROLL
        for (int m = 0; m < kAtOnce; ++m) {
          const int at = row + m * kWarps;
          const bool counts = live == nullptr ? first + at < c.rows : live[at] != 0.0f;
          four[m] = counts ? gather<T>(c, piece, n, first + at) : Several<T, 4>{};
        }
        MASKMOE_UNROLL
        for (int m = 0; m < kAtOnce; ++m) {
          *reinterpret_cast<Several<T, 4>*>(to + (row + m * kWarps) * stride + 4 * n) = four[m];
        }
      }
    }
  });
}

// acc += rows of `from` times the product's blocks; of 16-bit ones, kAhead are on their way.
template <class T, int kFragments>
MASKMOE_DEVICE void accumulate(const Call& c, const Product& product, const T* from, int stride,
                               PerLane<Acc>* acc) {
  using Core = fused::Core<T>;
  constexpr int kAhead = 4;
  const T* blocks = static_cast<const T*>(c.image) + int64_t{kBlock} * product.block;
  auto multiply = [&](int chunk, const PerLane<typename Core::B>& right) {
    MASKMOE_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      PerLane<typename Core::A> a;
      Core::load(a, from + f * 16 * stride + chunk * kSide, stride);
      Core::multiply(acc[f], a, right);
    }
  };
  if constexpr (sizeof(T) == 4) {  // there are registers for one that is on its way
    int left = product.blocks;
    PerLane<typename Core::B> right, next;
    if (left > 0) Core::load_image(right, blocks);
    next = right;
    for (int r = product.runs; r < product.runs_end; ++r) {
      const Run run = c.tables.runs[r];
      for (int chunk = run.first; chunk < run.first + run.count; ++chunk) {
        if (--left > 0) Core::load_image(next, blocks += kBlock);
        multiply(chunk, right);
        right = next;
      }
    }
    return;
  }
  PerLane<typename Core::B> right[kAhead];
  MASKMOE_UNROLL
  for (int m = 0; m < kAhead; ++m) {
    if (m < product.blocks) Core::load_image(right[m], blocks + m * kBlock);
  }
  int r = product.runs, left = 0, chunk = 0;  // of run r - 1: chunks to come, and the first of them
  for (int first = 0; first < product.blocks; first += kAhead) {
    MASKMOE_UNROLL
    for (int m = 0; m < kAhead; ++m) {
      const int n = first + m;
      if (n >= product.blocks) break;
      if (left == 0) {
        const Run run = c.tables.runs[r++];
        chunk = run.first, left = run.count;
      }
      multiply(chunk, right[m]);
      if (n + kAhead < product.blocks) Core::load_image(right[m], blocks + (n + kAhead) * kBlock);
      ++chunk, --left;
    }
  }
}

// Activations of two neighbouring units; padding stays zero whatever the rows hold.
template <class T>
struct Epilogue {
  const Call& c;
  const Product& product;
  const float* bias;
  T* to;
  T* slope;           // null: not kept
  const float* live;  // null: every row counts
  int stride;

  MASKMOE_DEVICE void operator()(int row, int col, float first, float second) const {
    const bool counts = live == nullptr || live[row] != 0.0f;
    const bool in[2] = {counts && col < product.valid, counts && col + 1 < product.valid};
    const float z[2] = {first + bias[col], second + bias[col + 1]};
    Several<T, 2> value, derivative;
    MASKMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
      value.value[n] = rounded<T>(in[n] ? activate(z[n], c.activation) : 0.0f);
      if (slope) derivative.value[n] = rounded<T>(in[n] ? slope_at(z[n], c.activation) : 0.0f);
    }
    const int at = row * stride + product.to * kSide + col;
    *reinterpret_cast<Several<T, 2>*>(to + at) = value;
    if (slope) *reinterpret_cast<Several<T, 2>*>(slope + at) = derivative;
  }
};

// f(worker, first row) of each warp.
template <class T, int kR, class F>
MASKMOE_DEVICE void each_worker(const F& f) {
  using Of = Tiling<T, kR>;
  each_warp([&](int warp) { f(warp / Of::kGroups, warp % Of::kGroups * 16 * Of::kFragments); });
}

// f(product, first row, acc) for every product of a pass.
template <class T, int kR, class F>
MASKMOE_DEVICE void each_product(const Call& c, Order order, int layer, const T* from, int stride,
                                 const F& f) {
  using Of = Tiling<T, kR>;
  const int32_t* bounds = c.tables.bounds + c.tables.pass(order, layer, Of::kMany);
  each_worker<T, kR>([&](int worker, int first) {
    for (int n = bounds[worker]; n < bounds[worker + 1]; ++n) {
      const Product product = c.tables.products[c.tables.schedule[n]];
      PerLane<Acc> acc[Of::kFragments];
      MASKMOE_UNROLL
      for (int m = 0; m < Of::kFragments; ++m) clear(acc[m]);
      accumulate<T, Of::kFragments>(c, product, from + first * stride, stride, acc);
      f(product, first, acc);
    }
  });
}

// Layer `layer`, not the last one, of a tile.
template <class T, int kR>
MASKMOE_DEVICE void layer_forward(const Call& c, const Tile<T>& tile, int layer,
                                  const float* live) {
  using Of = Tiling<T, kR>;
  each_product<T, kR>(
      c, Order::kForward, layer, tile.inputs(c, layer), c.room.stride[layer],
      [&](const Product& product, int first, PerLane<Acc>* acc) {
        const Epilogue<T> write{c,
                                product,
                                c.biases + c.tables.bias_at[layer] + product.to * kSide,
                                tile.inputs(c, layer + 1),
                                tile.slopes(c, layer + 1),
                                live,
                                c.room.stride[layer + 1]};
        each_lane([&](int lane) {
          MASKMOE_UNROLL
          for (int m = 0; m < Of::kFragments; ++m) {
            MASKMOE_UNROLL
            for (int n = 0; n < 8; n += 2) {
              write(first + m * 16 + acc_row(lane, n), acc_col(lane, n), acc[m][lane].x[n],
                    acc[m][lane].x[n + 1]);
            }
          }
        });
      });
}

// The sum over 16 columns of a row, in words of 16 bytes.
template <class T>
MASKMOE_DEVICE float dot(const T* row, const float* weight, float sum) {
  constexpr int kWide = 16 / sizeof(T);
  MASKMOE_UNROLL
  for (int n = 0; n < kSide; n += kWide) {
    T h[kWide];
    const Quad q = *reinterpret_cast<const Quad*>(row + n);
    memcpy(h, &q, sizeof h);
    MASKMOE_UNROLL
    for (int m = 0; m < kWide; m += 4) {
      const Quad4 w = read_only(reinterpret_cast<const Quad4*>(weight + n + m));
      MASKMOE_UNROLL
      for (int k = 0; k < 4; ++k) sum = fmaf(to_float(h[m + k]), w.value[k], sum);
    }
  }
  return sum;
}

// f(row, expert, logit) for every logit of a tile; the last layer has one unit an expert.
template <class T, int kR, class F>
MASKMOE_DEVICE void last_forward(const Call& c, const Tile<T>& tile, const F& f) {
  const Tables& t = c.tables;
  const int layer = t.layers - 1;
  each_thread([&](int thread) {
    for (int n = thread; n < kR * t.experts; n += kThreads) {
      const int row = n % kR, expert = n / kR;
      const T* from = tile.inputs(c, layer) + row * c.room.stride[layer];
      float z = 0.0f;
      for (int e = t.entries_begin[expert]; e < t.entries_begin[expert + 1]; ++e) {
        z = dot(from + t.entries[e].chunk * kSide, c.last + int64_t{kSide} * e, z);
      }
      f(row, expert, z + c.biases[t.bias_at[layer] + expert]);
    }
  });
}

// A tile's input through all layers but the last. live: as load_inputs has it.
template <class T, int kR>
MASKMOE_DEVICE void units_forward(const Call& c, const Tile<T>& tile, int64_t first,
                                  const float* live) {
  load_inputs<T, kR>(c, tile, first, live);
  barrier();
  for (int layer = 0; layer + 1 < c.tables.layers; ++layer) {
    layer_forward<T, kR>(c, tile, layer, live);
    barrier();
  }
}

template <class T, int kR>
struct Forward {
  using Arguments = Call;
  static constexpr int kResident = sizeof(T) == 4 ? 2 : 3;  // blocks a processor is to hold

  static MASKMOE_DEVICE void run(const Call& c, const Place& place) {
    const Tile<T> tile(c, place);
    T* logits = static_cast<T*>(c.logits);
    for (int64_t n = place.block; n * kR < c.rows; n += place.blocks) {
      const int64_t first = n * kR;
      barrier();
      units_forward<T, kR>(c, tile, first, nullptr);
      last_forward<T, kR>(c, tile, [&](int row, int expert, float z) {
        if (first + row < c.rows) {
          logits[(first + row) * c.tables.experts + expert] = rounded<T>(z);
        }
      });
    }
  }
};

}  // namespace maskmoe::fused
