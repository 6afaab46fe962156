// Shapes: M rows, O outputs, K inputs of a linear layer.
#include "product.h"

namespace {

using namespace mae_fast;
using matrix_unit::Pair;

void check(const char *op, const Tensor &a, const Tensor &b) {
  for (const Tensor *t : {&a, &b})
    MAE_CHECK_VALUE(t->dim() == 2 && t->scalar_type() == ScalarType::BFloat16, op,
                    ": inputs must be bf16 matrices, got ", t->dim(), " dimensions of ",
                    torch::headeronly::toString(t->scalar_type()));
  matrix_unit::require(op);
}

// grad [M, O], x [M, K] -> fp32 grad^T x [O, K] and the sum over the rows of grad [O]
std::tuple<Tensor, Tensor> linear_gradients_cpu(const Tensor &grad, const Tensor &x) {
  check("linear_gradients", grad, x);
  MAE_CHECK_VALUE(
      grad.size(0) == x.size(0),
      "linear_gradients: grad [M, O] and x [M, K] must have the same number of rows, got ",
      grad.size(0), " and ", x.size(0));
  const Tensor left = contiguous(grad), right = contiguous(x);
  const int64_t M = x.size(0), O = grad.size(1), K = x.size(1);
  Tensor dweight = new_empty(x, {O, K}, ScalarType::Float);
  Tensor dbias = new_empty(x, {O}, ScalarType::Float);
  if (O)
    product::gradients(left.const_data_ptr<BFloat16>(), right.const_data_ptr<BFloat16>(), M, O, K,
                       dweight.mutable_data_ptr<float>(), dbias.mutable_data_ptr<float>());
  return {dweight, dbias};
}

// x [M, K] times weight [K, N], or with `transposed` the transpose of weight [N, K], plus bias [N]
Tensor product_of(const Tensor &x, const Tensor &weight, bool transposed,
                  const float *bias = nullptr) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(transposed ? 0 : 1);
  const Tensor in = contiguous(x), w = contiguous(weight);
  Tensor out = K ? new_empty(x, {M, N}, ScalarType::BFloat16) : new_zeros(x, {M, N});
  Pair *packed = thread_buffer<Pair, 1>(product::packed_size(K, N));
  if (transposed)
    product::pack_transposed(w.const_data_ptr<BFloat16>(), N, K, packed);
  else
    product::pack<true>(w.const_data_ptr<BFloat16>(), K, K, N, packed);
  product::multiply(M, N, K, in.const_data_ptr<BFloat16>(), packed,
                    product::Store{out.mutable_data_ptr<BFloat16>(), N, bias});
  return out;
}

// x [M, K], weight [O, K] -> x weight^T (+ bias) [M, O]
Tensor linear_product_cpu(const Tensor &x, const Tensor &weight,
                          const std::optional<Tensor> &bias) {
  check("linear_product", x, weight);
  const int64_t K = x.size(1), O = weight.size(0);
  MAE_CHECK_VALUE(weight.size(1) == K && K % 2 == 0 &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == O)),
                  "linear_product: weight must be [O, K] and bias [O] for x [M, K] with even K");
  const std::vector<float> values = bias ? read_all<float>(*bias) : std::vector<float>();
  return product_of(x, weight, true, bias ? values.data() : nullptr);
}

// grad [M, O], weight [O, K] -> grad weight [M, K]
Tensor linear_input_gradient_cpu(const Tensor &grad, const Tensor &weight) {
  check("linear_input_gradient", grad, weight);
  MAE_CHECK_VALUE(weight.size(0) == grad.size(1) && grad.size(1) % 2 == 0,
                  "linear_input_gradient: weight must be [O, K] for grad [M, O] with even O");
  return product_of(grad, weight, false);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("linear_gradients", TORCH_BOX(&linear_gradients_cpu));
  m.impl("linear_product", TORCH_BOX(&linear_product_cpu));
  m.impl("linear_input_gradient", TORCH_BOX(&linear_input_gradient_cpu));
}
