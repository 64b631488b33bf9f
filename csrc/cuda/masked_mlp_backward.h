// The network forward again and then backward, for a tile of rows at a time.
//
// Recomputing costs one product more and no memory traffic: x is read once, and what is written
// are gradients. Each layer's gradient before the activation takes the place of its values as soon
// as the layer's weight gradient has read them. Weight gradients are sums over rows: each block
// keeps its own float32 image of them in L2 and adds its tiles there in order; no atomics.
#pragma once

#include "cuda/masked_mlp.h"

namespace maskmoe::fused {

// The floats of a tile: (experts, kR) each, then one a row.
struct Cells {
  float* logit;  // then its gradient
  float* own;    // g, then the weight; objective only
  float* rest;   // 1 - g, then the weighted loss
  float* live;   // 1: the row counts
  float* target;
  float* total;
  float* sums;   // (2 experts + 1,): losses, weights and samples of all the block's tiles

  MASKMOE_DEVICE Cells(float* floats, int experts, int rows, bool objective) {
    const int cells = experts * rows;
    logit = floats;
    live = logit + cells;
    target = live + rows;
    total = target + rows;
    own = total + rows;
    rest = own + cells;
    sums = rest + cells;
    if (!objective) target = total = own = rest = sums = nullptr;
  }
};

// A sum that a block keeps over its tiles.
MASKMOE_DEVICE void keep(float* at, float value, bool fresh) { *at = fresh ? value : *at + value; }

// Gradient of the blocks that end in a chunk of units: inputs' columns times units' columns.
template <class T, int kR>
MASKMOE_DEVICE void grad_blocks(const Call& c, const Tile<T>& tile, int layer, float* partial,
                                bool fresh) {
  using Core = fused::Core<T>;
  constexpr int kSteps = kR / 16;
  const T* inputs = tile.inputs(c, layer);
  const T* units = tile.inputs(c, layer + 1);
  const int in_stride = c.room.stride[layer], out_stride = c.room.stride[layer + 1];
  const int32_t* bounds = c.tables.bounds + c.tables.pass(Order::kGradient, layer, true);
  each_warp([&](int warp) {
    for (int n = bounds[warp]; n < bounds[warp + 1]; ++n) {
      const Strip strip = c.tables.strips[c.tables.schedule[n]];
      PerLane<typename Core::B> right[kSteps];
      MASKMOE_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        Core::load_right(right[s], units + s * 16 * out_stride + strip.tile * kSide, out_stride);
      }
      for (int b = strip.block; b < strip.block + strip.blocks; ++b) {
        const T* from = inputs + c.tables.blocks[b].chunk * kSide;
        Quad4* to = reinterpret_cast<Quad4*>(partial + int64_t{kBlock} * b);
        PerLane<Acc> acc;
        clear(acc);
        MASKMOE_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          PerLane<typename Core::A> a;
          Core::load_turned(a, from + s * 16 * in_stride, in_stride);
          Core::multiply(acc, a, right[s]);
        }
        each_lane([&](int lane) {
          MASKMOE_UNROLL
          for (int half = 0; half < 2; ++half) {
            Quad4 sum = fresh ? Quad4{} : to[half * 32 + lane];
            MASKMOE_UNROLL
            for (int k = 0; k < 4; ++k) sum.value[k] += acc[lane].x[half * 4 + k];
            to[half * 32 + lane] = sum;
          }
        });
      }
    }
  });
}

// Sums over the rows of a layer's gradient.
template <class T, int kR>
MASKMOE_DEVICE void grad_biases(const Call& c, const Tile<T>& tile, int layer, float* partial,
                                bool fresh) {
  const T* units = tile.inputs(c, layer + 1);
  const int stride = c.room.stride[layer + 1], columns = kSide * c.tables.chunks[layer + 1];
  each_thread([&](int thread) {
    for (int n = thread; n < columns; n += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += to_float(units[row * stride + n]);
      keep(partial + c.tables.bias_at[layer] + n, sum, fresh);
    }
  });
}

// Gradient of the last layer's weights and biases, from the gradient of the logits.
template <class T, int kR>
MASKMOE_DEVICE void grad_last(const Call& c, const Tile<T>& tile, const float* grad,
                              float* partial, bool fresh) {
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
      keep(partial + partial_entries(t) + n, sum, fresh);
    }
    for (int expert = thread; expert < t.experts; expert += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += grad[expert * kR + row];
      keep(partial + partial_biases(t) + t.bias_at[layer] + expert, sum, fresh);
    }
  });
}

