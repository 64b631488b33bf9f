// The ops: tensors in, launches, tensors out. A Machine launches kernels and knows its limits:
// the GPU (masked_mlp.cu) or its twin (twin.cc).
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "cuda/masked_mlp_backward.h"
#include "cuda/masked_mlp_mixture.h"
#include "cuda/reductions.h"
#include "cuda/table_gradient.h"

namespace maskmoe::fused {

// One call of an op, for any number type.
template <class Machine>
class Operator {
 public:
  Operator(Inputs given, Use use)
      : in_(std::move(given)), use_(use), checks_(kOp, like()), machine_(like()), buffers_(like()) {
    check_lists(kOp, in_.plans, in_.layouts, in_.weights, in_.biases, in_.tables, in_.ids,
                in_.x.has_value());
    STD_TORCH_CHECK(!in_.x || in_.x->dim() > 0, "maskmoe: x must be (*, features)");
    parts_ = read_parts(kOp, in_.parts, in_.tables, in_.x ? in_.x->size(in_.x->dim() - 1) : 0);
    typed([](auto) {});
    check_readable();
    results_ = dtype();
    single_ = dtype() == ScalarType::Float && single_products();
    dense(in_.tables), dense(in_.ids), dense(in_.weights), dense(in_.biases);
    if (in_.x) hold_matrix();
    placed_ = place();
    const Tensor& shaped = in_.x ? *in_.x : in_.ids[0];
    for (int64_t d = 0; d < shaped.dim() - (in_.x ? 1 : 0); ++d) {
      leading_.push_back(shaped.size(d));
      rows_ *= shaped.size(d);
    }
    check();
    room();
  }

  std::tuple<Tensor, Tensor> forward() {
    Integers sizes = leading_;
    sizes.push_back(network().out_features);
    Tensor logits = buffers_.empty(sizes, dtype());
    typed([&](auto t) {
      using T = decltype(t);
      Call call = this->call();
      call.logits = logits.mutable_data_ptr();
      pack<T>(call, network_tables().forward_blocks, nullptr);
      with_kernel<Forward, T>([&](auto kernel) { walk<typename decltype(kernel)::type>(call); });
    });
    return {logits, buffers_.empty({0, 0}, ScalarType::Float)};
  }

  Tensors backward(const Tensor& grad_logits, bool need_x, bool need_tables, bool need_weights) {
    checks_.matrix(grad_logits, "grad_logits", rows_, network().out_features);
    Tensor given = compact(grad_logits);
    need_x_ = need_x, need_tables_ = need_tables, need_weights_ = need_weights;
    typed([&](auto t) {
      using T = decltype(t);
      Call call = this->call();
      call.logits = given.data_ptr();
      if (need_x || need_tables || need_weights) {
        pack<T>(call, packed_blocks(), nullptr);
        sink(call);
        hold_sums<T>(call, need_weights, nullptr);
        sweep<T>(call, nullptr);
        if (need_weights) reduce<T>(call, nullptr, 1.0f);
        scatter<T>();
      }
    });
    return results();
  }

  // How much each expert is to count.
  struct Choice {
    Tensor strict;
    Confidence confidence;
    double sharpness;
    bool own;
  };

  std::tuple<Tensor, Tensor, Tensor> mixture(Choice choice) {
    check(choice);
    Integers sizes = leading_;
    Tensor probability = buffers_.empty(sizes, ScalarType::Float);
    sizes.push_back(network().out_features);
    Tensor alpha = buffers_.empty(sizes, ScalarType::Float);
    Tensor share = buffers_.empty(sizes, ScalarType::Float);
    typed([&](auto t) {
      using T = decltype(t);
      Call call = this->call();
      call.mixture = {static_cast<float*>(probability.mutable_data_ptr()),
                      static_cast<float*>(alpha.mutable_data_ptr()),
                      static_cast<float*>(share.mutable_data_ptr())};
      pack<T>(call, network_tables().forward_blocks, &choice);
      with_kernel<Mix, T>([&](auto kernel) { walk<typename decltype(kernel)::type>(call); });
    });
    return {probability, alpha, share};
  }

