// A network on a batch, shared out over threads: each takes tiles of rows through all layers.

#include <numeric>

#include "driver.h"
#include "sharing.h"

namespace maskmoe {
namespace {

constexpr int64_t kTileFloats = 1 << 18;  // of activations: weights pass by every tile, so tiles are few
constexpr int64_t kKeptBytes = 1 << 24;   // beyond, activations are cheaper computed than read
constexpr int64_t kUnitBytes = 1 << 30;   // of a large batch's gradients that wait for their factors

// Weights whose sum is smaller are divided by it before anything is multiplied by them. Dividing by
// a sum of at least 2^-63 may wait: products of weights then have all their digits where the result
// is 2^-63 (a normal 2^-126, divided), and no optimizer tells smaller gradients apart, for their
// squares are denormal.
constexpr double kMayWait = 0x1p-63;

int64_t weights_of(const NetworkInputs& in) {
  int64_t sum = 0;
  for (const Plan& plan : in.chain) sum += plan.layout.num_weights;
  return sum;
}

// Has every layer a block of units an expert, and does every layer but the first route gradients
// from an expert to itself only?
bool isolated(const Chain& chain, size_t experts) {
  if (chain[0].layout.rows() != experts) return false;
  for (size_t k = 1; k < chain.size(); ++k) {
    const Layout& layout = chain[k].layout;
    if (layout.rows() != experts || layout.cols() != experts) return false;
    for (size_t i = 0; i < experts; ++i) {
      for (size_t j = 0; j < experts; ++j) {
        if (i != j && layout.routed(i, j)) return false;
      }
    }
  }
  return true;
}

// One call: weights where the kernels want them, scratch, and everyone's sums.
class Call {
 public:
  Call(const NetworkInputs& in, const Kernels& k, const Tiling& tiling, int64_t flops)
      : in_(in), k_(k), tiling_(tiling),
        threads_(std::min(threads_for(flops, in.rows), std::max<int64_t>(tiling.count, 1))) {
    const Layout& first = in.chain[0].layout;
    network.depth = static_cast<int64_t>(in.chain.size());
    network.activation = in.activation;
    network.in_place = place_for(in.dtype, in.rows);
    network.dtype = in.dtype;
    network.parts = in.parts.data();
    network.num_parts = static_cast<int64_t>(in.parts.size());
    network.in_features = first.in_features;
    network.in_order = first.col_order.empty() ? nullptr : first.col_order.data();
    network.rows = in.rows;
    network.mask = in.mask;
    network.tile_rows = tiling.rows;
    for (const Plan& plan : in.chain) {
      layers_.push_back({view(plan.forward), view(plan.backward), nullptr, nullptr, nullptr, nullptr});
    }
    network.layers = layers_.data();
  }

  Network network{};

  int64_t threads() const { return threads_; }

  // Allocates; afterwards `own` floats can be taken from `scratch`. `gem` experts, or 0.
  void prepare(const NetworkGradients& grads, int64_t experts, int64_t own) {
    const bool weights = !grads.weights.empty();
    network.need_weights = weights;
    const Place in_place = network.in_place;
    int64_t size = own;
    for (size_t n = 0; n < in_.chain.size(); ++n) {
      const Plan& plan = in_.chain[n];
      size += Scratch::round_up(buffer_size(plan.forward, in_place));
      if (turns(n)) size += Scratch::round_up(buffer_size(plan.backward, Place::kNowhere));
      if (copies_bias(n)) size += Scratch::round_up(plan.layout.out_features);
      if (network.backward) {
        sums.emplace_back(plan, grads.dtype, in_place, weights, !grads.biases.empty(), threads_);
        size += sums.back().scratch();
      }
    }
    const int64_t tile = Scratch::round_up(k_.network_scratch(network));
    const int64_t totals = Scratch::round_up(4 * experts);  // two doubles each
    scratch = std::make_unique<Scratch>(size + threads_ * (tile + totals));
    bring_weights();
    for (size_t n = 0; n < sums.size(); ++n) {
      const auto& order = in_.chain[n].layout.row_order;
      sums[n].take(*scratch, weights ? grads.weights[n] : nullptr,
                   grads.biases.empty() ? nullptr : grads.biases[n],
                   order.empty() ? nullptr : order.data());
    }
    for (int64_t t = 0; t < threads_; ++t) {
      double* of = reinterpret_cast<double*>(scratch->take(totals));
      totals_.push_back({of, of + experts});
      tiles_.push_back(scratch->take(tile));
    }
  }

