// The network forward again and then backward, for a tile of rows at a time.
//
// Recomputing costs one product more and no memory traffic: x is read once, and what is written
// are gradients. Each layer's gradient before the activation takes the place of its values as soon
// as the layer's weight gradient has read them. Weight gradients are sums over rows: each block
// keeps its own float32 image of them, in shared memory what has room there and the rest in L2, and
// adds its tiles there in order; no atomics.
#pragma once

#include "cuda/objective.h"

namespace maskmoe::fused {

// A block's partial gradients: the last ones in shared memory, the others in L2.
struct Partial {
  float *near, *far;  // far: null where nobody asks for them
  int64_t from;       // the first one that is near
  bool fresh;         // nothing has been added yet

  MASKMOE_DEVICE bool wanted() const { return far != nullptr; }
  MASKMOE_DEVICE float* at(int64_t n) const { return n < from ? far + n : near + (n - from); }

  // Value n, whose sum is one thread's from the first tile to the last.
  MASKMOE_DEVICE void add(int64_t n, float value) const {
    float* to = at(n);
    *to = fresh ? value : *to + value;
  }

  // Hands the near ones to whoever adds up the blocks.
  MASKMOE_DEVICE void store(int64_t count) const {
    each_thread([&](int thread) {
      for (int64_t n = from + thread; n < count; n += kThreads) far[n] = near[n - from];
    });
  }
};

MASKMOE_DEVICE void load_kept(PerLane<Acc>& kept, const Quad4* from) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int n = 0; n < 8; ++n) kept[lane].x[n] = from[n / 4 * 32 + lane].value[n % 4];
  });
}

MASKMOE_DEVICE void store_sum(Quad4* to, const PerLane<Acc>& kept, const PerLane<Acc>& acc) {
  each_lane([&](int lane) {
    MASKMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      Quad4 sum;
      MASKMOE_UNROLL
      for (int k = 0; k < 4; ++k) {
        sum.value[k] = kept[lane].x[half * 4 + k] + acc[lane].x[half * 4 + k];
      }
      to[half * 32 + lane] = sum;
    }
  });
}

// Gradient of the blocks that end in a chunk of units: inputs' columns times units' columns. The
// sums of earlier tiles are on their way kAhead blocks before they are needed, and those of the next
// strip come from memory into L2 meanwhile.
template <class T, int kR>
MASKMOE_DEVICE void grad_blocks(const Call& c, const Tile<T>& tile, int layer,
                                const Partial& partial) {
  using Core = fused::Core<T>;
  constexpr int kSteps = kR / 16;
  constexpr bool kHold = sizeof(T) == 2;  // there are registers for all rows of the units
  constexpr int kAhead = kHold ? 4 : 2;
  const T* inputs = tile.inputs(c, layer);
  const T* units = tile.inputs(c, layer + 1);
  const int in_stride = c.room.stride[layer], out_stride = c.room.stride[layer + 1];
  const int32_t* bounds = c.tables.bounds + c.tables.pass(Order::kGradient, layer, true);
  auto sums_of = [&](int b) { return reinterpret_cast<Quad4*>(partial.at(int64_t{kBlock} * b)); };
  each_warp([&](int warp) {
    for (int n = bounds[warp]; n < bounds[warp + 1]; ++n) {
      const Strip strip = c.tables.strips[c.tables.schedule[n]];
      const int end = strip.block + strip.blocks;
      PerLane<Acc> kept[kAhead];
      int chunk[kAhead];  // of inputs
      auto fetch = [&](int m, int b) {
        if (b >= end) return;
        chunk[m] = c.tables.blocks[b].chunk;
        if (!partial.fresh) load_kept(kept[m], sums_of(b));
      };
      MASKMOE_UNROLL
      for (int m = 0; m < kAhead; ++m) {
        clear(kept[m]);
        fetch(m, strip.block + m);
      }
      if (!partial.fresh && n + 1 < bounds[warp + 1]) {
        const Strip next = c.tables.strips[c.tables.schedule[n + 1]];
        const int64_t first = int64_t{kBlock} * next.block;
        if (first < partial.from) fetch_ahead(partial.far + first, 4 * kBlock * next.blocks);
      }
      const T* at = units + strip.tile * kSide;
      PerLane<typename Core::B> right[kHold ? kSteps : 1];
      MASKMOE_UNROLL
      for (int s = 0; kHold && s < kSteps; ++s) {
        Core::load_right(right[s], at + s * 16 * out_stride, out_stride);
      }
      for (int group = strip.block; group < end; group += kAhead) {
        MASKMOE_UNROLL
        for (int m = 0; m < kAhead; ++m) {
          const int b = group + m;
          if (b >= end) break;
          const T* from = inputs + chunk[m] * kSide;
          PerLane<Acc> acc;
          clear(acc);
          auto step = [&](int s) {
            PerLane<typename Core::A> a;
            if (!kHold) Core::load_right(right[0], at + s * 16 * out_stride, out_stride);
            Core::load_turned(a, from + s * 16 * in_stride, in_stride);
            Core::multiply(acc, a, right[kHold ? s : 0]);
          };
          if constexpr (kHold) {
            MASKMOE_UNROLL
            for (int s = 0; s < kSteps; ++s) step(s);
          } else {
            MASKMOE_ROLL
            for (int s = 0; s < kSteps; ++s) step(s);
          }
          store_sum(sums_of(b), kept[m], acc);
          fetch(m, b + kAhead);
        }
      }
    }
  });
}