  struct Loss {
    Tensor target;
    std::optional<Tensor> mask;
    int normalize;
  };

  Tensors gem(Loss loss, Choice choice, bool need_x, bool need_tables, bool need_weights) {
    const int64_t experts = network().out_features;
    checks_.readable(loss.target, "target", -1, aoti_torch_dtype_float32());
    if (loss.mask) checks_.readable(*loss.mask, "mask", -1, aoti_torch_dtype_bool());
    STD_TORCH_CHECK(loss.target.numel() == rows_ && (!loss.mask || loss.mask->numel() == rows_),
                    "maskmoe: target or mask do not fit the logits");
    check(choice);
    loss.target = compact(loss.target);
    if (loss.mask) loss.mask = compact(*loss.mask);
    need_x_ = need_x, need_tables_ = need_tables, need_weights_ = need_weights;
    results_ = ScalarType::Float;  // what scales the loss is yet to come
    Tensor result = buffers_.empty({}, ScalarType::Float);
    typed([&](auto t) {
      using T = decltype(t);
      Call call = this->call();
      Objective& o = call.objective;
      o.target = static_cast<const float*>(loss.target.data_ptr());
      o.mask = loss.mask ? static_cast<const uint8_t*>(loss.mask->data_ptr()) : nullptr;
      o.sample = loss.normalize == 1;
      o.gain = kGain<T>;
      call.drain = 1.0f / kGain<T>;
      pack<T>(call, packed_blocks(), &choice);
      sink(call);
      Totals totals{};
      totals.experts = static_cast<int32_t>(experts);
      totals.normalize = loss.normalize;
      totals.scale = buffers_.template take<float>(experts);
      totals.divisor = buffers_.template take<float>(experts);
      totals.again = buffers_.template take<int32_t>(1);
      totals.least = kLeast<T>;
      totals.loss = static_cast<float*>(result.mutable_data_ptr());
      hold_sums<T>(call, need_weights, &totals);
      if (loss.normalize >= 2) {
        // The input's gradient adds experts up, and what divides each is a sum over the batch: it
        // needs a second sweep, which elsewhere is for sums that are small.
        Call first = call;
        first.sinks_wanted = false;
        if (call.sinks_wanted) first.partial = nullptr;
        sweep<T>(first, &totals);
        totals.known = true;
        o.divisor = totals.divisor;
        if (call.sinks_wanted) {
          o.scale = totals.scale;
        } else {
          o.again = totals.again;
        }
      } else {
        share(call);
      }
      sweep<T>(call, &totals);
      if (need_weights) reduce<float>(call, o.scale ? nullptr : totals.scale, 1.0f / kGain<T>);
      scatter<float>();
    });
    Tensors all{result};
    for (Tensor& grad : results()) all.push_back(grad);
    return all;
  }

 private:
  const Tensor& like() const {
    STD_TORCH_CHECK(!in_.weights.empty(), "maskmoe: the fused network has no weights");
    return in_.weights.front();
  }
  ScalarType dtype() const { return like().scalar_type(); }
  const Network& network() const { return placed_->network; }
  const Tables& network_tables() const { return placed_->host; }

  static void dense(Tensors& of) {
    for (Tensor& t : of) t = compact(t);
  }

  // x as a matrix with features side by side.
  void hold_matrix() {
    Tensor& x = *in_.x;
    const int64_t features = x.size(x.dim() - 1);
    x_stride_ = features;
    if (x.dim() == 2 && (features == 1 || x.stride(1) == 1) && x.stride(0) >= features) {
      x_stride_ = x.stride(0);
    } else {
      x = compact(x);
    }
  }

  // A network compiled for parts of these widths, the plans that it was read from, and where their
  // values lie, which stays theirs.
  struct Kept {
    std::vector<Encoded> addresses;
    Tensors plans;
    Contents contents;
    std::shared_ptr<const Placed<Machine>> placed;