  // Tiles by the `step`; after each, `then(row, rows)`.
  template <class F>
  void run(int64_t step, const F& then) {
    for (int64_t begin = 0, end; begin < tiling_.count; begin = end) {
      end = std::min(begin + step, tiling_.count);
      network.done = begin * tiling_.rows;
      each(threads_, [&](int64_t t) {
        std::vector<LayerSums> own;
        for (const ThreadSums& layer : sums) own.push_back(layer.of(t));
        const int64_t count = end - begin;
        k_.network(network, begin + count * t / threads_, begin + count * (t + 1) / threads_,
                   own.data(), totals_[t], tiles_[t]);
      });
      then(network.done, std::min(end * tiling_.rows, in_.rows) - network.done);
    }
  }
  void run() {
    run(std::max<int64_t>(tiling_.count, 1), [](int64_t, int64_t) {});
  }

  // `scale`, where given, has a factor for each expert.
  void finish(const float* scale) {
    ThreadSums::finish(k_, sums, in_.rows, scale);
  }

  // Sums of all threads, of w BCE and of w, for every expert.
  void add_totals(int64_t experts, double* loss, double* weight) const {
    std::fill_n(loss, experts, 0.0);
    std::fill_n(weight, experts, 0.0);
    for (int64_t t = 0; t < threads_ && in_.rows > 0; ++t) {
      for (int64_t i = 0; i < experts; ++i) {
        loss[i] += totals_[t].loss[i];
        weight[i] += totals_[t].weight[i];
      }
    }
  }

  // Slots of the first layer's units, and each expert's `factor` in those of its units.
  int64_t slots_of_units() const {
    return Scratch::round_up(in_.chain[0].forward.lines * in_.chain[0].forward.width);
  }
  void spread_over_units(const float* factor, float* slots) const {
    const Layout& first = in_.chain[0].layout;
    std::fill_n(slots, slots_of_units(), 0.0f);
    for (size_t i = 0; i < first.rows(); ++i) {
      for (int64_t u = first.row_offsets[i]; u < first.row_offsets[i + 1]; ++u) {
        slots[in_.chain[0].forward.slots[u]] = factor[i];
      }
    }
  }

  std::vector<ThreadSums> sums;
  std::unique_ptr<Scratch> scratch;

 private:
  bool turns(size_t layer) const { return network.backward && (layer > 0 || network.need_inputs); }
  bool copies_bias(size_t layer) const {
    return !in_.biases.empty() &&
           (in_.dtype != Dtype::kFloat32 || !in_.chain[layer].layout.row_order.empty());
  }

  void bring_weights() {
    std::vector<float*> forward, turned;
    int64_t size = 0;
    for (size_t n = 0; n < in_.chain.size(); ++n) {
      const Plan& plan = in_.chain[n];
      NetworkLayer& layer = layers_[n];
      const int64_t copied = buffer_size(plan.forward, network.in_place);
      const int64_t back = turns(n) ? buffer_size(plan.backward, Place::kNowhere) : 0;
      size += copied + back;
      forward.push_back(scratch->take(copied));
      turned.push_back(scratch->take(back));
      layer.buffer = forward[n];
      if (in_.dtype == Dtype::kFloat32) layer.weight = static_cast<const float*>(in_.weights[n]);
      if (turns(n)) layer.turned_buffer = turned[n];
      if (copies_bias(n)) {
        float* bias = scratch->take(plan.layout.out_features);
        const auto& order = plan.layout.row_order;
        k_.load(bias, in_.biases[n], in_.dtype, order.empty() ? nullptr : order.data(),
                plan.layout.out_features);
        layer.bias = bias;
      } else if (!in_.biases.empty()) {
        layer.bias = static_cast<const float*>(in_.biases[n]);
      }
    }
    const int64_t shares = tasks_for(size, threads_);
    each(shares, [&](int64_t t) {
      for (size_t n = 0; n < in_.chain.size(); ++n) {
        const auto bring = [&](const Panels& panels, Place in_place, float* to) {
          pack_share(k_, panels, in_.weights[n], in_.dtype, in_place, to, t, shares);
        };
        bring(in_.chain[n].forward, network.in_place, forward[n]);
        if (turns(n)) bring(in_.chain[n].backward, Place::kNowhere, turned[n]);
      }
    });
  }

