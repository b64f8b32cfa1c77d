// Cluster: the thread blocks that share one row of work and read each other's shared memory; before sm_90 a block
// stands alone. Device code, and its launch, which is called by whoever owns the stream.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/ops.h"

namespace vericache::cuda {

class Cluster {
 public:
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ int rank() const {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  __device__ int size() const {
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
  // A barrier of all threads of all blocks. Nobody may leave while others still read its shared memory: a kernel whose
  // blocks read each other's ends with it.
  __device__ void sync() const {
    cooperative_groups::this_cluster().sync();
  }
  // The variable that block `rank` has where this block has `own`.
  template <typename T>
  __device__ const T& of(int rank, T& own) const {
    return *cooperative_groups::this_cluster().map_shared_rank(&own, static_cast<unsigned>(rank));
  }
#else
  __device__ int rank() const {
    return 0;
  }
  __device__ int size() const {
    return 1;
  }
  __device__ void sync() const {
    __syncthreads();
  }
  template <typename T>
  __device__ const T& of(int /*rank*/, T& own) const {
    return own;
  }
#endif
  // Which of the grid's clusters this is.
  __device__ int index() const {
    return static_cast<int>(blockIdx.x) / size();
  }
};

// Blocks for each of `clusters` pieces of work of size `work`: a power of two, more while all clusters together have
// `most` blocks or fewer and each block has `least` to do.
inline int cluster_blocks(int64_t clusters, int64_t most, int64_t work, int64_t least) {
  constexpr int kMostPortable = 8;
  static const bool supported = [] {
    int device = 0;
    int value = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&value, cudaDevAttrClusterLaunch, device), "cudaDeviceGetAttribute");
    return value != 0;
  }();
  int blocks = 1;
  while (supported && blocks < kMostPortable && clusters * blocks * 2 <= most && work >= least * blocks * 2) {
    blocks *= 2;
  }
  return blocks;
}

template <typename... Formal, typename... Actual>
void launch_clusters(void (*kernel)(Formal...), const char* name, int clusters, int blocks, int threads,
                     cudaStream_t stream, Actual... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters) * static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...), name);
}

// The part of a row of floats that one block of the cluster reads: neighbouring quads of values, the lowest with rank
// 0.
struct RowSlice {
  const float* values;
  int count;  // of the whole row
  int begin;  // quads
  int end;
  bool aligned;

  __device__ RowSlice(const Cluster& cluster, const float* row, int n) : values(row), count(n) {
    const int quads = (n + 3) / 4;
    const int share = (quads + cluster.size() - 1) / cluster.size();
    begin = min(cluster.rank() * share, quads);
    end = min(begin + share, quads);
    aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  }
  // The bits of four values; zeros beyond the slice and beyond the row.
  __device__ uint4 load(int quad) const {
    if (quad >= end) {
      return make_uint4(0, 0, 0, 0);
    }
    if (aligned && quad * 4 + 4 <= count) {
      return __ldg(reinterpret_cast<const uint4*>(values) + quad);
    }
    const auto word = [&](int i) { return i < count ? __float_as_uint(__ldg(values + i)) : 0u; };
    return make_uint4(word(quad * 4), word(quad * 4 + 1), word(quad * 4 + 2), word(quad * 4 + 3));
  }
};

// Calls body(quad, bits) for this thread's quads of the slice, in rising order; the next one is already on its way.
template <typename Body>
__device__ void each_quad(const RowSlice& slice, const Body& body) {
  const int step = static_cast<int>(blockDim.x);
  int quad = slice.begin + static_cast<int>(threadIdx.x);
  uint4 next = slice.load(quad);
  for (; quad < slice.end; quad += step) {
    const uint4 bits = next;
    next = slice.load(quad + step);
    body(quad, bits);
  }
}

// Calls body(index, value) for this thread's values of the slice, in rising order.
template <typename Body>
__device__ void each_value(const RowSlice& slice, const Body& body) {
  each_quad(slice, [&](int quad, const uint4& bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (quad * 4 + i < slice.count) {
        body(quad * 4 + i, __uint_as_float(words[i]));
      }
    }
  });
}

// Rises as values fall. Values that compare equal (both zeros too) have one key; NaN is not a value.
__device__ inline uint32_t rank_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes +0
  return bits >> 31 != 0 ? bits : ~(bits | 0x80000000u);
}
__device__ inline float value_of(uint32_t rank_key) {
  return __uint_as_float(rank_key >> 31 != 0 ? rank_key : ~rank_key & 0x7fffffffu);
}

}  // namespace vericache::cuda
