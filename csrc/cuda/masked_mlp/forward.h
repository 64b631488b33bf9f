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

// Columns 4 n to 4 n + 3 of the padded input of kRows samples; NaN where an id names no row of the
// table, zero where a sample does not count. What depends on no other load comes first, so that the
// loads of all samples are on their way together.
template <class T, int kRows>
MASKMOE_DEVICE void gather(const Call& c, const InputQuad& quad, int n, const int64_t* sample,
                           const bool* counts, Vec<T, 4>* four) {
  const T zero = rounded<T>(0.0f), unknown = rounded<T>(bits_to_float(0x7fc00000u));
  MASKMOE_UNROLL
  for (int r = 0; r < kRows; ++r) four[r] = {{zero, zero, zero, zero}};
  if (quad.count > 0) {
    const PartSource& part = c.parts[quad.part];
    const T* from[kRows];
    MASKMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      from[r] = counts[r] ? source_of<T>(part, quad.column, sample[r]) : nullptr;
    }
    MASKMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!counts[r]) continue;
      if (from[r] != nullptr && quad.count == 4 && aligned<Vec<T, 4>>(from[r])) {
        four[r] = *reinterpret_cast<const Vec<T, 4>*>(from[r]);
        continue;
      }
      MASKMOE_UNROLL
      for (int m = 0; m < 4; ++m) {
        if (m < quad.count) four[r].value[m] = from[r] == nullptr ? unknown : from[r][m];
      }
    }
  } else if (quad.count < 0) {
    MASKMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
      const InputColumn column = c.plan.columns[4 * n + m];
      if (column.part < 0) continue;
      const PartSource& part = c.parts[column.part];
      const T* from[kRows];
      MASKMOE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        from[r] = counts[r] ? source_of<T>(part, column.column, sample[r]) : nullptr;
      }
      MASKMOE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (counts[r]) four[r].value[m] = from[r] == nullptr ? unknown : *from[r];
      }
    }
  }
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
        int64_t sample[kInFlight];
        bool counts[kInFlight];
        MASKMOE_UNROLL
        for (int m = 0; m < kInFlight; ++m) {
          const int at = row + m * warps;
          sample[m] = first + at;
          counts[m] = at < kR && (row_mask == nullptr ? first + at < c.rows
                                                      : row_mask[at] != 0.0f);
        }
        gather<T, kInFlight>(c, quad, n, sample, counts, four);
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

// acc += rows of `from` times the product's blocks. Weights are loaded kAhead blocks before they are
// needed, as many as registers suffice for; and so is the next run of chunks.
template <class T, int kFragments>
MASKMOE_DEVICE void accumulate(const Call& c, const Product& product, const T* from, int stride,
                               PerLane<Accumulator>* acc) {
  constexpr int kAhead = sizeof(T) == 4 ? 2 : 4;
  const T* blocks = static_cast<const T*>(c.weights) + int64_t{kBlockSize} * product.block;
  PerLane<typename Mma<T>::B> right[kAhead];
  MASKMOE_UNROLL
  for (int m = 0; m < kAhead; ++m) {
    if (m < product.blocks) Mma<T>::load_weights(right[m], blocks + m * kBlockSize);
  }
  int r = product.runs, left = 0, chunk = 0;  // of the run: chunks to come, the first of them
  ChunkRun next{};
  if (r < product.runs_end) next = c.plan.runs[r];
  for (int first = 0; first < product.blocks; first += kAhead) {
    MASKMOE_UNROLL
    for (int m = 0; m < kAhead; ++m) {
      const int n = first + m;
      if (n >= product.blocks) break;
      if (left == 0) {
        chunk = next.first, left = next.count;
        if (++r < product.runs_end) next = c.plan.runs[r];
      }
      multiply_chunk<T, kFragments>(from, stride, chunk, right[m], acc);
      if (n + kAhead < product.blocks) {
        Mma<T>::load_weights(right[m], blocks + (n + kAhead) * kBlockSize);
      }
      ++chunk, --left;
    }
  }
}

// A lane's values of a product, in pairs of neighbours: two pairs of columns, in kRowsOf<kFragments>
// rows.
template <int kFragments>
constexpr int kRowsOf = 2 * kFragments;

// f(index of the row, row, index of the columns, first column, two neighbouring values) for all of
// them.
template <int kFragments, class F>
MASKMOE_DEVICE void each_value_pair(int lane, int first, const PerLane<Accumulator>* acc,
                                    const F& f) {
  MASKMOE_UNROLL
  for (int m = 0; m < kFragments; ++m) {
    MASKMOE_UNROLL
    for (int n = 0; n < 8; n += 2) {
      f(2 * m + n / 2 % 2, first + m * 16 + accumulator_row(lane, n), n / 4,
        accumulator_column(lane, n), acc[m][lane].x[n], acc[m][lane].x[n + 1]);
    }
  }
}

// Bias and activation of a product's units. Padding and rows that do not count become zero, also
// beside infinities.
template <class T, Activation kActivation>
struct StoreUnits {
  const float* biases;    // of the layer, padded
  T* to;
  T* dact;                // null: not kept
  const float* row_mask;  // null: every row counts
  int stride;

  // What is loaded before the product is computed: while it is, loads from L2 arrive.
  template <int kFragments>
  struct Loaded {
    Vec<float, 2> bias[2];
    uint32_t counts;  // a bit for each row
  };