  const NetworkInputs& in_;
  const Kernels& k_;
  const Tiling tiling_;
  const int64_t threads_;
  std::vector<NetworkLayer> layers_;
  std::vector<GemSums> totals_;
  std::vector<float*> tiles_;
};

int64_t work_of(const NetworkInputs& in, bool forward, bool need_inputs, bool need_weights) {
  int64_t work = 0;
  for (size_t n = 0; n < in.chain.size(); ++n) {
    const Layout& l = in.chain[n].layout;
    work += (forward + need_weights) * l.num_weights + l.out_features;
    if (n > 0 || need_inputs) work += l.num_routed;
  }
  return 2 * in.rows * work;
}

// Where gradients of the inputs go: straight to x if that is all there is, else to rows of all
// parts, from which they are shared out, some tiles at a time while they are in the cache.
class InputGradients {
 public:
  InputGradients(const NetworkInputs& in, const NetworkGradients& grads, const Tiling& tiling)
      : in_(in), grads_(grads),
        tables_(std::any_of(grads.tables.begin(), grads.tables.end(), [](void* p) { return p; })),
        straight_(grads.x.data != nullptr && in.parts.size() == 1),
        step_(std::max<int64_t>(kRowsFloats / (features() * tiling.rows),
                                2 * torch::stable::get_num_threads())),
        rows_(std::min(step_ * tiling.rows, in.rows)) {}

  bool wanted() const { return tables_ || grads_.x.data != nullptr; }

  int64_t scratch() const {
    if (!wanted() || straight_) return 0;
    int64_t size = Scratch::round_up(rows_ * features());
    for (size_t p = 0; p < in_.parts.size(); ++p) size += Scratch::round_up(wide(p));
    return size;
  }

  Matrix take(Scratch& scratch) {
    if (straight_ || !wanted()) return grads_.x;
    values_ = scratch.take(rows_ * features());
    for (size_t p = 0; p < in_.parts.size(); ++p) wide_.push_back(scratch.take(wide(p)));
    const auto& order = in_.chain[0].layout.col_order;
    return {values_, Dtype::kFloat32, features(), features(),
            order.empty() ? nullptr : order.data()};
  }

  // Runs the call, which has to go back. Every table row sums the samples that named it, in the
  // order of the batch.
  void run(Call& call, const Kernels& k) const {
    if (straight_ || !wanted()) return call.run();
    bool fresh = true;
    auto share_out = [&](int64_t first, int64_t rows) {
      each(call.threads(), [&](int64_t t) {
        if (grads_.x.data != nullptr) {
          copy_columns(k, first, rows * t / call.threads(), rows * (t + 1) / call.threads());
        }
        each_table([&](size_t p, float* to) {
          const int64_t count = in_.table_rows[p], width = in_.parts[p].width;
          const int64_t begin = count * t / call.threads();
          const int64_t end = count * (t + 1) / call.threads();
          if (fresh) std::fill(to + begin * width, to + end * width, 0.0f);
          add_rows(k, p, first, rows, begin, end, to);
        });
      });
      fresh = false;
    };
    call.run(step_, share_out);
    if (in_.rows == 0) share_out(0, 0);
    if (direct()) return;
    each_table([&](size_t p, float* from) {
      const int64_t size = in_.table_rows[p] * in_.parts[p].width;
      k.store(grads_.tables[p], grads_.dtype, nullptr, from, size);
    });
  }

 private:
  static constexpr int64_t kRowsFloats = 1 << 20;

  bool direct() const { return grads_.dtype == Dtype::kFloat32; }
  int64_t features() const { return in_.chain[0].layout.in_features; }
  bool is_table(size_t p) const { return in_.table_rows[p] > 0; }
  int64_t wide(size_t p) const {
    return direct() || grads_.tables[p] == nullptr ? 0 : in_.table_rows[p] * in_.parts[p].width;
  }

  // f(part, its sums) for every table that wants a gradient.
  template <class F>
  void each_table(const F& f) const {
    for (size_t p = 0; p < in_.parts.size(); ++p) {
      if (!is_table(p) || grads_.tables[p] == nullptr) continue;
      f(p, direct() ? static_cast<float*>(grads_.tables[p]) : wide_[p]);
    }
  }

