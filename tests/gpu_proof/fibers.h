// CUDA C++ as host C++: the threads of a block are fibers of one thread, blocks run one after the
// other. What stands here under the names of CUDA, CUB and torch is as much of them as
// csrc/cuda/random_masking.cu asks for; tensors are exact heap blocks, so that AddressSanitizer
// sees a step outside.
//
// The program: dtype's bytes, N, L, stride_n, stride_l, num_keep, order (0: first thread first, 1:
// last thread first) and mistake on the command line, the noise's storage on standard input, the
// four outputs on standard output.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() fibers::wait(__LINE__)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx;

namespace fibers {

constexpr size_t stack_bytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void *asan = nullptr; // what AddressSanitizer keeps of a stack while another runs
  int barrier = 0;      // the line that it waits at
  bool done = false;
};

inline std::vector<Fiber> block;
inline Fiber *running;
inline ucontext_t home;
inline const void *home_stack;
inline size_t home_bytes;
inline std::function<void()> body;
inline bool last_first = false;
inline int mistake = 0; // which of those that a test has put into the source is made

[[noreturn]] inline void fail(const char *message) {
  std::fprintf(stderr, "fibers: block %u: %s\n", blockIdx.x, message);
  std::_Exit(3);
}

inline void leave(void **asan) {
  __sanitizer_start_switch_fiber(asan, home_stack, home_bytes);
  swapcontext(&running->context, &home);
}

inline void wait(int line) {
  Fiber *self = running;
  self->barrier = line;
  leave(&self->asan);
  __sanitizer_finish_switch_fiber(self->asan, &home_stack, &home_bytes);
}

inline void start() {
  __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_bytes);
  body();
  running->done = true;
  leave(nullptr);
}

inline void resume(size_t thread) {
  threadIdx.x = static_cast<unsigned>(thread);
  running = &block[thread];
  void *asan = nullptr;
  __sanitizer_start_switch_fiber(&asan, running->stack.get(), stack_bytes);
  swapcontext(&home, &running->context);
  __sanitizer_finish_switch_fiber(asan, nullptr, nullptr);
}

// Every thread runs to its next barrier before any goes on.
inline void run_block(size_t threads) {
  block.resize(threads);
  for (Fiber &fiber : block) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  while (!block[0].done) {
    for (size_t i = 0; i < threads; ++i)
      resume(last_first ? threads - 1 - i : i);
    for (const Fiber &fiber : block)
      if (fiber.done != block[0].done || (!fiber.done && fiber.barrier != block[0].barrier))
        fail("not every thread reaches the same barrier");
  }
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...)
template <class Kernel, class... Arguments>
void launch(unsigned blocks, unsigned threads, size_t, void *, Kernel kernel,
            Arguments... arguments) {
  body = [=] { kernel(arguments...); };
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    run_block(threads);
  }
}

} // namespace fibers

namespace cub {

// The first thread sorts.
template <class Key, int THREADS, int ITEMS, class Value> class BlockRadixSort {
public:
  struct TempStorage {
    Key keys[THREADS * ITEMS];
    Value values[THREADS * ITEMS];
  };
  explicit BlockRadixSort(TempStorage &storage) : storage(storage) {}

  void SortBlockedToStriped(Key (&keys)[ITEMS], Value (&values)[ITEMS]) {
    const int thread = static_cast<int>(threadIdx.x);
    std::copy_n(keys, ITEMS, storage.keys + thread * ITEMS);
    std::copy_n(values, ITEMS, storage.values + thread * ITEMS);
    __syncthreads();
    if (thread == 0)
      sort();
    __syncthreads();
    for (int i = 0; i < ITEMS; ++i) {
      keys[i] = storage.keys[i * THREADS + thread];
      values[i] = storage.values[i * THREADS + thread];
    }
  }

private:
  TempStorage &storage;

  void sort() {
    const TempStorage before = storage;
    std::vector<int> order(THREADS * ITEMS);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return before.keys[a] < before.keys[b]; });
    for (int i = 0; i < THREADS * ITEMS; ++i) {
      storage.keys[i] = before.keys[order[i]];
      storage.values[i] = before.values[order[i]];
    }
  }
};

} // namespace cub

