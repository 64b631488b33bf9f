// The forward kernel, and the steps of it that the other kernels share.
//
// A tile of rows stays in shared memory through all layers. A warp computes chunks of 16 units for
// 16 or 32 rows (the plan's schedule gives warps equal work), as sums over the 16-column chunks
// that the expert sees: inputs from shared memory, weights through L2 in the order of the matrix
// instruction. What an expert does not see is never read.
#pragma once

#include "cuda/masked_mlp/arguments.h"
#include "cuda/mma.h"

namespace maskmoe::fused {

// How the warps of a block share kR rows.
template <class T, int kR>
struct Tiling {
  static constexpr int kFragments = kR >= 32 ? 2 : 1;     // times 16 rows: rows of a warp
  static constexpr int kGroups = kR / (16 * kFragments);  // of rows, computed by different warps
};

// A tile in shared memory.
template <class T>
struct Tile {
  T* elements;
  float* floats;
  MASKMOE_DEVICE Tile(const Call& c, const GridPosition& grid)
      : elements(reinterpret_cast<T*>(grid.shared)),
        floats(reinterpret_cast<float*>(grid.shared + c.smem.floats_at)) {}
  MASKMOE_DEVICE T* inputs(const Call& c, int layer) const {
    return elements + c.smem.inputs_at[layer];
  }
  MASKMOE_DEVICE T* dact(const Call& c, int layer) const {
    return c.smem.dact_at[layer] < 0 ? nullptr : elements + c.smem.dact_at[layer];
  }
};

// Address of a part's column for a sample; null: its id names no row of the table.
template <class T>
MASKMOE_DEVICE const T* source_of(const PartSource& part, int32_t column, int64_t sample) {
  int64_t row = sample;
  if (part.ids != nullptr) {
    row = read_only(part.ids + sample);
    if (row < 0 || row >= part.rows) return nullptr;
  }
  return static_cast<const T*>(part.data) + row * part.stride + column;
}

// Columns 4 n to 4 n + 3 of a sample's padded input; NaN where an id names no row of the table.
template <class T>
MASKMOE_DEVICE Vec<T, 4> gather(const Call& c, const InputQuad& quad, int n, int64_t sample) {
  const T zero = rounded<T>(0.0f), unknown = rounded<T>(bits_to_float(0x7fc00000u));
  Vec<T, 4> four{{zero, zero, zero, zero}};
  if (quad.count > 0) {
    const T* from = source_of<T>(c.parts[quad.part], quad.column, sample);
    if (from != nullptr && quad.count == 4 && aligned<Vec<T, 4>>(from)) {
      return *reinterpret_cast<const Vec<T, 4>*>(from);
    }
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      if (m < quad.count) four.value[m] = from == nullptr ? unknown : from[m];
    }
  } else if (quad.count < 0) {
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      const InputColumn column = c.plan.columns[4 * n + m];
      if (column.part < 0) continue;
      const T* from = source_of<T>(c.parts[column.part], column.column, sample);
      four.value[m] = from == nullptr ? unknown : *from;
    }
  }
  return four;
}

// The padded input of a tile; rows that do not count are zero.
//   row_mask : (kR,) float, 0: the row does not count; null: all rows below c.rows count
template <class T, int kR>
MASKMOE_DEVICE void load_inputs(const Call& c, const Tile<T>& tile, int64_t first,
                                const float* row_mask) {
  constexpr int kInFlight = kR / kWarps < 4 ? kR / kWarps : 4;  // rows that a lane loads at a time
  const int quads = kChunk / 4 * c.plan.chunks[0], stride = c.smem.stride[0], warps = num_warps();
  each_thread([&](int thread) {
    T* to = tile.inputs(c, 0);
    for (int n = thread % 32; n < quads; n += 32) {
      const InputQuad quad = c.plan.quads[n];
      for (int row = thread / 32; row < kR; row += kInFlight * warps) {
        Vec<T, 4> four[kInFlight];
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) {
          const int at = row + m * warps;
          const bool counts = at < kR && (row_mask == nullptr ? first + at < c.rows
                                                              : row_mask[at] != 0.0f);
          four[m] = counts ? gather<T>(c, quad, n, first + at) : Vec<T, 4>{};
        }
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) {
          const int at = row + m * warps;
          if (at < kR) *reinterpret_cast<Vec<T, 4>*>(to + at * stride + 4 * n) = four[m];
        }
      }
    }
  });
}

// acc += rows of `from` times one block of weights, for the chunk that the block reads.
template <class T, int kFragments>
MASKMOE_DEVICE void multiply_chunk(const T* from, int stride, int chunk,
                                   const PerLane<typename Mma<T>::B>& right,
                                   PerLane<Accumulator>* acc) {
  MASKMOE_UNROLL
  for (int f = 0; f < kFragments; ++f) {
    PerLane<typename Mma<T>::A> a;
    Mma<T>::load(a, from + f * 16 * stride + chunk * kChunk, stride);
    Mma<T>::multiply(acc[f], a, right);
  }
}

