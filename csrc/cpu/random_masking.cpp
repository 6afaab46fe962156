// Shapes: N images, L patches, K kept patches.
#include "../random_masking.h"
#include "simd.h"

#include <array>
#include <utility>

namespace {

using namespace mae_fast;

// Up to this L, comparing all pairs with vectors is faster than a radix sort (measured: AVX2).
constexpr int64_t max_compared = 512;
constexpr int64_t lanes = 64; // patches compared at a time

// smaller[i] = number of keys below keys[i]. Both arrays are padded to a multiple of `lanes`.
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

// Writes the rank of each patch in the stable ascending order of one row of noise.
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
    for (int64_t l = 0; l < L; ++l) // flip the sign bit: vector comparisons are signed
      keys[l] = static_cast<int32_t>(sort_key(noise[l * stride]) ^ 0x80000000u);
    count_smaller(keys.data(), L, smaller.data());
    std::fill(ties.begin(), ties.end(), 0);
    for (int64_t l = 0; l < L; ++l)
      rank[l] = smaller[l] + ties[smaller[l]]++; // the sort is stable: equal keys keep their order
  }

  // Sorts by the least significant byte first. The histograms of all bytes are counted in one pass.
  void radix_sort(const T *noise, int64_t stride, int64_t *rank) {
    constexpr int passes = sizeof(Key);
    const auto byte = [](const Entry &entry, int pass) { return entry.key >> (8 * pass) & 255; };
    std::array<std::array<int32_t, 256>, passes> offsets{};
    for (int64_t l = 0; l < L; ++l) {
      entries[l] = {sort_key(noise[l * stride]), static_cast<int32_t>(l)};
      for (int pass = 0; pass < passes; ++pass)
        ++offsets[pass][byte(entries[l], pass)];
    }
    for (int pass = 0; pass < passes; ++pass) {
      auto &offset = offsets[pass];
      if (offset[byte(entries[0], pass)] == L)
        continue; // all keys have the same value of this byte
      for (int32_t value = 0, start = 0; value < 256; ++value)
        start += std::exchange(offset[value], start);
      for (const Entry &entry : entries)
        scratch[offset[byte(entry, pass)]++] = entry;
      entries.swap(scratch);
    }
    for (int64_t i = 0; i < L; ++i)
      rank[entries[i].patch] = i;
  }
};

RandomMasking random_masking_cpu(const Tensor &noise, int64_t num_keep) { // [N, L]
  const auto [result, ranking] = allocate_ranking(noise, num_keep);
  const int64_t N = noise.size(0), L = noise.size(1);
  if (N == 0 || L == 0)
    return result;
  const int64_t stride_n = noise.stride(0), stride_l = noise.stride(1);
  dispatch<float, double>(
      "random_masking", noise.scalar_type(), [&, &ranking = ranking]<class T>() {
        const T *noise_ptr = noise.const_data_ptr<T>();
        const int64_t rows_per_task = std::max<int64_t>(1, 8192 / L);
        parallel_kernel(N, rows_per_task, [&](int64_t begin, int64_t end) MAE_KERNEL {
          Ranker<T> write_ranks(L);
          std::vector<int64_t> rank(L);
          for (int64_t n = begin; n < end; ++n) {
            write_ranks(noise_ptr + n * stride_n, stride_l, rank.data());
            for (int64_t l = 0; l < L; ++l)
              ranking.write(n, l, rank[l]);
          }
        });
      });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking_cpu));
}
