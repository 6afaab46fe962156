// What every kernel file needs: the stable ABI, checks with messages, a dtype switch.
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

// Python sees std::invalid_argument as ValueError and std::out_of_range as IndexError. Never throw
// inside parallel_for: there the exception crosses a C boundary and arrives as a RuntimeError.
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

// Every index in 0..limit-1, or IndexError.
inline void check_indices(const char *op, const char *name, const int64_t *ids, int64_t count,
                          int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    MAE_CHECK_INDEX(0 <= ids[i] && ids[i] < limit, op, ": ", name, " holds ", ids[i],
                    ", which is outside 0..", limit - 1);
}

template <class T> constexpr ScalarType type_of = c10::CppTypeToScalarType<T>::value;

// The type that torch promotes two floating types to.
inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b)
    return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
}

// Calls f.operator()<T>() with the C++ type, one of Types, that dtype stands for.
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
