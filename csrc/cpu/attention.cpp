// Shapes: N images, T tokens, Q queries (the last Q tokens), H heads of d values. qkv is
// [N, T, 3*H*d]: q, k and v, each with all heads one after another.
#include "matrix_unit.h"

#include <limits>

namespace {

using namespace mae_fast;

constexpr int64_t query_rows = 48; // queries per block; its scores fit into the cache

// A matrix with element (i, j) at data[i * row + j * col].
template <class A> struct Operand {
  const A *data;
  int64_t row, col;
};

// c[ROWS, VECTORS * lanes] (+)= a[ROWS, K] b[K, VECTORS * lanes], with the sums in registers.
template <int BYTES, int ROWS, int VECTORS, bool ADD, class A>
MAE_INLINE void multiply_tile(Operand<A> a, const A *b, int64_t ldb, A *c, int64_t ldc, int64_t K) {
  using V = Vector<A, BYTES>;
  typename V::type sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      if constexpr (ADD)
        sum[r][v] = *reinterpret_cast<const typename V::in_memory *>(c + r * ldc + v * V::lanes);
      else
        sum[r][v] = typename V::type{};
  for (int64_t k = 0; k < K; ++k) {
    typename V::type row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      row[v] = *reinterpret_cast<const typename V::in_memory *>(b + k * ldb + v * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const A x = a.data[r * a.row + k * a.col];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v)
        sum[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      *reinterpret_cast<typename V::in_memory *>(c + r * ldc + v * V::lanes) = sum[r][v];
}

template <int BYTES, int VECTORS, bool ADD, class A>
MAE_INLINE void multiply_columns(Operand<A> a, const A *b, int64_t ldb, A *c, int64_t ldc,
                                 int64_t M, int64_t K) {
  int64_t i = 0;
  const auto at = [&](int64_t i)
                      MAE_KERNEL { return Operand<A>{a.data + i * a.row, a.row, a.col}; };
  for (; i + 6 <= M; i += 6)
    multiply_tile<BYTES, 6, VECTORS, ADD>(at(i), b, ldb, c + i * ldc, ldc, K);
  for (; i + 2 <= M; i += 2)
    multiply_tile<BYTES, 2, VECTORS, ADD>(at(i), b, ldb, c + i * ldc, ldc, K);
  for (; i < M; ++i)
    multiply_tile<BYTES, 1, VECTORS, ADD>(at(i), b, ldb, c + i * ldc, ldc, K);
}

// c[M, columns] (+)= a[M, K] b[K, columns]; columns is a multiple of the vector's lanes.
template <int BYTES, bool ADD, class A>
MAE_INLINE void multiply(Operand<A> a, const A *b, int64_t ldb, A *c, int64_t ldc, int64_t M,
                         int64_t K, int64_t columns) {
  constexpr int64_t lanes = Vector<A, BYTES>::lanes;
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes)
    multiply_columns<BYTES, 2, ADD>(a, b + j, ldb, c + j, ldc, M, K);
  if (j < columns)
    multiply_columns<BYTES, 1, ADD>(a, b + j, ldb, c + j, ldc, M, K);
}

// One head of one image, in the accumulation type. Rows are padded to whole vectors.
template <class T, int BYTES> struct Head {
  using A = Wide<T>;
  using V = Vector<A, BYTES>;
  static constexpr int64_t lanes = V::lanes;
  int64_t tokens, queries, d, width, columns; // width: d padded, columns: tokens padded
  A scale;
  std::vector<A> scores, dscores, products; // of a block of queries: [.., columns], [.., width]
  std::vector<A> q, k, v, dout, k_transposed, v_transposed, dk, dv;

  Head(int64_t tokens, int64_t queries, int64_t d, bool backward)
      : tokens(tokens), queries(queries), d(d), width(round_up(d, lanes)),
        columns(round_up(tokens, lanes)), scale(A(1) / std::sqrt(A(d))),
        scores(query_rows * columns), dscores(backward * query_rows * columns),
        products(query_rows * width), dk(backward * tokens * width), dv(dk) {}

  // [rows, d] with a row stride in memory -> [rows, width]
  MAE_INLINE void read(const T *from, int64_t rows, int64_t stride, A scale,
                       std::vector<A> &to) const {
    to.resize(rows * width); // the padding is zero-initialized and never written
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t c = 0; c < d; ++c)
        to[t * width + c] = widen(from[t * stride + c]) * scale;
  }
  // [tokens, width] -> [d, columns]
  MAE_INLINE void transpose(const std::vector<A> &from, std::vector<A> &to) const {
    to.resize(d * columns);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < d; ++c)
        to[c * columns + t] = from[t * width + c];
  }
  MAE_INLINE void write(const A *from, int64_t rows, T *to, int64_t stride) const {
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t c = 0; c < d; ++c)
        to[t * stride + c] = narrow<T>(from[t * width + c]);
  }

  // Reads q, k and v of one head.
  MAE_INLINE void read_qkv(const T *qkv, int64_t D) {
    read(qkv + (tokens - queries) * 3 * D, queries, 3 * D, scale, q);
    read(qkv + D, tokens, 3 * D, 1, k);
    read(qkv + 2 * D, tokens, 3 * D, 1, v);
    transpose(k, k_transposed);
  }

  // scores = softmax(q k^T) of `rows` queries from `first`. The padding is zero.
  MAE_INLINE void softmax(int64_t first, int64_t rows) {
    multiply<BYTES, false>(Operand<A>{q.data() + first * width, width, 1}, k_transposed.data(),
                           columns, scores.data(), columns, rows, d, columns);
    for (int64_t i = 0; i < rows; ++i) {
      A *row = scores.data() + i * columns;
      std::fill(row + tokens, row + columns, std::numeric_limits<A>::lowest());
      auto at = [&](int64_t j) MAE_KERNEL ->
          typename V::in_memory & { return *reinterpret_cast<typename V::in_memory *>(row + j); };
      typename V::type high = at(0), sum{};
      for (int64_t j = lanes; j < columns; j += lanes)
        high = at(j) > high ? at(j) : high;
      const A top = maximum<BYTES, A>(high);
      for (int64_t j = 0; j < columns; j += lanes) {
        typename V::type x = at(j) - top;
        exponential<BYTES>(x);
        at(j) = x;
        sum += x;
      }
      const A share = 1 / total<BYTES, A>(sum);
      for (int64_t j = 0; j < columns; j += lanes)
        at(j) *= share;
      std::fill(row + tokens, row + columns, A(0));
    }
  }

  // Backward pass of the softmax, in place for each row: ds = p (ds - sum(p ds)).
  MAE_INLINE void softmax_backward(A *ds, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      const auto *p = reinterpret_cast<const typename V::in_memory *>(scores.data() + i * columns);
      auto *d = reinterpret_cast<typename V::in_memory *>(ds + i * columns);
      typename V::type sum{};
      for (int64_t j = 0; j < columns / lanes; ++j)
        sum += p[j] * d[j];
      const A mean = total<BYTES, A>(sum);
      for (int64_t j = 0; j < columns / lanes; ++j)
        d[j] = p[j] * (d[j] - mean);
    }
  }

  // out = softmax(scale * q k^T) v
  MAE_INLINE void forward(const T *qkv, int64_t D, T *out) {
    read_qkv(qkv, D);
    for (int64_t first = 0; first < queries; first += query_rows) {
      const int64_t rows = std::min(query_rows, queries - first);
      softmax(first, rows);
      multiply<BYTES, false>(Operand<A>{scores.data(), columns, 1}, v.data(), width,
                             products.data(), width, rows, tokens, width);
      write(products.data(), rows, out + first * D, D);
    }
  }

  // dqkv has the layout of qkv.
  MAE_INLINE void backward(const T *grad, const T *qkv, int64_t D, T *dqkv) {
    read_qkv(qkv, D);
    read(grad, queries, D, 1, dout);
    transpose(v, v_transposed);
    std::fill(dk.begin(), dk.end(), A(0));
    std::fill(dv.begin(), dv.end(), A(0));
    T *dq = dqkv + (tokens - queries) * 3 * D;
    for (T *row = dqkv; row < dq; row += 3 * D)
      std::fill(row, row + d, T(0));
    for (int64_t first = 0; first < queries; first += query_rows) {
      const int64_t rows = std::min(query_rows, queries - first);
      softmax(first, rows);
      A *p = scores.data(), *ds = dscores.data();
      const A *dout_rows = dout.data() + first * width, *q_rows = q.data() + first * width;
      multiply<BYTES, false>(Operand<A>{dout_rows, width, 1}, v_transposed.data(), columns, ds,
                             columns, rows, d, columns);
      multiply<BYTES, true>(Operand<A>{p, 1, columns}, dout_rows, width, dv.data(), width, tokens,
                            rows, width);
      softmax_backward(ds, rows);
      multiply<BYTES, false>(Operand<A>{ds, columns, 1}, k.data(), width, products.data(), width,
                             rows, tokens, width);
      multiply<BYTES, true>(Operand<A>{ds, 1, columns}, q_rows, width, dk.data(), width, tokens,
                            rows, width);
      for (A &x : products)
        x *= scale;
      write(products.data(), rows, dq + first * 3 * D, 3 * D);
    }
    write(dk.data(), tokens, dqkv + D, 3 * D); // q is scaled, so dk is, too
    write(dv.data(), tokens, dqkv + 2 * D, 3 * D);
  }
};

