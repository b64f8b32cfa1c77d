// How rotated keys are rounded, from queries (RoundingArgs in kernels.h). A block has a KV head: it adds up what its
// queries are like, in registers, and decomposes that in shared memory.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/rotation.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kSide = 16;  // threads each way
constexpr int kThreads = kSide * kSide;
constexpr int kQueries = 32;  // at once

__device__ inline bf16 rounded(float x) {
  return {static_cast<uint16_t>(pack_pair(x, 0.0f))};
}

template <int kHeadDim>
struct FitMemory {
  float moment[kHeadDim][kHeadDim + 1];  // its lower half counts
  float queries[kQueries][kHeadDim];     // rotated
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) fit_kernel(RoundingArgs args) {
  constexpr int kTile = kHeadDim / kSide;  // rows and columns of a thread, every kSide-th
  extern __shared__ __align__(16) std::byte bytes[];
  auto& memory = *reinterpret_cast<FitMemory<kHeadDim>*>(bytes);
  auto& moment = memory.moment;
  const auto head = static_cast<int>(blockIdx.x);
  const int group = args.heads / args.shape.kv_heads;
  const int count = args.rows * group;
  const auto thread = static_cast<int>(threadIdx.x);
  const int row = thread / kSide;
  const int column = thread % kSide;
  const int lane = thread % 32;
  bf16* const matrix = args.matrix + static_cast<ptrdiff_t>(head) * kHeadDim * kHeadDim;

  float sums[kTile][kTile] = {};
  for (int first = 0; first < count; first += kQueries) {
    for (int i = thread / 32; i < kQueries; i += kThreads / 32) {
      float x[kHeadDim / 32] = {};
      if (first + i < count) {
        const int of = (args.position + (first + i) / group - args.queries.origin) % args.queries.capacity;
        const bf16* q =
            args.queries.q +
            (static_cast<ptrdiff_t>(of) * args.heads + head * group + (first + i) % group) * args.shape.key_dim();
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
          x[j] = first_of_pair(q[32 * j + lane].bits);
        }
      }
      rotate_lanes<kHeadDim>(x);
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        memory.queries[i][32 * j + lane] = x[j];
      }
    }
    __syncthreads();
    for (const auto& q : memory.queries) {
#pragma unroll
      for (int a = 0; a < kTile; ++a) {
#pragma unroll
        for (int b = 0; b < kTile; ++b) {
          sums[a][b] = fmaf(q[row + kSide * a], q[column + kSide * b], sums[a][b]);
        }
      }
    }
    __syncthreads();
  }
  const auto all = static_cast<float>(count + args.known * group);
#pragma unroll
  for (int a = 0; a < kTile; ++a) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      const int i = row + kSide * a;
      const int j = column + kSide * b;
      const float known = args.known > 0 && j <= i ? first_of_pair(matrix[i * kHeadDim + j].bits) : 0.0f;
      moment[i][j] = (sums[a][b] + known * static_cast<float>(args.known * group)) / all;
    }
  }
  __syncthreads();
  float trace = 0;
  for (int i = 0; i < kHeadDim; ++i) {
    trace += moment[i][i];
  }
  const bool fits = trace > 0 && trace < kInfinity;
  if (!fits && args.known > 0) {
    return;
  }
  for (int i = row; i < kHeadDim; i += kSide) {
    for (int j = column; j <= i; j += kSide) {
      matrix[i * kHeadDim + j] = rounded(fits ? moment[i][j] : 0.0f);
    }
  }
  __syncthreads();
  if (thread < kHeadDim) {
    moment[thread][thread] += kRoundingDamping * trace / kHeadDim;
  }
  __syncthreads();
  for (int k = 0; fits && k < kHeadDim; ++k) {
    const float pivot = 1.0f / moment[k][k];
    for (int i = k + 1 + row; i < kHeadDim; i += kSide) {
      const float share = moment[i][k] * pivot;
      for (int j = k + 1 + column; j <= i; j += kSide) {
        moment[i][j] -= share * moment[j][k];
      }
    }
    __syncthreads();
  }
  for (int i = row; i < kHeadDim; i += kSide) {
    for (int j = column; j < kHeadDim; j += kSide) {
      if (j > i) {
        matrix[i * kHeadDim + j] = rounded(fits ? moment[j][i] / moment[i][i] : 0.0f);
      }
    }
  }
}

}  // namespace

void fit_rounding(const RoundingArgs& args, cudaStream_t stream) {
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    constexpr size_t kBytes = sizeof(FitMemory<kHeadDim>);
    static const bool allowed = [] {
      allow_shared(fit_kernel<kHeadDim>, kBytes, "fit_rounding");
      return true;
    }();
    (void)allowed;
    fit_kernel<kHeadDim><<<static_cast<unsigned>(args.shape.kv_heads), kThreads, kBytes, stream>>>(args);
  });
  check_cuda(cudaGetLastError(), "fit_rounding");
}

}  // namespace vericache::cuda
