// Common helpers of the kernels: torch's stable ABI, argument checks and dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

namespace mae_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In Python, std::invalid_argument becomes a ValueError and std::out_of_range an IndexError. Do not
// throw inside parallel_for: the exception crosses a C boundary there and becomes a RuntimeError.
template <class Error, class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void raise(const Args &...args) {
  std::ostringstream message;
  (message << ... << args);
  throw Error(message.str());
}

#define MAE_CHECK_VALUE(condition, ...)                                                            \
  if (!(condition)) [[unlikely]]                                                                   \
  ::mae_fast::raise<std::invalid_argument>(__VA_ARGS__)
#define MAE_CHECK_INDEX(condition, ...)                                                            \
  if (!(condition)) [[unlikely]]                                                                   \
  ::mae_fast::raise<std::out_of_range>(__VA_ARGS__)

// Raises an IndexError unless all indices are in 0..limit-1.
inline void check_indices(const char *op, const char *name, const int64_t *ids, int64_t count,
                          int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    MAE_CHECK_INDEX(0 <= ids[i] && ids[i] < limit, op, ": ", name, " must be in 0..", limit - 1,
                    ", got ", ids[i]);
}

template <class T> constexpr ScalarType type_of = c10::CppTypeToScalarType<T>::value;

// Promotes two floating types as torch does.
inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b)
    return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
}

// Calls f.operator()<T>(), where T is the C++ type of dtype. It must be one of Types.
template <class... Types, class F> void dispatch(const char *op, ScalarType dtype, const F &f) {
  const bool supported =
      ((dtype == type_of<Types> && (f.template operator()<Types>(), true)) || ...);
  MAE_CHECK_VALUE(supported, op, ": dtype ", torch::headeronly::toString(dtype),
                  " is not supported");
}

template <class F> void dispatch_floating(const char *op, ScalarType dtype, const F &f) {
  dispatch<float, double, Half, BFloat16>(op, dtype, f);
}

} // namespace mae_fast