    bool is_from(const std::vector<Encoded>& others) const {
      return std::equal(addresses.begin(), addresses.end(), others.begin(), others.end(),
                        [](const Encoded& a, const Encoded& b) {
                          return a.values == b.values && a.count == b.count;
                        });
    }
  };

  // The plan of these layouts and parts on this device. Built on first use, which reads the
  // layouts back from the device and so cannot be captured in a graph; kept for good, as graphs
  // that were captured later point to its tables. What it was read from is known by its address,
  // other tensors by their content; see plan.h.
  std::shared_ptr<const Placed<Machine>> place() {
    static std::mutex mutex;
    static std::map<Integers, std::vector<Kept>> known;
    Integers key = in_.layouts;
    std::vector<PartSize> sizes;
    for (const PartOf& part : parts_) {
      sizes.push_back({part.table >= 0, part.width});
      key.push_back(part.width);
    }
    key.push_back(static_cast<int64_t>(in_.layouts.size()));
    key.push_back(machine_.device());
    std::vector<Encoded> addresses;
    for (const Tensor& plan : in_.plans) {
      addresses.push_back({static_cast<const int64_t*>(plan.data_ptr()), plan.numel()});
    }
    {
      const std::lock_guard<std::mutex> lock(mutex);
      for (const Kept& kept : known[key]) {
        if (kept.is_from(addresses)) return kept.placed;
      }
    }
    Contents contents;
    for (size_t n = 0; n < in_.plans.size(); ++n) {
      checks_.readable(in_.plans[n], "plans", n, aoti_torch_dtype_int64());
      STD_TORCH_CHECK(in_.plans[n].dim() == 1, checks_.named("plans", n), " must be a vector");
      contents.push_back(machine_.read(compact(in_.plans[n])));
    }
    std::shared_ptr<const Placed<Machine>> placed;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      for (const Kept& kept : known[key]) {
        if (kept.contents == contents) placed = kept.placed;
      }
    }
    if (placed == nullptr) {
      const auto layouts = verified(contents, in_.layouts);
      STD_TORCH_CHECK(layouts.front().in_features == features_of(parts_),
                      "maskmoe: the fused network reads ", layouts.front().in_features,
                      " features, its parts have ", features_of(parts_));
      std::vector<Encoded> encoded;
      for (const auto& values : contents) {
        encoded.push_back({values.data(), static_cast<int64_t>(values.size())});
      }
      placed = std::make_shared<const Placed<Machine>>(encoded, sizes);
    }
    Kept dropped;  // freed after the lock; see cpu/plan_cache.cpp
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<Kept>& all = known[key];
    if (all.size() >= kMostPlans) {  // never the last that has its tables
      auto spare = std::find_if(all.begin(), all.end(), [](const Kept& kept) {
        return kept.placed.use_count() > 1;
      });
      if (spare != all.end()) {
        dropped = std::move(*spare);
        all.erase(spare);
      }
    }
    all.push_back({std::move(addresses), in_.plans, std::move(contents), placed});
    return placed;
  }

  void check_readable() const {
    if (in_.x) checks_.readable(*in_.x, "x", -1, checks_.dtype());
    for (size_t n = 0; n < in_.tables.size(); ++n) {
      checks_.readable(in_.tables[n], "tables", n, checks_.dtype());
      checks_.readable(in_.ids[n], "ids", n, aoti_torch_dtype_int64());
      STD_TORCH_CHECK(in_.tables[n].dim() == 2, checks_.named("tables", n),
                      " must be (rows, width)");
    }
    for (size_t n = 0; n < in_.weights.size(); ++n) {
      checks_.readable(in_.weights[n], "weights", n, checks_.dtype());
    }
    for (size_t n = 0; n < in_.biases.size(); ++n) {
      checks_.readable(in_.biases[n], "biases", n, checks_.dtype());
    }
  }

