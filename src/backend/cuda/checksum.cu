// Checksums of equal blocks of memory, written or compared: one cluster of thread blocks for each, its slices of
// 16-byte vectors summed apart, so that a handful of blocks still draws on many multiprocessors.
#include "backend/cuda/checksum.h"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/mismatches.cuh"
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

// expected null: the checksums are written; else compared, and the blocks that differ counted.
__global__ void __launch_bounds__(kThreads, 4)
    checksum_kernel(BlockRow blocks, uint64_t* checksums, const uint64_t* expected, uint32_t* mismatches,
                    uint32_t* counters) {
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
  const uint64_t own = sum_of_lanes(sum_slice(block, begin, min(begin + share, vectors)));
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
      count_mismatch(sum != wanted, static_cast<unsigned int>(blocks.count), mismatches, counters);
    }
  }
  cluster.sync();
}

void launch(const BlockRow& blocks, uint64_t* checksums, const uint64_t* expected, uint32_t* mismatches,
            uint32_t* counters, const char* name, cudaStream_t stream) {
  check(blocks.bytes % 16 == 0 && blocks.stride % 16 == 0 && reinterpret_cast<uintptr_t>(blocks.first) % 16 == 0,
        "blocks that are summed are made of 16-byte vectors");
  check(blocks.bytes / 16 < size_t{1} << 31, "a block that is summed is smaller than 32 GiB");
  if (blocks.count == 0) {
    return;
  }
  const int size = cluster_blocks(blocks.count, kMostBlocks, static_cast<int64_t>(blocks.bytes), kLeastSlice);
  launch_clusters(checksum_kernel, name, blocks.count, size, kThreads, stream, blocks, checksums, expected, mismatches,
                  counters);
}

}  // namespace

void checksum(const BlockRow& blocks, uint64_t* checksums, cudaStream_t stream) {
  launch(blocks, checksums, nullptr, nullptr, nullptr, "checksum", stream);
}

void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches, uint32_t* counters,
           cudaStream_t stream) {
  launch(blocks, nullptr, checksums, mismatches, counters, "prove", stream);
}

}  // namespace vericache::cuda
