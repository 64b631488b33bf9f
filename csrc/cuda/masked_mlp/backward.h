// The backward kernel: a tile forward again, then backward.
//
// To recompute the activations costs one more product and no memory traffic: x is read once, and
// only gradients are written. A layer's gradient before the activation overwrites the layer's
// values as soon as the gradient of the weights has read them.
#pragma once

#include "cuda/masked_mlp/gem_objective.h"
#include "cuda/masked_mlp/gradient_sums.h"

namespace maskmoe::fused {

// Writes the gradients before the activation of two neighbouring inputs of a layer, in the place of
// their values. Padding becomes zero.
template <class T>
struct StoreUnitGradient {
  const Call& c;
  T* values;
  const T* dact;  // null: the derivative follows from the values
  int stride;

  // valid: columns of the chunk that are not padding.
  MASKMOE_DEVICE void operator()(int row, int column, int valid, float first, float second) const {
    using Two = Vec<T, 2>;
    const int at = row * stride + column;
    Two* to = reinterpret_cast<Two*>(values + at);
    const Two factor = dact == nullptr ? *to : *reinterpret_cast<const Two*>(dact + at);
    const float given[2] = {first, second};
    Two before;
    MASKMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const float value = to_float(factor.value[n]);
      const float grad = dact == nullptr ? grad_before_activation(given[n], value, c.activation)
                                         : given[n] * value;
      before.value[n] = rounded<T>(column % kChunk + n < valid ? grad : 0.0f);
    }
    *to = before;
  }
};

// Writes the gradients of two neighbouring inputs of the MLP to c.grad_parts.
template <class T>
struct StoreInputGradient {
  const Call& c;
  int64_t first;

  MASKMOE_DEVICE void operator()(int row, int column, int, float one, float other) const {
    if (first + row >= c.rows) return;
    const float factor = c.grad_input_factor == nullptr
                             ? c.grad_input_scale
                             : c.grad_input_scale * *c.grad_input_factor;
    one *= factor, other *= factor;
    if (sizeof(T) == 2 && c.float32_grad_inputs) return store<float>(row, column, one, other);
    store<T>(row, column, one, other);
  }

 private:
  template <class To>
  MASKMOE_DEVICE void store(int row, int column, float one, float other) const {
    const InputColumn left = c.plan.columns[column], right = c.plan.columns[column + 1];
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
    return static_cast<To*>(part.data) + (first + row) * part.stride + column.column;
  }
};

// Through the head, along its routed weights: store(row, column, valid, two gradients).
//   grad : (experts, kR), of the logits
template <class T, int kR, class F>
MASKMOE_DEVICE void head_backward(const Call& c, const float* grad, const F& store) {
  const ExecutionPlan& plan = c.plan;
  const int pairs = kChunk / 2 * plan.chunks[plan.layers - 1];
  each_thread([&](int thread) {
    for (int row = thread / 32; row < kR; row += num_warps()) {
      for (int n = thread % 32; n < pairs; n += 32) {
        const int column = 2 * n, chunk = column / kChunk;
        float sum[2] = {0.0f, 0.0f};
        int valid = 0;
        for (int r = plan.routed_head_begin[chunk]; r < plan.routed_head_begin[chunk + 1]; ++r) {
          const int e = plan.routed_head[r];
          const HeadWeights head = plan.head[e];
          const float* weight = c.head_weights + int64_t{kChunk} * e + column % kChunk;
          valid = head.valid;
          MASKMOE_UNROLL
          for (int m = 0; m < 2; ++m) {
            if (column % kChunk + m >= valid) continue;
            sum[m] = fmaf(grad[head.expert * kR + row], read_only(weight + m), sum[m]);
          }
        }
        store(row, column, valid, sum[0], sum[1]);
      }
    }
  });
}

// Through a layer, not the head, along its routed blocks: store as in head_backward.
template <class T, int kR, class F>
MASKMOE_DEVICE void layer_backward(const Call& c, const Tile<T>& tile, int layer, const F& store) {
  each_product<T, kR>(
      c, Pass::kBackward, layer, tile.inputs(c, layer + 1), c.smem.stride[layer + 1],
      [&](const Product& product, int first, PerLane<Accumulator>* acc) {
        each_value_pair<Tiling<T, kR>::kFragments>(
            first, acc, [&](int row, int column, float one, float other) {
              store(row, product.to * kChunk + column, product.valid, one, other);
            });
      });
}

// From the gradient of a tile's logits, (experts, kR), to all other gradients.
template <class T, int kR>
MASKMOE_DEVICE void backward(const Call& c, const Tile<T>& tile, const float* grad, int64_t first,
                             const GradientSums& sums) {
  const int head = c.plan.layers - 1;
  const StoreInputGradient<T> to_inputs{c, first};
  auto to_units = [&](int layer) {
    return StoreUnitGradient<T>{c, tile.inputs(c, layer), tile.dact(c, layer),
                                c.smem.stride[layer]};
  };
  if (sums.needed()) {
    grad_head<T, kR>(c, tile, grad, sums);
    barrier();
  }
  if (head > 0) {
    head_backward<T, kR>(c, grad, to_units(head));
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
      layer_backward<T, kR>(c, tile, layer, to_units(layer));
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
