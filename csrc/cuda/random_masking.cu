// Shapes: N images, L patches, K kept patches.
#include "../random_masking.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cub/block/block_radix_sort.cuh>
#include <cuda_runtime.h>

namespace {

using namespace mae_fast;

template <class T> struct Noise { // [N, L]
  const T *data;
  int64_t stride_n, stride_l;
  __device__ KeyOf<T> key(int64_t n, int64_t l) const {
    return sort_key(data[n * stride_n + l * stride_l]);
  }
};

// Each block sorts one row of up to THREADS * ITEMS values.
template <class T, int THREADS, int ITEMS>
__global__ void __launch_bounds__(THREADS) sort_row(Noise<T> noise, Ranking ranking) {
  using Sort = cub::BlockRadixSort<KeyOf<T>, THREADS, ITEMS, int32_t>;
  __shared__ typename Sort::TempStorage storage;
  const int64_t n = blockIdx.x;
  const int32_t L = static_cast<int32_t>(ranking.L), thread = threadIdx.x;
  KeyOf<T> keys[ITEMS];
  int32_t patches[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int32_t l = thread * ITEMS + i;
    patches[i] = l;
    // Padding has the same key as NaN. The sort is stable, so padding is after all values.
    keys[i] = l < L ? noise.key(n, l) : ~KeyOf<T>(0);
  }
  Sort(storage).SortBlockedToStriped(keys, patches);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int32_t rank = i * THREADS + thread;
    if (rank < L)
      ranking.write(n, patches[i], rank);
  }
}

// For any L: each thread counts the patches that sort before its own.
constexpr int rank_threads = 256;
template <class T>
__global__ void __launch_bounds__(rank_threads)
    rank_row(Noise<T> noise, Ranking ranking, int64_t blocks_per_row) {
  __shared__ KeyOf<T> keys[rank_threads];
  const int64_t n = blockIdx.x / blocks_per_row;
  const int64_t l = blockIdx.x % blocks_per_row * rank_threads + threadIdx.x;
  const KeyOf<T> mine = l < ranking.L ? noise.key(n, l) : 0;
  int64_t rank = 0;
  for (int64_t start = 0; start < ranking.L; start += rank_threads) {
    const int64_t left = ranking.L - start;
    const int count = left < rank_threads ? static_cast<int>(left) : rank_threads;
    if (threadIdx.x < count)
      keys[threadIdx.x] = noise.key(n, start + threadIdx.x);
    __syncthreads();
    for (int j = 0; j < count; ++j)
      rank += keys[j] < mine || (keys[j] == mine && start + j < l);
    __syncthreads();
  }
  if (l < ranking.L)
    ranking.write(n, l, rank);
}

RandomMasking random_masking_cuda(const Tensor &noise, int64_t num_keep) { // [N, L]
  const auto device = noise.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto [result, ranking] = allocate_ranking(noise, num_keep);
  const int64_t N = noise.size(0), L = noise.size(1);
  if (N == 0 || L == 0)
    return result;
  void *current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);

  dispatch<float, double>(
      "random_masking", noise.scalar_type(), [&, &ranking = ranking]<class T>() {
        const Noise<T> row{noise.const_data_ptr<T>(), noise.stride(0), noise.stride(1)};
        const auto blocks = static_cast<unsigned>(N);
        if (L <= 256) // ViT-B and ViT-L have 196 patches, ViT-H 256
          sort_row<T, 128, 2><<<blocks, 128, 0, stream>>>(row, ranking);
        else if (L <= 1024)
          sort_row<T, 256, 4><<<blocks, 256, 0, stream>>>(row, ranking);
        else if (L <= 4096)
          sort_row<T, 512, 8><<<blocks, 512, 0, stream>>>(row, ranking);
        else {
          const int64_t blocks_per_row = (L + rank_threads - 1) / rank_threads;
          rank_row<<<static_cast<unsigned>(N * blocks_per_row), rank_threads, 0, stream>>>(
              row, ranking, blocks_per_row);
        }
      });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mae_fast, CUDA, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking_cuda));
}
