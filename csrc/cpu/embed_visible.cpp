// Shapes: N images, C channels, patches of p x q pixels, P = C*p*q, L patches, K visible, D width.
#include "images.h"

namespace {

using namespace mae_fast;

// Copies a patch to a row [C, p, q]: out[c][i][j] = convert(pixel, c).
template <class In, class Out, class Convert>
MAE_INLINE void copy_patch(const In *__restrict pixel, Out *__restrict out, const PatchView &view,
                           const Convert &convert) {
  for (int64_t c = 0; c < view.C; ++c)
    for (int64_t i = 0; i < view.p; ++i) {
      const In *row = pixel + c * view.stride_c + i * view.stride_h;
      if (view.stride_w == 1) // separate loop for unit stride, so that it vectorises
        for (int64_t j = 0; j < view.q; ++j)
          out[j] = convert(row[j], c);
      else
        for (int64_t j = 0; j < view.q; ++j)
          out[j] = convert(row[j * view.stride_w], c);
      out += view.q;
    }
}

// Gathers patches of raw pixels that are not bytes. A missing pixel becomes 0, which is the mean.
template <class A, class Out>
void gather_raw(const char *op, const Tensor &images, const int64_t *id, int64_t rows, int64_t K,
                const PatchView &view, const std::optional<Tensor> &mean,
                const std::optional<Tensor> &std, std::optional<double> nodata, Out *out) {
  const RawReader<A> reader(op, mean, std, nodata, images.scalar_type(), view);
  const int64_t P = view.values();
  RawReader<A>::dispatch_raw(op, images.scalar_type(), [&]<class In>() {
    const In *pixels = images.const_data_ptr<In>();
    parallel_kernel(rows, 32768 / (P + 1) + 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
      std::vector<A> buffer(P);
      A *__restrict patch = buffer.data();
      for (int64_t row = begin; row < end; ++row) {
        reader.read(pixels + view.offset(row / K, id[row]), view, patch);
        Out *__restrict to = out + row * P;
        for (int64_t c = 0; c < view.C; ++c, to += view.p * view.q)
          for (int64_t i = 0; i < view.p * view.q; ++i) {
            const A x = patch[i * view.C + c];
            to[i] = narrow<Out>(x == x ? x : A(0));
          }
      }
    });
  });
}

Tensor gather_patches_cpu(const Tensor &images, const Tensor &ids, // [N, K]
                          int64_t p, int64_t q, std::optional<Tensor> mean,
                          std::optional<Tensor> std, std::optional<double> nodata,
                          ScalarType dtype) { // -> [N, K, P]
  const char *op = "gather_patches";
  const bool raw = mean.has_value();
  const PatchView view(op, images, p, q, raw);
  const Tensor index = contiguous(ids);
  const int64_t N = images.size(0), K = ids.size(1), P = view.values();
  const int64_t *id = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_keep", id, N * K, view.patches);
  Tensor rows = new_empty(images, {N, K, P}, dtype);
  const int64_t grain = 32768 / std::max<int64_t>(1, P) + 1;

  dispatch_floating(op, dtype, [&]<class Out>() {
    Out *out = rows.mutable_data_ptr<Out>();
    const auto gather = [&]<class In, class Convert>(const In *pixels, const Convert &convert) {
      parallel_kernel(N * K, grain, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t row = begin; row < end; ++row)
          copy_patch(pixels + view.offset(row / K, id[row]), out + row * P, view, convert);
      });
    };
    if (raw && images.scalar_type() != ScalarType::Byte) {
      if (mean->scalar_type() == ScalarType::Double)
        gather_raw<double>(op, images, id, N * K, K, view, mean, std, nodata, out);
      else
        gather_raw<float>(op, images, id, N * K, K, view, mean, std, nodata, out);
    } else if (raw) {
      const auto table = standard_table<Wide<Out>>(op, mean, std, nodata, view.C);
      std::vector<Out> rounded(table.size());
      for (size_t i = 0; i < table.size(); ++i)
        rounded[i] = narrow<Out>(table[i] == table[i] ? table[i] : 0);
      const Out *values = rounded.data();
      gather(images.const_data_ptr<uint8_t>(),
             [values](uint8_t v, int64_t c) MAE_KERNEL { return values[c * 256 + v]; });
    } else {
      dispatch_floating(op, images.scalar_type(), [&]<class In>() {
        gather(images.const_data_ptr<In>(),
               [](In v, int64_t) MAE_KERNEL { return narrow<Out>(widen(v)); });
      });
    }
  });
  return rows;
}

