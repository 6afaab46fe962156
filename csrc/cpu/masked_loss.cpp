// Shapes: N images, C channels, patches of p x q pixels, P = p*q*C values (channel fastest),
// L patches, R predicted patches.
#include "images.h"

#include <cmath>

namespace {

using namespace mae_fast;

constexpr double epsilon = 1e-6; // added to the variance, as in the official implementation

// Loads a target patch [p, q, C] of bytes, standardised with `table` [C][256].
template <class A>
MAE_INLINE void load_bytes(const uint8_t *__restrict corner, const PatchView &view,
                           const A *__restrict table, A *__restrict out) {
  for (int64_t i = 0; i < view.p; ++i, out += view.q * view.C) {
    const uint8_t *__restrict row = corner + i * view.stride_h;
    for (int64_t j = 0; j < view.q; ++j)
      for (int64_t c = 0; c < view.C; ++c)
        out[j * view.C + c] = table[c * 256 + row[j * view.stride_w + c * view.stride_c]];
  }
}

// Loads a target patch [p, q, C] of a standardised image.
template <class In, class A>
MAE_INLINE void load_planes(const In *__restrict corner, const PatchView &view, A *__restrict out) {
  for (int64_t i = 0; i < view.p; ++i, out += view.q * view.C) {
    const In *__restrict row = corner + i * view.stride_h;
    if (view.C == 3 && view.stride_w == 1) { // unrolled, so that the compiler vectorises it
      const In *__restrict g = row + view.stride_c, *__restrict b = g + view.stride_c;
      for (int64_t j = 0; j < view.q; ++j) {
        out[3 * j] = A(widen(row[j]));
        out[3 * j + 1] = A(widen(g[j]));
        out[3 * j + 2] = A(widen(b[j]));
      }
    } else {
      for (int64_t c = 0; c < view.C; ++c)
        for (int64_t j = 0; j < view.q; ++j)
          out[j * view.C + c] = A(widen(row[j * view.stride_w + c * view.stride_c]));
    }
  }
}

// Sum of f(0), ..., f(count - 1), with independent partial sums. The compiler may not reorder a
// floating-point sum, so it vectorises a sum only in this form.
template <class A, class F> MAE_INLINE A sum_of(int64_t count, const F &f) {
  constexpr int64_t lanes = 32;
  A part[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane)
      part[lane] += f(i + lane);
  for (; i < count; ++i)
    part[i % lanes] += f(i);
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane)
      part[lane] += part[lane + width];
  return part[0];
}

// Checked inputs of the forward and the backward kernel.
template <class A> struct Operands {
  bool raw, missing; // missing: pixels may be missing, and their targets are NaN
  PatchView view;
  Tensor pred, index, weights;
  std::vector<A> table;
  std::optional<RawReader<A>> reader;
  ScalarType dtype;
  const void *pixels;
  const int64_t *ids;
  int64_t N, R, P;

  Operands(const char *op, const Tensor &images, const Tensor &pred_, const Tensor &mask,
           const std::optional<Tensor> &ids_, int64_t p, int64_t q,
           const std::optional<Tensor> &mean, const std::optional<Tensor> &std,
           std::optional<double> nodata)
      : raw(mean.has_value()), missing(may_miss(images, mean, nodata)), view(op, images, p, q, raw),
        pred(contiguous(pred_)), weights(contiguous(to(mask, type_of<A>))),
        dtype(images.scalar_type()), pixels(images.const_data_ptr()), ids(nullptr), N(pred.size(0)),
        R(pred.size(1)), P(pred.size(2)) {
    MAE_CHECK_VALUE(P == view.values(), op, ": pred must have ", view.values(),
                    " values per patch, got ", P);
    if (raw && dtype == ScalarType::Byte)
      table = standard_table<A>(op, mean, std, nodata, view.C);
    else if (raw)
      reader.emplace(op, mean, std, nodata, dtype, view);
    else
      dispatch_floating(op, dtype, []<class In>() {});
    if (ids_) {
      index = contiguous(*ids_);
      ids = index.const_data_ptr<int64_t>();
      check_indices(op, "ids", ids, N * R, view.patches);
    } else {
      MAE_CHECK_VALUE(R == view.patches, op, ": pred must have ", view.patches, " patches, got ",
                      R);
    }
  }

  // Loads the target [p, q, C] of a row of pred. The branches take little time compared with the
  // loops over the values of a patch.
  MAE_INLINE void target(int64_t row, A *__restrict out) const {
    const int64_t at = view.offset(row / R, ids ? ids[row] : row % R);
    if (raw && dtype == ScalarType::Byte)
      load_bytes(static_cast<const uint8_t *>(pixels) + at, view, table.data(), out);
    else if (raw)
      of_type<uint16_t, int16_t, float, Half>(
          [&]<class In>(const In *values) MAE_KERNEL { reader->read(values + at, view, out); });
    else
      of_type<float, double, Half, BFloat16>(
          [&]<class In>(const In *values) MAE_KERNEL { load_planes(values + at, view, out); });
  }

private:
  template <class... Types, class F> MAE_INLINE void of_type(const F &f) const {
    ((dtype == type_of<Types> && (f(static_cast<const Types *>(pixels)), true)) || ...);
  }
};

