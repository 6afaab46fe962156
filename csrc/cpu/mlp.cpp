// Shapes: M rows, D inputs, H hidden units, O outputs.
#include "gelu.h"
#include "product.h"

namespace {

using namespace mae_fast;
using matrix_unit::Pair;
using product::panel;

// Rows per chunk, chosen so that the hidden values are in the cache when the second product reads
// them.
int64_t chunk_rows(int64_t M, int64_t H) {
  const int64_t max_rows =
      std::clamp<int64_t>((1 << 22) / std::max<int64_t>(1, H), 32, product::copied_rows);
  const int64_t chunks = std::max<int64_t>(1, (M + max_rows - 1) / max_rows);
  return std::max<int64_t>(32, round_up((M + chunks - 1) / chunks, 32));
}

struct Sizes {
  int64_t M, D, H, O;
  Sizes(const char *op, const Tensor &x, const Tensor &weight1, const Tensor &bias1,
        const Tensor &weight2) {
    matrix_unit::require(op);
    for (const Tensor *t : {&x, &weight1, &weight2})
      MAE_CHECK_VALUE(t->dim() == 2 && t->scalar_type() == ScalarType::BFloat16, op,
                      ": x, weight1 and weight2 must be bf16 matrices");
    M = x.size(0), D = x.size(1), H = weight1.size(0), O = weight2.size(0);
    MAE_CHECK_VALUE(weight1.size(1) == D && weight2.size(1) == H && bias1.dim() == 1 &&
                        bias1.size(0) == H,
                    op, ": weight1 must be [H, D], bias1 [H], weight2 [O, H] for x [M, D]");
    MAE_CHECK_VALUE(D % 2 == 0 && H % 2 == 0 && O % 2 == 0, op, ": D, H and O must be even");
  }
};

// x [M, D], weight1 [H, D], weight2 [O, H] in bf16 -> out [M, O], and with `save` x weight1^T
// [panels of H, M, 64] for the backward pass (else empty)
std::tuple<Tensor, Tensor> mlp_cpu(const Tensor &x, const Tensor &weight1, const Tensor &bias1,
                                   const Tensor &weight2, const Tensor &bias2, bool save) {
  const Tensor in = contiguous(x), w1 = contiguous(weight1), w2 = contiguous(weight2);
  const auto [M, D, H, O] = Sizes("mlp", x, weight1, bias1, weight2);
  MAE_CHECK_VALUE(bias2.dim() == 1 && bias2.size(0) == O, "mlp: bias2 must be [O]");
  Tensor out = new_empty(x, {M, O}, ScalarType::BFloat16);
  const std::vector<int64_t> sizes = {save ? (H + panel - 1) / panel : 0, M, panel};
  Tensor h = H % panel ? new_zeros(x, sizes) : new_empty(x, sizes, ScalarType::BFloat16);
  const std::vector<float> b1 = read_all<float>(bias1), b2 = read_all<float>(bias2);
  Pair *packed1 = thread_buffer<Pair, 1>(product::packed_size(D, H));
  Pair *packed2 = thread_buffer<Pair, 2>(product::packed_size(H, O));
  product::pack_transposed(w1.const_data_ptr<BFloat16>(), H, D, packed1);
  product::pack_transposed(w2.const_data_ptr<BFloat16>(), O, H, packed2);
  const int64_t chunk = chunk_rows(M, H);
  BFloat16 *hidden = thread_buffer<BFloat16>(chunk * H);
  BFloat16 *h_ptr = h.mutable_data_ptr<BFloat16>();
  for (int64_t first = 0; first < M; first += chunk) {
    const int64_t rows_here = std::min(chunk, M - first);
    const auto gelu = [&]<int BYTES>(const float *c, int64_t m, int64_t rows, int64_t n,
                                     int64_t columns) MAE_KERNEL {
      for (int64_t r = 0; r < rows; ++r)
        each_vector<BYTES / 4>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
          const auto v = load_some<BYTES>(c + r * panel + j, count);
          const auto x = v + load_some<BYTES>(b1.data() + n + j, count);
          typename Vector<float, BYTES>::type cdf;
          rough_gelu<BYTES>(x, cdf);
          if (save)
            store_some<BYTES>(h_ptr + n * M + (first + m + r) * panel + j, count, v);
          store_some<BYTES>(hidden + (m + r) * H + n + j, count, x * cdf);
        });
    };
    product::multiply(rows_here, H, D, in.const_data_ptr<BFloat16>() + first * D, packed1, gelu);
    product::multiply(rows_here, O, H, hidden, packed2,
                      product::Store{out.mutable_data_ptr<BFloat16>() + first * O, O, b2.data()});
  }
  return {out, h};
}

