// Shapes: N images, L patches, K kept.
#include "simd.h"

#include <array>
#include <bit>
#include <limits>
#include <utility>

namespace {

using namespace mae_fast;

// Up to this L comparing every pair, in vectors, beats the radix sort (measured with AVX2).
constexpr int64_t max_compared = 512;
constexpr int64_t lanes = 64; // patches compared at once

template <class T> using KeyOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Unsigned integer in the order torch sorts floats: -0 equals +0, every NaN comes last.
template <class T> KeyOf<T> sort_key(T x) {
  using Key = KeyOf<T>;
  constexpr Key sign = Key(1) << (sizeof(T) * 8 - 1);
  if (x != x)
    return std::numeric_limits<Key>::max();
  const Key bits = std::bit_cast<Key>(x + T(0)); // + 0 turns -0 into +0
  return bits & sign ? ~bits : bits | sign;
}

// smaller[i] = how many of keys are below keys[i]; both arrays are padded to a multiple of `lanes`.
MAE_INLINE void count_smaller(const int32_t *__restrict keys, int64_t L,
                              int32_t *__restrict smaller) {
  for (int64_t i = 0; i < L; i += lanes) {
    int32_t count[lanes] = {};
    for (int64_t j = 0; j < L; ++j)
      for (int64_t lane = 0; lane < lanes; ++lane)
        count[lane] += keys[j] < keys[i + lane];
    std::copy(count, count + lanes, smaller + i);
  }
}

// Writes the place of each patch in the stable ascending order of one row of noise.
template <class T> struct Ranker {
  using Key = KeyOf<T>;
  struct Entry {
    Key key;
    int32_t patch;
  };
  int64_t L;
  std::vector<int32_t> keys, smaller, ties;
  std::vector<Entry> entries, scratch;

  static bool compares(int64_t L) { return sizeof(T) == 4 && L <= max_compared; }

  explicit Ranker(int64_t L) : L(L) {
    const int64_t padded = (L + lanes - 1) / lanes * lanes;
    if (compares(L))
      keys.resize(padded), smaller.resize(padded), ties.resize(L);
    else
      entries.resize(L), scratch.resize(L);
  }

  MAE_INLINE void operator()(const T *noise, int64_t stride, int64_t *rank) { // [L], [L]
    compares(L) ? compare(noise, stride, rank) : radix_sort(noise, stride, rank);
  }

  MAE_INLINE void compare(const T *noise, int64_t stride, int64_t *rank) {
    for (int64_t l = 0; l < L; ++l) // vector units compare signed integers
      keys[l] = static_cast<int32_t>(sort_key(noise[l * stride]) ^ 0x80000000u);
    count_smaller(keys.data(), L, smaller.data());
    std::fill(ties.begin(), ties.end(), 0);
    for (int64_t l = 0; l < L; ++l)
      rank[l] = smaller[l] + ties[smaller[l]]++; // equal keys: first come, first placed
  }

  // Least significant byte first. A row is short, so one pass over it counts the bytes of all
  // passes.
  void radix_sort(const T *noise, int64_t stride, int64_t *rank) {
    constexpr int passes = sizeof(Key);
    const auto byte = [](const Entry &entry, int pass) { return entry.key >> (8 * pass) & 255; };
    std::array<std::array<int32_t, 256>, passes> places{};
    for (int64_t l = 0; l < L; ++l) {
      entries[l] = {sort_key(noise[l * stride]), static_cast<int32_t>(l)};
      for (int pass = 0; pass < passes; ++pass)
        ++places[pass][byte(entries[l], pass)];
    }
    for (int pass = 0; pass < passes; ++pass) {
      auto &place = places[pass];
      if (place[byte(entries[0], pass)] == L)
        continue; // all keys agree in this byte
      for (int32_t value = 0, start = 0; value < 256; ++value)
        start += std::exchange(place[value], start);
      for (const Entry &entry : entries)
        scratch[place[byte(entry, pass)]++] = entry;
      entries.swap(scratch);
    }
    for (int64_t i = 0; i < L; ++i)
      rank[entries[i].patch] = i;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> random_masking_cpu(const Tensor &noise, // [N, L]
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
  if (N == 0 || L == 0)
    return {ids_keep, ids_removed, ids_restore, mask};

  auto *keep_ptr = ids_keep.mutable_data_ptr<int64_t>();
  auto *removed_ptr = ids_removed.mutable_data_ptr<int64_t>();
  auto *restore_ptr = ids_restore.mutable_data_ptr<int64_t>();
  auto *mask_ptr = mask.mutable_data_ptr<float>();
  const int64_t stride_n = noise.stride(0), stride_l = noise.stride(1);

  dispatch<float, double>("random_masking", noise.scalar_type(), [&]<class T>() {
    const T *noise_ptr = noise.const_data_ptr<T>();
    const int64_t rows_per_task = std::max<int64_t>(1, 8192 / L);
    parallel_kernel(N, rows_per_task, [&](int64_t begin, int64_t end) MAE_KERNEL {
      Ranker<T> write_ranks(L);
      for (int64_t n = begin; n < end; ++n) {
        int64_t *rank = restore_ptr + n * L;
        write_ranks(noise_ptr + n * stride_n, stride_l, rank);
        int64_t *keep = keep_ptr + n * K, *removed = removed_ptr + n * (L - K);
        for (int64_t l = 0; l < L; ++l) {
          *(rank[l] < K ? keep + rank[l] : removed + (rank[l] - K)) = l;
          mask_ptr[n * L + l] = rank[l] >= K;
        }
      }
    });
  });
  return {ids_keep, ids_removed, ids_restore, mask};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking_cpu));
}