// Sets `valid` to 1 for known targets and to 0 for NaN, and replaces NaN by 0. Returns the number
// of known targets.
template <class A> MAE_INLINE A known_values(A *__restrict t, A *__restrict valid, int64_t P) {
  for (int64_t i = 0; i < P; ++i) {
    const bool known = t[i] == t[i];
    valid[i] = known ? A(1) : A(0);
    t[i] = known ? t[i] : A(0);
  }
  return sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return valid[i]; });
}

// Calls f.operator()<Pred, A>(). Pred is the type of pred. A is double if pred or the images (for
// raw pixels: mean) are fp64, else float.
template <class F>
void dispatch_types(const char *op, const Tensor &images, const Tensor &pred,
                    const std::optional<Tensor> &mean, const F &f) {
  const ScalarType values = mean ? mean->scalar_type() : images.scalar_type();
  dispatch_floating(op, pred.scalar_type(), [&]<class Pred>() {
    if (std::is_same_v<Pred, double> || values == ScalarType::Double)
      f.template operator()<Pred, double>();
    else if constexpr (!std::is_same_v<Pred, double>)
      f.template operator()<Pred, float>();
  });
}

std::tuple<Tensor, Tensor> masked_loss_cpu(const Tensor &images, const Tensor &pred, // [N, R, P]
                                           const Tensor &mask,                       // [N, R]
                                           std::optional<Tensor> ids,                // [N, R]
                                           int64_t p, int64_t q, bool norm_pix,
                                           std::optional<Tensor> mean, std::optional<Tensor> std,
                                           std::optional<double> nodata) { // -> [], [N, R, 3 or 4]
  const char *op = "masked_loss";
  Tensor loss, stats;
  dispatch_types(op, images, pred, mean, [&]<class Pred, class A>() {
    const Operands<A> in(op, images, pred, mask, ids, p, q, mean, std, nodata);
    const int64_t P = in.P, width = in.missing ? 4 : 3;
    loss = new_empty(pred, {}, type_of<A>);
    stats = new_empty(pred, {in.N, in.R, width}, type_of<A>);
    const Pred *predictions = in.pred.template const_data_ptr<Pred>();
    A *stat = stats.mutable_data_ptr<A>();
    const int64_t grain = 16384 / std::max<int64_t>(1, P) + 1;
    parallel_kernel(in.N * in.R, grain, [&](int64_t begin, int64_t end) MAE_KERNEL {
      std::vector<A> buffer(P), known(in.missing ? P : 0);
      A *__restrict t = buffer.data(), *__restrict valid = known.data();
      const auto write_row = [&]<class Weight>(const Weight &weight, int64_t row,
                                               A count) MAE_KERNEL {
        A centre = 0, scale = 1;
        if (norm_pix) {
          centre = sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return t[i]; }) / count;
          const A squares = sum_of<A>(P, [&](int64_t i) MAE_KERNEL {
            const A d = t[i] - centre;
            return weight(d * d, i);
          });
          const A degrees = in.missing ? std::max(count - 1, A(1)) : count - 1;
          scale = A(1) / std::sqrt(squares / degrees + A(epsilon));
        }
        const Pred *__restrict y = predictions + row * P;
        const A squares = sum_of<A>(P, [&](int64_t i) MAE_KERNEL {
          const A d = A(widen(y[i])) - (t[i] - centre) * scale;
          return weight(d * d, i);
        });
        stat[width * row] = centre;
        stat[width * row + 1] = scale;
        stat[width * row + 2] = squares / count;
      };
      for (int64_t row = begin; row < end; ++row) {
        in.target(row, t);
        if (in.missing) {
          const A count = known_values(t, valid, P);
          stat[width * row + 3] = count;
          write_row([&](A x, int64_t i) MAE_KERNEL { return valid[i] == 0 ? A(0) : x; }, row,
                    std::max(count, A(1)));
        } else {
          write_row([](A x, int64_t) MAE_KERNEL { return x; }, row, A(P));
        }
      }
    });
    const A *weight = in.weights.template const_data_ptr<A>();
    double total = 0, removed = 0;
    for (int64_t row = 0; row < in.N * in.R; ++row)
      if (!in.missing || stat[width * row + 3] > 0) { // ignore patches without known pixels
        total += double(stat[width * row + 2]) * weight[row];
        removed += weight[row];
      }
    *loss.mutable_data_ptr<A>() = static_cast<A>(total / removed); // NaN if no patch is removed
  });
  return {loss, stats};
}

