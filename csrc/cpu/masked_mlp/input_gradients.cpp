#include "cpu/masked_mlp/input_gradients.h"

#include <algorithm>

namespace maskmoe {
namespace {

constexpr int64_t kRowsFloats = 1 << 20;

}  // namespace

InputGradients::InputGradients(const MlpInputs& in, const MlpGradients& grads, const Tiling& tiling)
    : in_(in), grads_(grads),
      tables_(std::any_of(grads.tables.begin(), grads.tables.end(), [](void* p) { return p; })),
      straight_(grads.x.data != nullptr && in.parts.size() == 1),
      step_(std::max<int64_t>(kRowsFloats / (features() * tiling.rows),
                              2 * torch::stable::get_num_threads())),
      rows_(std::min(step_ * tiling.rows, in.rows)) {}

int64_t InputGradients::scratch() const {
  if (!wanted() || straight_) return 0;
  int64_t size = Scratch::round_up(rows_ * features());
  for (size_t p = 0; p < in_.parts.size(); ++p) size += Scratch::round_up(wide(p));
  return size;
}

Matrix InputGradients::take(Scratch& scratch) {
  if (straight_ || !wanted()) return grads_.x;
  values_ = scratch.take(rows_ * features());
  for (size_t p = 0; p < in_.parts.size(); ++p) wide_.push_back(scratch.take(wide(p)));
  const auto& order = in_.chain[0].layout.col_order;
  return {values_, Dtype::kFloat32, features(), features(),
          order.empty() ? nullptr : order.data()};
}

void InputGradients::run(MlpCall& call, const Kernels& k) const {
  if (straight_ || !wanted()) return call.run();
  bool fresh = true;
  call.run(step_, [&](int64_t first, int64_t rows) {
    distribute(call, k, first, rows, fresh);
    fresh = false;
  });
  if (in_.rows == 0) distribute(call, k, 0, 0, true);
  if (direct()) return;
  each_table([&](size_t p, float* from) {
    const int64_t size = in_.table_rows[p] * in_.parts[p].width;
    k.store(grads_.tables[p], grads_.dtype, nullptr, from, size);
  });
}

// Gradients of the samples [first, first + rows); `fresh`: the sums of tables begin at zero.
void InputGradients::distribute(const MlpCall& call, const Kernels& k, int64_t first, int64_t rows,
                                bool fresh) const {
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
}

// Rows [begin, end) of those that begin at `first`.
void InputGradients::copy_columns(const Kernels& k, int64_t first, int64_t begin,
                                  int64_t end) const {
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

// Samples [first, first + rows), to the rows of table [begin, end) that they name.
void InputGradients::add_rows(const Kernels& k, size_t p, int64_t first, int64_t rows,
                              int64_t begin, int64_t end, float* to) const {
  const Part& part = in_.parts[p];
  const float* from = values_;
  for (size_t before = 0; before < p; ++before) from += in_.parts[before].width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t id = part.ids[first + r];
    if (id < begin || id >= end) continue;
    k.add(to + id * part.width, from + r * features(), part.width);
  }
}

}  // namespace maskmoe
