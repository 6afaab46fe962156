// Shapes: N images, T tokens, H heads of d values. qkv is [N, T, 3*H*d]: q, k, v, each head by
// head.
#include "vector.h"

#include <limits>

namespace {

using namespace mae_fast;

constexpr int64_t query_rows = 48; // queries whose scores are in the cache at once

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A matrix of A whose element (i, j) lies at data[i * row + j * col].
template <class A> struct Operand {
  const A *data;
  int64_t row, col;
};

// c[ROWS, VECTORS * lanes] (+)= a[ROWS, K] b[K, VECTORS * lanes], the sums in registers.
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
  int64_t tokens, d, width, columns; // width: d padded, columns: tokens padded
  std::vector<A> scores;             // [query_rows, columns]

  Head(int64_t tokens, int64_t d)
      : tokens(tokens), d(d), width(round_up(d, lanes)), columns(round_up(tokens, lanes)),
        scores(query_rows * columns) {}

  // [tokens, d] with a row stride in memory -> [tokens, width]
  MAE_INLINE void read(const T *from, int64_t stride, A scale, std::vector<A> &to) const {
    to.resize(tokens * width); // the padding is zero from the start and never written
    for (int64_t t = 0; t < tokens; ++t)
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

  // scores = softmax(q k^T) of `rows` queries from the first; the columns of padding are zero.
  MAE_INLINE void softmax(const std::vector<A> &q, const std::vector<A> &k_transposed,
                          int64_t first, int64_t rows) {
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
      A top = high[0];
      for (int lane = 1; lane < lanes; ++lane)
        top = high[lane] > top ? high[lane] : top;
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

  // ds = p (ds - sum(p ds)), row by row: the gradient's way through the softmax.
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
};

struct Sizes {
  int64_t N, tokens, H, d;
  Sizes(const char *op, const Tensor &qkv, int64_t heads) {
    MAE_CHECK_VALUE(qkv.dim() == 3, op, ": qkv must be [N, T, 3*H*d], got ", qkv.dim(),
                    " dimensions");
    MAE_CHECK_VALUE(heads > 0 && qkv.size(2) % (3 * heads) == 0, op, ": the width ", qkv.size(2),
                    " of qkv must be a multiple of 3 * num_heads = ", 3 * heads);
    N = qkv.size(0), tokens = qkv.size(1), H = heads, d = qkv.size(2) / (3 * heads);
  }
  int64_t empty() const { return N * tokens * d == 0; }
};

Tensor attention_cpu(const Tensor &qkv, int64_t num_heads) { // [N, T, 3*H*d]
  const Sizes s("attention", qkv, num_heads);
  const Tensor packed = contiguous(qkv);
  Tensor out = new_empty(qkv, {s.N, s.tokens, s.H * s.d}, qkv.scalar_type());
  if (s.empty())
    return out;
  dispatch_floating("attention", qkv.scalar_type(), [&]<class T>() {
    const T *in = packed.const_data_ptr<T>();
    T *to = out.mutable_data_ptr<T>();
    parallel_kernel(
        s.N * s.H, 1, [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
          using A = Wide<T>;
          Head<T, BYTES> head(s.tokens, s.d);
          const int64_t D = s.H * s.d;
          const A scale = A(1) / std::sqrt(static_cast<A>(s.d));
          std::vector<A> q, k, v, k_transposed, rows_out(query_rows * head.width);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / s.H, h = i % s.H;
            const T *base = in + n * s.tokens * 3 * D + h * s.d;
            head.read(base, 3 * D, scale, q);
            head.read(base + D, 3 * D, 1, k);
            head.read(base + 2 * D, 3 * D, 1, v);
            head.transpose(k, k_transposed);
            for (int64_t first = 0; first < s.tokens; first += query_rows) {
              const int64_t rows = std::min(query_rows, s.tokens - first);
              head.softmax(q, k_transposed, first, rows);
              multiply<BYTES, false>(Operand<A>{head.scores.data(), head.columns, 1}, v.data(),
                                     head.width, rows_out.data(), head.width, rows, s.tokens,
                                     head.width);
              head.write(rows_out.data(), rows, to + (n * s.tokens + first) * D + h * s.d, D);
            }
          }
        });
  });
  return out;
}

Tensor attention_backward_cpu(const Tensor &grad, const Tensor &qkv,
                              int64_t num_heads) { // [N, T, H*d]
  const Sizes s("attention_backward", qkv, num_heads);
  MAE_CHECK_VALUE(grad.scalar_type() == qkv.scalar_type(),
                  "attention_backward: grad must have the dtype of qkv");
  MAE_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == s.N && grad.size(1) == s.tokens &&
                      grad.size(2) == s.H * s.d,
                  "attention_backward: grad must be [", s.N, ", ", s.tokens, ", ", s.H * s.d, "]");
  const Tensor packed = contiguous(qkv), dout = contiguous(grad);
  Tensor dqkv = new_empty(qkv, {s.N, s.tokens, 3 * s.H * s.d}, qkv.scalar_type());
  if (s.empty())
    return dqkv;
  dispatch_floating("attention_backward", qkv.scalar_type(), [&]<class T>() {
    const T *in = packed.const_data_ptr<T>(), *dout_ptr = dout.const_data_ptr<T>();
    T *to = dqkv.mutable_data_ptr<T>();
    parallel_kernel(
        s.N * s.H, 1, [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
          using A = Wide<T>;
          Head<T, BYTES> head(s.tokens, s.d);
          const int64_t D = s.H * s.d, width = head.width, columns = head.columns;
          const A scale = A(1) / std::sqrt(static_cast<A>(s.d));
          std::vector<A> q, k, v, dout, k_transposed, v_transposed, dq(query_rows * width);
          std::vector<A> dk(s.tokens * width), dv(s.tokens * width), dscores(query_rows * columns);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / s.H, h = i % s.H, base = n * s.tokens * 3 * D + h * s.d;
            head.read(in + base, 3 * D, scale, q);
            head.read(in + base + D, 3 * D, 1, k);
            head.read(in + base + 2 * D, 3 * D, 1, v);
            head.read(dout_ptr + n * s.tokens * D + h * s.d, D, 1, dout);
            head.transpose(k, k_transposed);
            head.transpose(v, v_transposed);
            std::fill(dk.begin(), dk.end(), A(0));
            std::fill(dv.begin(), dv.end(), A(0));
            for (int64_t first = 0; first < s.tokens; first += query_rows) {
              const int64_t rows = std::min(query_rows, s.tokens - first);
              head.softmax(q, k_transposed, first, rows);
              A *p = head.scores.data(), *ds = dscores.data();
              multiply<BYTES, false>(Operand<A>{dout.data() + first * width, width, 1},
                                     v_transposed.data(), columns, ds, columns, rows, s.d, columns);
              multiply<BYTES, true>(Operand<A>{p, 1, columns}, dout.data() + first * width, width,
                                    dv.data(), width, s.tokens, rows, width);
              head.softmax_backward(ds, rows);
              multiply<BYTES, false>(Operand<A>{ds, columns, 1}, k.data(), width, dq.data(), width,
                                     rows, s.tokens, width);
              multiply<BYTES, true>(Operand<A>{ds, 1, columns}, q.data() + first * width, width,
                                    dk.data(), width, s.tokens, rows, width);
              for (A &x : dq)
                x *= scale;
              head.write(dq.data(), rows, to + base + first * 3 * D, 3 * D);
            }
            head.write(dk.data(), s.tokens, to + base + D, 3 * D); // q came scaled, and so does dk
            head.write(dv.data(), s.tokens, to + base + 2 * D, 3 * D);
          }
        });
  });
  return dqkv;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}