// One head of one image in bf16. The matrix unit computes the products. The softmax is in fp32.
template <class, int BYTES> struct HeadOnMatrixUnit {
  using V = Vector<float, BYTES>;
  using Float = typename V::type;
  using Bits = typename Vector<uint32_t, BYTES>::type;
  using Pair = matrix_unit::Pair;
  using Bit32 = matrix_unit::Bit32;
  static constexpr int64_t lanes = V::lanes;
  // Queries per block. The last block may be longer, so that no block has only a few rows.
  static constexpr int64_t block = 64, longest = block + 16;
  int64_t tokens, queries, d, columns; // columns: tokens padded
  float scale;
  std::vector<float> scores, dscores,
      products;                        // of a block: [longest, columns], products [longest, d]
  std::vector<float> shares;           // [longest]: 1 / sum of the row's exponentials
  std::vector<BFloat16> narrowed;      // scores or dscores
  std::vector<Pair> p_pairs, ds_pairs; // [longest / 2, columns]
  // For all tokens. The padding is zero-initialized and never written.
  std::vector<Pair> k, v, k_transposed, v_transposed;
  std::vector<BFloat16> q_transposed, dout_transposed;
  std::vector<float> dk, dv; // [d, columns]
  matrix_unit::Lease lease;

  HeadOnMatrixUnit(int64_t tokens, int64_t queries, int64_t d, bool backward)
      : tokens(tokens), queries(queries), d(d), columns(round_up(tokens, 16)),
        scale(1 / std::sqrt(float(d))), scores(longest * columns),
        dscores(backward * longest * columns), products(longest * d), shares(longest),
        narrowed(longest * columns), p_pairs(backward * longest / 2 * columns),
        ds_pairs(backward * longest / 2 * columns), k(backward * columns / 2 * d),
        v(!backward * columns / 2 * d), k_transposed(d / 2 * columns),
        v_transposed(backward * d / 2 * columns), q_transposed(backward * d * columns),
        dout_transposed(backward * d * columns), dk(backward * d * columns),
        dv(backward * d * columns) {}

  static int64_t rows_of_block(int64_t left) { return left <= longest ? left : block; }

  // Packs the transpose [d, columns] of a matrix [tokens, d] as pairs: the right operand of scores.
  MAE_INLINE void pair_transposed(const BFloat16 *from, int64_t stride,
                                  std::vector<Pair> &to) const {
    transpose_matrix<BYTES>(reinterpret_cast<const Bit32 *>(from), stride / 2, tokens, d / 2,
                            reinterpret_cast<Bit32 *>(to.data()), columns);
  }
  // Packs a matrix [tokens, d] as pairs: a right operand [columns, d].
  MAE_INLINE void pair_rows(const BFloat16 *from, int64_t stride, std::vector<Pair> &to) const {
    for (int64_t t = 0; t < tokens; t += 2)
      each_vector<lanes>(d, [&](int64_t c, int64_t count) MAE_KERNEL {
        const BFloat16 *row = from + t * stride + c;
        matrix_unit::join_rows<BYTES>(row, t + 1 < tokens ? row + stride : nullptr, count,
                                      to.data() + t / 2 * d + c);
      });
  }
  // Writes row i of product [rows, d], multiplied by factors[i * step].
  MAE_INLINE void write(const float *product, int64_t rows, BFloat16 *to, int64_t stride,
                        const float *factors, int64_t step) const {
    for (int64_t i = 0; i < rows; ++i)
      each_vector<lanes>(d, [&](int64_t c, int64_t count) MAE_KERNEL {
        store_some<BYTES>(to + i * stride + c, count,
                          load_some<BYTES>(product + i * d + c, count) * factors[i * step]);
      });
  }
  // Writes the transpose of product [d, columns], multiplied by factor, to [tokens, d].
  MAE_INLINE void write_transposed(const float *product, BFloat16 *to, int64_t stride,
                                   float factor) const {
    each_block<BYTES>(tokens, d,
                      [&](int64_t t, int64_t c, Float(&block)[lanes], int64_t rows, int64_t count)
                          MAE_KERNEL {
                            for (int64_t j = 0; j < count; ++j)
                              block[j] = load<BYTES>(product + (c + j) * columns + t) * factor;
                            mae_fast::transpose<BYTES>(block);
                            for (int64_t i = 0; i < rows; ++i)
                              store_some<BYTES>(to + (t + i) * stride + c, count, block[i]);
                          });
  }

  // to = exp(scale * (q k^T - row maximum)), zero in the padding. Also computes `shares`.
  template <class To>
  MAE_INLINE void softmax(const BFloat16 *q, int64_t stride, int64_t rows, To *to) {
    matrix_unit::multiply(rows, columns, d, q, stride, k_transposed.data(), columns, scores.data(),
                          columns);
    const float in_binary = scale * 1.44269504088896341f;
    for (int64_t i = 0; i < rows; ++i) {
      float *row = scores.data() + i * columns;
      std::fill(row + tokens, row + columns, std::numeric_limits<float>::lowest());
      Float high = load<BYTES>(row), sum{};
      for (int64_t j = lanes; j < columns; j += lanes)
        high = load<BYTES>(row + j) > high ? load<BYTES>(row + j) : high;
      const float top = maximum<BYTES, float>(high);
      To *to_row = to + i * columns;
      for (int64_t j = 0; j < columns; j += lanes) {
        Float x = (load<BYTES>(row + j) - top) * in_binary;
        rough_power_of_two<BYTES>(x);
        store<BYTES>(to_row + j, x);
        sum += x;
      }
      shares[i] = 1 / total<BYTES, float>(sum);
      std::fill(to_row + tokens, to_row + columns, To());
    }
  }

  // out = softmax(scale * q k^T) v
  MAE_INLINE void forward(const BFloat16 *qkv, int64_t D, BFloat16 *out) {
    const int64_t stride = 3 * D;
    pair_transposed(qkv + D, stride, k_transposed);
    pair_rows(qkv + 2 * D, stride, v);
    qkv += (tokens - queries) * stride;
    for (int64_t first = 0, rows; first < queries; first += rows) {
      rows = rows_of_block(queries - first);
      softmax(qkv + first * stride, stride, rows, narrowed.data());
      matrix_unit::multiply(rows, d, columns, narrowed.data(), columns, v.data(), d,
                            products.data(), d);
      write(products.data(), rows, out + first * D, D, shares.data(), 1);
    }
  }

  // dqkv has the layout of qkv. The gradients of k and v are accumulated transposed, [d, columns],
  // so that the probabilities are right operands, and their pairs of rows need no transposition.
  MAE_INLINE void backward(const BFloat16 *dout, const BFloat16 *qkv, int64_t D, BFloat16 *dqkv) {
    const int64_t stride = 3 * D;
    pair_transposed(qkv + D, stride, k_transposed);
    pair_transposed(qkv + 2 * D, stride, v_transposed);
    pair_rows(qkv + D, stride, k);
    const BFloat16 *q = qkv + (tokens - queries) * stride;
    BFloat16 *dq = dqkv + (tokens - queries) * stride;
    transpose_matrix<BYTES>(q, stride, queries, d, q_transposed.data(), columns);
    transpose_matrix<BYTES>(dout, D, queries, d, dout_transposed.data(), columns);
    for (BFloat16 *row = dqkv; row < dq; row += stride)
      std::fill(row, row + d, BFloat16());
    for (int64_t first = 0, rows; first < queries; first += rows) {
      rows = rows_of_block(queries - first);
      const int64_t even = round_up(rows, 2);
      softmax(q + first * stride, stride, rows, scores.data());
      matrix_unit::multiply(rows, columns, d, dout + first * D, D, v_transposed.data(), columns,
                            dscores.data(), columns);
      if (even > rows) // the last pair has a stale second row: multiply it by 0
        shares[rows] = 0;
      for (int64_t i = 0; i < even; i += 2) { // p, then ds = p (dp - sum(p dp)), two rows at a time
        float *p = scores.data() + i * columns, *ds = dscores.data() + i * columns;
        Float sums[2]{};
        for (int64_t j = 0; j < columns; j += lanes) {
          const Float x = load<BYTES>(p + j) * shares[i],
                      y = load<BYTES>(p + columns + j) * shares[i + 1];
          store<BYTES>(p + j, x);
          store<BYTES>(p + columns + j, y);
          matrix_unit::store_pairs<BYTES>(p_pairs.data() + i / 2 * columns + j, lanes, x, y);
          sums[0] += x * load<BYTES>(ds + j);
          sums[1] += y * load<BYTES>(ds + columns + j);
        }
        const float mean[] = {total<BYTES, float>(sums[0]), total<BYTES, float>(sums[1])};
        for (int64_t j = 0; j < columns; j += lanes) {
          const Float x = load<BYTES>(p + j) * (load<BYTES>(ds + j) - mean[0]);
          const Float y = load<BYTES>(p + columns + j) * (load<BYTES>(ds + columns + j) - mean[1]);
          matrix_unit::store_pairs<BYTES>(ds_pairs.data() + i / 2 * columns + j, lanes, x, y);
          store<BYTES>(narrowed.data() + i * columns + j, x);
          store<BYTES>(narrowed.data() + (i + 1) * columns + j, y);
        }
      }
      matrix_unit::multiply(d, columns, even, dout_transposed.data() + first, columns,
                            p_pairs.data(), columns, dv.data(), columns, first > 0);
      matrix_unit::multiply(d, columns, even, q_transposed.data() + first, columns, ds_pairs.data(),
                            columns, dk.data(), columns, first > 0);
      matrix_unit::multiply(rows, d, columns, narrowed.data(), columns, k.data(), d,
                            products.data(), d);
      write(products.data(), rows, dq + first * stride, stride, &scale, 0);
    }
    write_transposed(dk.data(), dqkv + D, stride, scale);
    write_transposed(dv.data(), dqkv + 2 * D, stride, 1);
  }
};

