// Shapes: R rows of D values; weight and bias are [D].
#include "vector.h"

#include <cmath>

namespace {

using namespace mae_fast;

constexpr const char *expected = "weight must be [D] for x [..., D]";
constexpr const char *no_residual_bias =
    "add_layer_norm: residual_bias is not supported on CPUs; add it to the residual";

// Calls f.operator()<S, L>(). S is the dtype of the sum, L the dtype of the residual, of normed or
// of their gradients. L is S, or a half type if S is fp32.
template <class F>
void dispatch_pair(const char *op, ScalarType sum, ScalarType residual_dtype, const F &f) {
  if (sum == residual_dtype)
    return dispatch_floating(op, sum, [&]<class T>() { f.template operator()<T, T>(); });
  MAE_CHECK_VALUE(sum == ScalarType::Float, op, ": sum dtype ", torch::headeronly::toString(sum),
                  " with ", torch::headeronly::toString(residual_dtype), " is not supported");
  dispatch<Half, BFloat16>(op, residual_dtype,
                           [&]<class T>() { f.template operator()<float, T>(); });
}

// Maps rows of a residual [..., R, D] to rows of x [..., T, D]. The residual has the last R tokens
// of each image.
struct Tokens {
  int64_t length = 1, skipped = 0; // R, and T - R
  Tokens(const char *op, const Tensor &x, const Tensor &residual) {
    const int64_t dims = x.dim();
    bool fits = residual.dim() == dims;
    for (int64_t i = 0; fits && i < dims; ++i)
      fits = residual.size(i) == x.size(i) || (i == dims - 2 && residual.size(i) < x.size(i));
    MAE_CHECK_VALUE(fits, op, ": residual must have the size of x, or fewer tokens");
    if (dims > 1)
      length = residual.size(dims - 2), skipped = x.size(dims - 2) - length;
  }
  // The row of x for row r of the residual.
  MAE_INLINE int64_t row(int64_t r) const { return skipped ? r + (r / length + 1) * skipped : r; }
};

// -> sum [..., D] (empty without residual), normed [..., D], stats [2, R]: mean and 1 / standard
// deviation
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor &x,
                                                      const std::optional<Tensor> &residual,
                                                      const std::optional<Tensor> &residual_bias,
                                                      const Tensor &weight, const Tensor &bias,
                                                      double eps, ScalarType dtype) {
  MAE_CHECK_VALUE(!residual_bias, no_residual_bias);
  const Rows s("add_layer_norm", residual ? *residual : x, weight, expected);
  const Tokens tokens("add_layer_norm", x, residual ? *residual : x);
  MAE_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == s.width,
                  "add_layer_norm: bias must be [D], like weight");
  MAE_CHECK_VALUE(!residual || residual->scalar_type() == dtype ||
                      residual->scalar_type() == x.scalar_type(),
                  "add_layer_norm: residual must have the dtype of x or of normed");
  const Tensor in = contiguous(x), added = residual ? contiguous(*residual) : in;
  const ScalarType acc_dtype =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor sum =
      residual ? new_empty(x, added.sizes(), x.scalar_type()) : new_empty(x, {0}, x.scalar_type());
  Tensor normed = new_empty(in, added.sizes(), dtype), stats = new_empty(x, {2, s.rows}, acc_dtype);
  dispatch_pair("add_layer_norm", x.scalar_type(), dtype, [&]<class S, class L>() {
    using A = Wide<S>;
    const bool is_narrow = residual && residual->scalar_type() != x.scalar_type();
    const S *x_ptr = in.const_data_ptr<S>();
    const S *same_ptr = residual && !is_narrow ? added.const_data_ptr<S>() : nullptr;
    const L *narrow_ptr = is_narrow ? added.const_data_ptr<L>() : nullptr;
    S *sum_ptr = residual ? sum.mutable_data_ptr<S>() : nullptr;
    L *normed_ptr = normed.mutable_data_ptr<L>();
    A *stats_ptr = stats.mutable_data_ptr<A>();
    const std::vector<A> scale = read_all<A>(weight), shift = read_all<A>(bias);
    s.each([&]<int BYTES>(int64_t r, int64_t) MAE_KERNEL {
      constexpr int64_t lanes = Vector<A, BYTES>::lanes;
      A *row = thread_buffer<A>(s.width);
      const int64_t first = r * s.width, x_first = tokens.row(r) * s.width;
      typename Vector<A, BYTES>::type sums{};
      each_vector<lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        auto v = load_some<BYTES>(x_ptr + x_first + j, count);
        if (same_ptr)
          v += load_some<BYTES>(same_ptr + first + j, count);
        if (narrow_ptr)
          v += load_some<BYTES>(narrow_ptr + first + j, count);
        if (sum_ptr) { // normalise the rounded sum
          store_some<BYTES>(sum_ptr + first + j, count, v);
          v = load_some<BYTES>(sum_ptr + first + j, count);
        }
        store_some<BYTES>(row + j, count, v);
        sums += v; // v is zero in lanes from count
      });
      const A mean = total<BYTES, A>(sums) / A(s.width);
      typename Vector<A, BYTES>::type squares{};
      each_vector<lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        auto d = load_some<BYTES>(row + j, count) - mean;
        for (int64_t i = count; i < lanes; ++i)
          d[i] = 0;
        squares += d * d;
      });
      const A rstd = 1 / std::sqrt(total<BYTES, A>(squares) / A(s.width) + A(eps));
      stats_ptr[r] = mean;
      stats_ptr[s.rows + r] = rstd;
      each_vector<lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        const auto d = (load_some<BYTES>(row + j, count) - mean) * rstd;
        store_some<BYTES>(normed_ptr + first + j, count,
                          d * load_some<BYTES>(scale.data() + j, count) +
                              load_some<BYTES>(shift.data() + j, count));
      });
    });
  });
  return {sum, normed, stats};
}

