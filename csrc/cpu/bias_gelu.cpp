// Shapes: R rows of W values; bias is [W].
#include "vector.h"

namespace {

using namespace mae_fast;

template <class A, int BYTES> struct Normal { // the standard normal distribution at x
  typename Vector<A, BYTES>::type cdf{}, pdf{};
};

// erfc(z) = p(1 / (1 + 0.3275911 z)) e^(-z^2) for z >= 0, to 1.5e-7 (Abramowitz and
// Stegun, 7.1.26): density and distribution share the exponential.
template <int BYTES>
MAE_INLINE void normal(const typename Vector<float, BYTES>::type &x, Normal<float, BYTES> &out) {
  using V = typename Vector<float, BYTES>::type;
  const V size = x < 0.f ? -x : x;
  V e = x * x * -0.5f;
  exponential<BYTES>(e);
  const V t = 1.f / (size * (0.3275911f * 0.70710678118654752f) + 1.f);
  V p = t * 1.061405429f + -1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t + -0.284496736f;
  p = p * t + 0.254829592f;
  const V tail = p * t * e * 0.5f;
  out.cdf = x < 0.f ? tail : 1.f - tail;
  out.pdf = e * 0.39894228040143268f;
}
template <int BYTES>
MAE_INLINE void normal(const typename Vector<double, BYTES>::type &x, Normal<double, BYTES> &out) {
  constexpr int lanes = BYTES / 8;
  double cdf[lanes], pdf[lanes];
  for (int i = 0; i < lanes; ++i) {
    cdf[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
    pdf[i] = std::exp(x[i] * x[i] * -0.5) * 0.39894228040143267794;
  }
  out.cdf = load<BYTES>(static_cast<const double *>(cdf));
  out.pdf = load<BYTES>(static_cast<const double *>(pdf));
}

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
    parallel_kernel(s.rows, 1 + 8192 / std::max<int64_t>(1, s.width),
                    [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
                      for (int64_t r = begin; r < end; ++r) {
                        const int64_t row = r * s.width;
                        each_vector<Vector<A, BYTES>::lanes>(
                            s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
                              const auto h = load_some<BYTES>(x_ptr + row + j, count) +
                                             load_some<BYTES>(shift.data() + j, count);
                              Normal<A, BYTES> at;
                              normal<BYTES>(h, at);
                              store_some<BYTES>(out_ptr + row + j, count, h * at.cdf);
                            });
                      }
                    });
  });
  return out;
}

// dx [..., W], dbias [W] and, `again`, the value itself (else empty)
std::tuple<Tensor, Tensor, Tensor> bias_gelu_backward_cpu(const Tensor &grad, const Tensor &x,
                                                          const Tensor &bias, bool again) {
  const Rows s("bias_gelu_backward", x, bias, expected);
  MAE_CHECK_VALUE(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
                  "bias_gelu_backward: grad must have the size and dtype of x");
  const Tensor in = contiguous(x), dout = contiguous(grad);
  Tensor value = again ? empty_like(in) : new_empty(in, {0}, in.scalar_type());
  Tensor dx = empty_like(in), dbias = new_empty(bias, {s.width}, bias.scalar_type());
  dispatch_floating("bias_gelu_backward", x.scalar_type(), [&]<class T>() {
    using A = Wide<T>;
    const T *x_ptr = in.const_data_ptr<T>(), *dout_ptr = dout.const_data_ptr<T>();
    T *dx_ptr = dx.mutable_data_ptr<T>();
    T *value_ptr = again ? value.mutable_data_ptr<T>() : nullptr;
    const std::vector<A> shift = read_all<A>(bias);
    std::vector<A> sums(s.blocks * s.width);
    parallel_kernel(
        s.blocks, 1, [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
          for (int64_t block = begin; block < end; ++block) {
            A *sum = sums.data() + block * s.width;
            for (int64_t r = block * s.per_block; r < std::min(s.rows, (block + 1) * s.per_block);
                 ++r) {
              const int64_t row = r * s.width;
              each_vector<Vector<A, BYTES>::lanes>(s.width, [&](int64_t j,
                                                                int64_t count) MAE_KERNEL {
                const auto h = load_some<BYTES>(x_ptr + row + j, count) +
                               load_some<BYTES>(shift.data() + j, count);
                Normal<A, BYTES> at;
                normal<BYTES>(h, at);
                const auto d = load_some<BYTES>(dout_ptr + row + j, count) * (at.cdf + h * at.pdf);
                store_some<BYTES>(dx_ptr + row + j, count, d);
                if (value_ptr)
                  store_some<BYTES>(value_ptr + row + j, count, h * at.cdf);
                store_some<BYTES>(sum + j, count, load_some<BYTES>(sum + j, count) + d);
              });
            }
          }
        });
    dispatch_floating("bias_gelu_backward", bias.scalar_type(), [&]<class B>() {
      B *dbias_ptr = dbias.mutable_data_ptr<B>();
      for (int64_t j = 0; j < s.width; ++j) {
        A sum = 0;
        for (int64_t block = 0; block < s.blocks; ++block)
          sum += sums[block * s.width + j];
        dbias_ptr[j] = narrow<B>(sum);
      }
    });
  });
  return {dx, dbias, value};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cpu));
}