// loss [], stats [N, R, 3 or 4] -> gradients of pred, mask and images (empty unless needed)
std::tuple<Tensor, Tensor, Tensor>
masked_loss_backward_cpu(const Tensor &grad, const Tensor &images, const Tensor &pred,
                         const Tensor &mask, std::optional<Tensor> ids, const Tensor &loss,
                         const Tensor &stats, int64_t p, int64_t q, bool norm_pix,
                         std::optional<Tensor> mean, std::optional<Tensor> std,
                         std::optional<double> nodata, bool needs_images) {
  const char *op = "masked_loss_backward";
  Tensor grad_pred = new_empty(pred, {pred.size(0), pred.size(1), pred.size(2)});
  Tensor grad_mask, grad_images;
  dispatch_types(op, images, pred, mean, [&]<class Pred, class A>() {
    const Operands<A> in(op, images, pred, mask, ids, p, q, mean, std, nodata);
    MAE_CHECK_VALUE(!(needs_images && in.raw), op, ": raw images have no gradient");
    const int64_t P = in.P, R = in.R, width = in.missing ? 4 : 3;
    const Tensor scalar = contiguous(to(grad, type_of<A>));
    const Tensor saved = contiguous(stats);
    const A *stat = saved.const_data_ptr<A>(), *weight = in.weights.template const_data_ptr<A>();
    const A value = *loss.const_data_ptr<A>();
    const auto valid_count = [&](int64_t row)
                                 MAE_KERNEL { return in.missing ? stat[width * row + 3] : A(P); };
    double removed = 0;
    for (int64_t row = 0; row < in.N * R; ++row)
      removed += valid_count(row) > 0 ? weight[row] : A(0);
    const A share = static_cast<A>(double(*scalar.const_data_ptr<A>()) / removed);

    grad_mask = new_empty(mask, {in.N, R}, type_of<A>);
    A *dmask = grad_mask.mutable_data_ptr<A>();
    const Pred *predictions = in.pred.template const_data_ptr<Pred>();
    Pred *dpred = grad_pred.mutable_data_ptr<Pred>();
    // With needs_images, one thread per image, as its rows may add to the same pixels.
    const int64_t rows = needs_images ? std::max<int64_t>(1, R) : 1;
    const int64_t grain = 16384 / std::max<int64_t>(1, P * rows) + 1;

    Tensor sums; // gradient of the images in the accumulation type
    A *dpixels = nullptr;
    if (needs_images) {
      const std::vector<int64_t> size = {images.size(0), images.size(1), images.size(2),
                                         images.size(3)};
      sums = new_zeros(images, size, type_of<A>);
      dpixels = sums.mutable_data_ptr<A>();
    }
    const PatchView out(op, needs_images ? sums : images, p, q, in.raw);

    parallel_kernel(in.N * R / rows, grain, [&](int64_t begin, int64_t end) MAE_KERNEL {
      std::vector<A> buffer(P), gradient(P);
      A *__restrict t = buffer.data(), *__restrict g = gradient.data();
      for (int64_t row = begin * rows; row < end * rows; ++row) {
        in.target(row, t);
        const A centre = stat[width * row], scale = stat[width * row + 1], count = valid_count(row);
        const A factor = share * A(2) / count * weight[row];
        dmask[row] = count > 0 ? share * (stat[width * row + 2] - value) : A(0);
        const Pred *__restrict y = predictions + row * P;
        Pred *__restrict dy = dpred + row * P;
        if (in.missing)
          for (int64_t i = 0; i < P; ++i)
            dy[i] = narrow<Pred>(t[i] == t[i] ? factor * (A(widen(y[i])) - (t[i] - centre) * scale)
                                              : A(0));
        else
          for (int64_t i = 0; i < P; ++i)
            dy[i] = narrow<Pred>(factor * (A(widen(y[i])) - (t[i] - centre) * scale));
        if (!dpixels)
          continue;
        for (int64_t i = 0; i < P; ++i) {
          t[i] = (t[i] - centre) * scale;
          g[i] = -factor * (A(widen(y[i])) - t[i]);
        }
        if (norm_pix) { // backward pass of the mean and the unbiased variance
          const A mean_grad = sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return g[i]; }) / A(P);
          const A variance_grad =
              sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return g[i] * t[i]; }) / A(P - 1);
          for (int64_t i = 0; i < P; ++i)
            g[i] = scale * (g[i] - mean_grad - t[i] * variance_grad);
        }
        const A *from = g;
        A *corner = dpixels + out.offset(row / R, in.ids ? in.ids[row] : row % R);
        for (int64_t i = 0; i < p; ++i)
          for (int64_t j = 0; j < q; ++j)
            for (int64_t c = 0; c < out.C; ++c, ++from) // += because ids may repeat
              corner[i * out.stride_h + j * out.stride_w + c * out.stride_c] += *from;
      }
    });
    grad_images = needs_images ? to(sums, images.scalar_type()) : new_empty(images, {0});
  });
  return {grad_pred, to(grad_mask, mask.scalar_type()), grad_images};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("masked_loss", TORCH_BOX(&masked_loss_cpu));
  m.impl("masked_loss_backward", TORCH_BOX(&masked_loss_backward_cpu));
}
