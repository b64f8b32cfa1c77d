// Scores of tokens for compressors: mass pooled over neighbours or averaged over rows, one thread a token; chosen
// tokens counted by rows; and the best of each row, one cluster of blocks a row, each block a slice of it: a radix walk
// finds the score of the last one kept, then every block writes its tokens in their order.
#include "backend/cuda/best_of_row.cuh"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kPoolThreads = 256;

__global__ void __launch_bounds__(kPoolThreads)
    pool_mass_kernel(const float* mass, int n, int reach, int always, int chunks, float* scores) {
  const int token = static_cast<int>(blockIdx.x) % chunks * kPoolThreads + static_cast<int>(threadIdx.x);
  const size_t row = blockIdx.x / static_cast<unsigned>(chunks) * static_cast<size_t>(n);
  if (token >= n) {
    return;
  }
  float sum = 0;
  for (int i = max(0, token - reach); i <= min(n - 1, token + reach); ++i) {
    sum += mass[row + static_cast<size_t>(i)];
  }
  scores[row + static_cast<size_t>(token)] = token >= n - always ? INFINITY : sum / static_cast<float>(2 * reach + 1);
}

__global__ void __launch_bounds__(kPoolThreads) mean_rows_kernel(float* values, int rows, int n) {
  const int token = static_cast<int>(blockIdx.x) * kPoolThreads + static_cast<int>(threadIdx.x);
  if (token >= n) {
    return;
  }
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    sum += values[static_cast<size_t>(row) * static_cast<size_t>(n) + static_cast<size_t>(token)];
  }
  const float mean = sum / static_cast<float>(rows);
  for (int row = 0; row < rows; ++row) {
    values[static_cast<size_t>(row) * static_cast<size_t>(n) + static_cast<size_t>(token)] = mean;
  }
}

// How many of the ascending `chosen` are less than `bound`.
__device__ int count_below(const int* chosen, int count, int bound) {
  int low = 0;
  int high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (chosen[middle] < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A thread a row, one block.
__global__ void __launch_bounds__(kPoolThreads)
    count_rows_kernel(const int* chosen, int count, int rows, int n, int* counts) {
  const int row = static_cast<int>(threadIdx.x);
  if (row < rows) {
    counts[row] = count_below(chosen, count, (row + 1) * n) - count_below(chosen, count, row * n);
  }
}

constexpr int kThreads = 1024;
constexpr int kMostBlocks = 132;  // one fills a multiprocessor
constexpr int kLeastSlice = 2048;

__global__ void __launch_bounds__(kThreads) choose_best_kernel(BestArgs args) {
  __shared__ BestShared<kThreads> shared;
  const Cluster cluster;
  const auto row = static_cast<size_t>(cluster.index());
  const int count = args.counts == nullptr ? args.count : args.counts[row];
  if (count == 0) {
    return;  // every block of the row
  }
  const RowSlice slice(cluster, args.scores + row * static_cast<size_t>(args.n), args.n);
  Threshold threshold;  // no score has the highest key: all are better
  if (count < args.n) {
    threshold = find_threshold(cluster, slice, count, shared.walk);
  }
  uint32_t better;
  uint32_t equal;
  count_before(cluster, slice, threshold, shared, better, equal);
  int* chosen = args.chosen + row * static_cast<size_t>(args.stride);
  write_chosen(slice, threshold, better, equal, shared, [chosen](uint32_t place, int index) { chosen[place] = index; });
  cluster.sync();
}

}  // namespace

void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores, cudaStream_t stream) {
  check(reach >= 0 && always >= 0, "tokens are pooled with neighbours, and some of them are always kept");
  if (rows == 0 || n == 0) {
    return;
  }
  const int chunks = (n + kPoolThreads - 1) / kPoolThreads;
  launch_clusters(pool_mass_kernel, "pool_mass", rows * chunks, 1, kPoolThreads, stream, mass, n, reach, always, chunks,
                  scores);
}

void choose_best(const BestArgs& args, cudaStream_t stream) {
  check(args.count >= 0 && args.count <= args.n && args.count <= args.stride,
        "a row has the tokens that are chosen, and room for them");
  if (args.rows == 0 || args.count == 0) {
    return;
  }
  launch_clusters(choose_best_kernel, "choose_best", args.rows,
                  cluster_blocks(args.rows, kMostBlocks, args.n, kLeastSlice), kThreads, stream, args);
}

void mean_rows(float* values, int rows, int n, cudaStream_t stream) {
  if (rows == 0 || n == 0) {
    return;
  }
  mean_rows_kernel<<<static_cast<unsigned>((n + kPoolThreads - 1) / kPoolThreads), kPoolThreads, 0, stream>>>(values,
                                                                                                              rows, n);
  check_cuda(cudaGetLastError(), "mean_rows");
}

void count_rows(const int* chosen, int count, int rows, int n, int* counts, cudaStream_t stream) {
  check(rows <= kPoolThreads, "a thread counts a row");
  if (rows == 0) {
    return;
  }
  count_rows_kernel<<<1, kPoolThreads, 0, stream>>>(chosen, count, rows, n, counts);
  check_cuda(cudaGetLastError(), "count_rows");
}

}  // namespace vericache::cuda