Tensor gather_patches_backward_cpu(const Tensor &grad, const Tensor &ids, // [N, K, P], [N, K]
                                   std::vector<int64_t> size, int64_t p, int64_t q,
                                   ScalarType dtype) { // -> [N, C, H, W]
  const char *op = "gather_patches_backward";
  Tensor grad_images = new_empty(grad, size, dtype);
  const PatchView view(op, grad_images, p, q, false);
  const Tensor rows = contiguous(grad), index = contiguous(ids);
  const int64_t N = size[0], K = ids.size(1), P = view.values(),
                pixels = size[1] * size[2] * size[3];
  const int64_t *id = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_keep", id, N * K, view.patches);

  dispatch_floating(op, grad.scalar_type(), [&]<class In>() {
    dispatch_floating(op, dtype, [&]<class Out>() {
      const In *in = rows.const_data_ptr<In>();
      Out *out = grad_images.mutable_data_ptr<Out>();
      parallel_kernel(N, 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
        std::fill(out + begin * pixels, out + end * pixels, Out(0));
        for (int64_t n = begin; n < end; ++n)
          for (int64_t k = 0; k < K; ++k) {
            const In *row = in + (n * K + k) * P;
            Out *corner = out + view.offset(n, id[n * K + k]);
            for (int64_t c = 0; c < view.C; ++c)
              for (int64_t i = 0; i < p; ++i, row += q) {
                Out *line = corner + c * view.stride_c + i * view.stride_h;
                for (int64_t j = 0; j < q; ++j) // += because ids may repeat
                  line[j] = narrow<Out>(widen(line[j]) + widen(row[j]));
              }
          }
      });
    });
  });
  return grad_images;
}

// cls + pos[0], [D]. As in eager torch, the promoted dtype of cls and pos, not of x.
Tensor class_row(const char *op, const Tensor &pos, const Tensor &cls) {
  const ScalarType dtype = promote(pos.scalar_type(), cls.scalar_type());
  const int64_t D = pos.size(2);
  const Tensor class_position = select(select(pos, 0, 0), 0, 0);
  const Tensor a = contiguous(to(cls, dtype));
  const Tensor b = contiguous(to(class_position, dtype));
  Tensor sum = new_empty(pos, {D}, dtype);
  dispatch_floating(op, dtype, [&]<class T>() {
    for (int64_t d = 0; d < D; ++d)
      sum.mutable_data_ptr<T>()[d] =
          narrow<T>(widen(a.const_data_ptr<T>()[d]) + widen(b.const_data_ptr<T>()[d]));
  });
  return sum;
}

Tensor add_positions_cpu(const Tensor &x, const Tensor &ids,     // [N, K, D], [N, K]
                         const Tensor &pos, const Tensor &cls) { // [1, 1+L, D], [1, 1, D]
  const char *op = "add_positions";
  const Tensor row = class_row(op, pos, cls);
  const ScalarType dtype = promote(x.scalar_type(), row.scalar_type());
  const int64_t N = x.size(0), K = x.size(1), D = x.size(2), L = pos.size(1) - 1;
  const Tensor tokens = contiguous(x), index = contiguous(ids);
  // Widening is exact, so this addition in the dtype of the result equals that of eager torch.
  const Tensor table = contiguous(to(pos, dtype));
  const Tensor first_row = to(row, dtype);
  const int64_t *id = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_keep", id, N * K, L);
  Tensor sum = new_empty(x, {N, 1 + K, D}, dtype);

  dispatch_floating(op, x.scalar_type(), [&]<class In>() {
    dispatch_floating(op, dtype, [&]<class Out>() {
      const In *in = tokens.const_data_ptr<In>();
      const Out *positions = table.const_data_ptr<Out>(), *first = first_row.const_data_ptr<Out>();
      Out *out = sum.mutable_data_ptr<Out>();
      parallel_kernel(N * (1 + K), 32768 / (D + 1) + 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t n = row / (1 + K), k = row % (1 + K) - 1;
          Out *__restrict y = out + row * D;
          if (k < 0) {
            std::copy(first, first + D, y);
          } else {
            const In *__restrict a = in + (n * K + k) * D;
            const Out *__restrict b = positions + (1 + id[n * K + k]) * D;
            for (int64_t d = 0; d < D; ++d)
              y[d] = narrow<Out>(widen(a[d]) + widen(b[d]));
          }
        }
      });
    });
  });
  return sum;
}

