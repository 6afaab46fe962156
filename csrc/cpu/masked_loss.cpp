// Shapes: N images, C channels, patches of p x q pixels, P = p*q*C values (channel fastest),
// L patches, R of them predicted.
#include "images.h"

#include <cmath>

namespace {

using namespace mae_fast;

constexpr double epsilon = 1e-6; // inside the root, as published

// One target patch [p, q, C], standardised if it comes as bytes.
template <class In, class A>
MAE_INLINE void load_patch(const In *__restrict corner, const PatchView &view, const A *table,
                           A *__restrict out) {
  for (int64_t i = 0; i < view.p; ++i, out += view.q * view.C) {
    const In *__restrict row = corner + i * view.stride_h;
    if constexpr (std::is_same_v<In, uint8_t>) {
      for (int64_t j = 0; j < view.q; ++j)
        for (int64_t c = 0; c < view.C; ++c)
          out[j * view.C + c] = table[c * 256 + row[j * view.stride_w + c * view.stride_c]];
    } else if (view.C == 3 && view.stride_w == 1) { // spelt out, so that it vectorises
      const In *__restrict g = row + view.stride_c, *__restrict b = g + view.stride_c;
      for (int64_t j = 0; j < view.q; ++j) {
        out[3 * j] = widen(row[j]);
        out[3 * j + 1] = widen(g[j]);
        out[3 * j + 2] = widen(b[j]);
      }
    } else {
      for (int64_t c = 0; c < view.C; ++c)
        for (int64_t j = 0; j < view.q; ++j)
          out[j * view.C + c] = widen(row[j * view.stride_w + c * view.stride_c]);
    }
  }
}

// sum of f(0..count-1) in `sum_lanes` independent parts
template <class A, class F> MAE_INLINE A sum_of(int64_t count, const F &f) {
  LaneSum<A> sum;
  int64_t i = 0;
  for (; i + sum_lanes <= count; i += sum_lanes)
    for (int64_t lane = 0; lane < sum_lanes; ++lane)
      sum.part[lane] += f(i + lane);
  for (; i < count; ++i)
    sum.part[i % sum_lanes] += f(i);
  return sum.total();
}

// What both directions need: the tensors as the kernels read them.
template <class A> struct Operands {
  PatchView view;
  Tensor pred, index, weights;
  std::vector<A> table;
  const int64_t *ids;
  int64_t N, R, P;

  Operands(const char *op, const Tensor &images, const Tensor &pred_, const Tensor &mask,
           const std::optional<Tensor> &ids_, int64_t p, int64_t q,
           const std::optional<Tensor> &mean, const std::optional<Tensor> &std)
      : view(op, images, p, q), pred(torch::stable::contiguous(pred_)),
        weights(torch::stable::contiguous(torch::stable::to(mask, type_of<A>))), ids(nullptr),
        N(pred.size(0)), R(pred.size(1)), P(pred.size(2)) {
    MAE_CHECK_VALUE(P == view.values(), op, ": pred has ", P, " values per patch, images have ",
                    view.values());
    if (images.scalar_type() == ScalarType::Byte)
      table = standard_table<A>(op, mean, std, view.C);
    if (ids_) {
      index = torch::stable::contiguous(*ids_);
      ids = index.const_data_ptr<int64_t>();
      check_indices(op, "ids", ids, N * R, view.patches);
    } else {
      MAE_CHECK_VALUE(R == view.patches, op, ": pred has ", R, " patches, images have ",
                      view.patches);
    }
  }
  MAE_INLINE int64_t offset(int64_t row) const {
    return view.offset(row / R, ids ? ids[row] : row % R);
  }
};

// f.operator()<Image, Pred, A>(): the images' and the predictions' type, and fp64 where one is
// that.
template <class F>
void dispatch_types(const char *op, const Tensor &images, const Tensor &pred,
                    const std::optional<Tensor> &mean, const F &f) {
  dispatch<uint8_t, float, double, Half, BFloat16>(op, images.scalar_type(), [&]<class Image>() {
    dispatch_floating(op, pred.scalar_type(), [&]<class Pred>() {
      if constexpr (std::is_same_v<Image, double> || std::is_same_v<Pred, double>)
        f.template operator()<Image, Pred, double>();
      else if (std::is_same_v<Image, uint8_t> && mean && mean->scalar_type() == ScalarType::Double)
        f.template operator()<Image, Pred, double>();
      else
        f.template operator()<Image, Pred, float>();
    });
  });
}

std::tuple<Tensor, Tensor> masked_loss_cpu(const Tensor &images, const Tensor &pred, // [N, R, P]
                                           const Tensor &mask,                       // [N, R]
                                           std::optional<Tensor> ids,                // [N, R]
                                           int64_t p, int64_t q, bool norm_pix,
                                           std::optional<Tensor> mean,
                                           std::optional<Tensor> std) { // -> [], [N, R, 3]
  const char *op = "masked_loss";
  Tensor loss, stats;
  dispatch_types(op, images, pred, mean, [&]<class Image, class Pred, class A>() {
    const Operands<A> in(op, images, pred, mask, ids, p, q, mean, std);
    const int64_t P = in.P;
    loss = torch::stable::new_empty(pred, {}, type_of<A>);
    stats = torch::stable::new_empty(pred, {in.N, in.R, 3}, type_of<A>);
    const Image *pixels = images.const_data_ptr<Image>();
    const Pred *predictions = in.pred.template const_data_ptr<Pred>();
    const A *table = in.table.data();
    A *stat = stats.mutable_data_ptr<A>();
    const int64_t grain = 16384 / std::max<int64_t>(1, P) + 1;
    parallel_kernel(in.N * in.R, grain, [&](int64_t begin, int64_t end) MAE_KERNEL {
      std::vector<A> buffer(P);
      A *__restrict t = buffer.data();
      for (int64_t row = begin; row < end; ++row) {
        load_patch(pixels + in.offset(row), in.view, table, t);
        A centre = 0, scale = 1;
        if (norm_pix) {
          centre = sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return t[i]; }) / A(P);
          const A squares = sum_of<A>(P, [&](int64_t i) MAE_KERNEL {
            const A d = t[i] - centre;
            return d * d;
          });
          scale = A(1) / std::sqrt(squares / A(P - 1) + A(epsilon));
        }
        const Pred *__restrict y = predictions + row * P;
        const A squares = sum_of<A>(P, [&](int64_t i) MAE_KERNEL {
          const A d = A(widen(y[i])) - (t[i] - centre) * scale;
          return d * d;
        });
        stat[3 * row] = centre;
        stat[3 * row + 1] = scale;
        stat[3 * row + 2] = squares / A(P);
      }
    });
    const A *weight = in.weights.template const_data_ptr<A>();
    double total = 0, removed = 0;
    for (int64_t row = 0; row < in.N * in.R; ++row) {
      total += double(stat[3 * row + 2]) * weight[row];
      removed += weight[row];
    }
    *loss.mutable_data_ptr<A>() = static_cast<A>(total / removed); // nothing removed: 0 / 0
  });
  return {loss, stats};
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_backward_cpu(
    const Tensor &grad, const Tensor &images, const Tensor &pred, const Tensor &mask,
    std::optional<Tensor> ids, const Tensor &loss, const Tensor &stats, // [], [N, R, 3]
    int64_t p, int64_t q, bool norm_pix, std::optional<Tensor> mean, std::optional<Tensor> std,
    bool needs_images) { // -> of pred, mask, images (empty unless needed)
  const char *op = "masked_loss_backward";
  Tensor grad_pred = torch::stable::new_empty(pred, {pred.size(0), pred.size(1), pred.size(2)});
  Tensor grad_mask, grad_images;
  dispatch_types(op, images, pred, mean, [&]<class Image, class Pred, class A>() {
    const Operands<A> in(op, images, pred, mask, ids, p, q, mean, std);
    const int64_t P = in.P, R = in.R;
    const Tensor scalar = torch::stable::contiguous(torch::stable::to(grad, type_of<A>));
    const Tensor kept = torch::stable::contiguous(stats);
    const A *stat = kept.const_data_ptr<A>(), *weight = in.weights.template const_data_ptr<A>();
    const A value = *loss.const_data_ptr<A>();
    double removed = 0;
    for (int64_t row = 0; row < in.N * R; ++row)
      removed += weight[row];
    const A share = static_cast<A>(double(*scalar.const_data_ptr<A>()) / removed);

    grad_mask = torch::stable::new_empty(mask, {in.N, R}, type_of<A>);
    A *dmask = grad_mask.mutable_data_ptr<A>();
    const Image *pixels = images.const_data_ptr<Image>();
    const Pred *predictions = in.pred.template const_data_ptr<Pred>();
    const A *table = in.table.data();
    Pred *dpred = grad_pred.mutable_data_ptr<Pred>();
    const int64_t rows =
        needs_images ? std::max<int64_t>(1, R) : 1; // an image's rows add to the same pixels
    const int64_t grain = 16384 / std::max<int64_t>(1, P * rows) + 1;

    Image *dpixels = nullptr;
    if (needs_images) {
      const std::vector<int64_t> size = {images.size(0), images.size(1), images.size(2),
                                         images.size(3)};
      grad_images = torch::stable::new_zeros(images, size);
      if constexpr (!std::is_same_v<Image, uint8_t>)
        dpixels = grad_images.mutable_data_ptr<Image>();
    } else {
      grad_images = torch::stable::new_empty(images, {0});
    }
    const PatchView out(op, needs_images ? grad_images : images, p, q);

    parallel_kernel(in.N * R / rows, grain, [&](int64_t begin, int64_t end) MAE_KERNEL {
      std::vector<A> buffer(P), gradient(P);
      A *__restrict t = buffer.data(), *__restrict g = gradient.data();
      for (int64_t row = begin * rows; row < end * rows; ++row) {
        load_patch(pixels + in.offset(row), in.view, table, t);
        const A centre = stat[3 * row], scale = stat[3 * row + 1];
        const A factor = share * A(2) / A(P) * weight[row];
        dmask[row] = share * (stat[3 * row + 2] - value);
        const Pred *__restrict y = predictions + row * P;
        Pred *__restrict dy = dpred + row * P;
        for (int64_t i = 0; i < P; ++i)
          dy[i] = narrow<Pred>(factor * (A(widen(y[i])) - (t[i] - centre) * scale));

        if constexpr (!std::is_same_v<Image, uint8_t>) {
          if (!dpixels)
            continue;
          for (int64_t i = 0; i < P; ++i) {
            t[i] = (t[i] - centre) * scale;
            g[i] = -factor * (A(widen(y[i])) - t[i]);
          }
          if (norm_pix) { // through the mean and the unbiased variance
            const A level = sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return g[i]; }) / A(P);
            const A along =
                sum_of<A>(P, [&](int64_t i) MAE_KERNEL { return g[i] * t[i]; }) / A(P - 1);
            for (int64_t i = 0; i < P; ++i)
              g[i] = scale * (g[i] - level - t[i] * along);
          }
          const A *from = g;
          Image *corner = dpixels + out.offset(row / R, in.ids ? in.ids[row] : row % R);
          for (int64_t i = 0; i < p; ++i)
            for (int64_t j = 0; j < q; ++j)
              for (int64_t c = 0; c < out.C; ++c, ++from) { // added: an id may come twice
                Image &to = corner[i * out.stride_h + j * out.stride_w + c * out.stride_c];
                to = narrow<Image>(A(widen(to)) + *from);
              }
        }
      }
    });
  });
  return {grad_pred, torch::stable::to(grad_mask, mask.scalar_type()), grad_images};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("masked_loss", TORCH_BOX(&masked_loss_cpu));
  m.impl("masked_loss_backward", TORCH_BOX(&masked_loss_backward_cpu));
}