// Sums over the rows of a layer's gradient.
template <class T, int kR>
MASKMOE_DEVICE void grad_biases(const Call& c, const Tile<T>& tile, int layer,
                                const Partial& partial) {
  const T* units = tile.inputs(c, layer + 1);
  const int stride = c.room.stride[layer + 1], columns = kSide * c.tables.chunks[layer + 1];
  const int64_t first = partial_biases(c.tables) + c.tables.bias_at[layer];
  each_thread([&](int thread) {
    for (int n = thread; n < columns; n += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += to_float(units[row * stride + n]);
      partial.add(first + n, sum);
    }
  });
}

// Gradient of the last layer's weights and biases, from the gradient of the logits.
template <class T, int kR>
MASKMOE_DEVICE void grad_last(const Call& c, const Tile<T>& tile, const float* grad,
                              const Partial& partial) {
  const Tables& t = c.tables;
  const int layer = t.layers - 1, stride = c.room.stride[layer];
  each_thread([&](int thread) {
    for (int n = thread; n < kSide * t.num_entries; n += kThreads) {
      const Entry entry = t.entries[n / kSide];
      const T* from = tile.inputs(c, layer) + entry.chunk * kSide + n % kSide;
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) {
        sum = fmaf(to_float(from[row * stride]), grad[entry.expert * kR + row], sum);
      }
      partial.add(partial_entries(t) + n, sum);
    }
    for (int expert = thread; expert < t.experts; expert += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += grad[expert * kR + row];
      partial.add(partial_biases(t) + t.bias_at[layer] + expert, sum);
    }
  });
}

// The gradients before the activation of two of a layer's inputs, in their values' place.
template <class T>
struct Descend {
  const Call& c;
  T* values;
  const T* slopes;
  int stride;

  // valid: columns of the chunk that are not padding.
  MASKMOE_DEVICE void operator()(int row, int column, int valid, float first, float second) const {
    using Pair = Several<T, 2>;
    const int at = row * stride + column;
    Pair* to = reinterpret_cast<Pair*>(values + at);
    const Pair factor = slopes == nullptr ? *to : *reinterpret_cast<const Pair*>(slopes + at);
    const float given[2] = {first, second};
    Pair down;
    MASKMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const float value = to_float(factor.value[n]);
      const float grad =
          slopes == nullptr ? before(given[n], value, c.activation) : given[n] * value;
      down.value[n] = rounded<T>(column % kSide + n < valid ? grad : 0.0f);
    }
    *to = down;
  }
};