  void check() const {
    for (size_t n = 0; n < in_.weights.size(); ++n) {
      checks_.values(in_.weights[n], "weights", n, network().num_weights[n]);
      if (in_.biases.empty()) continue;
      checks_.values(in_.biases[n], "biases", n, network().num_units[n]);
    }
    for (size_t n = 0; n < in_.ids.size(); ++n) {
      STD_TORCH_CHECK(in_.ids[n].numel() == rows_, checks_.named("ids", n), " must have ", rows_,
                      " entries, one a sample");
    }
  }

  void check(Choice& choice) const {
    const int64_t experts = network().out_features;
    checks_.readable(choice.strict, "strict", -1, aoti_torch_dtype_bool());
    STD_TORCH_CHECK(choice.strict.dim() == 2 && choice.strict.size(0) == experts &&
                        choice.strict.size(1) == experts,
                    "maskmoe: the family does not fit the network, it has ", experts, " logits");
    choice.sharpness = checked_sharpness(choice.sharpness);
    choice.strict = compact(choice.strict);
  }

  // Chooses the rows of a tile, or says why no tile fits.
  void room() {
    const int size = dtype() == ScalarType::Float ? 4 : 2;
    const bool slopes = holds_all(use_) && !follows_from_value(in_.activation);
    const int64_t limit = machine_.shared_limit();
    const std::string why = obstacle(network_tables(), size, use_, slopes, limit);
    STD_TORCH_CHECK(why.empty(), "maskmoe: ", why);
    height_ = rows_for(network_tables(), size, use_, slopes, limit, rows_, machine_.processors());
    room_ = room_for(network_tables(), height_, size, use_, slopes);
    if (holds_all(use_)) {
      hold_near(room_, network_tables(), partial_size(), machine_.shared(), limit);
    }
    bytes_ = room_.bytes;
  }

  // Of a block's partial gradients: whole words of 16 bytes.
  int64_t partial_size() const {
    const Tables& t = network_tables();
    return (partial_biases(t) + t.num_biases + 3) / 4 * 4;
  }

  template <class F>
  void typed(const F& f) {
    switch (dtype()) {
      case ScalarType::Float: return f(float{});
      case ScalarType::BFloat16: return f(Bfloat16{});
      case ScalarType::Half: return f(Float16{});
      default:
        STD_TORCH_CHECK(false, "maskmoe: the fused network takes float32, bfloat16 and float16");
    }
  }

  // f(std::type_identity of the kernel for these products and tiles); T: as tensors hold numbers.
  template <template <class, int> class Kernel, class T, class F>
  void with_kernel(const F& f) {
    if constexpr (std::is_same_v<T, float>) {
      if (single_) return with_height<Kernel, Tf32>(f);
    }
    with_height<Kernel, T>(f);
  }

  template <template <class, int> class Kernel, class T, class F>
  void with_height(const F& f) {
    constexpr int kHigh = high_tile(sizeof(T)), kLow = low_tile(sizeof(T));
    if (height_ == kHigh) return f(std::type_identity<Kernel<T, kHigh>>{});
    return f(std::type_identity<Kernel<T, kLow>>{});
  }

  template <class Kernel>
  int64_t blocks() {
    const int64_t tiles = (rows_ + height_ - 1) / height_;
    return std::min(tiles, machine_.template resident<Kernel>(bytes_));
  }

  // All tiles.
  template <class Kernel>
  void walk(const Call& call) {
    if (rows_ > 0) machine_.template launch<Kernel>(blocks<Kernel>(), bytes_, call);
  }

  Call call() {
    Call call{};
    call.tables = placed_->tables;
    call.room = room_;
    call.activation = in_.activation;
    call.rows = rows_;
    call.drain = 1.0f;
    int64_t column = 0;
    const int64_t item = dtype() == ScalarType::Float ? 4 : 2;
    for (size_t p = 0; p < in_.parts.size(); ++p) {
      const int64_t n = in_.parts[p];
      if (n < 0) {
        const auto* data = static_cast<const unsigned char*>(in_.x->data_ptr());
        call.parts[p] = {data + column * item, nullptr, x_stride_, rows_};
        column -= n;
      } else {
        const Tensor& table = in_.tables[n];
        call.parts[p] = {table.data_ptr(), static_cast<const int64_t*>(in_.ids[n].data_ptr()),
                         table.size(1), table.size(0)};
      }
    }
    return call;
  }