  // Rows [begin, end) of those that begin at `first`.
  void copy_columns(const Kernels& k, int64_t first, int64_t begin, int64_t end) const {
    const int64_t size = direct() ? 4 : 2;
    int64_t column = 0, x_column = 0;
    for (size_t p = 0; p < in_.parts.size(); column += in_.parts[p].width, ++p) {
      if (is_table(p)) continue;
      const int64_t width = in_.parts[p].width;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = (first + r) * grads_.x.stride + x_column;
        k.store(static_cast<char*>(grads_.x.data) + at * size, grads_.dtype, nullptr,
                values_ + r * features() + column, width);
      }
      x_column += width;
    }
  }

  // Samples [first, first + rows) to those of them that name a row of [begin, end).
  void add_rows(const Kernels& k, size_t p, int64_t first, int64_t rows, int64_t begin,
                int64_t end, float* to) const {
    const Part& part = in_.parts[p];
    const float* from = values_;
    for (size_t before = 0; before < p; ++before) from += in_.parts[before].width;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t id = part.ids[first + r];
      if (id < begin || id >= end) continue;
      k.add(to + id * part.width, from + r * features(), part.width);
    }
  }

  const NetworkInputs& in_;
  const NetworkGradients& grads_;
  const bool tables_, straight_;
  const int64_t step_, rows_;  // tiles at a time, and the rows that they have at most
  float* values_ = nullptr;    // (rows_, features)
  std::vector<float*> wide_;
};

}  // namespace

Tiling tiles_of(const NetworkInputs& in) {
  int64_t floats = in.chain[0].layout.in_features, most = 0;
  for (const Plan& plan : in.chain) {
    floats += plan.layout.out_features;
    most = std::max(most, plan.layout.out_features);
  }
  const int64_t fit = std::clamp<int64_t>(kTileFloats / (floats + 2 * most), 56, 252) / 28 * 28;
  int64_t count = std::max<int64_t>((in.rows + fit / 2) / fit, 1);
  const int64_t threads = threads_for(6 * in.rows * weights_of(in), in.rows);
  if (count >= 8 * threads) return {fit, (in.rows + fit - 1) / fit};
  count = (count + threads - 1) / threads * threads;  // few are shared out evenly
  const int64_t rows = std::max<int64_t>((in.rows + count - 1) / count, 1);
  return {rows, (in.rows + rows - 1) / rows};
}

int64_t worth_keeping(const NetworkInputs& in, const Kernels& k, const Tiling& tiling) {
  Call call(in, k, tiling, 0);
  const int64_t floats = k.network_saved(call.network);
  return 4 * floats * tiling.count <= kKeptBytes ? floats : 0;
}

void network_forward(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                     const Matrix& logits, float* saved) {
  Call call(in, k, tiling, 2 * in.rows * weights_of(in));
  call.network.forward = true;
  call.network.logits = logits;
  call.network.saved = saved;
  call.network.saved_stride = k.network_saved(call.network);
  call.prepare({}, 0, 0);
  call.run();
}

void network_mixture(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                     const Mixture& mixture) {
  Call call(in, k, tiling, 2 * in.rows * weights_of(in));
  call.network.forward = true;
  call.network.mixture = &mixture;
  call.prepare({}, 0, 0);
  call.run();
}

void network_backward(const NetworkInputs& in, const Kernels& k, const Tiling& tiling,
                      const Matrix& grad_logits, const float* saved,
                      const NetworkGradients& grads) {
  InputGradients inputs(in, grads, tiling);
  Call call(in, k, tiling,
            work_of(in, saved == nullptr, inputs.wanted(), !grads.weights.empty()));
  Network& n = call.network;
  n.forward = saved == nullptr;
  n.saved = const_cast<float*>(saved);  // read only, without `forward`
  n.saved_stride = k.network_saved(n);
  n.backward = true;
  n.grad_logits = grad_logits;
  n.need_inputs = inputs.wanted();
  call.prepare(grads, 0, inputs.scratch());
  n.grad_inputs = inputs.take(*call.scratch);
  inputs.run(call, k);
  call.finish(nullptr);
}

namespace {

// What divides an expert's weights: a factor for the end, or a divisor for another sweep, which the
// result says is needed. An expert's own sum decides for it alone, and its bits are its own.
bool part_with(const std::vector<double>& weight, Normalize normalize, double* factor,
               float* divisor) {
  bool again = false;
  const double all = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (size_t i = 0; i < weight.size(); ++i) {
    const double by = normalize == Normalize::kExpert ? weight[i] : all;
    const bool small = by > 0 && by < kMayWait;
    if (small) divisor[i] = static_cast<float>(by);
    factor[i] = small || by == 0 ? 1 : 1 / by;
    again = again || small;
  }
  return again;
}

}  // namespace