// The gradients of two of the network's inputs.
template <class T>
struct Drain {
  const Call& c;
  int64_t first;

  MASKMOE_DEVICE void operator()(int row, int column, int, float one, float other) const {
    if (first + row >= c.rows) return;
    const float factor = c.drain_by == nullptr ? c.drain : c.drain * *c.drain_by;
    one *= factor, other *= factor;
    if (sizeof(T) == 2 && c.sinks_wide) return write<float>(row, column, one, other);
    write<T>(row, column, one, other);
  }

 private:
  template <class To>
  MASKMOE_DEVICE void write(int row, int column, float one, float other) const {
    const Column left = c.tables.columns[column], right = c.tables.columns[column + 1];
    To* to = find<To>(left, row);
    const bool next = right.part == left.part && right.column == left.column + 1;
    if (to != nullptr && next && aligned<Several<To, 2>>(to)) {
      *reinterpret_cast<Several<To, 2>*>(to) = {{rounded<To>(one), rounded<To>(other)}};
      return;
    }
    if (to != nullptr) *to = rounded<To>(one);
    to = find<To>(right, row);
    if (to != nullptr) *to = rounded<To>(other);
  }

  template <class To>
  MASKMOE_DEVICE To* find(const Column& column, int row) const {
    if (column.part < 0 || c.sinks[column.part].data == nullptr) return nullptr;
    const Sink& sink = c.sinks[column.part];
    return static_cast<To*>(sink.data) + (first + row) * sink.stride + column.column;
  }
};

// Through the last layer, along its routed weights; to(row, column, valid, two gradients).
template <class T, int kR, class F>
MASKMOE_DEVICE void last_backward(const Call& c, const float* grad, const F& to) {
  const Tables& t = c.tables;
  const int pairs = kSide / 2 * t.chunks[t.layers - 1];
  each_thread([&](int thread) {
    for (int row = thread / 32; row < kR; row += kWarps) {
      for (int n = thread % 32; n < pairs; n += 32) {
        const int column = 2 * n, chunk = column / kSide;
        float sum[2] = {0.0f, 0.0f};
        int valid = 0;
        for (int r = t.readers_begin[chunk]; r < t.readers_begin[chunk + 1]; ++r) {
          const int e = t.readers[r];
          const Entry entry = t.entries[e];
          const float* weight = c.last + int64_t{kSide} * e + column % kSide;
          valid = entry.valid;
          MASKMOE_UNROLL
          for (int m = 0; m < 2; ++m) {
            if (column % kSide + m >= valid) continue;
            sum[m] = fmaf(grad[entry.expert * kR + row], read_only(weight + m), sum[m]);
          }
        }
        to(row, column, valid, sum[0], sum[1]);
      }
    }
  });
}

// Through layer `layer`, not the last one, along its routed blocks.
template <class T, int kR, class F>
MASKMOE_DEVICE void layer_backward(const Call& c, const Tile<T>& tile, int layer, const F& to) {
  each_product<T, kR>(c, Order::kBackward, layer, tile.inputs(c, layer + 1),
                      c.room.stride[layer + 1],
                      [&](const Product& product, int first, PerLane<Acc>* acc) {
                        each_lane([&](int lane) {
                          MASKMOE_UNROLL
                          for (int m = 0; m < Tiling<T, kR>::kFragments; ++m) {
                            MASKMOE_UNROLL
                            for (int n = 0; n < 8; n += 2) {
                              to(first + m * 16 + acc_row(lane, n),
                                 product.to * kSide + acc_col(lane, n), product.valid,
                                 acc[m][lane].x[n], acc[m][lane].x[n + 1]);
                            }
                          }
                        });
                      });
}

