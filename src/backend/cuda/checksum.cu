// Checksums of equal blocks of memory, written or compared: one cluster of thread blocks for each, its slices of
// 16-byte vectors summed apart, so that a handful of blocks still draws on many multiprocessors.
#include "backend/cuda/checksum.h"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 8;  // loads of a thread; four blocks on a multiprocessor have 128 KiB on their way
constexpr int kMostBlocks = 4 * 132;
constexpr int64_t kLeastSlice = int64_t{kThreads} * 16 * 2;

struct Shared {
  uint64_t warps[kWarps];
  uint64_t block;
};

// This thread's share of the vectors [begin, end).
__device__ uint64_t sum_slice(const uint4* block, uint32_t begin, uint32_t end) {
  uint64_t sum = 0;
  for (uint32_t first = begin + threadIdx.x; first < end; first += kInFlight * kThreads) {
    uint4 vectors[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t at = first + static_cast<uint32_t>(i) * kThreads;
      vectors[i] = at < end ? __ldcs(block + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t at = first + static_cast<uint32_t>(i) * kThreads;
      const uint4& v = vectors[i];
      if (at < end) {
        sum += checksum_share(v.x | uint64_t{v.y} << 32, v.z | uint64_t{v.w} << 32, at);
      }
    }
  }
  return sum;
}

__device__ uint64_t sum_of_warp(uint64_t sum) {
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
  }
  return sum;
}

// Of every block's speaker: the last one tells the host how many blocks differ. A GPU has no atomics on host memory.
__device__ void count_mismatch(bool differs, unsigned int blocks, uint32_t* mismatches, uint32_t* scratch) {
  if (differs) {
    atomicAdd(&scratch[0], 1u);
  }
  __threadfence();
  if (atomicAdd(&scratch[1], 1u) + 1 == blocks) {
    __threadfence();
    const uint32_t count = atomicExch(&scratch[0], 0u);
    scratch[1] = 0;
    if (count > 0) {
      auto* host = static_cast<volatile uint32_t*>(mismatches);
      *host = *host + count;
      __threadfence_system();
    }
  }
}

// expected null: the checksums are written; else compared, and the blocks that differ counted.
__global__ void __launch_bounds__(kThreads, 4)
    checksum_kernel(BlockRow blocks, uint64_t* checksums, const uint64_t* expected, uint32_t* mismatches,
                    uint32_t* scratch) {
  __shared__ Shared shared;
  const Cluster cluster;
  const bool speaker = cluster.rank() == 0 && threadIdx.x == 0;
  const ptrdiff_t place = static_cast<ptrdiff_t>(cluster.index()) * blocks.checksum_stride;
  // Host memory is far: what is there is asked for before the sum begins.
  const uint64_t wanted = speaker && expected != nullptr ? expected[place] : 0;

  const auto vectors = static_cast<uint32_t>(blocks.bytes / 16);
  const auto size = static_cast<uint32_t>(cluster.size());
  const uint32_t share = (vectors + size - 1) / size;
  const uint32_t begin = min(static_cast<uint32_t>(cluster.rank()) * share, vectors);
  const auto* block =
      reinterpret_cast<const uint4*>(blocks.first + static_cast<size_t>(cluster.index()) * blocks.stride);
  const uint64_t own = sum_of_warp(sum_slice(block, begin, min(begin + share, vectors)));
  if (threadIdx.x % 32 == 0) {
    shared.warps[threadIdx.x / 32] = own;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.block = 0;
    for (const uint64_t warp : shared.warps) {
      shared.block += warp;
    }
  }
  cluster.sync();
  if (speaker) {
    uint64_t sum = 0;
    for (int rank = 0; rank < cluster.size(); ++rank) {
      sum += cluster.of(rank, shared.block);
    }
    sum = finish_checksum(sum, blocks.bytes);
    if (expected == nullptr) {
      checksums[place] = sum;
    } else {
      count_mismatch(sum != wanted, static_cast<unsigned int>(blocks.count), mismatches, scratch);
    }
  }
  cluster.sync();
}

void launch(const BlockRow& blocks, uint64_t* checksums, const uint64_t* expected, uint32_t* mismatches,
            uint32_t* scratch, const char* name, cudaStream_t stream) {
  check(blocks.bytes % 16 == 0 && blocks.stride % 16 == 0 && reinterpret_cast<uintptr_t>(blocks.first) % 16 == 0,
        "blocks that are summed are made of 16-byte vectors");
  check(blocks.bytes / 16 < size_t{1} << 31, "a block that is summed is smaller than 32 GiB");
  if (blocks.count == 0) {
    return;
  }
  const int size = cluster_blocks(blocks.count, kMostBlocks, static_cast<int64_t>(blocks.bytes), kLeastSlice);
  launch_clusters(checksum_kernel, name, blocks.count, size, kThreads, stream, blocks, checksums, expected, mismatches,
                  scratch);
}

}  // namespace

void checksum(const BlockRow& blocks, uint64_t* checksums, cudaStream_t stream) {
  launch(blocks, checksums, nullptr, nullptr, nullptr, "checksum", stream);
}

void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches, uint32_t* scratch,
           cudaStream_t stream) {
  launch(blocks, nullptr, checksums, mismatches, scratch, "prove", stream);
}

}  // namespace vericache::cuda
