// The exact GELU, x Phi(x), and its derivative, Phi(x) + x phi(x).
#pragma once

#include "vector.h"

namespace mae_fast {

// Minimax fits of functions f for which f - 0.5 is odd: 0.5 + x p(2 x^2 / limit^2 - 1). x is
// clamped to -limit..limit.
template <int BYTES> struct OddAroundHalf {
  using V = typename Vector<float, BYTES>::type;
  V clamped, t;
  MAE_INLINE OddAroundHalf(const V &x, float limit) {
    clamped = x > limit ? V{} + limit : x; // keeps NaN
    clamped = clamped < -limit ? V{} - limit : clamped;
    t = clamped * clamped * (2 / (limit * limit)) - 1.f;
  }
  template <size_t N> MAE_INLINE void at(const float (&p)[N], V &out) const {
    V y = V{} + p[N - 1];
#pragma GCC unroll 16
    for (int i = int(N) - 2; i >= 0; --i)
      y = y * t + p[i];
    out = clamped * y + 0.5f;
  }
  // Clamps the fit to 0..1. It is slightly above 1 at the limit, so the result is exactly 1 for
  // larger x.
  template <size_t N> MAE_INLINE void probability(const float (&p)[N], V &out) const {
    at(p, out);
    out = out > 1.f ? V{} + 1.f : out;
    out = out < 0.f ? V{} : out;
  }
};

// Phi(x), with an error of at most 2e-7 in fp32.
constexpr float cdf_terms[] = {0.12855193f,    -0.06417269f,   0.04773794f,   -0.038780037f,
                               0.03206244f,    -0.02618015f,   0.020429622f,  -0.014404677f,
                               0.009986685f,   -0.008177947f,  0.0050605317f, -0.0007791199f,
                               0.00033681397f, -0.0015221843f, 0.00075994665f};
template <int BYTES>
MAE_INLINE void normal_cdf(const typename Vector<float, BYTES>::type &x,
                           typename Vector<float, BYTES>::type &out) {
  OddAroundHalf<BYTES>(x, 5.5f).probability(cdf_terms, out);
}
template <int BYTES>
MAE_INLINE void normal_cdf(const typename Vector<double, BYTES>::type &x,
                           typename Vector<double, BYTES>::type &out) {
  for (int i = 0; i < BYTES / 8; ++i)
    out[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
}

// The derivative of GELU. `cdf` is Phi(x).
template <class A, int BYTES>
MAE_INLINE void gelu_derivative(const typename Vector<A, BYTES>::type &x,
                                const typename Vector<A, BYTES>::type &cdf,
                                typename Vector<A, BYTES>::type &out) {
  typename Vector<A, BYTES>::type e = x * x * A(-0.5);
  exponential<BYTES>(e);
  out = cdf + x * e * A(0.39894228040143267794);
}

// Less accurate versions for results that are rounded to bf16: the error is at most 2e-6 for Phi(x)
// and 2e-5 for the derivative.
constexpr float rough_cdf_terms[] = {0.14136364f,   -0.07030041f,  0.051532578f, -0.040349767f,
                                     0.0312831f,    -0.02384433f,  0.017168567f, -0.009724397f,
                                     0.0047499957f, -0.004247093f, 0.003370251f, -0.0010019371f};
constexpr float rough_derivative_terms[] = {
    0.14213057f, -0.07512374f, 0.066827215f, -0.07151944f,  0.07707979f,  -0.085499175f,
    0.09515038f, -0.06807908f, 0.021189354f, -0.028130777f, 0.046531737f, -0.020556828f};
template <int BYTES>
MAE_INLINE void rough_gelu(const typename Vector<float, BYTES>::type &x,
                           typename Vector<float, BYTES>::type &cdf,
                           typename Vector<float, BYTES>::type *derivative = nullptr) {
  const OddAroundHalf<BYTES> fit(x, 5.f);
  fit.probability(rough_cdf_terms, cdf);
  if (derivative)
    fit.at(rough_derivative_terms, *derivative);
}

} // namespace mae_fast