namespace torch::headeronly {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
enum class ScalarType { Long, Float, Double, Half, BFloat16 };
inline const char *toString(ScalarType) { return "another"; }

} // namespace torch::headeronly

namespace c10 {

using torch::headeronly::ScalarType;
template <class T> struct CppTypeToScalarType;
template <>
struct CppTypeToScalarType<float> : std::integral_constant<ScalarType, ScalarType::Float> {};
template <>
struct CppTypeToScalarType<double> : std::integral_constant<ScalarType, ScalarType::Double> {};

} // namespace c10

namespace torch::stable {

using headeronly::ScalarType;

class Tensor {
public:
  Tensor(std::vector<int64_t> sizes, std::vector<int64_t> strides, ScalarType type, size_t bytes)
      : sizes(std::move(sizes)), strides(std::move(strides)), type(type), bytes(bytes),
        storage(new char[bytes]) {
    std::memset(storage.get(), 0xAB, bytes);
  }
  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
  int get_device_index() const { return 0; }
  ScalarType scalar_type() const { return type; }
  template <class T> const T *const_data_ptr() const {
    return reinterpret_cast<const T *>(storage.get());
  }
  template <class T> T *mutable_data_ptr() const { return reinterpret_cast<T *>(storage.get()); }

  std::vector<int64_t> sizes, strides;
  ScalarType type;
  size_t bytes;
  std::shared_ptr<char[]> storage;
};

inline Tensor new_empty(const Tensor &, const std::vector<int64_t> &sizes, ScalarType type) {
  const size_t width = type == ScalarType::Float ? 4 : 8;
  return {sizes, {sizes[1], 1}, type, static_cast<size_t>(sizes[0] * sizes[1]) * width};
}

namespace accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
} // namespace accelerator

} // namespace torch::stable

using cudaStream_t = void *;
inline int aoti_torch_get_current_cuda_stream(int, void **) { return 0; }
#define TORCH_ERROR_CODE_CHECK(call) call
#define STD_CUDA_KERNEL_LAUNCH_CHECK()
#define TORCH_BOX(function) function

namespace fibers {

using torch::stable::Tensor;
using Op = std::tuple<Tensor, Tensor, Tensor, Tensor> (*)(const Tensor &, int64_t);

struct Library {
  Op op = nullptr;
  void impl(const char *, Op function) { op = function; }
};

inline int main(char **arguments, const Library &library) {
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const int64_t width = number(1), N = number(2), L = number(3), stride_n = number(4),
                stride_l = number(5);
  const size_t count = N && L ? (N - 1) * stride_n + (L - 1) * stride_l + 1 : 0;
  const auto type = width == 4 ? c10::ScalarType::Float : c10::ScalarType::Double;
  const Tensor noise({N, L}, {stride_n, stride_l}, type, count * width);
  last_first = number(7);
  mistake = static_cast<int>(number(8));
  if (std::fread(noise.storage.get(), width, count, stdin) != count)
    fail("too little noise");
  const auto write = [](const auto &...out) {
    (std::fwrite(out.storage.get(), 1, out.bytes, stdout), ...);
  };
  std::apply(write, library.op(noise, number(6)));
  return 0;
}

} // namespace fibers

#define STABLE_TORCH_LIBRARY_IMPL(name, key, m)                                                    \
  static void register_ops(fibers::Library &m);                                                    \
  int main(int, char **arguments) {                                                                \
    fibers::Library library;                                                                       \
    register_ops(library);                                                                         \
    return fibers::main(arguments, library);                                                       \
  }                                                                                                \
  static void register_ops(fibers::Library &m)