// acc += rows of `from` times the product's blocks. Registers suffice to load one block of 32-bit
// weights ahead, and kAhead blocks of 16-bit weights.
template <class T, int kFragments>
MASKMOE_DEVICE void accumulate(const Call& c, const Product& product, const T* from, int stride,
                               PerLane<Accumulator>* acc) {
  using B = typename Mma<T>::B;
  const T* blocks = static_cast<const T*>(c.weights) + int64_t{kBlockSize} * product.block;
  if constexpr (sizeof(T) == 4) {
    int left = product.blocks;
    PerLane<B> right, next;
    if (left > 0) Mma<T>::load_weights(right, blocks);
    next = right;
    for (int r = product.runs; r < product.runs_end; ++r) {
      const ChunkRun run = c.plan.runs[r];
      for (int chunk = run.first; chunk < run.first + run.count; ++chunk) {
        if (--left > 0) Mma<T>::load_weights(next, blocks += kBlockSize);
        multiply_chunk<T, kFragments>(from, stride, chunk, right, acc);
        right = next;
      }
    }
  } else {
    constexpr int kAhead = 4;
    PerLane<B> right[kAhead];
    MASKMOE_UNROLL
    for (int m = 0; m < kAhead; ++m) {
      if (m < product.blocks) Mma<T>::load_weights(right[m], blocks + m * kBlockSize);
    }
    int r = product.runs, left = 0, chunk = 0;  // of run r - 1: chunks to come, the first of them
    for (int first = 0; first < product.blocks; first += kAhead) {
      MASKMOE_UNROLL
      for (int m = 0; m < kAhead; ++m) {
        const int n = first + m;
        if (n >= product.blocks) break;
        if (left == 0) {
          const ChunkRun run = c.plan.runs[r++];
          chunk = run.first, left = run.count;
        }
        multiply_chunk<T, kFragments>(from, stride, chunk, right[m], acc);
        if (n + kAhead < product.blocks) {
          Mma<T>::load_weights(right[m], blocks + (n + kAhead) * kBlockSize);
        }
        ++chunk, --left;
      }
    }
  }
}

// Bias and activation of two neighbouring units of a row. Padding and rows that do not count become
// zero, also beside infinities.
template <class T>
struct Epilogue {
  const Call& c;
  const Product& product;
  const float* bias;
  T* to;
  T* dact;                // null: not kept
  const float* row_mask;  // null: every row counts
  int stride;

  MASKMOE_DEVICE void operator()(int row, int col, float first, float second) const {
    const bool counts = row_mask == nullptr || row_mask[row] != 0.0f;
    const bool in[2] = {counts && col < product.valid, counts && col + 1 < product.valid};
    const float z[2] = {first + bias[col], second + bias[col + 1]};
    Vec<T, 2> value, derivative;
    MASKMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
      value.value[n] = rounded<T>(in[n] ? activate(z[n], c.activation) : 0.0f);
      if (dact) {
        derivative.value[n] = rounded<T>(in[n] ? activation_derivative(z[n], c.activation) : 0.0f);
      }
    }
    const int at = row * stride + product.to * kChunk + col;
    *reinterpret_cast<Vec<T, 2>*>(to + at) = value;
    if (dact) *reinterpret_cast<Vec<T, 2>*>(dact + at) = derivative;
  }
};

// f(product, first row of the warp, acc) for every product of a pass.
template <class T, int kR, class F>
MASKMOE_DEVICE void each_product(const Call& c, Pass pass, int layer, const T* from, int stride,
                                 const F& f) {
  using Of = Tiling<T, kR>;
  const int32_t* bounds = c.plan.bounds + c.plan.bounds_at(pass, layer, num_warps() / Of::kGroups);
  each_warp([&](int warp) {
    const int worker = warp / Of::kGroups, first = warp % Of::kGroups * 16 * Of::kFragments;
    for (int n = bounds[worker]; n < bounds[worker + 1]; ++n) {
      const Product product = c.plan.products[c.plan.schedule[n]];
      PerLane<Accumulator> acc[Of::kFragments];
      MASKMOE_UNROLL
      for (int m = 0; m < Of::kFragments; ++m) clear(acc[m]);
      accumulate<T, Of::kFragments>(c, product, from + first * stride, stride, acc);
      f(product, first, acc);
    }
  });
}