struct Sizes {
  int64_t N, tokens, queries, H, d, D; // D = H * d
  Sizes(const char *op, const Tensor &qkv, int64_t heads, int64_t first_query) {
    MAE_CHECK_VALUE(qkv.dim() == 3, op, ": qkv must be [N, T, 3*H*d], got ", qkv.dim(),
                    " dimensions");
    MAE_CHECK_VALUE(heads > 0 && qkv.size(2) % (3 * heads) == 0, op, ": the width ", qkv.size(2),
                    " of qkv must be a multiple of 3 * num_heads = ", 3 * heads);
    N = qkv.size(0), tokens = qkv.size(1), H = heads, d = qkv.size(2) / (3 * heads), D = H * d;
    MAE_CHECK_VALUE(first_query == 0 || (0 < first_query && first_query < tokens), op,
                    ": first_query must be in 0..", tokens - 1, ", got ", first_query);
    queries = tokens - first_query;
  }
};

// Calls f.operator()<T>(head, first value of qkv, first value of the output) for each head of each
// image, where T is the type of qkv. `head` is a Head or a HeadOnMatrixUnit.
template <class F>
void each_head(const char *op, const Sizes &s, ScalarType dtype, bool backward, const F &f) {
  const auto run = [&]<class T, template <class, int> class Kernel>() {
    parallel_kernel(s.N * s.H, 1, [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
      Kernel<T, BYTES> head(s.tokens, s.queries, s.d, backward);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / s.H, first = i % s.H * s.d;
        f.template operator()<T>(head, n * s.tokens * 3 * s.D + first, n * s.queries * s.D + first);
      }
    });
  };
  if (s.N * s.tokens * s.d == 0)
    return;
  if (dtype == ScalarType::BFloat16 && s.d % 2 == 0 && matrix_unit::available())
    run.template operator()<BFloat16, HeadOnMatrixUnit>();
  else
    dispatch_floating(op, dtype, [&]<class T>() { run.template operator()<T, Head>(); });
}