std::tuple<Tensor, Tensor, Tensor>
add_positions_backward_cpu(const Tensor &grad, const Tensor &ids, // [N, 1+K, D], [N, K]
                           const Tensor &pos, const Tensor &cls, ScalarType x_dtype,
                           bool needs_pos) { // -> gradients of x, pos (empty unless needed), cls
  const char *op = "add_positions_backward";
  const int64_t N = grad.size(0), K = grad.size(1) - 1, D = grad.size(2), L = pos.size(1) - 1;
  const Tensor rows = contiguous(grad), index = contiguous(ids);
  const int64_t *id = index.const_data_ptr<int64_t>();
  check_indices(op, "ids_keep", id, N * K, L);
  Tensor grad_x = new_empty(grad, {N, K, D}, x_dtype);

  Tensor grad_pos, grad_cls;
  dispatch_floating(op, grad.scalar_type(), [&]<class In>() {
    using A = Wide<In>;
    const In *in = rows.const_data_ptr<In>();
    dispatch_floating(op, x_dtype, [&]<class Out>() {
      Out *out = grad_x.mutable_data_ptr<Out>();
      parallel_kernel(N * K, 32768 / (D + 1) + 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
        for (int64_t row = begin; row < end; ++row) {
          const In *__restrict g = in + (row / K * (1 + K) + 1 + row % K) * D;
          Out *__restrict dx = out + row * D;
          for (int64_t d = 0; d < D; ++d)
            dx[d] = narrow<Out>(widen(g[d]));
        }
      });
    });

    // Threads split the columns, so that each sum adds the images in order.
    grad_cls = new_zeros(grad, {1, 1, D}, type_of<A>);
    grad_pos = new_zeros(grad, {1, needs_pos ? 1 + L : 0, D}, type_of<A>);
    A *dcls = grad_cls.mutable_data_ptr<A>(), *dpos = grad_pos.mutable_data_ptr<A>();
    const int64_t slice = 64;
    parallel_kernel((D + slice - 1) / slice, 1, [&](int64_t begin, int64_t end) MAE_KERNEL {
      const int64_t first = begin * slice, last = std::min(D, end * slice);
      for (int64_t n = 0; n < N; ++n) {
        const In *g = in + n * (1 + K) * D;
        for (int64_t d = first; d < last; ++d)
          dcls[d] += widen(g[d]);
        if (needs_pos)
          for (int64_t k = 0; k < K; ++k) {
            A *__restrict sum = dpos + (1 + id[n * K + k]) * D;
            const In *__restrict row = g + (1 + k) * D;
            for (int64_t d = first; d < last; ++d)
              sum[d] += widen(row[d]);
          }
      }
      if (needs_pos)
        std::copy(dcls + first, dcls + last, dpos + first);
    });
  });
  if (!needs_pos)
    grad_pos = new_empty(grad, {0});
  return {grad_x, to(grad_pos, pos.scalar_type()), to(grad_cls, cls.scalar_type())};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches_cpu));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward_cpu));
  m.impl("add_positions", TORCH_BOX(&add_positions_cpu));
  m.impl("add_positions_backward", TORCH_BOX(&add_positions_backward_cpu));
}
