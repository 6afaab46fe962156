// Shapes: M rows, O outputs, K inputs of a linear layer.
//
// The gradient of its weight, grad^T x, sums over the rows. Both operands are copied once so that
// the matrix unit reads them as it likes: grad transposed, x in pairs of rows. The sum does not
// care about the rows' order: a block of 2 * lanes rows makes pairs of rows `lanes` apart, which
// whole vectors can be joined to.
#include "matrix_unit.h"

#include <memory>

namespace {

using namespace mae_fast;
using matrix_unit::Pair;

constexpr int64_t rows_at_once = 2048;                     // of grad and x that are copied
constexpr int64_t outputs = 128, inputs = 64, depth = 512; // of one product on the matrix unit
constexpr int64_t gap = 32; // between rows of the copy, which would else share cache sets

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

  // x [rows, K], columns first..first + inputs -> to [rows / 2, inputs], in the same pairs of rows
  MAE_INLINE static void paired(const BFloat16 *x, int64_t rows, int64_t padded, int64_t K,
                                int64_t first, Pair *to) {
    const int64_t width = std::min(inputs, K - first);
    for (int64_t m = 0; m < padded; m += 2 * lanes)
      for (int64_t i = 0; i < lanes; ++i, to += inputs)
        each_vector<lanes>(width, [&](int64_t j, int64_t count) MAE_KERNEL {
          const BFloat16 *from = x + (m + i) * K + first + j;
          const BFloat16 *upper = m + i < rows ? from : nullptr;
          const BFloat16 *lower = m + i + lanes < rows ? from + lanes * K : nullptr;
          matrix_unit::join_rows<BYTES>(upper, lower, count, to + j);
        });
  }
};

// Memory for the copies, the thread's own and kept from call to call: fresh pages would cost as
// much time as the copying.
template <class T> T *kept(int64_t count) {
  static thread_local std::unique_ptr<T[]> memory;
  static thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(); // before there are two
    memory.reset(new T[count]);
    size = count;
  }
  return memory.get();
}

// grad [M, O], x [M, K], both bf16 -> grad^T x [O, K], the sum of grad's rows [O], both fp32 and,
// with `add`, on top of what is there
void gradients(const BFloat16 *grad, const BFloat16 *x, int64_t M, int64_t O, int64_t K,
               float *dweight, float *dbias, bool add) {
  const int64_t longest = std::min(rows_at_once, round_up(M, 32)), stride = longest + gap;
  const int64_t padded_O = round_up(O, outputs), panels = (K + inputs - 1) / inputs;
  BFloat16 *left = kept<BFloat16>(padded_O * stride);
  Pair *right = kept<Pair>(panels * longest / 2 * inputs);
  if (!add)
    std::fill(dbias, dbias + O, 0.f);
  if (!add && M == 0)
    std::fill(dweight, dweight + O * K, 0.f);
  for (int64_t first = 0; first < M; first += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, M - first), padded = round_up(rows, 32);
    const BFloat16 *grad_ptr = grad + first * O, *x_ptr = x + first * K;
    parallel_kernel((O + 31) / 32, 1,
                    [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
                      constexpr int64_t columns = BYTES / 2;
                      for (int64_t o = begin * 32; o < std::min(O, end * 32); o += columns)
                        Copy<BYTES>::transposed(grad_ptr, rows, padded, O, o, left + o * stride,
                                                stride, dbias);
                    });
    parallel_kernel(panels, 1,
                    [&]<int BYTES>(int64_t begin, int64_t end, VectorBytes<BYTES>) MAE_KERNEL {
                      for (int64_t p = begin; p < end; ++p)
                        Copy<BYTES>::paired(x_ptr, rows, padded, K, p * inputs,
                                            right + p * longest / 2 * inputs);
                    });
    torch::stable::parallel_for(0, padded_O / outputs * panels, 1, [&](int64_t begin, int64_t end) {
      const matrix_unit::Lease lease;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t o = i / panels * outputs, k = i % panels * inputs;
        const Pair *panel = right + i % panels * longest / 2 * inputs;
        for (int64_t m = 0; m < padded; m += depth)
          matrix_unit::multiply(std::min(outputs, O - o), std::min(inputs, K - k),
                                std::min(depth, padded - m), left + o * stride + m, stride,
                                panel + m / 2 * inputs, inputs, dweight + o * K + k, K,
                                add || first + m > 0);
      }
    });
  }
}

void run(const char *op, const Tensor &grad, const Tensor &x, const Tensor &dweight,
         const Tensor &dbias, bool add) {
  MAE_CHECK_VALUE(matrix_unit::available(), op,
                  ": this processor multiplies no bf16 matrices in hardware, or oneDNN's settings "
                  "forbid it");
  const Tensor left = contiguous(grad), right = contiguous(x);
  if (grad.size(1))
    gradients(left.const_data_ptr<BFloat16>(), right.const_data_ptr<BFloat16>(), grad.size(0),
              grad.size(1), x.size(1), dweight.mutable_data_ptr<float>(),
              dbias.mutable_data_ptr<float>(), add);
}

void check(const char *op, const Tensor &grad, const Tensor &x) {
  MAE_CHECK_VALUE(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), op,
                  ": grad must be [M, O] and x [M, K]");
  MAE_CHECK_VALUE(grad.scalar_type() == ScalarType::BFloat16 &&
                      x.scalar_type() == ScalarType::BFloat16,
                  op, ": grad and x must be bf16");
}

std::tuple<Tensor, Tensor> linear_gradients_cpu(const Tensor &grad, const Tensor &x) {
  check("linear_gradients", grad, x);
  Tensor dweight = new_empty(x, {grad.size(1), x.size(1)}, ScalarType::Float);
  Tensor dbias = new_empty(x, {grad.size(1)}, ScalarType::Float);
  run("linear_gradients", grad, x, dweight, dbias, false);
  return {dweight, dbias};
}

void add_linear_gradients_cpu(const Tensor &grad, const Tensor &x, const Tensor &dweight,
                              const Tensor &dbias) {
  check("add_linear_gradients", grad, x);
  MAE_CHECK_VALUE(dweight.dim() == 2 && dweight.size(0) == grad.size(1) &&
                      dweight.size(1) == x.size(1) && dbias.dim() == 1 &&
                      dbias.size(0) == grad.size(1) && dweight.scalar_type() == ScalarType::Float &&
                      dbias.scalar_type() == ScalarType::Float && dweight.is_contiguous() &&
                      dbias.is_contiguous(),
                  "add_linear_gradients: dweight must be fp32 [O, K] and dbias [O], contiguous");
  run("add_linear_gradients", grad, x, dweight, dbias, true);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("linear_gradients", TORCH_BOX(&linear_gradients_cpu));
  m.impl("add_linear_gradients", TORCH_BOX(&add_linear_gradients_cpu));
}