// The gradient before the activation of a layer's input, in its value's place.
template <class T>
struct Descend {
  const Call& c;
  T* values;
  const T* slopes;
  int stride;

  MASKMOE_DEVICE void operator()(int row, int column, bool valid, float gradient) const {
    const int at = row * stride + column;
    const float down = slopes != nullptr ? gradient * to_float(slopes[at])
                                         : before(gradient, to_float(values[at]), c.activation);
    values[at] = rounded<T>(valid ? down : 0.0f);
  }
};

// The gradient of the network's input.
template <class T>
struct Drain {
  const Call& c;
  int64_t first;

  MASKMOE_DEVICE void operator()(int row, int column, bool, float gradient) const {
    const Column of = c.tables.columns[column];
    if (of.part < 0 || first + row >= c.rows) return;
    const Sink& sink = c.sinks[of.part];
    if (sink.data == nullptr) return;
    static_cast<T*>(sink.data)[(first + row) * sink.stride + of.column] = rounded<T>(gradient);
  }
};

// Through the last layer, along its routed weights; to(row, column, valid, gradient).
template <class T, int kR, class F>
MASKMOE_DEVICE void last_backward(const Call& c, const float* grad, const F& to) {
  const Tables& t = c.tables;
  const int columns = kSide * t.chunks[t.layers - 1];
  each_thread([&](int thread) {
    const int lane = thread % 32;
    for (int row = thread / 32; row < kR; row += kWarps) {
      for (int n = lane; n < columns; n += 32) {
        const int chunk = n / kSide;
        float sum = 0.0f;
        for (int r = t.readers_begin[chunk]; r < t.readers_begin[chunk + 1]; ++r) {
          const int e = t.readers[r];
          const Entry entry = t.entries[e];
          if (n % kSide >= entry.valid) continue;
          const float weight = read_only(c.last + int64_t{kSide} * e + n % kSide);
          sum = fmaf(grad[entry.expert * kR + row], weight, sum);
        }
        const int r = t.readers_begin[chunk];
        const bool valid =
            r < t.readers_begin[chunk + 1] && n % kSide < t.entries[t.readers[r]].valid;
        to(row, n, valid, sum);
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
                            for (int n = 0; n < 8; ++n) {
                              const int col = acc_col(lane, n);
                              to(first + m * 16 + acc_row(lane, n), product.to * kSide + col,
                                 col < product.valid, acc[m][lane].x[n]);
                            }
                          }
                        });
                      });
}

