// Shapes: R rows of W values; bias is [W].
#include "gelu.h"

namespace {

using namespace mae_fast;

constexpr const char *expected = "bias must be [W] for x [..., W]";

Tensor bias_gelu_cpu(const Tensor &x, const Tensor &bias) { // [..., W], [W]
  const Rows s("bias_gelu", x, bias, expected);
  const Tensor in = contiguous(x);
  Tensor out = empty_like(in);
  dispatch_floating("bias_gelu", x.scalar_type(), [&]<class T>() {
    using A = Wide<T>;
    const T *x_ptr = in.const_data_ptr<T>();
    T *out_ptr = out.mutable_data_ptr<T>();
    const std::vector<A> shift = read_all<A>(bias);
    s.each([&]<int BYTES>(int64_t r, int64_t) MAE_KERNEL {
      each_vector<Vector<A, BYTES>::lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        const auto h = load_some<BYTES>(x_ptr + r * s.width + j, count) +
                       load_some<BYTES>(shift.data() + j, count);
        typename Vector<A, BYTES>::type cdf;
        normal_cdf<BYTES>(h, cdf);
        store_some<BYTES>(out_ptr + r * s.width + j, count, h * cdf);
      });
    });
  });
  return out;
}

// -> dx [..., W], dbias [W], and with `with_value` the result of bias_gelu [..., W] (else empty)
std::tuple<Tensor, Tensor, Tensor> bias_gelu_backward_cpu(const Tensor &grad, const Tensor &x,
                                                          const Tensor &bias, bool with_value) {
  const Rows s("bias_gelu_backward", x, bias, expected);
  MAE_CHECK_VALUE(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
                  "bias_gelu_backward: grad must have the size and dtype of x");
  const Tensor in = contiguous(x), dout = contiguous(grad);
  Tensor value = with_value ? empty_like(in) : new_empty(in, {0}, in.scalar_type());
  Tensor dx = empty_like(in), dbias = new_empty(bias, {s.width}, bias.scalar_type());
  dispatch_floating("bias_gelu_backward", x.scalar_type(), [&]<class T>() {
    using A = Wide<T>;
    const T *x_ptr = in.const_data_ptr<T>(), *dout_ptr = dout.const_data_ptr<T>();
    T *dx_ptr = dx.mutable_data_ptr<T>();
    T *value_ptr = with_value ? value.mutable_data_ptr<T>() : nullptr;
    const std::vector<A> shift = read_all<A>(bias);
    std::vector<A> sums(s.blocks * s.width);
    s.each([&]<int BYTES>(int64_t r, int64_t block) MAE_KERNEL {
      A *sum = sums.data() + block * s.width;
      const int64_t row = r * s.width;
      each_vector<Vector<A, BYTES>::lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        const auto h =
            load_some<BYTES>(x_ptr + row + j, count) + load_some<BYTES>(shift.data() + j, count);
        typename Vector<A, BYTES>::type cdf, slope;
        normal_cdf<BYTES>(h, cdf);
        gelu_derivative<A, BYTES>(h, cdf, slope);
        const auto d = load_some<BYTES>(dout_ptr + row + j, count) * slope;
        store_some<BYTES>(dx_ptr + row + j, count, d);
        if (value_ptr)
          store_some<BYTES>(value_ptr + row + j, count, h * cdf);
        store_some<BYTES>(sum + j, count, load_some<BYTES>(sum + j, count) + d);
      });
    });
    s.add_blocks(sums.data(), s.width, dbias);
  });
  return {dx, dbias, value};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cpu));
}
