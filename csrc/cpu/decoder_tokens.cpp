// Shapes: N images, L patches, K visible, M mask tokens (up to L - K), E decoder width.
#include "simd.h"

namespace {

using namespace mae_fast;

Tensor decoder_tokens_cpu(const Tensor &x, const Tensor &mask_token,    // [N, 1+K, E], [1, 1, E]
                          const Tensor &ids_restore, const Tensor &pos, // [N, L], [1, 1+L, E]
                          bool image_order, std::optional<int64_t> M) {
  const char *op = "decoder_tokens";
  // Eager torch concatenates x and the mask tokens, and then adds the positions.
  const ScalarType concatenated = promote(x.scalar_type(), mask_token.scalar_type());
  const ScalarType dtype = promote(concatenated, pos.scalar_type());
  const int64_t N = x.size(0), K = x.size(1) - 1, E = x.size(2), L = ids_restore.size(1);
  const Tensor visible = contiguous(x);
  const Tensor index = contiguous(ids_restore);
  const Tensor token = contiguous(to(mask_token, dtype));
  const Tensor table = contiguous(to(pos, dtype));
  const int64_t *ids = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_restore", ids, N * L, L);
  const int64_t last = M ? K + *M : L; // index of the last token to write
  Tensor tokens = new_empty(x, {N, 1 + last, E}, dtype);

  dispatch_floating(op, x.scalar_type(), [&]<class In>() {
    dispatch_floating(op, dtype, [&]<class Out>() {
      const In *in = visible.const_data_ptr<In>();
      const Out *fill = token.const_data_ptr<Out>(), *positions = table.const_data_ptr<Out>();
      Out *out = tokens.mutable_data_ptr<Out>();
      parallel_kernel(N * (1 + L), 32768 / (E + 1) + 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t n = row / (1 + L), l = row % (1 + L) - 1;
          const int64_t r = l < 0 ? -1 : ids[n * L + l]; // shuffled index; -1: class token
          if (r >= last)
            continue;
          const Out *__restrict b = positions + (1 + l) * E;
          Out *__restrict y = out + (image_order ? row : n * (1 + last) + 1 + r) * E;
          if (r < K) {
            const In *__restrict a = in + (n * (1 + K) + 1 + r) * E;
            for (int64_t e = 0; e < E; ++e)
              y[e] = narrow<Out>(widen(a[e]) + widen(b[e]));
          } else {
            for (int64_t e = 0; e < E; ++e)
              y[e] = narrow<Out>(widen(fill[e]) + widen(b[e]));
          }
        }
      });
    });
  });
  return tokens;
}

// grad [N, 1+L, E] or [N, 1+K+M, E], ids_restore [N, L] -> gradients of x, mask_token and pos
// (empty unless needed)
std::tuple<Tensor, Tensor, Tensor>
decoder_tokens_backward_cpu(const Tensor &grad, const Tensor &ids_restore, int64_t K,
                            ScalarType x_dtype, ScalarType token_dtype, ScalarType pos_dtype,
                            bool needs_pos, bool image_order) {
  const char *op = "decoder_tokens_backward";
  const int64_t N = grad.size(0), L = ids_restore.size(1), E = grad.size(2);
  const int64_t last = grad.size(1) - 1;
  const Tensor rows = contiguous(grad);
  const Tensor index = contiguous(ids_restore);
  const int64_t *ids = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_restore", ids, N * L, L);
  // Zeros, because rows without an index have no gradient. They exist if ids_restore is not a
  // permutation.
  Tensor grad_x = new_zeros(grad, {N, 1 + K, E}, x_dtype);

  Tensor grad_token, grad_pos;
  dispatch_floating(op, grad.scalar_type(), [&]<class In>() {
    using A = Wide<In>;
    const In *in = rows.const_data_ptr<In>();
    // Partial sums per image, added in order: the result does not depend on the thread count.
    std::vector<double> sums(N * E);
    dispatch_floating(op, x_dtype, [&]<class Out>() {
      Out *out = grad_x.mutable_data_ptr<Out>();
      parallel_kernel(N, 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t n = begin; n < end; ++n) {
          double *__restrict sum = sums.data() + n * E;
          for (int64_t l = -1; l < last; ++l) {
            const In *__restrict g = in + (n * (1 + last) + 1 + l) * E;
            const int64_t r = l < 0 ? -1 : image_order ? ids[n * L + l] : l;
            if (r < K) {
              Out *__restrict dx = out + (n * (1 + K) + 1 + r) * E;
              for (int64_t e = 0; e < E; ++e)
                dx[e] = narrow<Out>(widen(g[e]));
            } else {
              for (int64_t e = 0; e < E; ++e)
                sum[e] += widen(g[e]);
            }
          }
        }
      });
    });
    grad_token = new_zeros(grad, {1, 1, E}, type_of<A>);
    A *dtoken = grad_token.mutable_data_ptr<A>();
    for (int64_t e = 0; e < E; ++e) {
      double total = 0;
      for (int64_t n = 0; n < N; ++n)
        total += sums[n * E + e];
      dtoken[e] = static_cast<A>(total);
    }

    grad_pos = new_zeros(grad, {needs_pos ? 1 : 0, 1 + L, E}, type_of<A>);
    A *dpos = grad_pos.mutable_data_ptr<A>();
    if (needs_pos)
      parallel_kernel(1 + L, 4, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t n = 0; n < N; ++n)
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = image_order || i == 0 ? i : 1 + ids[n * L + i - 1];
            if (row > last)
              continue;
            for (int64_t e = 0; e < E; ++e)
              dpos[i * E + e] += widen(in[(n * (1 + last) + row) * E + e]);
          }
      });
  });
  if (!needs_pos)
    grad_pos = new_empty(grad, {0});
  return {grad_x, to(grad_token, token_dtype), to(grad_pos, pos_dtype)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("decoder_tokens", TORCH_BOX(&decoder_tokens_cpu));
  m.impl("decoder_tokens_backward", TORCH_BOX(&decoder_tokens_backward_cpu));
}
