// All kernels with the processor's own products `P` of bfloat16. Other dtypes use AVX-512.
#pragma once

#include "cpu/bfloat16/masked_mlp.h"
#include "cpu/masked_linear/packed_weights.h"

namespace maskmoe {

template <class P>
struct Bfloat16Kernels {
  using I = typename P::Isa;
  using E = Elements<I>;
  using Linear = Bfloat16Linear<P>;
  using Network = Bfloat16Mlp<P>;

  static constexpr Kernels table(const char* name) {
    return {name,
            I::kLanes,
            pack,
            PackedWeights<I>::unpack,
            forward_scratch,
            forward,
            backward_scratch,
            backward,
            E::add,
            E::load,
            E::store,
            mlp_saved,
            mlp_units,
            mlp_scratch,
            mlp,
            spline,
            spline_inverse,
            spline_backward};
  }

  static bool own(Dtype dtype) { return dtype == Dtype::kBfloat16; }

  static void pack(const PanelsView& view, int64_t begin, int64_t end, const void* weight,
                   Dtype dtype, Place in_place, float* buffer) {
    if (!own(dtype)) return kAvx512.pack(view, begin, end, weight, dtype, in_place, buffer);
    P::pack(view, begin, end, static_cast<const uint16_t*>(weight), buffer);
  }

  static int64_t forward_scratch(const Forward& f) {
    return own(f.x.dtype) ? Linear::forward_scratch(f) : kAvx512.forward_scratch(f);
  }
  static void forward(const Forward& f, int64_t row, int64_t end, float* scratch) {
    own(f.x.dtype) ? Linear::forward(f, row, end, scratch) : kAvx512.forward(f, row, end, scratch);
  }

  static int64_t backward_scratch(const Backward& b) {
    return own(b.x.dtype) ? Linear::backward_scratch(b) : kAvx512.backward_scratch(b);
  }
  static void backward(const Backward& b, int64_t row, int64_t end, float* grad_weight,
                       float* grad_buffer, float* grad_bias, float* scratch) {
    if (own(b.x.dtype)) return Linear::backward(b, row, end, grad_buffer, grad_bias, scratch);
    kAvx512.backward(b, row, end, grad_weight, grad_buffer, grad_bias, scratch);
  }

  static int64_t mlp_saved(const Mlp& n) {
    return own(n.dtype) ? Network::saved(n) : kAvx512.mlp_saved(n);
  }
  static int64_t mlp_units(const Mlp& n) {
    return own(n.dtype) ? Network::units(n) : kAvx512.mlp_units(n);
  }
  static int64_t mlp_scratch(const Mlp& n) {
    return own(n.dtype) ? Network::scratch(n) : kAvx512.mlp_scratch(n);
  }
  static void mlp(const Mlp& n, int64_t begin, int64_t end, const LayerSums* sums,
                  const GemSums& totals, float* scratch) {
    own(n.dtype) ? Network::run(n, begin, end, sums, totals, scratch)
                 : kAvx512.mlp(n, begin, end, sums, totals, scratch);
  }

  static void spline(const Splines& s, int64_t begin, int64_t end) {
    kAvx512.spline(s, begin, end);
  }
  static void spline_inverse(const Splines& s, int64_t begin, int64_t end) {
    kAvx512.spline_inverse(s, begin, end);
  }
  static void spline_backward(const Splines& s, const SplineGradients& grads, int64_t begin,
                              int64_t end) {
    kAvx512.spline_backward(s, grads, begin, end);
  }
};

}  // namespace maskmoe
