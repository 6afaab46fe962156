// bf16 matrix products. The right operand, a weight, is packed once per product. oneDNN would pack
// it again for each block of rows.
#pragma once

#include "matrix_unit.h"

namespace mae_fast::product {

using matrix_unit::Pair;
constexpr int64_t panel = 64; // columns per panel of the packed right operand
// The largest M and K of one call of the matrix unit.
constexpr int64_t rows_at_once = 224, depth = 4096;

// Number of pairs in a packed right operand [K, N]. It consists of panels of 64 columns, each with
// [K / 2, 64] pairs of rows. N is padded.
inline int64_t packed_size(int64_t K, int64_t N) { return round_up(N, panel) * K / 2; }

// Packs the transpose of weight [N, K].
inline void pack_transposed(const BFloat16 *weight, int64_t N, int64_t K, Pair *to) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
    const auto *pairs = reinterpret_cast<const matrix_unit::Bit32 *>(weight);
    for (int64_t n = begin * panel; n < std::min(N, end * panel); n += panel)
      transpose_matrix<BYTES>(pairs + n * K / 2, K / 2, std::min(panel, N - n), K / 2,
                              reinterpret_cast<matrix_unit::Bit32 *>(to + n * K / 2), panel);
  };
  parallel_kernel((N + panel - 1) / panel, 1, run);
}

// Packs x [rows, width], with zero rows up to `padded`. With ADJACENT, a pair is two adjacent rows.
// Otherwise, its rows are `lanes` apart, as in the transposed left operand (see Copy::transposed).
template <bool ADJACENT>
void pack(const BFloat16 *x, int64_t rows, int64_t padded, int64_t width, Pair *to) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
    constexpr int64_t lanes = BYTES / 4, distance = ADJACENT ? 1 : lanes;
    for (int64_t n = begin * panel; n < std::min(width, end * panel); n += panel)
      for (int64_t i = 0; i < padded / 2; ++i)
        each_vector<lanes>(std::min(panel, width - n), [&](int64_t j, int64_t count) MAE_KERNEL {
          const int64_t row = i / distance * 2 * distance + i % distance;
          const BFloat16 *from = x + row * width + n + j;
          matrix_unit::join_rows<BYTES>(row < rows ? from : nullptr,
                                        row + distance < rows ? from + distance * width : nullptr,
                                        count, to + n * padded / 2 + i * panel + j);
        });
  };
  parallel_kernel((width + panel - 1) / panel, 1, run);
}

// Multiplies a [M, K] by a packed b [K, N], for even K. Calls f(c, first_row, rows, first_column,
// columns) for each fp32 block c [rows, 64] of the product. A block has `rows_at_once` rows;
// the last one may have fewer.
template <class F>
void multiply(int64_t M, int64_t N, int64_t K, const BFloat16 *a, const Pair *b, const F &f) {
  const int64_t blocks = (M + rows_at_once - 1) / rows_at_once, panels = (N + panel - 1) / panel;
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
    const matrix_unit::Lease lease;
    float *c = thread_buffer<float>(rows_at_once * panel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % blocks * rows_at_once, n = i / blocks * panel;
      const int64_t rows = std::min(rows_at_once, M - m), columns = std::min(panel, N - n);
      for (int64_t k = 0; k < K; k += depth)
        matrix_unit::multiply(rows, columns, std::min(depth, K - k), a + m * K + k, K,
                              b + n * K / 2 + k / 2 * panel, panel, c, panel, k > 0);
      f.template operator()<BYTES>(c, m, rows, n, columns);
    }
  };
  parallel_kernel(blocks * panels, 1, run);
}

// The gradient of a weight, grad^T x, is a sum over rows. Both operands are copied once to the
// layout of the matrix unit: grad transposed, x as pairs of rows. The sum may use any order of the
// rows, so in each block of 2 * lanes rows, the rows of a pair are `lanes` apart. Such pairs are
// interleaved from whole vectors.
constexpr int64_t copied_rows = 2048; // rows of grad and x per copy
constexpr int64_t outputs = 256;      // largest M of one call of the matrix unit
constexpr int64_t sum_depth = 512;    // largest K of one call; longer sums round worse
constexpr int64_t gap = 32;           // padding per row, so that rows use different cache sets

