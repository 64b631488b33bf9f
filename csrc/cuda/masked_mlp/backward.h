// The backward kernel: a tile forward again, then backward.
//
// To recompute the activations costs one more product and no memory traffic: x is read once, and
// only gradients are written. A layer's gradient before the activation overwrites the layer's
// values as soon as the gradient of the weights has read them.
#pragma once

#include "cuda/masked_mlp/gem_objective.h"
#include "cuda/masked_mlp/gradient_sums.h"

namespace maskmoe::fused {

// Writes the gradients before the activation of a layer's inputs, in the place of their values.
// Padding becomes zero.
template <class T, Activation kActivation>
struct StoreUnitGradients {
  using Two = Vec<T, 2>;
  T* values;
  const T* dact;  // where the derivative does not follow from the values
  int stride;

  MASKMOE_DEVICE Two factor_at(int at) const {
    return *reinterpret_cast<const Two*>((kFollowsFromValue<kActivation> ? values : dact) + at);
  }

  // Two neighbours. valid: columns of the chunk that are not padding.
  MASKMOE_DEVICE void write(int at, int column, int valid, const Two& factor, float one,
                            float other) const {
    const float given[2] = {one, other};
    Two before;
    MASKMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const float value = to_float(factor.value[n]);
      const float grad = kFollowsFromValue<kActivation>
                             ? grad_before_activation(given[n], value, kActivation)
                             : given[n] * value;
      before.value[n] = rounded<T>(column + n < valid ? grad : 0.0f);
    }
    *reinterpret_cast<Two*>(values + at) = before;
  }

  template <int kFragments>
  struct Loaded {};

  template <int kFragments>
  MASKMOE_DEVICE void load(const Product&, int, PerLane<Loaded<kFragments>>&) const {}

  // All values are read before the first is overwritten.
  template <int kFragments>
  MASKMOE_DEVICE void store(const Product& product, int first, const PerLane<Loaded<kFragments>>&,
                            const PerLane<Accumulator>* acc) const {
    each_lane([&](int lane) {
      Two factor[kRowsOf<kFragments>][2];
      each_value_pair<kFragments>(lane, first, acc,
                                  [&](int r, int row, int n, int column, float, float) {
                                    factor[r][n] = factor_at(place(product, row, column));
                                  });
      each_value_pair<kFragments>(
          lane, first, acc, [&](int r, int row, int n, int column, float one, float other) {
            write(place(product, row, column), column, product.valid, factor[r][n], one, other);
          });
    });
  }

 private:
  MASKMOE_DEVICE int place(const Product& product, int row, int column) const {
    return row * stride + product.to * kChunk + column;
  }
};

// Writes the gradients of the inputs of the MLP to c.grad_parts.
template <class T>
struct StoreInputGradients {
  const Call& c;
  int64_t first_sample;  // of the tile

  // Two neighbours of a row, in these columns of the padded input.
  MASKMOE_DEVICE void write(int row, const InputColumn& left, const InputColumn& right, float one,
                            float other) const {
    if (first_sample + row >= c.rows) return;
    float factor = c.grad_input_scale;
    if (c.grad_input_factor != nullptr) factor *= *c.grad_input_factor;
    one *= factor, other *= factor;
    if (sizeof(T) == 2 && c.float32_grad_inputs) return write_as<float>(row, left, right, one, other);
    write_as<T>(row, left, right, one, other);
  }

  // Where a lane's columns come from.
  template <int kFragments>
  struct Loaded {
    InputColumn left[2], right[2];
  };

  template <int kFragments>
  MASKMOE_DEVICE void load(const Product& product, int,
                           PerLane<Loaded<kFragments>>& loaded) const {
    each_lane([&](int lane) {
      MASKMOE_UNROLL
      for (int n = 0; n < 2; ++n) {
        const InputColumn* of = c.plan.columns + product.to * kChunk + accumulator_column(lane, 4 * n);
        loaded[lane].left[n] = of[0], loaded[lane].right[n] = of[1];
      }
    });
  }

  template <int kFragments>
  MASKMOE_DEVICE void store(const Product&, int first, const PerLane<Loaded<kFragments>>& loaded,
                            const PerLane<Accumulator>* acc) const {
    each_lane([&](int lane) {
      each_value_pair<kFragments>(lane, first, acc,
                                  [&](int, int row, int n, int, float one, float other) {
                                    write(row, loaded[lane].left[n], loaded[lane].right[n], one,
                                          other);
                                  });
    });
  }

