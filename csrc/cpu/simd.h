// Compiles kernels for several instruction sets, and chooses the best one at run time.
#pragma once

#include "../common.h"

#include <cstdlib>
#include <cstring>
#include <string_view>

#define MAE_INLINE inline __attribute__((always_inline))

namespace mae_fast {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU. ONEDNN_MAX_CPU_ISA limits it, as it limits oneDNN's matrix
// products.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char *limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    const std::string_view name = limit ? limit : "";
    if (name == "SSE41" || name == "AVX")
      return Isa::baseline;
    if (name.substr(0, 4) == "AVX2")
      return std::min(best, Isa::avx2);
    return best;
  }();
  return chosen;
}

#if defined(__x86_64__)
#define MAE_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define MAE_AVX512                                                                                 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,"               \
                        "prefer-vector-width=512")))
#else
#define MAE_AVX2
#define MAE_AVX512
#endif

// Kernels with explicit vectors have the size of a vector register as their template parameter.
// Kernels without it leave vectorisation to the compiler.
template <int BYTES, class F> MAE_INLINE void call(const F &f, int64_t begin, int64_t end) {
  if constexpr (std::is_invocable_v<const F &, int64_t, int64_t>)
    f(begin, end);
  else
    f.template operator()<BYTES>(begin, end);
}
template <class F> void run_baseline(const F &f, int64_t begin, int64_t end) {
  call<16>(f, begin, end);
}
template <class F> MAE_AVX2 void run_avx2(const F &f, int64_t begin, int64_t end) {
  call<32>(f, begin, end);
}
template <class F> MAE_AVX512 void run_avx512(const F &f, int64_t begin, int64_t end) {
  call<64>(f, begin, end);
}

// Runs f(begin, end) over [0, count) in torch's thread pool. f must be marked MAE_KERNEL, and each
// of our functions that it calls MAE_INLINE: only inlined code is compiled for the chosen
// instruction set.
#define MAE_KERNEL __attribute__((always_inline))
template <class F> void parallel_kernel(int64_t count, int64_t grain, const F &f) {
  const Isa level = isa();
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain),
                              [&](int64_t begin, int64_t end) {
                                if (level == Isa::avx512)
                                  run_avx512(f, begin, end);
                                else if (level == Isa::avx2)
                                  run_avx2(f, begin, end);
                                else
                                  run_baseline(f, begin, end);
                              });
}

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Accumulation type: fp64 for fp64, else fp32.
template <class T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T> MAE_INLINE Wide<T> widen(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    return static_cast<Wide<T>>(x);
  }
}

// Rounds to nearest even, as torch does.
template <class T, class A> MAE_INLINE T narrow(A x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    BFloat16 out;
    out.x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
    return out;
  } else if constexpr (std::is_same_v<T, Half>) {
    return static_cast<Half>(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Copies a tensor to a vector and converts it to A. For small tensors.
template <class A> std::vector<A> read_all(const Tensor &values) {
  const Tensor in = contiguous(values);
  std::vector<A> out(in.numel());
  dispatch_floating("read_all", in.scalar_type(), [&]<class B>() {
    std::transform(in.const_data_ptr<B>(), in.const_data_ptr<B>() + out.size(), out.begin(),
                   [](B x) { return static_cast<A>(widen(x)); });
  });
  return out;
}

} // namespace mae_fast
