// Products of bf16 matrices. The right operand, a weight, is copied once per product. A library
// copies it again for each block of rows.
#pragma once

#include "matrix_unit.h"

#include <memory>

namespace mae_fast {

// Memory for copies, the thread's own and kept from call to call: fresh pages would cost as much
// time as the copying. A TAG for each that is in use at the same time.
template <class T, int TAG = 0> T *kept(int64_t count) {
  static thread_local std::unique_ptr<T[]> memory;
  static thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(); // before there are two
    memory.reset(new T[count]);
    size = count;
  }
  return memory.get();
}

namespace product {

using matrix_unit::Pair;
constexpr int64_t panel = 64; // columns of the right operand that lie together
constexpr int64_t rows_at_once = 224, depth = 4096; // of one product on the matrix unit

// Values of a right operand [K, N], padded: panels of [K / 2, 64] pairs of rows.
inline int64_t packed_size(int64_t K, int64_t N) { return round_up(N, panel) * K / 2; }

// weight [N, K] -> its transpose, packed
inline void pack_transposed(const BFloat16 *weight, int64_t N, int64_t K, Pair *to) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
    using Bit32 = matrix_unit::Bit32;
    constexpr int64_t lanes = BYTES / 4;
    for (int64_t n = begin * panel; n < std::min(N, end * panel); n += lanes)
      each_vector<lanes>(K / 2, [&](int64_t k, int64_t count) MAE_KERNEL {
        typename Vector<float, BYTES>::type block[lanes]{};
        for (int64_t i = 0; i < std::min(lanes, N - n); ++i)
          block[i] =
              load_some<BYTES>(reinterpret_cast<const Bit32 *>(weight + (n + i) * K) + k, count);
        transpose<BYTES>(block);
        Pair *at = to + n / panel * panel * K / 2 + k * panel + n % panel;
        for (int64_t j = 0; j < count; ++j)
          store<BYTES>(reinterpret_cast<Bit32 *>(at + j * panel), block[j]);
      });
  };
  parallel_kernel((N + panel - 1) / panel, 1, run);
}

// x [rows, width], rows beyond it zero up to `padded`, packed. Pairs are of ADJACENT rows, or of
// rows a vector's lanes apart, as whole vectors of a transposed left operand have them.
template <bool ADJACENT>
void pack(const BFloat16 *x, int64_t rows, int64_t padded, int64_t width, Pair *to) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
    constexpr int64_t lanes = BYTES / 4, apart = ADJACENT ? 1 : lanes;
    for (int64_t n = begin * panel; n < std::min(width, end * panel); n += panel)
      for (int64_t i = 0; i < padded / 2; ++i)
        each_vector<lanes>(std::min(panel, width - n), [&](int64_t j, int64_t count) MAE_KERNEL {
          const int64_t row = i / apart * 2 * apart + i % apart;
          const BFloat16 *from = x + row * width + n + j;
          matrix_unit::join_rows<BYTES>(row < rows ? from : nullptr,
                                        row + apart < rows ? from + apart * width : nullptr, count,
                                        to + n * padded / 2 + i * panel + j);
        });
  };
  parallel_kernel((width + panel - 1) / panel, 1, run);
}

// f(c, first_row, rows, first_column, columns, bytes) for every block c [rows, 64], in fp32, of the
// product of a [M, K] and a packed b [K, N]. K is even. A block has `rows_at_once` rows, the last
// ones less.
template <class F>
void multiply(int64_t M, int64_t N, int64_t K, const BFloat16 *a, const Pair *b, const F &f) {
  const int64_t blocks = (M + rows_at_once - 1) / rows_at_once, panels = (N + panel - 1) / panel;
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES> bytes) MAE_KERNEL {
    const matrix_unit::Lease lease;
    float *c = kept<float>(rows_at_once * panel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % blocks * rows_at_once, n = i / blocks * panel;
      const int64_t rows = std::min(rows_at_once, M - m), columns = std::min(panel, N - n);
      for (int64_t k = 0; k < K; k += depth)
        matrix_unit::multiply(rows, columns, std::min(depth, K - k), a + m * K + k, K,
                              b + n * K / 2 + k / 2 * panel, panel, c, panel, k > 0);
      f(c, m, rows, n, columns, bytes);
    }
  };
  parallel_kernel(blocks * panels, 1, run);
}

// The gradient of a weight, grad^T x, sums over the rows. Both operands are copied once so that
// the matrix unit reads them as it likes: grad transposed, x in pairs of rows. The sum does not
// care about the rows' order: a block of 2 * lanes rows makes pairs of rows `lanes` apart, which
// whole vectors can be joined to.
constexpr int64_t copied_rows = 2048; // of grad and x
constexpr int64_t outputs = 256;      // of one product on the matrix unit
constexpr int64_t sum_depth = 512;    // rows summed in one go: more would round worse
constexpr int64_t gap = 32;           // between rows of the copy, which would else share cache sets