// -> dx [..., D] in the dtype of sum, with `skipped` zero tokens before those of each image; the
// gradient of the residual in residual_dtype (empty if that is the dtype of sum); dweight [D];
// dbias [D]; an empty gradient of residual_bias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
add_layer_norm_backward_cpu(const std::optional<Tensor> &grad_sum, const Tensor &grad,
                            const Tensor &sum, const Tensor &stats, const Tensor &weight,
                            const std::optional<Tensor> &residual_bias, ScalarType residual_dtype,
                            int64_t skipped) {
  MAE_CHECK_VALUE(!residual_bias, no_residual_bias);
  const Rows s("add_layer_norm_backward", sum, weight, expected);
  const ScalarType acc_dtype =
      sum.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  MAE_CHECK_VALUE(grad.numel() == sum.numel() &&
                      (!grad_sum || (grad_sum->numel() == sum.numel() &&
                                     grad_sum->scalar_type() == sum.scalar_type())),
                  "add_layer_norm_backward: grad and grad_sum must have the size of sum, and "
                  "grad_sum its dtype");
  MAE_CHECK_VALUE(stats.numel() == 2 * s.rows && stats.scalar_type() == acc_dtype,
                  "add_layer_norm_backward: stats must be [2, R], as returned by add_layer_norm");
  const Tensor in = contiguous(sum), dnormed = contiguous(grad), saved = contiguous(stats);
  const Tensor dsum = grad_sum ? contiguous(*grad_sum) : in;
  const bool narrowed = residual_dtype != sum.scalar_type();
  std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
  MAE_CHECK_VALUE(skipped == 0 || (skipped > 0 && sizes.size() > 1),
                  "add_layer_norm_backward: skipped must be at least 0, and 0 if sum is [D], got ",
                  skipped);
  if (skipped)
    sizes[sizes.size() - 2] += skipped;
  Tensor dx = s.rows ? new_empty(in, sizes, in.scalar_type()) : new_zeros(in, sizes);
  const Tokens tokens("add_layer_norm_backward", dx, in);
  Tensor dresidual =
      narrowed ? new_empty(in, in.sizes(), residual_dtype) : new_empty(in, {0}, residual_dtype);
  Tensor dweight = new_empty(weight, {s.width}, weight.scalar_type());
  Tensor dbias = new_empty(weight, {s.width}, weight.scalar_type());
  const ScalarType other =
      grad.scalar_type() == sum.scalar_type() ? residual_dtype : grad.scalar_type();
  MAE_CHECK_VALUE(!narrowed || other == residual_dtype,
                  "add_layer_norm_backward: grad must have the dtype of sum or residual_dtype");
  dispatch_pair("add_layer_norm_backward", sum.scalar_type(), other, [&]<class S, class L>() {
    using A = Wide<S>;
    const bool same = grad.scalar_type() == sum.scalar_type();
    const S *in_ptr = in.const_data_ptr<S>();
    const S *same_ptr = same ? dnormed.const_data_ptr<S>() : nullptr;
    const L *narrow_ptr = same ? nullptr : dnormed.const_data_ptr<L>();
    const S *dsum_ptr = grad_sum ? dsum.const_data_ptr<S>() : nullptr;
    const A *stats_ptr = saved.const_data_ptr<A>();
    S *dx_ptr = dx.mutable_data_ptr<S>();
    L *dresidual_ptr = narrowed ? dresidual.mutable_data_ptr<L>() : nullptr;
    const std::vector<A> scale = read_all<A>(weight);
    std::vector<A> sums(2 * s.blocks * s.width);
    s.each([&]<int BYTES>(int64_t r, int64_t block) MAE_KERNEL {
      using V = Vector<A, BYTES>;
      A *g = thread_buffer<A>(2 * s.width), *normed = g + s.width;
      A *sum_w = sums.data() + 2 * block * s.width, *sum_b = sum_w + s.width;
      const int64_t first = r * s.width, dx_first = tokens.row(r) * s.width;
      if (r % tokens.length == 0)
        std::fill(dx_ptr + dx_first - skipped * s.width, dx_ptr + dx_first, narrow<S>(A(0)));
      const A mean = stats_ptr[r], rstd = stats_ptr[s.rows + r];
      typename V::type sum_g{}, sum_gn{};
      each_vector<V::lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        const auto dy = same_ptr ? load_some<BYTES>(same_ptr + first + j, count)
                                 : load_some<BYTES>(narrow_ptr + first + j, count);
        const auto n = (load_some<BYTES>(in_ptr + first + j, count) - mean) * rstd;
        const auto dg = dy * load_some<BYTES>(scale.data() + j, count);
        store_some<BYTES>(sum_w + j, count, load_some<BYTES>(sum_w + j, count) + dy * n);
        store_some<BYTES>(sum_b + j, count, load_some<BYTES>(sum_b + j, count) + dy);
        store_some<BYTES>(g + j, count, dg);
        store_some<BYTES>(normed + j, count, n);
        sum_g += dg; // dg is zero in lanes from count
        sum_gn += dg * n;
      });
      const A c = total<BYTES, A>(sum_g) / A(s.width);
      const A cn = total<BYTES, A>(sum_gn) / A(s.width);
      each_vector<V::lanes>(s.width, [&](int64_t j, int64_t count) MAE_KERNEL {
        auto d =
            (load_some<BYTES>(g + j, count) - c - load_some<BYTES>(normed + j, count) * cn) * rstd;
        if (dsum_ptr)
          d += load_some<BYTES>(dsum_ptr + first + j, count);
        store_some<BYTES>(dx_ptr + dx_first + j, count, d);
        if (dresidual_ptr)
          store_some<BYTES>(dresidual_ptr + first + j, count, d);
      });
    });
    s.add_blocks(sums.data(), 2 * s.width, dweight);
    s.add_blocks(sums.data() + s.width, 2 * s.width, dbias);
  });
  return {dx, dresidual, dweight, dbias, new_empty(weight, {0}, weight.scalar_type())};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward_cpu));
}