// From the gradient of a tile's logits to all others.
template <class T, int kR>
MASKMOE_DEVICE void backward(const Call& c, const Tile<T>& tile, const float* grad, int64_t first,
                             const Partial& partial) {
  const int last = c.tables.layers - 1;
  const Drain<T> drain{c, first};
  auto descend = [&](int layer) {
    return Descend<T>{c, tile.inputs(c, layer), tile.slopes(c, layer), c.room.stride[layer]};
  };
  if (partial.wanted()) {
    grad_last<T, kR>(c, tile, grad, partial);
    barrier();
  }
  if (last > 0) {
    last_backward<T, kR>(c, grad, descend(last));
  } else if (c.sinks_wanted) {
    last_backward<T, kR>(c, grad, drain);
  }
  barrier();
  for (int layer = last - 1; layer >= 0; --layer) {
    if (partial.wanted()) {
      grad_blocks<T, kR>(c, tile, layer, partial);
      grad_biases<T, kR>(c, tile, layer, partial);
      barrier();
    }
    if (layer > 0) {
      layer_backward<T, kR>(c, tile, layer, descend(layer));
    } else if (c.sinks_wanted) {
      layer_backward<T, kR>(c, tile, layer, drain);
    }
    barrier();
  }
}

// The gradient of the logits follows from the objective if there is one, else it is given.
template <class T, int kR>
struct Backward {
  using Arguments = Call;
  static constexpr int kResident = kMostResident;

  static MASKMOE_DEVICE void run(const Call& c, const Place& place) {
    if (c.objective.again != nullptr && *c.objective.again == 0) return;
    const Tables& t = c.tables;
    const Tile<T> tile(c, place);
    const bool follows = c.objective.target != nullptr;
    const Cells cells(tile.floats, t.experts, kR);
    Partial partial{reinterpret_cast<float*>(place.shared + c.room.near), nullptr, c.room.near_from,
                    true};
    if (c.partial != nullptr) partial.far = c.partial + place.block * c.partial_size;
    if (c.objective.sums != nullptr) {
      each_thread([&](int thread) {
        for (int n = thread; n < 2 * t.experts + 1; n += kThreads) cells.sums[n] = 0.0f;
      });
    }
    for (int64_t n = place.block; n * kR < c.rows; n += place.blocks) {
      const int64_t first = n * kR;
      load_rows<kR>(c, cells, first);
      barrier();
      units_forward<T, kR>(c, tile, first, cells.live);
      if (follows) {
        confident_logits<T, kR>(c, tile, cells);
        barrier();
        objective<kR>(c, cells);
      } else {
        given(c, cells, first);
      }
      barrier();
      if (partial.wanted() || c.sinks_wanted) {
        backward<T, kR>(c, tile, cells.logit, first, partial);
      }
      partial.fresh = false;
    }
    if (partial.wanted()) partial.store(partial_biases(t) + t.num_biases);
    if (c.objective.sums != nullptr) {  // each of them is one thread's from beginning to end
      each_thread([&](int thread) {
        const int count = 2 * t.experts + 1;
        for (int n = thread; n < count; n += kThreads) {
          c.objective.sums[place.block * count + n] = cells.sums[n];
        }
      });
    }
  }

 private:
  // The gradient of the logits as the caller has it; zero where a row is none.
  static MASKMOE_DEVICE void given(const Call& c, const Cells& cells, int64_t first) {
    const int experts = c.tables.experts;
    const T* from = static_cast<const T*>(c.logits) + first * experts;
    each_thread([&](int thread) {
      for (int n = thread; n < kR * experts; n += kThreads) {
        const int row = n / experts, expert = n % experts;
        cells.logit[expert * kR + row] = first + row < c.rows ? to_float(from[n]) : 0.0f;
      }
    });
  }
};

}  // namespace maskmoe::fused
