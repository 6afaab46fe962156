// bf16 matrix products on the matrix or bf16 units of the CPU (AMX, AVX512_BF16), by the oneDNN
// that torch contains. oneDNN chooses the unit, limited by ONEDNN_MAX_CPU_ISA.
#pragma once

#include "vector.h"

// Not in torch's stable ABI, so the symbols are weak: they are null if torch does not have them.
namespace at::native::cpublas {
#define MAE_WEAK __attribute__((weak, visibility("default")))
MAE_WEAK void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc,
                     bool add, const c10::BFloat16 *a, const c10::BFloat16 *b, float *c, bool vnni);
MAE_WEAK void brgemm_release(bool vnni);
#undef MAE_WEAK
} // namespace at::native::cpublas

namespace mae_fast::matrix_unit {

// c[M, N] (+)= a[M, K] b[K, N] for even K. b is stored as pairs of rows: element (k, j) is
// b[(k / 2) * ldb + j].x[k % 2].
struct Pair {
  BFloat16 x[2];
};
inline void multiply(int64_t M, int64_t N, int64_t K, const BFloat16 *a, int64_t lda, const Pair *b,
                     int64_t ldb, float *c, int64_t ldc, bool add = false) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b->x, c, true);
}

typedef float Bit32 __attribute__((may_alias, aligned(2))); // a pair as 32 bits, to be copied

// Interleaves `count` values of two rows to pairs. A null row is read as zeros.
template <int BYTES>
MAE_INLINE void join_rows(const BFloat16 *first, const BFloat16 *second, int64_t count, Pair *to) {
  using Float = typename Vector<float, BYTES>::type;
  using Bits = typename Vector<uint32_t, BYTES>::type;
  const Float a = first ? load_some<BYTES>(first, count) : Float{};
  const Float b = second ? load_some<BYTES>(second, count) : Float{};
  store_some<BYTES>(reinterpret_cast<Bit32 *>(to), count, (Float)(((Bits)a >> 16) | (Bits)b));
}

// Rounds `count` values of two rows, stores them as pairs and returns the pairs. `rounded` is
// correct here, because its addition does not overflow the NaNs that bf16 products produce.
template <int BYTES>
MAE_INLINE typename Vector<uint32_t, BYTES>::type
store_pairs(Pair *to, int64_t count, const typename Vector<float, BYTES>::type &first,
            const typename Vector<float, BYTES>::type &second) {
  const auto pairs = (rounded<BYTES>(first) >> 16) | (rounded<BYTES>(second) & 0xffff0000u);
  store_some<BYTES>(reinterpret_cast<Bit32 *>(to), count,
                    (typename Vector<float, BYTES>::type)pairs);
  return pairs;
}

// Tries whether `multiply` works. oneDNN throws if the CPU, ONEDNN_MAX_CPU_ISA or
// torch.backends.mkldnn.enabled does not allow it. Only the first call of a thread is slow.
inline bool available() {
  namespace cpublas = at::native::cpublas;
  if (!cpublas::brgemm || !cpublas::brgemm_release)
    return false;
  BFloat16 a[16 * 2];
  Pair b[16];
  float c[16 * 16] = {};
  std::fill(a, a + 32, narrow<BFloat16>(2.f));
  std::fill(b, b + 16, Pair{narrow<BFloat16>(3.f), narrow<BFloat16>(-1.f)});
  try {
    multiply(16, 16, 2, a, 2, b, 16, c, 16);
    cpublas::brgemm_release(true);
  } catch (...) {
    return false;
  }
  return std::all_of(c, c + 256, [](float x) { return x == 4; });
}

inline void require(const char *op) {
  MAE_CHECK_VALUE(available(), op,
                  ": bf16 matrix products need a CPU with AMX or AVX512_BF16, and oneDNN settings "
                  "that allow them");
}

// Releases the matrix unit when a thread has finished its work.
struct Lease {
  Lease() = default;
  Lease(const Lease &) = delete;
  ~Lease() { at::native::cpublas::brgemm_release(true); }
};

} // namespace mae_fast::matrix_unit