// qkv [N, T, 3*H*d] -> out [N, Q, H*d], and an empty log-sum-exp, which the CPU does not need
std::tuple<Tensor, Tensor> attention_cpu(const Tensor &qkv, const std::optional<Tensor> &bias,
                                         int64_t num_heads, bool save_lse, int64_t first_query) {
  const Sizes s("attention", qkv, num_heads, first_query);
  MAE_CHECK_VALUE(!bias && !save_lse, "attention: bias and save_lse are not supported on CPUs");
  const Tensor packed = contiguous(qkv);
  Tensor out = new_empty(qkv, {s.N, s.queries, s.D}, qkv.scalar_type());
  each_head("attention", s, qkv.scalar_type(), false,
            [&]<class T>(auto &head, int64_t at, int64_t at_out) MAE_KERNEL {
              head.forward(packed.const_data_ptr<T>() + at, s.D,
                           out.mutable_data_ptr<T>() + at_out);
            });
  return {out, new_empty(qkv, {0}, ScalarType::Float)};
}

// grad [N, Q, H*d], qkv [N, T, 3*H*d] -> the gradient of qkv, and an empty gradient of bias
std::tuple<Tensor, Tensor> attention_backward_cpu(const Tensor &grad, const Tensor &qkv,
                                                  const Tensor &, const Tensor &,
                                                  const std::optional<Tensor> &bias,
                                                  int64_t num_heads, int64_t first_query) {
  const Sizes s("attention_backward", qkv, num_heads, first_query);
  MAE_CHECK_VALUE(!bias, "attention_backward: bias is not supported on CPUs");
  MAE_CHECK_VALUE(grad.scalar_type() == qkv.scalar_type(),
                  "attention_backward: grad must have the dtype of qkv");
  MAE_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == s.N && grad.size(1) == s.queries &&
                      grad.size(2) == s.D,
                  "attention_backward: grad must be [", s.N, ", ", s.queries, ", ", s.D, "]");
  const Tensor packed = contiguous(qkv), dout = contiguous(grad);
  Tensor dqkv = new_empty(qkv, {s.N, s.tokens, 3 * s.D}, qkv.scalar_type());
  each_head("attention_backward", s, qkv.scalar_type(), true,
            [&]<class T>(auto &head, int64_t at, int64_t at_out) MAE_KERNEL {
              head.backward(dout.const_data_ptr<T>() + at_out, packed.const_data_ptr<T>() + at, s.D,
                            dqkv.mutable_data_ptr<T>() + at);
            });
  return {dqkv, new_empty(qkv, {0}, qkv.scalar_type())};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}