 private:
  template <class To>
  MASKMOE_DEVICE void write_as(int row, const InputColumn& left, const InputColumn& right, float one,
                               float other) const {
    To* to = address_of<To>(left, row);
    const bool neighbours = right.part == left.part && right.column == left.column + 1;
    if (to != nullptr && neighbours && aligned<Vec<To, 2>>(to)) {
      *reinterpret_cast<Vec<To, 2>*>(to) = {{rounded<To>(one), rounded<To>(other)}};
      return;
    }
    if (to != nullptr) *to = rounded<To>(one);
    to = address_of<To>(right, row);
    if (to != nullptr) *to = rounded<To>(other);
  }

  template <class To>
  MASKMOE_DEVICE To* address_of(const InputColumn& column, int row) const {
    if (column.part < 0 || c.grad_parts[column.part].data == nullptr) return nullptr;
    const PartGradient& part = c.grad_parts[column.part];
    return static_cast<To*>(part.data) + (first_sample + row) * part.stride + column.column;
  }
};

// Through the head, along its routed weights: store(row, first column, valid, two gradients). What
// belongs to columns is loaded once for all rows of a warp.
//   grad : (experts, kR), of the logits
template <class T, int kR, class F>
MASKMOE_DEVICE void head_backward(const Call& c, const float* grad, const F& store) {
  constexpr int kMostRows = kR / kWarps;  // of a warp
  const ExecutionPlan& plan = c.plan;
  const int pairs = kChunk / 2 * plan.chunks[plan.layers - 1], warps = num_warps();
  each_thread([&](int thread) {
    for (int n = thread % 32; n < pairs; n += 32) {
      const int column = 2 * n, chunk = column / kChunk;
      float sum[kMostRows][2] = {};
      int valid = 0;
      for (int r = plan.routed_head_begin[chunk]; r < plan.routed_head_begin[chunk + 1]; ++r) {
        const int e = plan.routed_head[r];
        const HeadWeights head = plan.head[e];
        const auto weight = read_only(reinterpret_cast<const Vec<float, 2>*>(
            c.head_weights + int64_t{kChunk} * e + column % kChunk));
        valid = head.valid;
        MASKMOE_UNROLL
        for (int m = 0; m < kMostRows; ++m) {
          const int row = thread / 32 + m * warps;
          const float given = row < kR ? grad[head.expert * kR + row] : 0.0f;
          MASKMOE_UNROLL
          for (int k = 0; k < 2; ++k) {
            if (column % kChunk + k < valid) sum[m][k] = fmaf(given, weight.value[k], sum[m][k]);
          }
        }
      }
      MASKMOE_UNROLL
      for (int m = 0; m < kMostRows; ++m) {
        const int row = thread / 32 + m * warps;
        if (row < kR) store(row, column, valid, sum[m][0], sum[m][1]);
      }
    }
  });
}

// Through the head, to the gradients before the activation of its inputs.
template <class T, int kR, Activation kActivation>
MASKMOE_DEVICE void head_backward(const Call& c, const float* grad,
                                  const StoreUnitGradients<T, kActivation>& output) {
  head_backward<T, kR>(c, grad, [&](int row, int column, int valid, float one, float other) {
    const int at = row * output.stride + column;
    output.write(at, column % kChunk, valid, output.factor_at(at), one, other);
  });
}

// Through the head of an MLP that is nothing else, to its inputs.
template <class T, int kR>
MASKMOE_DEVICE void head_backward(const Call& c, const float* grad,
                                  const StoreInputGradients<T>& output) {
  head_backward<T, kR>(c, grad, [&](int row, int column, int, float one, float other) {
    output.write(row, c.plan.columns[column], c.plan.columns[column + 1], one, other);
  });
}

// Through a layer, not the head, along its routed blocks.
template <class T, int kR, class Output>
MASKMOE_DEVICE void layer_backward(const Call& c, const Tile<T>& tile, int layer,
                                   const Output& output) {
  each_product<T, kR>(c, Pass::kBackward, layer, tile.inputs(c, layer + 1),
                      c.smem.stride[layer + 1], output);
}