template <int BYTES> struct Copy {
  using Bits = typename Vector<uint32_t, BYTES>::type;
  using Float = typename Vector<float, BYTES>::type;
  static constexpr int64_t lanes = BYTES / 4;
  using Bit32 = matrix_unit::Bit32;

  // Loads row `row` of a matrix [rows, width] from column `first`, as pairs of columns. Values
  // outside of the matrix are zero.
  MAE_INLINE static Float pairs_of_columns(const BFloat16 *from, int64_t rows, int64_t width,
                                           int64_t row, int64_t first) {
    if (row >= rows)
      return Float{};
    typedef float Unaligned __attribute__((vector_size(BYTES), aligned(2), may_alias));
    from += row * width + first;
    if (first + 2 * lanes <= width)
      return *reinterpret_cast<const Unaligned *>(from);
    float padded[lanes] = {};
    std::memcpy(padded, from, (width - first) * sizeof(BFloat16));
    return load<BYTES>(static_cast<const float *>(padded));
  }

  // Transposes columns first..first + 2 * lanes of grad [rows, O] to `to` [2 * lanes, stride], as
  // pairs of rows. Rows from `rows` to `padded` are zero. Adds the sum of each column to `sums`.
  MAE_INLINE static void transposed(const BFloat16 *grad, int64_t rows, int64_t padded, int64_t O,
                                    int64_t first, BFloat16 *to, int64_t stride, float *sums) {
    Float even{}, odd{};
    for (int64_t m = 0; m < padded; m += 2 * lanes) {
      Float upper[lanes], lower[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        upper[i] = pairs_of_columns(grad, rows, O, m + i, first);
        lower[i] = pairs_of_columns(grad, rows, O, m + lanes + i, first);
        even += (Float)((Bits)upper[i] << 16) + (Float)((Bits)lower[i] << 16);
        odd += (Float)((Bits)upper[i] & 0xffff0000u) + (Float)((Bits)lower[i] & 0xffff0000u);
      }
      transpose<BYTES>(upper);
      transpose<BYTES>(lower);
      for (int64_t j = 0; j < lanes; ++j) {
        const Bits a = (Bits)upper[j], b = (Bits)lower[j];
        auto *column = reinterpret_cast<Bit32 *>(to + 2 * j * stride + m);
        store<BYTES>(column, (Float)((a & 0xffffu) | (b << 16)));
        column = reinterpret_cast<Bit32 *>(to + (2 * j + 1) * stride + m);
        store<BYTES>(column, (Float)((a >> 16) | (b & 0xffff0000u)));
      }
    }
    for (int64_t i = 0; i < lanes; ++i) {
      if (first + 2 * i < O)
        sums[first + 2 * i] += even[i];
      if (first + 2 * i + 1 < O)
        sums[first + 2 * i + 1] += odd[i];
    }
  }
};

// Stores only the first or only the second row of `pairs`.
template <int BYTES>
MAE_INLINE void store_row(BFloat16 *to, int64_t count,
                          const typename Vector<uint32_t, BYTES>::type &pairs, bool second) {
  typedef uint16_t Narrow __attribute__((vector_size(BYTES / 2)));
  const Narrow row = __builtin_convertvector(second ? pairs >> 16 : pairs, Narrow);
  std::memcpy(to, &row, count * sizeof(BFloat16));
}

// Layout of the copies of up to `copied_rows` rows, padded to whole pairs of vectors. The
// transposed left operand is [O, stride].
struct Copied {
  int64_t rows, padded, stride;
  explicit Copied(int64_t rows) : rows(rows), padded(round_up(rows, 32)), stride(padded + gap) {}
  int64_t left_size(int64_t O) const { return round_up(O, 32) * stride; }
};