  int32_t packed_blocks() const {
    return need_x_ || need_tables_ ? network_tables().all_blocks : network_tables().inner_blocks;
  }

  // Weights and biases as the kernels want them. choice: of a selection, or null.
  template <class T>
  void pack(Call& call, int32_t count, const Choice* choice) {
    const Tables& t = network_tables();
    Parameters p{};
    p.tables = placed_->tables;
    for (size_t l = 0; l < in_.weights.size(); ++l) {
      p.weights[l] = in_.weights[l].data_ptr();
      p.biases[l] = in_.biases.empty() ? nullptr : in_.biases[l].data_ptr();
    }
    p.blocks = count;
    p.image = buffers_.template take<T>(int64_t{kBlock} * count);
    p.last = buffers_.template take<float>(int64_t{kSide} * t.num_entries);
    p.padded_biases = buffers_.template take<float>(t.num_biases);
    if (choice != nullptr) {
      p.strict = static_cast<const uint8_t*>(choice->strict.data_ptr());
      p.above = buffers_.template take<int16_t>(int64_t{t.experts} * t.experts);
      p.above_count = buffers_.template take<int32_t>(t.experts);
      p.larger = buffers_.template take<uint8_t>(t.experts);
      call.selection = {p.above,
                        p.above_count,
                        p.larger,
                        static_cast<float>(choice->sharpness),
                        choice->confidence,
                        choice->own};
    }
    call.image = p.image, call.last = p.last, call.biases = p.padded_biases;
    machine_.template launch<Pack<T>>(spread(int64_t{kBlock} * count + t.num_biases), 0, p);
  }

  // Where the input's gradients go: grad_x at once, table rows to be added up later.
  void sink(Call& call) {
    if (in_.x && need_x_) {
      Integers sizes = leading_;
      sizes.push_back(in_.x->size(in_.x->dim() - 1));
      grad_x_ = buffers_.empty(sizes, results_);
    }
    int64_t width = 0;
    if (need_tables_) {
      for (int64_t p : in_.parts) width += p < 0 ? 0 : in_.tables[p].size(1);
      grad_rows_ = buffers_.empty({rows_, width}, results_);
    }
    const int64_t item = results_ == ScalarType::Float ? 4 : 2;
    int64_t column = 0, table_column = 0;
    for (size_t n = 0; n < in_.parts.size(); ++n) {
      const int64_t p = in_.parts[n];
      if (p < 0) {
        if (grad_x_) {
          auto* data = static_cast<unsigned char*>(grad_x_->mutable_data_ptr());
          call.sinks[n] = {data + column * item, grad_x_->size(grad_x_->dim() - 1)};
        }
        column -= p;
      } else if (need_tables_) {
        auto* data = static_cast<unsigned char*>(grad_rows_->mutable_data_ptr());
        call.sinks[n] = {data + table_column * item, width};
        table_column += in_.tables[p].size(1);
      }
    }
    call.sinks_wanted = grad_x_ || (need_tables_ && width > 0);
    call.sinks_wide = results_ == ScalarType::Float;
  }

  // The loss is a mean over samples: so are the inputs' gradients.
  void share(Call& call) {
    if (!call.sinks_wanted) return;
    if (call.objective.mask == nullptr) {
      call.drain /= static_cast<float>(std::max<int64_t>(rows_, 1));
      return;
    }
    const Samples samples{call.objective.mask, rows_, buffers_.template take<float>(1)};
    machine_.template launch<Count>(1, Count::kShared, samples);
    call.drain_by = samples.share;
  }

