// Patches of image batches in two layouts: standardised floating [N, C, H, W], or raw pixels
// [N, H, W, C] with a mean and std to standardise them.
#pragma once

#include "simd.h"

#include <limits>
#include <optional>

namespace mae_fast {

// Offsets of patches and strides of their pixels, in elements.
struct PatchView {
  int64_t C, p, q, columns, patches; // columns: patches per row of the grid; patches: per image
  int64_t stride_n, stride_c, stride_h, stride_w;

  PatchView(const char *op, const Tensor &images, int64_t p, int64_t q, bool raw) : p(p), q(q) {
    MAE_CHECK_VALUE(images.dim() == 4, op, ": images must have 4 dimensions, got ", images.dim());
    const int c = raw ? 3 : 1, h = raw ? 1 : 2, w = raw ? 2 : 3;
    C = images.size(c);
    MAE_CHECK_VALUE(p > 0 && q > 0 && images.size(h) % p == 0 && images.size(w) % q == 0, op,
                    ": patches of ", p, " x ", q, " must divide images of ", images.size(h), " x ",
                    images.size(w));
    columns = images.size(w) / q;
    patches = images.size(h) / p * columns;
    stride_n = images.stride(0), stride_c = images.stride(c);
    stride_h = images.stride(h), stride_w = images.stride(w);
  }

  int64_t values() const { return C * p * q; }
  MAE_INLINE int64_t offset(int64_t n, int64_t l) const {
    return n * stride_n + l / columns * p * stride_h + l % columns * q * stride_w;
  }
};

// Whether pixels may be missing, i.e. NaN or `nodata`.
inline bool may_miss(const Tensor &images, const std::optional<Tensor> &mean,
                     std::optional<double> nodata) {
  const ScalarType dtype = images.scalar_type();
  return mean && (nodata || dtype == ScalarType::Float || dtype == ScalarType::Half);
}

inline void check_stats(const char *op, const std::optional<Tensor> &mean,
                        const std::optional<Tensor> &std, int64_t C) {
  MAE_CHECK_VALUE(mean && std && mean->numel() == C && std->numel() == C, op,
                  ": mean and std of raw images must have one value for each of ", C, " channels");
}

// Table [C][256] of (v / 255 - mean[c]) / std[c] for each byte v, rounded in fp32 or fp64 as in
// torch. The value for `nodata` is NaN.
template <class A>
std::vector<A> standard_table(const char *op, const std::optional<Tensor> &mean,
                              const std::optional<Tensor> &std, std::optional<double> nodata,
                              int64_t C) {
  check_stats(op, mean, std, C);
  const std::vector<A> means = read_all<A>(*mean), stds = read_all<A>(*std);
  std::vector<A> table(C * 256);
  for (int64_t c = 0; c < C; ++c)
    for (int v = 0; v < 256; ++v)
      table[c * 256 + v] = nodata && v == *nodata ? std::numeric_limits<A>::quiet_NaN()
                                                  : (A(v) / A(255) - means[c]) / stds[c];
  return table;
}

// Reads and standardises patches of raw pixels that are not bytes.
template <class A> struct RawReader {
  std::vector<A> mean, std; // [q, C]: for one row of a patch
  A nodata;                 // NaN, which equals no value, if not given

  RawReader(const char *op, const std::optional<Tensor> &means, const std::optional<Tensor> &stds,
            std::optional<double> nodata_, ScalarType dtype, const PatchView &view)
      : nodata(std::numeric_limits<A>::quiet_NaN()) {
    check_stats(op, means, stds, view.C);
    const std::vector<A> of_channel[] = {read_all<A>(*means), read_all<A>(*stds)};
    for (int64_t j = 0; j < view.q; ++j) {
      mean.insert(mean.end(), of_channel[0].begin(), of_channel[0].end());
      std.insert(std.end(), of_channel[1].begin(), of_channel[1].end());
    }
    if (nodata_)
      dispatch_raw(op, dtype, [&]<class In>() { // compare in the type of the pixels
        if constexpr (std::is_integral_v<In>)
          nodata = A(*nodata_);
        else
          nodata = A(widen(narrow<In>(*nodata_)));
      });
  }

  // Calls f.operator()<In>() with the type of the pixels.
  template <class F> static void dispatch_raw(const char *op, ScalarType dtype, const F &f) {
    dispatch<uint16_t, int16_t, float, Half>(op, dtype, f);
  }

  // Reads a patch [p, q, C], standardised with the rounding of torch. Missing pixels are NaN.
  template <class In>
  MAE_INLINE void read(const In *__restrict corner, const PatchView &view,
                       A *__restrict out) const {
    const A *__restrict m = mean.data(), *__restrict s = std.data();
    const int64_t width = view.q * view.C;
    const auto standard = [&](In value, int64_t i) MAE_KERNEL {
      const A x = A(widen(value));
      return x == nodata ? std::numeric_limits<A>::quiet_NaN() : (x - m[i]) / s[i];
    };
    for (int64_t i = 0; i < view.p; ++i, out += width) {
      const In *__restrict row = corner + i * view.stride_h;
      if (view.stride_c == 1 && view.stride_w == view.C) { // contiguous row: this loop vectorises
        for (int64_t x = 0; x < width; ++x)
          out[x] = standard(row[x], x);
      } else {
        for (int64_t j = 0; j < view.q; ++j)
          for (int64_t c = 0; c < view.C; ++c)
            out[j * view.C + c] =
                standard(row[j * view.stride_w + c * view.stride_c], j * view.C + c);
      }
    }
  }
};

} // namespace mae_fast