float network_gem(const NetworkInputs& in, const Kernels& k, const Tiling& tiling, Gem gem,
                  Normalize normalize, const NetworkGradients& grads) {
  const int64_t experts = gem.selection.experts;
  InputGradients inputs(in, grads, tiling);
  const bool weights = !grads.weights.empty(), wanted = weights || inputs.wanted();
  const bool by_sums = normalize == Normalize::kExpert || normalize == Normalize::kBatch;
  // Factors of experts are known at the end. Gradients of weights are an expert's own, and so are
  // those of its units; what it gives to inputs adds up with what others give.
  const bool own = by_sums && isolated(in.chain, experts);
  int64_t counted = in.rows;
  if (in.mask != nullptr) {
    counted = std::count_if(in.mask, in.mask + in.rows, [](uint8_t m) { return m != 0; });
  }
  const float per_sample = 1.0f / static_cast<float>(std::max<int64_t>(counted, 1));
  gem.scale = by_sums ? 1.0f : per_sample;
  gem.per_sample = normalize == Normalize::kSample;

  Call call(in, k, tiling, work_of(in, true, inputs.wanted(), weights));
  Network& n = call.network;
  n.gem = &gem;
  n.forward = true;
  n.backward = wanted;
  n.need_inputs = inputs.wanted();
  n.saved_stride = k.network_saved(n);
  n.units_stride = Scratch::round_up(k.network_units(n));
  const int64_t all_units = n.units_stride * tiling.count;
  const bool waits = own && inputs.wanted() && 4 * all_units <= kUnitBytes;
  const bool twice = wanted && by_sums && !waits && (inputs.wanted() || !own);
  const bool keeps = twice && 4 * n.saved_stride * tiling.count <= kKeptBytes;
  const int64_t kept = Scratch::round_up(keeps ? n.saved_stride * tiling.count : 0);
  const int64_t kept_grads = Scratch::round_up(twice ? in.rows * experts : 0);
  const int64_t factors = Scratch::round_up(experts);
  const int64_t units = waits ? all_units : 0, slots = waits ? call.slots_of_units() : 0;
  call.prepare(grads, experts, inputs.scratch() + kept + kept_grads + factors + units + slots);
  n.grad_inputs = inputs.take(*call.scratch);
  float* saved = call.scratch->take(kept);
  float* grad_logits = call.scratch->take(kept_grads);
  float* scale = call.scratch->take(factors);
  float* unit_grads = call.scratch->take(units);
  float* unit_scale = call.scratch->take(slots);

  if (waits) {
    n.unit_grads = unit_grads;
    n.need_inputs = false;
  }
  if (twice) {
    n.saved = keeps ? saved : nullptr;
    gem.kept = grad_logits;
    n.backward = false;
  }
  std::vector<double> loss(experts), weight(experts), factor(experts, per_sample);
  const auto sweep = [&] {
    if (n.need_inputs && n.backward) {
      inputs.run(call, k);
    } else {
      call.run();
    }
    call.add_totals(experts, loss.data(), weight.data());
  };
  sweep();
  if (by_sums) {
    std::vector<float> divisors(experts, 1.0f);
    if (part_with(weight, normalize, factor.data(), divisors.data())) {
      gem.divisors = divisors.data();
      sweep();
    }
  }
  double total = 0;
  for (int64_t i = 0; i < experts; ++i) {
    total += loss[i] * factor[i];
    scale[i] = static_cast<float>(factor[i]);
  }
  if (twice) {
    n.gem = nullptr;
    n.forward = !keeps;
    n.backward = true;
    n.grad_logits = {grad_logits, Dtype::kFloat32, experts, experts, nullptr};
    n.scale = scale;
    inputs.run(call, k);
  }
  if (waits) {
    call.spread_over_units(scale, unit_scale);
    n.gem = nullptr;
    n.unit_scale = unit_scale;
    n.need_inputs = true;
    inputs.run(call, k);
  }
  if (wanted) call.finish(by_sums && !twice ? scale : nullptr);
  return static_cast<float>(total);
}

}  // namespace maskmoe
