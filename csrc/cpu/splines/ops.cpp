// rational_quadratic and its backward: tensors in, tensors out.

#include <cmath>

#include "cpu/instruction_sets.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace maskmoe {
namespace {

constexpr int64_t kFlopsPerBin = 100;  // about
constexpr double kLeast = 1e-6;      // slope or fraction: intermediate results are normal numbers
constexpr double kMostFixed = 0.95;  // of the domain, by the least fractions of all bins

// A tensor (elements, count) whose last dimension is dense.
Strided strided(const Checks& checks, const Tensor& t, const char* name, int64_t elements,
                int64_t count) {
  checks.readable(t, name, -1, aoti_torch_dtype_float32());
  const bool fits = t.dim() == 2 && t.size(0) == elements && t.size(1) == count;
  STD_TORCH_CHECK(fits && (count <= 1 || t.stride(1) == 1), checks.named(name, -1), " must be ",
                  elements, " rows of ", count, " values, one after the other");
  return {static_cast<const float*>(t.data_ptr()), t.stride(0)};
}

float* dense(const Checks& checks, const Tensor& t, const char* name, int64_t elements) {
  checks.readable(t, name, -1, aoti_torch_dtype_float32());
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == elements && t.is_contiguous(),
                  checks.named(name, -1), " must be ", elements, " values, one after the other");
  return static_cast<float*>(t.data_ptr());
}

// What the numbers of a call say about all of its splines.
struct Form {
  double bound, slope, width, height;
  bool squashed;
};

Splines checked(const Checks& checks, const Tensor& x, const Tensor& widths,
                const Tensor& heights, const Tensor& derivatives, const Form& form) {
  const int64_t elements = x.numel();
  const int64_t bins = widths.dim() == 2 ? widths.size(1) : 0;
  STD_TORCH_CHECK(bins >= 1 && bins <= kMaxBins, checks.named("widths", -1), " must be of 1 to ",
                  kMaxBins, " bins, and is of ", bins);
  STD_TORCH_CHECK(form.bound >= 1e-6 && form.bound <= 1e6 && form.slope >= kLeast &&
                      form.slope < 1,
                  "maskmoe::", checks.op(), ": bound must be in [1e-6, 1e6] and slope in [1e-6, 1)");
  // Squashed, fractions are bounded as it is.
  const double least = form.squashed ? 0 : kLeast;
  const double most = form.squashed ? 0 : kMostFixed / static_cast<double>(bins);
  const auto fits = [&](double m) { return m >= least && m <= most; };
  STD_TORCH_CHECK(fits(form.width) && fits(form.height), "maskmoe::", checks.op(),
                  ": width and height must be in [", least, ", ", most, "]");
  Splines s{};
  s.bins = bins;
  s.bound = static_cast<float>(form.bound);
  s.squashed = form.squashed;
  s.slope = static_cast<float>(form.slope);
  s.steepest = static_cast<float>(-std::log(form.slope));
  s.least_width = static_cast<float>(form.width);
  s.least_height = static_cast<float>(form.height);
  s.x = dense(checks, x, "x", elements);
  s.widths = strided(checks, widths, "widths", elements, bins);
  s.heights = strided(checks, heights, "heights", elements, bins);
  s.derivatives = strided(checks, derivatives, "derivatives", elements, bins - 1);
  return s;
}

// f(begin, end) for each thread's elements.
template <class F>
void over(int64_t elements, int64_t bins, const F& f) {
  const int64_t threads = threads_for(elements * bins * kFlopsPerBin, elements);
  each(threads, [&](int64_t t) { f(elements * t / threads, elements * (t + 1) / threads); });
}

// Two results of every element, by a forward or an inverse.
std::tuple<Tensor, Tensor> run(const char* op, decltype(Kernels::spline) kernel, const Tensor& x,
                               const Tensor& widths, const Tensor& heights,
                               const Tensor& derivatives, const Form& form) {
  Splines s = checked(Checks(op, x), x, widths, heights, derivatives, form);
  const int64_t elements = x.numel();
  Tensor y = empty_like_with(x, &elements, 1), log_slope = empty_like_with(x, &elements, 1);
  s.y = static_cast<float*>(y.data_ptr());
  s.log_slope = static_cast<float*>(log_slope.data_ptr());
  over(elements, s.bins, [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  return {y, log_slope};
}

}  // namespace

std::tuple<Tensor, Tensor> rational_quadratic_op(Tensor x, Tensor widths, Tensor heights,
                                                 Tensor derivatives, double bound, double slope,
                                                 double width, double height, bool squashed) {
  return run("rational_quadratic", kernels()->spline, x, widths, heights, derivatives,
             {bound, slope, width, height, squashed});
}

std::tuple<Tensor, Tensor> rational_quadratic_inverse_op(Tensor y, Tensor widths, Tensor heights,
                                                         Tensor derivatives, double bound,
                                                         double slope, double width, double height,
                                                         bool squashed) {
  return run("rational_quadratic_inverse", kernels()->spline_inverse, y, widths, heights,
             derivatives, {bound, slope, width, height, squashed});
}

std::tuple<Tensor, Tensor> rational_quadratic_backward_op(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_log_slope, Tensor x, Tensor widths,
    Tensor heights, Tensor derivatives, double bound, double slope, double width, double height,
    bool squashed) {
  const Checks checks("rational_quadratic_backward", x);
  const Splines s = checked(checks, x, widths, heights, derivatives,
                            {bound, slope, width, height, squashed});
  const int64_t elements = x.numel(), sizes[2] = {elements, 3 * s.bins - 1};
  SplineGradients grads{};
  if (grad_y) grads.y = dense(checks, *grad_y, "grad_y", elements);
  if (grad_log_slope) {
    grads.log_slope = dense(checks, *grad_log_slope, "grad_log_slope", elements);
  }
  Tensor grad_x = empty_like_with(x, sizes, 1), grad_parameters = empty_like_with(x, sizes, 2);
  grads.x = static_cast<float*>(grad_x.data_ptr());
  grads.parameters = static_cast<float*>(grad_parameters.data_ptr());
  const Kernels& k = *kernels();
  over(elements, s.bins, [&](int64_t begin, int64_t end) {
    k.spline_backward(s, grads, begin, end);
  });
  return {grad_x, grad_parameters};
}

}  // namespace maskmoe
