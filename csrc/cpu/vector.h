// Explicit vectors, for loops that the compiler does not vectorise well.
#pragma once

#include "simd.h"

#include <cmath>
#include <memory>
#include <utility>

namespace mae_fast {

template <class A, int BYTES> struct Vector {
  typedef A type __attribute__((vector_size(BYTES)));
  // The same type in memory that is only aligned to A.
  typedef A in_memory __attribute__((vector_size(BYTES), aligned(alignof(A)), may_alias));
  static constexpr int64_t lanes = BYTES / sizeof(A);
};

// Loads values of T, and converts them to a vector of the accumulation type.
template <int BYTES, class T> MAE_INLINE typename Vector<Wide<T>, BYTES>::type load(const T *from) {
  using A = Wide<T>;
  using V = Vector<A, BYTES>;
  if constexpr (std::is_same_v<T, A>) {
    return *reinterpret_cast<const typename V::in_memory *>(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Bits __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
    using Int = typename Vector<uint32_t, BYTES>::type;
    const Int bits = __builtin_convertvector(*reinterpret_cast<const Bits *>(from), Int) << 16;
    return (typename V::type)bits;
  } else {
    typename V::type out;
    for (int i = 0; i < V::lanes; ++i)
      out[i] = widen(from[i]);
    return out;
  }
}

// Rounds to the nearest bf16, ties to even. The result is in the upper half of each lane. Some NaNs
// become other values, because the addition overflows.
template <int BYTES>
MAE_INLINE typename Vector<uint32_t, BYTES>::type
rounded(const typename Vector<float, BYTES>::type &x) {
  const auto bits = (typename Vector<uint32_t, BYTES>::type)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Rounds to nearest even, as torch does.
template <int BYTES, class T>
MAE_INLINE void store(T *to, const typename Vector<Wide<T>, BYTES>::type &x) {
  using A = Wide<T>;
  using V = Vector<A, BYTES>;
  if constexpr (std::is_same_v<T, A>) {
    *reinterpret_cast<typename V::in_memory *>(to) = x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Bits __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
    typedef uint16_t Narrow __attribute__((vector_size(BYTES / 2)));
    using Int = typename Vector<uint32_t, BYTES>::type;
    const Int bits = x == x ? rounded<BYTES>(x) >> 16 : Int{} + 0x7fc0u; // NaN
    *reinterpret_cast<Bits *>(to) = __builtin_convertvector(bits, Narrow);
  } else {
    for (int i = 0; i < V::lanes; ++i)
      to[i] = narrow<T>(x[i]);
  }
}

// Calls f(first, count) for each vector of a row of `width` values. Only the last one may have
// fewer than LANES values.
template <int64_t LANES, class F> MAE_INLINE void each_vector(int64_t width, const F &f) {
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES)
    f(j, LANES);
  if (j < width)
    f(j, width - j);
}

// Loads or stores the first `count` lanes: all, or fewer at the end of a row. The other lanes of a
// loaded vector are zero.
template <int BYTES, class T>
MAE_INLINE typename Vector<Wide<T>, BYTES>::type load_some(const T *from, int64_t count) {
  constexpr int64_t lanes = Vector<Wide<T>, BYTES>::lanes;
  if (count == lanes)
    return load<BYTES>(from);
  T padded[lanes] = {};
  std::copy(from, from + count, padded);
  return load<BYTES>(static_cast<const T *>(padded));
}
template <int BYTES, class T>
MAE_INLINE void store_some(T *to, int64_t count, const typename Vector<Wide<T>, BYTES>::type &x) {
  constexpr int64_t lanes = Vector<Wide<T>, BYTES>::lanes;
  if (count == lanes)
    return store<BYTES>(to, x);
  T padded[lanes];
  store<BYTES>(static_cast<T *>(padded), x);
  std::copy(padded, padded + count, to);
}

// Reduces all lanes with f: first both halves of the vector, then the halves of the result.
template <int BYTES, class A, class F>
MAE_INLINE A reduce_lanes(const typename Vector<A, BYTES>::type &x, const F &f) {
  if constexpr (BYTES > 16) {
    typename Vector<A, BYTES / 2>::type half[2];
    std::memcpy(half, &x, BYTES);
    return reduce_lanes<BYTES / 2, A>(f(half[0], half[1]), f);
  } else if constexpr (sizeof(A) == 8) {
    return f(x[0], x[1]);
  } else {
    return f(f(x[0], x[2]), f(x[1], x[3]));
  }
}
template <int BYTES, class A> MAE_INLINE A total(const typename Vector<A, BYTES>::type &x) {
  return reduce_lanes<BYTES, A>(x, [](const auto &a, const auto &b) MAE_KERNEL { return a + b; });
}
template <int BYTES, class A> MAE_INLINE A maximum(const typename Vector<A, BYTES>::type &x) {
  return reduce_lanes<BYTES, A>(x, [](const auto &a, const auto &b)
                                       MAE_KERNEL { return a > b ? a : b; });
}

// e^x of each lane for x <= 0, with an error of about 1 ulp. x is clamped to -87, where the result
// is 1e-38. The minimax polynomial is from Cephes.
template <int BYTES> MAE_INLINE void exponential(typename Vector<float, BYTES>::type &x) {
  using V = typename Vector<float, BYTES>::type;
  using Int = typename Vector<int32_t, BYTES>::type;
  const V magic = V{} + 12582912.f; // 1.5 * 2^23: adding it rounds x to an integer in the low bits
  const V lowest = V{} - 87.f;
  x = x < lowest ? lowest : x; // keeps NaN
  const V shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = V{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const Int power = ((Int)shifted + 127) << 23; // the low bits of magic are zero
  x = y * (V)power;
}
// 2^x of each lane for x <= 0, with a relative error of 3e-6, for results that are rounded to bf16.
template <int BYTES> MAE_INLINE void rough_power_of_two(typename Vector<float, BYTES>::type &x) {
  using V = typename Vector<float, BYTES>::type;
  using Int = typename Vector<int32_t, BYTES>::type;
  const V magic = V{} + 12582912.f, lowest = V{} - 126.f;
  x = x < lowest ? lowest : x; // keeps NaN
  const V shifted = x + magic, r = x - (shifted - magic);
  V y = V{} + 9.570095e-3f;
  y = y * r + 5.591786e-2f;
  y = y * r + 2.4024744e-1f;
  y = y * r + 6.931218e-1f;
  y = y * r + 1.f;
  // Add n to the exponent. The shift drops the bits of magic.
  x = (V)((Int)y + ((Int)shifted << 23));
}
template <int BYTES> MAE_INLINE void exponential(typename Vector<double, BYTES>::type &x) {
  for (int i = 0; i < BYTES / 8; ++i)
    x[i] = std::exp(x[i]);
}

// Interleaves the lanes of the first halves of a and b, or of their second halves.
template <int BYTES, bool SECOND, size_t... I>
MAE_INLINE void interleave(const typename Vector<float, BYTES>::type &a,
                           const typename Vector<float, BYTES>::type &b,
                           typename Vector<float, BYTES>::type &out, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I), first = SECOND * lanes / 2;
#ifdef __clang__
  out = __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * lanes)...);
#else
  const typename Vector<int32_t, BYTES>::type index = {int(first + I / 2 + I % 2 * lanes)...};
  out = __builtin_shuffle(a, b, index);
#endif
}