// f(row, column, two neighbouring values) for all values of a product.
template <int kFragments, class F>
MASKMOE_DEVICE void each_value_pair(int first, const PerLane<Accumulator>* acc, const F& f) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int m = 0; m < kFragments; ++m) {
      MASKMOE_UNROLL
      for (int n = 0; n < 8; n += 2) {
        f(first + m * 16 + accumulator_row(lane, n), accumulator_column(lane, n),
          acc[m][lane].x[n], acc[m][lane].x[n + 1]);
      }
    }
  });
}

// A layer of a tile, not the head.
template <class T, int kR>
MASKMOE_DEVICE void layer_forward(const Call& c, const Tile<T>& tile, int layer,
                                  const float* row_mask) {
  each_product<T, kR>(c, Pass::kForward, layer, tile.inputs(c, layer), c.smem.stride[layer],
                      [&](const Product& product, int first, PerLane<Accumulator>* acc) {
                        const Epilogue<T> store{
                            c,
                            product,
                            c.biases + c.plan.bias_at[layer] + product.to * kChunk,
                            tile.inputs(c, layer + 1),
                            tile.dact(c, layer + 1),
                            row_mask,
                            c.smem.stride[layer + 1]};
                        each_value_pair<Tiling<T, kR>::kFragments>(first, acc, store);
                      });
}

// sum + 16 columns of a row times as many weights, loaded in words of 16 bytes.
template <class T>
MASKMOE_DEVICE float dot(const T* row, const float* weight, float sum) {
  constexpr int kWide = 16 / sizeof(T);
  MASKMOE_UNROLL
  for (int n = 0; n < kChunk; n += kWide) {
    T h[kWide];
    const UInt4 q = *reinterpret_cast<const UInt4*>(row + n);
    memcpy(h, &q, sizeof h);
    MASKMOE_UNROLL
    for (int m = 0; m < kWide; m += 4) {
      const Float4 w = read_only(reinterpret_cast<const Float4*>(weight + n + m));
      MASKMOE_UNROLL
      for (int k = 0; k < 4; ++k) sum = fmaf(to_float(h[m + k]), w.value[k], sum);
    }
  }
  return sum;
}

// f(row, expert, logit) for every logit of a tile.
template <class T, int kR, class F>
MASKMOE_DEVICE void head_forward(const Call& c, const Tile<T>& tile, const F& f) {
  const ExecutionPlan& plan = c.plan;
  const int layer = plan.layers - 1;
  each_thread([&](int thread) {
    for (int n = thread; n < kR * plan.experts; n += num_threads()) {
      const int row = n % kR, expert = n / kR;
      const T* from = tile.inputs(c, layer) + row * c.smem.stride[layer];
      float z = 0.0f;
      for (int e = plan.head_begin[expert]; e < plan.head_begin[expert + 1]; ++e) {
        z = dot(from + plan.head[e].chunk * kChunk, c.head_weights + int64_t{kChunk} * e, z);
      }
      f(row, expert, z + c.biases[plan.bias_at[layer] + expert]);
    }
  });
}

// A tile through all layers but the head. row_mask: see load_inputs.
template <class T, int kR>
MASKMOE_DEVICE void hidden_layers_forward(const Call& c, const Tile<T>& tile, int64_t first,
                                          const float* row_mask) {
  load_inputs<T, kR>(c, tile, first, row_mask);
  barrier();
  for (int layer = 0; layer + 1 < c.plan.layers; ++layer) {
    layer_forward<T, kR>(c, tile, layer, row_mask);
    barrier();
  }
}

// The logits of an MLP.
//   x, ids       : c.parts, each row read once
//   weights      : as PackWeights leaves them; read rows / kR times, through L2
//   logits       : (rows, experts), each element written once, by one thread: deterministic
//   grid         : the blocks that the device runs at a time; block b computes tiles b, b + blocks,
//                  b + 2 blocks, ...
//   shared memory: the inputs of two layers, (kR, padded columns) each; see smem_layout
template <class T, int kR>
struct Forward {
  using Arguments = Call;
  static constexpr int kBlocksPerMultiprocessor = sizeof(T) == 4 ? 2 : 3;  // limits registers

  static MASKMOE_DEVICE void run(const Call& c, const GridPosition& grid) {
    const Tile<T> tile(c, grid);
    T* logits = static_cast<T*>(c.logits);
    for (int64_t n = grid.block; n * kR < c.rows; n += grid.num_blocks) {
      const int64_t first = n * kR;
      barrier();
      hidden_layers_forward<T, kR>(c, tile, first, nullptr);
      head_forward<T, kR>(c, tile, [&](int row, int expert, float z) {
        if (first + row < c.rows) {
          logits[(first + row) * c.plan.experts + expert] = rounded<T>(z);
        }
      });
    }
  }
};

}  // namespace maskmoe::fused
