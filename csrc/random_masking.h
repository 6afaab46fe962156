// Shared by the CPU and CUDA kernels of random_masking: the sort order of the noise, and the
// outputs. Shapes: N images, L patches, K kept patches.
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

// Maps a float to an unsigned integer with the order of torch.sort: -0 equals +0, and NaN is last.
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

// Writes the rank of a patch to all outputs.
struct Ranking {
  int64_t K, L;
  int64_t *ids_keep, *ids_removed, *ids_restore;
  float *mask;

  // `rank` is the position of patch l of image n in the stable ascending order of its noise.
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

// Checks the arguments. Returns the uninitialized outputs, and a Ranking that writes to them.
inline std::pair<RandomMasking, Ranking> allocate_ranking(const Tensor &noise, // [N, L]
                                                          int64_t num_keep) {
  MAE_CHECK_VALUE(noise.dim() == 2, "random_masking: noise must be [N, L], got ", noise.dim(),
                  " dimensions");
  const int64_t N = noise.size(0), L = noise.size(1), K = num_keep;
  MAE_CHECK_VALUE(0 <= K && K <= L, "random_masking: num_keep must be in 0..", L, ", got ", K);
  constexpr int64_t max_patches = std::numeric_limits<int32_t>::max();
  MAE_CHECK_VALUE(L <= max_patches, "random_masking: noise must have at most ", max_patches,
                  " columns, got ", L);
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