  // Room for what every block sums up.
  template <class T>
  void hold_sums(Call& call, bool weights, Totals* totals) {
    const Tables& t = network_tables();
    call.partial_size = partial_size();
    with_kernel<Backward, T>([&](auto kernel) {
      sums_ = blocks<typename decltype(kernel)::type>();
    });
    if (weights) call.partial = buffers_.template take<float>(sums_ * call.partial_size);
    if (totals == nullptr) return;
    call.objective.sums = buffers_.template take<float>(sums_ * (2 * t.experts + 1));
    totals->sums = call.objective.sums;
    totals->blocks = sums_;
  }

  // Forward and backward of all tiles; then the loss, where there is one.
  template <class T>
  void sweep(const Call& call, const Totals* totals) {
    with_kernel<Backward, T>([&](auto kernel) { walk<typename decltype(kernel)::type>(call); });
    if (totals == nullptr) return;
    machine_.template launch<Finish>(1, Finish::shared(totals->experts), *totals);
  }

  // The sums over blocks; T: as the results hold numbers.
  template <class T>
  void reduce(const Call& call, const float* scale, float factor) {
    Gradients g{};
    g.tables = placed_->tables;
    g.partial = call.partial;
    g.partial_size = call.partial_size;
    g.partials = sums_;
    g.scale = scale;
    g.factor = factor;
    for (size_t l = 0; l < in_.weights.size(); ++l) {
      grad_weights_.push_back(buffers_.empty({in_.weights[l].numel()}, results_));
      g.weights[l] = grad_weights_.back().mutable_data_ptr();
    }
    for (size_t l = 0; l < in_.biases.size(); ++l) {
      grad_biases_.push_back(buffers_.empty({in_.biases[l].numel()}, results_));
      g.biases[l] = grad_biases_.back().mutable_data_ptr();
    }
    machine_.template launch<Reduce<T>>(spread(kWarps * partial_size()), Reduce<T>::kShared, g);
  }

  // Gradients of the tables from those of the rows that samples read; T: as those hold numbers.
  template <class T>
  void scatter() {
    if (!need_tables_) return;
    std::vector<int64_t> column(in_.tables.size(), -1);
    int64_t at = 0;
    for (int64_t p : in_.parts) {
      if (p < 0) continue;
      column[p] = at;
      at += in_.tables[p].size(1);
    }
    for (size_t n = 0; n < in_.tables.size(); ++n) {
      const Tensor& table = in_.tables[n];
      Scatter s{};
      s.grad = column[n] < 0 ? nullptr : static_cast<const T*>(grad_rows_->data_ptr()) + column[n];
      s.samples = rows_;
      s.stride = at;
      s.rows = table.size(0);
      s.width = table.size(1);
      grad_tables_.push_back(table_gradient<T>(machine_, buffers_, s, in_.ids[n], results_));
    }
  }

  Tensors results() {
    Tensors all;
    if (grad_x_) all.push_back(*grad_x_);
    for (auto* of : {&grad_tables_, &grad_weights_, &grad_biases_}) {
      all.insert(all.end(), of->begin(), of->end());
    }
    return all;
  }

  static constexpr const char* kOp = "masked_mlp";
  static constexpr size_t kMostPlans = 64;  // tensors that one network is known by

  Inputs in_;
  Use use_;
  Checks checks_;
  std::vector<PartOf> parts_;
  Machine machine_;
  std::shared_ptr<const Placed<Machine>> placed_;
  Integers leading_;
  ScalarType results_;  // of the gradients
  int64_t rows_ = 1, x_stride_ = 0, bytes_ = 0;
  int64_t sums_ = 0;    // blocks that have some
  int height_ = 0;
  Room room_{};
  bool single_ = false;  // float32 multiplies as Tf32
  bool need_x_ = false, need_tables_ = false, need_weights_ = false;
  std::optional<Tensor> grad_x_, grad_rows_;
  Tensors grad_tables_, grad_weights_, grad_biases_;
  Buffers buffers_;
};

}  // namespace maskmoe::fused
