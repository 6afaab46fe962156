// Patches of image batches in either layout: floating [N, C, H, W] or uint8 [N, H, W, C].
#pragma once

#include "simd.h"

#include <optional>

namespace mae_fast {

// Where patch l of image n lies, and how to step through its pixels. Strides are in elements.
struct PatchView {
  int64_t C, p, q, columns, patches; // patches per row of the grid, per image
  int64_t stride_n, stride_c, stride_h, stride_w;

  PatchView(const char *op, const Tensor &images, int64_t p, int64_t q) : p(p), q(q) {
    MAE_CHECK_VALUE(images.dim() == 4, op, ": images must have 4 dimensions, got ", images.dim());
    const bool nhwc = images.scalar_type() == ScalarType::Byte;
    const int c = nhwc ? 3 : 1, h = nhwc ? 1 : 2, w = nhwc ? 2 : 3;
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

// (v / 255 - mean[c]) / std[c] for every byte v, [C][256], rounded in fp32 or fp64 as torch does
// it.
template <class A>
std::vector<A> standard_table(const char *op, const std::optional<Tensor> &mean,
                              const std::optional<Tensor> &std, int64_t C) {
  MAE_CHECK_VALUE(mean && std && mean->numel() == C && std->numel() == C, op,
                  ": uint8 images need mean and std of ", C, " channels");
  const Tensor means = torch::stable::contiguous(torch::stable::to(*mean, type_of<A>));
  const Tensor stds = torch::stable::contiguous(torch::stable::to(*std, type_of<A>));
  std::vector<A> table(C * 256);
  for (int64_t c = 0; c < C; ++c)
    for (int v = 0; v < 256; ++v)
      table[c * 256 + v] =
          (A(v) / A(255) - means.const_data_ptr<A>()[c]) / stds.const_data_ptr<A>()[c];
  return table;
}

} // namespace mae_fast