// From the gradient of a tile's logits to all others.
template <class T, int kR>
MASKMOE_DEVICE void backward(const Call& c, const Tile<T>& tile, const float* grad, int64_t first,
                             float* partial, bool fresh) {
  const int last = c.tables.layers - 1;
  const Drain<T> drain{c, first};
  auto descend = [&](int layer) {
    return Descend<T>{c, tile.inputs(c, layer), tile.slopes(c, layer), c.room.stride[layer]};
  };
  if (partial != nullptr) {
    grad_last<T, kR>(c, tile, grad, partial, fresh);
    barrier();
  }
  if (last > 0) {
    last_backward<T, kR>(c, grad, descend(last));
  } else if (c.sinks_wanted) {
    last_backward<T, kR>(c, grad, drain);
  }
  barrier();
  for (int layer = last - 1; layer >= 0; --layer) {
    if (partial != nullptr) {
      grad_blocks<T, kR>(c, tile, layer, partial, fresh);
      grad_biases<T, kR>(c, tile, layer, partial + partial_biases(c.tables), fresh);
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

// Which rows of a tile count, and their targets.
template <int kR>
MASKMOE_DEVICE void load_rows(const Call& c, const Cells& cells, int64_t first) {
  each_thread([&](int thread) {
    if (thread >= kR) return;
    const int64_t row = first + thread;
    const uint8_t* mask = c.objective.mask;
    const bool counts = row < c.rows && (mask == nullptr || mask[row] != 0);
    cells.live[thread] = counts ? 1.0f : 0.0f;
    if (cells.target != nullptr) cells.target[thread] = counts ? c.objective.target[row] : 0.0f;
  });
}

// w of every expert (section 3.3.2), its loss, and the gradient of its logit (eq. 4, eq. 7).
template <class T, int kR>
MASKMOE_DEVICE void objective(const Call& c, const Cells& cells) {
  const Objective& o = c.objective;
  const int experts = c.tables.experts, count = kR * experts;
  auto each_cell = [&](const auto& f) {
    each_thread([&](int thread) {
      for (int n = thread; n < count; n += kThreads) f(n, n % kR, n / kR);
    });
    barrier();
  };
  each_cell([&](int n, int row, int) {  // products over strict subsets, in order
    if (cells.live[row] == 0.0f) {
      cells.own[n] = 0.0f;
      return;
    }
    const int expert = n / kR;
    float weight = o.own ? cells.own[n] : 1.0f;
    for (int a = 0; a < o.above_count[expert]; ++a) {
      weight *= cells.rest[o.above[expert * experts + a] * kR + row];
    }
    cells.own[n] = weight;
  });
  if (o.sample) {
    each_thread([&](int thread) {
      if (thread >= kR) return;
      float total = 0.0f;
      for (int i = 0; i < experts; ++i) total += cells.own[i * kR + thread];
      cells.total[thread] = total == 0.0f ? 1.0f : total;
    });
    barrier();
  }
  each_cell([&](int n, int row, int expert) {
    const float z = cells.logit[n];
    const float weight = o.sample ? cells.own[n] / cells.total[row] : cells.own[n];
    const Loss loss = cross_entropy(z, cells.target[row]);
    const bool counts = cells.live[row] != 0.0f;
    float grad = counts ? 2.0f * weight * loss.error : 0.0f;
    if (o.scale != nullptr) grad *= o.scale[expert];
    cells.logit[n] = grad;
    cells.own[n] = weight;
    cells.rest[n] = counts ? weight * loss.value : 0.0f;
  });
  if (o.sums == nullptr) return;
  each_thread([&](int thread) {
    for (int n = thread; n < 2 * experts + 1; n += kThreads) {
      const float* from = n < experts       ? cells.rest + n * kR
                          : n < 2 * experts ? cells.own + (n - experts) * kR
                                            : cells.live;
      float sum = 0.0f;
      for (int row = 0; row < kR; ++row) sum += from[row];
      cells.sums[n] += sum;
    }
  });
}

// The gradient of the logits follows from the objective if there is one, else it is given.
template <class T, int kR>
struct Backward {
  using Arguments = Call;
  static constexpr int kResident = sizeof(T) == 4 && kR == 64 ? 1 : 2;

  static MASKMOE_DEVICE void run(const Call& c, const Place& place) {
    const Tables& t = c.tables;
    const Tile<T> tile(c, place);
    const bool follows = c.objective.target != nullptr;
    const Cells cells(tile.floats, t.experts, kR, follows);
    float* partial = c.partial == nullptr ? nullptr : c.partial + place.block * c.partial_size;
    if (c.objective.sums != nullptr) {
      each_thread([&](int thread) {
        for (int n = thread; n < 2 * t.experts + 1; n += kThreads) cells.sums[n] = 0.0f;
      });
    }
    bool fresh = true;
    for (int64_t n = place.block; n * kR < c.rows; n += place.blocks, fresh = false) {
      const int64_t first = n * kR;
      barrier();
      load_rows<kR>(c, cells, first);
      barrier();
      load_inputs<T, kR>(c, tile, first, cells.live);
      barrier();
      for (int layer = 0; layer + 1 < t.layers; ++layer) {
        layer_forward<T, kR>(c, tile, layer, cells.live);
        barrier();
      }
      if (follows) {
        logits(c, tile, cells);
        barrier();
        objective<T, kR>(c, cells);
      } else {
        given(c, cells, first);
      }
      barrier();
      if (partial != nullptr || c.sinks_wanted) {
        backward<T, kR>(c, tile, cells.logit, first, partial, fresh);
      }
    }
    if (c.objective.sums != nullptr) {
      barrier();
      each_thread([&](int thread) {
        const int count = 2 * t.experts + 1;
        for (int n = thread; n < count; n += kThreads) {
          c.objective.sums[place.block * count + n] = cells.sums[n];
        }
      });
    }
  }

 private:
  // The logits with their confidences.
  static MASKMOE_DEVICE void logits(const Call& c, const Tile<T>& tile, const Cells& cells) {
    const Objective& o = c.objective;
    last_forward<T, kR>(c, tile, [&](int row, int expert, float z) {
      const int n = expert * kR + row;
      Pair pair = z == z ? confidence_of(z, o.confidence) : Pair{z, z};
      if (o.sharpness != 1.0f && o.larger[expert]) pair = sharpened(pair, o.sharpness);
      cells.logit[n] = z;
      cells.own[n] = pair.own;
      cells.rest[n] = pair.rest;
    });
  }

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