// From the gradient of a tile's logits, (experts, kR), to all other gradients.
template <class T, int kR>
MASKMOE_DEVICE void backward(const Call& c, const Tile<T>& tile, const float* grad, int64_t first,
                             const GradientSums& sums) {
  const int head = c.plan.layers - 1;
  const StoreInputGradients<T> to_inputs{c, first};
  // f(where the gradients of a layer's units go)
  const auto to_units = [&](int layer, const auto& f) {
    with_activation(c.activation, [&](auto activation) {
      f(StoreUnitGradients<T, activation.value>{tile.inputs(c, layer), tile.dact(c, layer),
                                                c.smem.stride[layer]});
    });
  };
  if (sums.needed()) {
    grad_head<T, kR>(c, tile, grad, sums);
    barrier();
  }
  if (head > 0) {
    to_units(head, [&](const auto& output) { head_backward<T, kR>(c, grad, output); });
  } else if (c.need_grad_inputs) {
    head_backward<T, kR>(c, grad, to_inputs);
  }
  barrier();
  for (int layer = head - 1; layer >= 0; --layer) {
    if (sums.needed()) {
      grad_weights<T, kR>(c, tile, layer, sums);
      grad_biases<T, kR>(c, tile, layer, sums);
      barrier();
    }
    if (layer > 0) {
      to_units(layer, [&](const auto& output) { layer_backward<T, kR>(c, tile, layer, output); });
    } else if (c.need_grad_inputs) {
      layer_backward<T, kR>(c, tile, layer, to_inputs);
    }
    barrier();
  }
}

// All gradients of an MLP, from a given gradient of its logits or from the GEM objective.
//   x, ids       : c.parts, each row read once; c.logits: (rows, experts), where it is given
//   grad_parts   : each element written once, by one thread
//   gradient_sums: (blocks, sums_size), each sum added up by one thread or warp; no atomics.
//                  ReduceGradients adds the blocks in order: deterministic for one grid size
//   gem.sums     : (blocks, 2 experts + 1), likewise
//   grid         : the blocks that the device runs at a time; block b computes tiles b, b + blocks,
//                  b + 2 blocks, ...
//   shared memory: the inputs of all layers, derivatives where they are kept, a LogitTile, and the
//                  last of the gradient sums; see smem_layout
template <class T, int kR>
struct Backward {
  using Arguments = Call;
  static constexpr int kBlocksPerMultiprocessor = 1, kMostThreads = 32 * kMostWarps;
  static_assert(kBackwardBlocks * kWarps == kMostWarps);  // either way, registers for so many warps

  static MASKMOE_DEVICE void run(const Call& c, const GridPosition& grid) {
    if (c.gem.rerun != nullptr && *c.gem.rerun == 0) return;
    const ExecutionPlan& plan = c.plan;
    const Tile<T> tile(c, grid);
    const bool has_objective = c.gem.target != nullptr;
    const LogitTile cells(tile.floats, plan.experts, kR);
    GradientSums sums{reinterpret_cast<float*>(grid.shared + c.smem.sums_at), nullptr,
                      c.smem.first_shared_sum, true};
    if (c.gradient_sums != nullptr) sums.in_global = c.gradient_sums + grid.block * c.sums_size;
    if (c.gem.sums != nullptr) {
      each_thread([&](int thread) {
        for (int n = thread; n < 2 * plan.experts + 1; n += num_threads()) cells.sums[n] = 0.0f;
      });
    }
    for (int64_t n = grid.block; n * kR < c.rows; n += grid.num_blocks) {
      const int64_t first = n * kR;
      load_rows<kR>(c, cells, first);
      barrier();
      hidden_layers_forward<T, kR>(c, tile, first, cells.row_mask);
      if (has_objective) {
        confident_logits<T, kR>(c, tile, cells);
        barrier();
        gem_objective<kR>(c, cells);
      } else {
        load_grad_logits(c, cells, first);
      }
      barrier();
      if (sums.needed() || c.need_grad_inputs) {
        backward<T, kR>(c, tile, cells.logit, first, sums);
      }
      sums.empty = false;
    }
    if (sums.needed()) sums.store(first_bias_sum(plan) + plan.num_biases);
    if (c.gem.sums != nullptr) {  // a thread reads the sums that it added up: no barrier
      each_thread([&](int thread) {
        const int count = 2 * plan.experts + 1;
        for (int n = thread; n < count; n += num_threads()) {
          c.gem.sums[grid.block * count + n] = cells.sums[n];
        }
      });
    }
  }

 private:
  // The gradient of the logits that the caller gives; zero in rows beyond the batch.
  static MASKMOE_DEVICE void load_grad_logits(const Call& c, const LogitTile& cells,
                                              int64_t first) {
    const int experts = c.plan.experts;
    const T* from = static_cast<const T*>(c.logits) + first * experts;
    each_thread([&](int thread) {
      for (int n = thread; n < kR * experts; n += num_threads()) {
        const int row = n / experts, expert = n % experts;
        cells.logit[expert * kR + row] = first + row < c.rows ? to_float(from[n]) : 0.0f;
      }
    });
  }
};

}  // namespace maskmoe::fused
