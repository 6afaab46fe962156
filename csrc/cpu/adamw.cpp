// A single pass over a parameter and its optimizer state, because a step is limited by memory
// bandwidth.
#include "vector.h"

#include <optional>

namespace {

using namespace mae_fast;

// The compiler vectorises this loop with -fno-math-errno.
template <class A, int BYTES> MAE_INLINE void square_root(typename Vector<A, BYTES>::type &x) {
  for (int i = 0; i < Vector<A, BYTES>::lanes; ++i)
    x[i] = std::sqrt(x[i]);
}

// Adds the squares of one vector of T at `from` in fp64. In fp32, squares overflow from 2e19.
template <int BYTES, class T>
MAE_INLINE void add_squares(const T *from, typename Vector<double, BYTES>::type &sum) {
  using V = Vector<double, BYTES>;
  typedef T Part __attribute__((vector_size(V::lanes * sizeof(T)), aligned(alignof(T)), may_alias));
#pragma GCC unroll 2
  for (int64_t i = 0; i < Vector<T, BYTES>::lanes; i += V::lanes) {
    const auto x =
        __builtin_convertvector(*reinterpret_cast<const Part *>(from + i), typename V::type);
    sum += x * x;
  }
}

template <int BYTES, class T>
MAE_INLINE void store_copy(BFloat16 *to, int64_t count, const typename Vector<T, BYTES>::type &x) {
  if constexpr (std::is_same_v<T, float>)
    store_some<BYTES>(to, count, x);
  else
    for (int64_t i = 0; i < count; ++i)
      to[i] = narrow<BFloat16>(x[i]);
}

void check_like(const char *name, const Tensor &x, ScalarType dtype, const Tensor &param) {
  bool fits = x.scalar_type() == dtype && x.is_contiguous() && x.dim() == param.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i)
    fits = x.size(i) == param.size(i);
  MAE_CHECK_VALUE(fits, "adamw_step: ", name, " must be contiguous ",
                  torch::headeronly::toString(dtype), " with the shape of param");
}

// Values per block. Fixed, so that the sum does not depend on the number of threads.
constexpr int64_t per_block = 16384;

Tensor adamw_step_cpu(const Tensor &param, const Tensor &grad, const Tensor &exp_avg,
                      const Tensor &exp_avg_sq, const std::optional<Tensor> &copy, double lr,
                      double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const ScalarType dtype = param.scalar_type();
  check_like("param", param, dtype, param);
  check_like("grad", grad, dtype, param);
  check_like("exp_avg", exp_avg, dtype, param);
  check_like("exp_avg_sq", exp_avg_sq, dtype, param);
  if (copy)
    check_like("copy", *copy, ScalarType::BFloat16, param);
  MAE_CHECK_VALUE(step > 0, "adamw_step: step must be at least 1, got ", step);

  const int64_t count = param.numel(), blocks = (count + per_block - 1) / per_block;
  std::vector<double> sums(blocks);
  dispatch<float, double>("adamw_step", dtype, [&]<class T>() {
    T *p_ptr = param.mutable_data_ptr<T>(), *m_ptr = exp_avg.mutable_data_ptr<T>(),
      *v_ptr = exp_avg_sq.mutable_data_ptr<T>();
    const T *g_ptr = grad.const_data_ptr<T>();
    BFloat16 *copy_ptr = copy ? copy->mutable_data_ptr<BFloat16>() : nullptr;
    const T keep = static_cast<T>(1 - lr * weight_decay);
    const T rate = static_cast<T>(lr / (1 - std::pow(beta1, static_cast<double>(step))));
    const T scale = static_cast<T>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step))));
    const T b2 = static_cast<T>(beta2), rest2 = static_cast<T>(1 - beta2), e = static_cast<T>(eps);
    // m = lerp(m, g, 1 - beta1), computed from the nearer end as in torch.lerp.
    const bool from_grad = 1 - beta1 >= 0.5;
    const T part = static_cast<T>(from_grad ? -beta1 : 1 - beta1);
    parallel_kernel(blocks, 1, [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
      using V = typename Vector<T, BYTES>::type;
      constexpr int64_t lanes = Vector<T, BYTES>::lanes;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * per_block;
        typename Vector<double, BYTES>::type squares{};
        each_vector<lanes>(
            std::min(per_block, count - first), [&](int64_t j, int64_t n) MAE_KERNEL {
              const int64_t i = first + j;
              const V g = load_some<BYTES>(g_ptr + i, n);
              V p = load_some<BYTES>(p_ptr + i, n);
              V m = load_some<BYTES>(m_ptr + i, n);
              V v = load_some<BYTES>(v_ptr + i, n);
              T row[lanes];
              store<BYTES>(static_cast<T *>(row), g);
              add_squares<BYTES>(static_cast<const T *>(row), squares);
              p *= keep;
              m = (from_grad ? g : m) + (g - m) * part;
              v = v * b2 + g * rest2 * g; // in this order, because g * g overflows earlier
              V size = v;
              square_root<T, BYTES>(size);
              p -= m / (size * scale + e) * rate;
              store_some<BYTES>(p_ptr + i, n, p);
              store_some<BYTES>(m_ptr + i, n, m);
              store_some<BYTES>(v_ptr + i, n, v);
              if (copy_ptr)
                store_copy<BYTES, T>(copy_ptr + i, n, p);
            });
        sums[block] = total<BYTES, double>(squares);
      }
    });
  });
  double sum = 0;
  for (const double x : sums)
    sum += x;
  Tensor out = new_empty(param, {}, ScalarType::Double);
  *out.mutable_data_ptr<double>() = sum;
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) { m.impl("adamw_step", TORCH_BOX(&adamw_step_cpu)); }