// Swaps lane j of x[i] with lane i of x[j].
template <int BYTES>
MAE_INLINE void transpose(typename Vector<float, BYTES>::type (&x)[BYTES / 4]) {
  constexpr int lanes = BYTES / 4;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    typename Vector<float, BYTES>::type y[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      const std::make_index_sequence<lanes> all;
      interleave<BYTES, false>(x[i], x[i + lanes / 2], y[2 * i], all);
      interleave<BYTES, true>(x[i], x[i + lanes / 2], y[2 * i + 1], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      x[i] = y[i];
  }
}

// Calls f(t, c, block, rows, count) for each block of lanes x lanes of a matrix [length, width].
// The last ones may have fewer rows or columns.
template <int BYTES, class F>
MAE_INLINE void each_block(int64_t length, int64_t width, const F &f) {
  constexpr int64_t lanes = BYTES / 4;
  for (int64_t t = 0; t < length; t += lanes)
    for (int64_t c = 0; c < width; c += lanes) {
      typename Vector<float, BYTES>::type block[lanes]{};
      f(t, c, block, std::min(lanes, length - t), std::min(lanes, width - c));
    }
}

// Transposes a matrix [length, width] to [width, length]. `stride` and `to_stride` are the
// distances of rows. Writes whole vectors, so to_stride must be at least `length` rounded up to
// them.
template <int BYTES, class T, class To>
MAE_INLINE void transpose_matrix(const T *from, int64_t stride, int64_t length, int64_t width,
                                 To *to, int64_t to_stride) {
  each_block<BYTES>(length, width,
                    [&](int64_t t, int64_t c, auto &block, int64_t rows, int64_t count) MAE_KERNEL {
                      for (int64_t i = 0; i < rows; ++i)
                        block[i] = load_some<BYTES>(from + (t + i) * stride + c, count);
                      transpose<BYTES>(block);
                      for (int64_t j = 0; j < count; ++j)
                        store<BYTES>(to + (c + j) * to_stride + t, block[j]);
                    });
}

// Thread-local scratch memory. It is reused between calls, because page faults of new memory
// take as long as copies. Buffers that are in use at the same time need different TAGs.
template <class T, int TAG = 0> T *thread_buffer(int64_t count) {
  static thread_local std::unique_ptr<T[]> memory;
  static thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(); // free the old buffer first, to limit peak memory
    memory.reset(new T[count]);
    size = count;
  }
  return memory.get();
}