template <int BYTES> struct Copy {
  using Bits = typename Vector<uint32_t, BYTES>::type;
  using Float = typename Vector<float, BYTES>::type;
  static constexpr int64_t lanes = BYTES / 4;
  using Bit32 = matrix_unit::Bit32;

  // Row `row` of [rows, width] from column `first`, as pairs of columns; zero outside.
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

  // grad [rows, O], columns first..first + 2 * lanes -> to [2 * lanes, stride], in pairs of rows,
  // those from `rows` to `padded` zero;
  // adds every column's sum to sums.
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

// The first or second row of pairs.
template <int BYTES>
MAE_INLINE void store_row(BFloat16 *to, int64_t count,
                          const typename Vector<uint32_t, BYTES>::type &pairs, bool second) {
  typedef uint16_t Narrow __attribute__((vector_size(BYTES / 2)));
  const Narrow row = __builtin_convertvector(second ? pairs >> 16 : pairs, Narrow);
  std::memcpy(to, &row, count * sizeof(BFloat16));
}

// How rows are copied: at most `copied_rows`, padded to whole pairs of vectors.
struct Copied {
  int64_t rows, padded, stride; // of the transposed left operand [O, stride]
  explicit Copied(int64_t rows) : rows(rows), padded(round_up(rows, 32)), stride(padded + gap) {}
  int64_t left_size(int64_t O) const { return round_up(O, 32) * stride; }
};

// grad [rows, O] -> its transpose; adds the sum of its rows to sums [O]
inline void copy_left(const Copied &s, const BFloat16 *grad, int64_t O, BFloat16 *to, float *sums) {
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
    for (int64_t o = begin * 32; o < std::min(O, end * 32); o += BYTES / 2)
      Copy<BYTES>::transposed(grad, s.rows, s.padded, O, o, to + o * s.stride, s.stride, sums);
  };
  parallel_kernel((O + 31) / 32, 1, run);
}

// The copies' product [O, K], or its transpose [K, O], to fp32 or, with `add`, on top of it. A
// block is complete before it is written: a gradient is too large for the cache.
template <bool TRANSPOSED>
void multiply_copies(const Copied &s, const BFloat16 *left, const Pair *right, int64_t O, int64_t K,
                     float *to, bool add) {
  const int64_t panels = (K + panel - 1) / panel, blocks = (O + outputs - 1) / outputs;
  const auto run = [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
    using V = Vector<float, BYTES>;
    const matrix_unit::Lease lease;
    float *c = kept<float>(outputs * panel);
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
      for (int64_t r = 0; r < rows; r += TRANSPOSED ? V::lanes : 1)
        each_vector<V::lanes>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
          if constexpr (TRANSPOSED) {
            const int64_t some = std::min(V::lanes, rows - r);
            typename V::type block[V::lanes]{};
            for (int64_t t = 0; t < some; ++t)
              block[t] = load_some<BYTES>(c + (r + t) * panel + j, count);
            transpose<BYTES>(block);
            for (int64_t t = 0; t < count; ++t)
              put(to + (k + j + t) * O + o + r, some, block[t]);
          } else {
            put(to + (o + r) * K + k + j, count, load_some<BYTES>(c + r * panel + j, count));
          }
        });
    }
  };
  parallel_kernel(blocks * panels, 1, run);
}

// grad [M, O], x [M, K], both bf16 -> grad^T x [O, K], the sum of grad's rows [O], both fp32
inline void gradients(const BFloat16 *grad, const BFloat16 *x, int64_t M, int64_t O, int64_t K,
                      float *dweight, float *dbias) {
  std::fill(dbias, dbias + O, 0.f);
  if (M == 0)
    std::fill(dweight, dweight + O * K, 0.f);
  for (int64_t first = 0; first < M; first += copied_rows) {
    const Copied s(std::min(copied_rows, M - first));
    BFloat16 *left = kept<BFloat16>(s.left_size(O));
    Pair *right = kept<Pair>(packed_size(s.padded, K));
    copy_left(s, grad + first * O, O, left, dbias);
    pack<false>(x + first * K, s.rows, s.padded, K, right);
    multiply_copies<false>(s, left, right, O, K, dweight, first > 0);
  }
}

// Takes a block c of `multiply` to out [M, N] in bf16, a bias [N] added or not.
struct Store {
  BFloat16 *out;
  int64_t N;
  const float *bias = nullptr;
  template <int BYTES>
  MAE_INLINE void operator()(const float *c, int64_t m, int64_t rows, int64_t n, int64_t columns,
                             VectorBytes<BYTES>) const {
    for (int64_t r = 0; r < rows; ++r)
      each_vector<BYTES / 4>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
        auto v = load_some<BYTES>(c + r * panel + j, count);
        if (bias)
          v += load_some<BYTES>(bias + n + j, count);
        store_some<BYTES>(out + (m + r) * N + n + j, count, v);
      });
  }
};

} // namespace product
} // namespace mae_fast
