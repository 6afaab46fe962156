// What the CPU and the CUDA kernel of random_masking share: the order of the noise, and the
// outputs. Shapes: N images, L patches, K kept.
#pragma once

#include "common.h"

#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define MAE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mae_fast {

template <class T> using KeyOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Unsigned integer in the order torch sorts floats: -0 equals +0, every NaN comes last.
template <class T> MAE_HOST_DEVICE KeyOf<T> sort_key(T x) {
  using Key = KeyOf<T>;
  constexpr Key sign = Key(1) << (sizeof(T) * 8 - 1);
  if (x != x)
    return ~Key(0);
  const T positive_zero = x + T(0); // turns -0 into +0
  Key bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  return bits & sign ? ~bits : bits | sign;
}

// Where the ranks of one batch's patches are written to, as every output tells them.
struct Ranking {
  int64_t K, L;
  int64_t *ids_keep, *ids_removed, *ids_restore;
  float *mask;

  // Patch l of image n comes at place `rank` of the stable ascending order of its row.
  MAE_HOST_DEVICE void write(int64_t n, int64_t l, int64_t rank) const {
    const bool removed = rank >= K;
    if (removed)
      ids_removed[n * (L - K) + rank - K] = l;
    else
      ids_keep[n * K + rank] = l;
    ids_restore[n * L + l] = rank;
    mask[n * L + l] = removed;
  }
};

using RandomMasking = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the arguments; gives the op's result, to be filled, and the way to fill it.
inline std::pair<RandomMasking, Ranking> allocate_ranking(const Tensor &noise, // [N, L]
                                                          int64_t num_keep) {
  MAE_CHECK_VALUE(noise.dim() == 2, "random_masking: noise must be [N, L], got ", noise.dim(),
                  " dimensions");
  const int64_t N = noise.size(0), L = noise.size(1), K = num_keep;
  MAE_CHECK_VALUE(0 <= K && K <= L, "random_masking: num_keep must be in 0..", L, ", got ", K);
  MAE_CHECK_VALUE(L <= std::numeric_limits<int32_t>::max(), "random_masking: L is too large: ", L);
  Tensor ids_keep = new_empty(noise, {N, K}, ScalarType::Long);
  Tensor ids_removed = new_empty(noise, {N, L - K}, ScalarType::Long);
  Tensor ids_restore = new_empty(noise, {N, L}, ScalarType::Long);
  Tensor mask = new_empty(noise, {N, L}, ScalarType::Float);
  const Ranking ranking{K,
                        L,
                        ids_keep.mutable_data_ptr<int64_t>(),
                        ids_removed.mutable_data_ptr<int64_t>(),
                        ids_restore.mutable_data_ptr<int64_t>(),
                        mask.mutable_data_ptr<float>()};
  return {{ids_keep, ids_removed, ids_restore, mask}, ranking};
}

} // namespace mae_fast