// The shape of x [..., width] as [rows, width], for ops with one of `values` [width] per column.
struct Rows {
  int64_t rows, width;
  // Blocks of rows for sums over the rows. They do not depend on the number of threads, so the
  // result does not, either.
  int64_t per_block, blocks;
  Rows(const char *op, const Tensor &x, const Tensor &values, const char *expected) {
    MAE_CHECK_VALUE(x.dim() > 0 && values.dim() == 1 && values.size(0) == x.size(x.dim() - 1), op,
                    ": ", expected);
    width = values.size(0), rows = 1;
    for (int64_t i = 1; i < x.dim(); ++i)
      rows *= x.size(i - 1);
    per_block = std::max<int64_t>(16, (rows + 63) / 64);
    blocks = (rows + per_block - 1) / per_block;
  }
  // Calls f.operator()<BYTES>(row, block) for each row. The rows of a block run in order.
  template <class F> void each(const F &f) const {
    parallel_kernel(blocks, 1, [&]<int BYTES>(int64_t begin, int64_t end) MAE_KERNEL {
      for (int64_t r = begin * per_block; r < std::min(rows, end * per_block); ++r)
        f.template operator()<BYTES>(r, r / per_block);
    });
  }
  // Adds the sums of all blocks to out [width]. The sums of a block start at sums + block * stride.
  template <class A> void add_blocks(const A *sums, int64_t stride, const Tensor &out) const {
    dispatch_floating("add_blocks", out.scalar_type(), [&]<class B>() {
      B *to = out.mutable_data_ptr<B>();
      for (int64_t j = 0; j < width; ++j) {
        A sum = 0;
        for (int64_t block = 0; block < blocks; ++block)
          sum += sums[block * stride + j];
        to[j] = narrow<B>(sum);
      }
    });
  }
};

} // namespace mae_fast