  template <int kFragments>
  MASKMOE_DEVICE void load(const Product& product, int first,
                           PerLane<Loaded<kFragments>>& loaded) const {
    const float* bias = biases + product.to * kChunk;
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 2; ++n) {
        loaded[lane].bias[n] =
            read_only(reinterpret_cast<const Vec<float, 2>*>(bias + accumulator_column(lane, 4 * n)));
      }
      loaded[lane].counts = 0;
      MASKMOE_UNROLL
      for (int r = 0; r < kRowsOf<kFragments>; ++r) {
        const int row = first + r / 2 * 16 + accumulator_row(lane, r % 2 * 2);
        const bool counts = row_mask == nullptr || row_mask[row] != 0.0f;
        loaded[lane].counts |= uint32_t{counts} << r;
      }
    });
  }

  template <int kFragments>
  MASKMOE_DEVICE void store(const Product& product, int first,
                            const PerLane<Loaded<kFragments>>& loaded,
                            const PerLane<Accumulator>* acc) const {
    constexpr bool kKeeps = !kFollowsFromValue<kActivation>;
    each_lane([&](int lane) {
      each_value_pair<kFragments>(
          lane, first, acc, [&](int r, int row, int n, int col, float one, float other) {
            const bool counts = (loaded[lane].counts >> r & 1) != 0;
            const bool in[2] = {counts && col < product.valid, counts && col + 1 < product.valid};
            const Vec<float, 2> bias = loaded[lane].bias[n];
            const float z[2] = {one + bias.value[0], other + bias.value[1]};
            Vec<T, 2> value, derivative;
            MASKMOE_UNROLL
            for (int m = 0; m < 2; ++m) {
              value.value[m] = rounded<T>(in[m] ? activate(z[m], kActivation) : 0.0f);
              if (kKeeps && dact != nullptr) {
                derivative.value[m] =
                    rounded<T>(in[m] ? activation_derivative(z[m], kActivation) : 0.0f);
              }
            }
            const int at = row * stride + product.to * kChunk + col;
            *reinterpret_cast<Vec<T, 2>*>(to + at) = value;
            if (kKeeps && dact != nullptr) {
              *reinterpret_cast<Vec<T, 2>*>(dact + at) = derivative;
            }
          });
    });
  }
};

// output.store of every product of a pass; output.load comes before a product is computed.
template <class T, int kR, class Output>
MASKMOE_DEVICE void each_product(const Call& c, Pass pass, int layer, const T* from, int stride,
                                 const Output& output) {
  using Of = Tiling<T, kR>;
  constexpr int kFragments = Of::kFragments;
  const int32_t* bounds = c.plan.bounds + c.plan.bounds_at(pass, layer, num_warps() / Of::kGroups);
  each_warp([&](int warp) {
    const int worker = warp / Of::kGroups, first = warp % Of::kGroups * 16 * kFragments;
    const int end = bounds[worker + 1];
    int n = bounds[worker];
    Product next{};
    if (n < end) next = c.plan.products[c.plan.schedule[n]];
    while (n < end) {
      const Product product = next;
      if (++n < end) next = c.plan.products[c.plan.schedule[n]];
      PerLane<typename Output::template Loaded<kFragments>> loaded;
      output.template load<kFragments>(product, first, loaded);
      PerLane<Accumulator> acc[kFragments];
      MASKMOE_UNROLL
      for (int m = 0; m < kFragments; ++m) clear(acc[m]);
      accumulate<T, kFragments>(c, product, from + first * stride, stride, acc);
      output.template store<kFragments>(product, first, loaded, acc);
    }
  });
}

// A layer of a tile, not the head.
template <class T, int kR>
MASKMOE_DEVICE void layer_forward(const Call& c, const Tile<T>& tile, int layer,
                                  const float* row_mask) {
  with_activation(c.activation, [&](auto activation) {
    each_product<T, kR>(
        c, Pass::kForward, layer, tile.inputs(c, layer), c.smem.stride[layer],
        StoreUnits<T, activation.value>{c.biases + c.plan.bias_at[layer], tile.inputs(c, layer + 1),
                                        tile.dact(c, layer + 1), row_mask,
                                        c.smem.stride[layer + 1]});
  });
}

// 16 columns of a row and as many weights of the head, loaded in words of 16 bytes.
template <class T>
struct HeadChunk {
  static constexpr int kWords = kChunk * sizeof(T) / 16;
  UInt4 row[kWords];
  Float4 weight[4];

  MASKMOE_DEVICE HeadChunk(const T* from, const float* weights) {
    MASKMOE_UNROLL
    for (int n = 0; n < 4; ++n) weight[n] = read_only(reinterpret_cast<const Float4*>(weights) + n);
    MASKMOE_UNROLL
    for (int n = 0; n < kWords; ++n) row[n] = reinterpret_cast<const UInt4*>(from)[n];
  }

  // sum + the products, in the order of the columns.
  MASKMOE_DEVICE float added_to(float sum) const {
    T h[kChunk];
    memcpy(h, row, sizeof h);
    MASKMOE_UNROLL
    for (int n = 0; n < kChunk; ++n) sum = fmaf(to_float(h[n]), weight[n / 4].value[n % 4], sum);
    return sum;
  }
};

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
      const int end = plan.head_begin[expert + 1];
      int e = plan.head_begin[expert];
      for (; e + 1 < end; e += 2) {  // two at a time: their loads are on their way together
        const int one = plan.head[e].chunk, other = plan.head[e + 1].chunk;
        const float* weights = c.head_weights + int64_t{kChunk} * e;
        const HeadChunk<T> left(from + one * kChunk, weights);
        const HeadChunk<T> right(from + other * kChunk, weights + kChunk);
        z = right.added_to(left.added_to(z));
      }
      if (e < end) {
        const float* weights = c.head_weights + int64_t{kChunk} * e;
        z = HeadChunk<T>(from + plan.head[e].chunk * kChunk, weights).added_to(z);
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
  static constexpr int kBlocksPerMultiprocessor = 1, kMostThreads = 32 * kMostWarps;

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