// Transposes grad [rows, O] to `to`, and adds the sum over its rows to sums [O].
inline void copy_left(const Copied &s, const BFloat16 *grad, int64_t O, BFloat16 *to, float *sums) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
    for (int64_t o = begin * 32; o < std::min(O, end * 32); o += BYTES / 2)
      Copy<BYTES>::transposed(grad, s.rows, s.padded, O, o, to + o * s.stride, s.stride, sums);
  };
  parallel_kernel((O + 31) / 32, 1, run);
}

// Writes the product of the copies [O, K], or with TRANSPOSED its transpose [K, O], to `to` in
// fp32. With `add`, adds the product to `to`. A block is written once, after its sum is complete,
// because the gradient does not fit into the cache.
template <bool TRANSPOSED>
void multiply_copies(const Copied &s, const BFloat16 *left, const Pair *right, int64_t O, int64_t K,
                     float *to, bool add) {
  const int64_t panels = (K + panel - 1) / panel, blocks = (O + outputs - 1) / outputs;
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
    using V = Vector<float, BYTES>;
    const matrix_unit::Lease lease;
    float *c = thread_buffer<float>(outputs * panel);
    const auto put = [&](float *at, int64_t count, const typename V::type &v) MAE_KERNEL {
      store_some<BYTES>(at, count, add ? v + load_some<BYTES>(at, count) : v);
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = i / panels * outputs, k = i % panels * panel;
      const int64_t rows = std::min(outputs, O - o), columns = std::min(panel, K - k);
      for (int64_t m = 0; m < s.padded; m += sum_depth)
        matrix_unit::multiply(rows, columns, std::min(sum_depth, s.padded - m),
                              left + o * s.stride + m, s.stride,
                              right + k * s.padded / 2 + m / 2 * panel, panel, c, panel, m > 0);
      if constexpr (TRANSPOSED)
        each_block<BYTES>(rows, columns,
                          [&](int64_t r, int64_t j, auto &block, int64_t count_rows, int64_t count)
                              MAE_KERNEL {
                                for (int64_t t = 0; t < count_rows; ++t)
                                  block[t] = load_some<BYTES>(c + (r + t) * panel + j, count);
                                transpose<BYTES>(block);
                                for (int64_t t = 0; t < count; ++t)
                                  put(to + (k + j + t) * O + o + r, count_rows, block[t]);
                              });
      else
        for (int64_t r = 0; r < rows; ++r)
          each_vector<V::lanes>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
            put(to + (o + r) * K + k + j, count, load_some<BYTES>(c + r * panel + j, count));
          });
    }
  };
  parallel_kernel(blocks * panels, 1, run);
}

// bf16 grad [M, O] and x [M, K] -> fp32 dweight = grad^T x [O, K] and dbias [O], the sum over the
// rows of grad
inline void gradients(const BFloat16 *grad, const BFloat16 *x, int64_t M, int64_t O, int64_t K,
                      float *dweight, float *dbias) {
  std::fill(dbias, dbias + O, 0.f);
  if (M == 0)
    std::fill(dweight, dweight + O * K, 0.f);
  for (int64_t first = 0; first < M; first += copied_rows) {
    const Copied s(std::min(copied_rows, M - first));
    BFloat16 *left = thread_buffer<BFloat16>(s.left_size(O));
    Pair *right = thread_buffer<Pair>(packed_size(s.padded, K));
    copy_left(s, grad + first * O, O, left, dbias);
    pack<false>(x + first * K, s.rows, s.padded, K, right);
    multiply_copies<false>(s, left, right, O, K, dweight, first > 0);
  }
}

// Callback of `multiply`: adds bias [N], if given, to a block and stores it to out [M, N] in bf16.
struct Store {
  BFloat16 *out;
  int64_t N;
  const float *bias = nullptr;
  template <int BYTES>
  MAE_INLINE void operator()(const float *c, int64_t m, int64_t rows, int64_t n,
                             int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r)
      each_vector<BYTES / 4>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
        auto v = load_some<BYTES>(c + r * panel + j, count);
        if (bias)
          v += load_some<BYTES>(bias + n + j, count);
        store_some<BYTES>(out + (m + r) * N + n + j, count, v);
      });
  }
};

} // namespace mae_fast::product
