// Scores of tokens for compressors: mass pooled over neighbours or averaged over rows, one thread a token; chosen
// tokens counted by rows; and the best of each row, one cluster of blocks a row, each block a slice of it: a radix walk
// finds the score of the last one kept, then every block writes its tokens in their order.
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/ops.h"
#include "backend/cuda/radix_walk.cuh"
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
constexpr int kWarps = kThreads / 32;
constexpr int kMostBlocks = 132;  // one fills a multiprocessor
constexpr int kLeastSlice = 2048;

struct Shared {
  RadixWalk::Shared walk;
  uint32_t better;  // of this block's slice
  uint32_t equal;
  uint32_t warps[2][kWarps];
};

// The best of a row are those whose key is below `key`, and those at it but for the first `skipped`.
struct Threshold {
  uint32_t key = ~0u;
  uint32_t skipped = 0;
};

__device__ uint32_t key_of(float score) {
  return rank_key(score > -INFINITY ? score : -INFINITY);
}

__device__ Threshold find_threshold(const Cluster& cluster, const RowSlice& slice, int count,
                                    RadixWalk::Shared& shared) {
  RadixWalk walk(cluster, shared);
  const RadixWalk::Place place = walk.find_key(static_cast<uint64_t>(count), [&](const auto& visit) {
    each_value(slice, [&](int, float score) { visit(key_of(score), [] { return uint64_t{1}; }); });
  });
  return {place.key, static_cast<uint32_t>(place.mass - place.needed)};
}

// Low half: values better than the threshold, high half: values at it. At most 4 each of a thread, 4096 of a block.
__device__ uint32_t kinds(const uint32_t (&keys)[4], int valid, uint32_t threshold) {
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) {
      count += keys[i] < threshold ? 1u : keys[i] == threshold ? 1u << 16 : 0u;
    }
  }
  return count;
}

// The sum over the threads before this one, and over all threads in `total`. Every other call uses the other `warps`.
__device__ uint32_t scan(uint32_t own, uint32_t (&warps)[kWarps], uint32_t& total) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t through = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, through, static_cast<unsigned>(step));
    through += lane >= step ? below : 0;
  }
  if (lane == 31) {
    warps[warp] = through;
  }
  __syncthreads();
  uint32_t before = through - own;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? warps[i] : 0;
    total += warps[i];
  }
  return before;
}

__device__ void load_keys(const RowSlice& slice, int quad, uint32_t (&keys)[4]) {
  const uint4 bits = slice.load(quad);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keys[i] = key_of(__uint_as_float(words[i]));
  }
}
// How many of a quad's four values are of the slice.
__device__ int valid_of(const RowSlice& slice, int quad) {
  return quad < slice.end ? min(4, slice.count - quad * 4) : 0;
}

// How many values of the lower ranks' slices are better than the threshold and at it.
__device__ void count_before(const Cluster& cluster, const RowSlice& slice, const Threshold& threshold, Shared& shared,
                             uint32_t& better, uint32_t& equal) {
  uint32_t own_better = 0;
  uint32_t own_equal = 0;
  each_value(slice, [&](int, float score) {
    const uint32_t key = key_of(score);
    own_better += key < threshold.key ? 1 : 0;
    own_equal += key == threshold.key ? 1 : 0;
  });
  if (threadIdx.x == 0) {
    shared.better = 0;
    shared.equal = 0;
  }
  __syncthreads();
  own_better = __reduce_add_sync(~0u, own_better);
  own_equal = __reduce_add_sync(~0u, own_equal);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&shared.better, own_better);
    atomicAdd(&shared.equal, own_equal);
  }
  cluster.sync();
  better = 0;
  equal = 0;
  for (int rank = 0; rank < cluster.rank(); ++rank) {
    better += cluster.of(rank, shared.better);
    equal += cluster.of(rank, shared.equal);
  }
}

__device__ void write_chosen(const RowSlice& slice, const Threshold& threshold, uint32_t better, uint32_t equal,
                             Shared& shared, int* chosen) {
  int turn = 0;
  for (int first = slice.begin; first < slice.end; first += kThreads) {
    const int quad = first + static_cast<int>(threadIdx.x);
    const int valid = valid_of(slice, quad);
    uint32_t keys[4];
    load_keys(slice, quad, keys);
    uint32_t total;
    const uint32_t before = scan(kinds(keys, valid, threshold.key), shared.warps[turn], total);
    uint32_t better_before = better + (before & 0xffff);
    uint32_t equal_before = equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_better = i < valid && keys[i] < threshold.key;
      const bool is_equal = i < valid && keys[i] == threshold.key;
      if (is_better || (is_equal && equal_before >= threshold.skipped)) {
        const uint32_t kept_equal = equal_before > threshold.skipped ? equal_before - threshold.skipped : 0;
        chosen[better_before + kept_equal] = quad * 4 + i;
      }
      better_before += is_better ? 1 : 0;
      equal_before += is_equal ? 1 : 0;
    }
    better += total & 0xffff;
    equal += total >> 16;
    turn ^= 1;
  }
}

__global__ void __launch_bounds__(kThreads) choose_best_kernel(BestArgs args) {
  __shared__ Shared shared;
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
  write_chosen(slice, threshold, better, equal, shared, args.chosen + row * static_cast<size_t>(args.stride));
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