// grad [M, O], x [M, D], h from mlp [panels of H, M, 64] -> gradients of x, weight1, bias1,
// weight2, bias2
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
mlp_backward_cpu(const Tensor &grad, const Tensor &x, const Tensor &h, const Tensor &weight1,
                 const Tensor &bias1, const Tensor &weight2) {
  const Tensor dout = contiguous(grad), in = contiguous(x), hs = contiguous(h),
               w1 = contiguous(weight1), w2 = contiguous(weight2);
  const auto [M, D, H, O] = Sizes("mlp_backward", x, weight1, bias1, weight2);
  MAE_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == M && grad.size(1) == O &&
                      grad.scalar_type() == ScalarType::BFloat16,
                  "mlp_backward: grad must be bf16 [M, O]");
  MAE_CHECK_VALUE(h.numel() == round_up(H, panel) * M && h.scalar_type() == ScalarType::BFloat16,
                  "mlp_backward: h must be the second result of mlp with save=True");
  Tensor dx = new_empty(x, {M, D}, ScalarType::BFloat16);
  const auto gradient = [&, M = M](std::vector<int64_t> size) { // of a parameter; zero without rows
    return M ? new_empty(x, size, ScalarType::Float) : new_zeros(x, size, ScalarType::Float);
  };
  Tensor dweight1 = gradient({H, D}), dweight2 = gradient({O, H});
  Tensor dbias1 = new_zeros(x, {H}, ScalarType::Float);
  Tensor dbias2 = new_zeros(x, {O}, ScalarType::Float);
  const std::vector<float> b1 = read_all<float>(bias1);
  Pair *packed1 = thread_buffer<Pair, 1>(product::packed_size(H, D));
  Pair *packed2 = thread_buffer<Pair, 2>(product::packed_size(O, H));
  product::pack<true>(w1.const_data_ptr<BFloat16>(), H, H, D, packed1);
  product::pack<true>(w2.const_data_ptr<BFloat16>(), O, O, H, packed2);
  const int64_t chunk = chunk_rows(M, H);
  float *db1 = dbias1.mutable_data_ptr<float>(), *db2 = dbias2.mutable_data_ptr<float>();
  for (int64_t first = 0; first < M; first += chunk) {
    const product::Copied s(std::min(chunk, M - first));
    const int64_t blocks = (s.rows + product::rows_at_once - 1) / product::rows_at_once;
    const BFloat16 *dout_ptr = dout.const_data_ptr<BFloat16>() + first * O;
    const BFloat16 *h_ptr = hs.const_data_ptr<BFloat16>();
    BFloat16 *dh = thread_buffer<BFloat16, 1>(s.rows * H);
    const int64_t pairs_size = product::packed_size(s.padded, H);
    Pair *dh_pairs = thread_buffer<Pair, 0>(pairs_size),
         *hidden_pairs = thread_buffer<Pair, 3>(pairs_size);
    std::vector<float> sums(blocks * H); // partial sums over the rows of dh
    const auto gelu = [&]<int BYTES>(const float *c, int64_t m, int64_t rows, int64_t n,
                                     int64_t columns) MAE_KERNEL {
      using Float = typename Vector<float, BYTES>::type;
      constexpr int64_t lanes = BYTES / 4;
      float *sum = sums.data() + m / product::rows_at_once * H + n;
      for (int64_t i = 0; i < round_up(rows, 2 * lanes) / 2; ++i) {
        const int64_t row[] = {i / lanes * 2 * lanes + i % lanes, row[0] + lanes};
        const int64_t pair = n * s.padded / 2 + (m / 2 + i) * panel;
        each_vector<lanes>(columns, [&](int64_t j, int64_t count) MAE_KERNEL {
          const Float bias = load_some<BYTES>(b1.data() + n + j, count);
          Float value[2]{}, d[2]{}; // for both rows of the pair; zero after the last row
          for (int half = 0; half < 2 && row[half] < rows; ++half) {
            const auto *h_row = h_ptr + n * M + (first + m + row[half]) * panel;
            const Float x = load_some<BYTES>(h_row + j, count) + bias;
            rough_gelu<BYTES>(x, value[half], &d[half]);
            value[half] *= x;
            d[half] *= load_some<BYTES>(c + row[half] * panel + j, count);
          }
          matrix_unit::store_pairs<BYTES>(hidden_pairs + pair + j, count, value[0], value[1]);
          const auto pairs =
              matrix_unit::store_pairs<BYTES>(dh_pairs + pair + j, count, d[0], d[1]);
          for (int half = 0; half < 2 && row[half] < rows; ++half)
            product::store_row<BYTES>(dh + (m + row[half]) * H + n + j, count, pairs, half);
          store_some<BYTES>(sum + j, count, load_some<BYTES>(sum + j, count) + d[0] + d[1]);
        });
      }
    };
    product::multiply(s.rows, H, O, dout_ptr, packed2, gelu);
    for (int64_t i = 0; i < blocks * H; ++i)
      db1[i % H] += sums[i];
    product::multiply(s.rows, D, H, dh, packed1,
                      product::Store{dx.mutable_data_ptr<BFloat16>() + first * D, D});
    BFloat16 *left = thread_buffer<BFloat16>(s.left_size(std::max(D, O)));
    std::vector<float> ignored_sums(D); // copy_left always sums
    product::copy_left(s, in.const_data_ptr<BFloat16>() + first * D, D, left, ignored_sums.data());
    product::multiply_copies<true>(s, left, dh_pairs, D, H, dweight1.mutable_data_ptr<float>(),
                                   first > 0);
    product::copy_left(s, dout_ptr, O, left, db2);
    product::multiply_copies<false>(s, left, hidden_pairs, O, H, dweight2.mutable_data_ptr<float>(),
                                    first > 0);
  }
  return {dx, dweight1, dbias1, dweight2, dbias2};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp_cpu));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward_cpu));
}
