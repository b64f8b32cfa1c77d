// What the ops on single rows share: how rows are cut among threads, sums in one order, pairs of bf16.
// Device code, and the launchers' arithmetic; pure.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/warp_ops.cuh"
#include "base/bf16.h"

namespace vericache::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;  // lanes

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Rows times pieces of a row.
inline dim3 row_grid(int rows, int values, int values_per_thread) {
  return {static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(values, values_per_thread * kThreads)), 1};
}

__device__ inline size_t at(int row, int columns) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns);
}

__device__ inline uint16_t bf16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Two neighbours, the lower address in the lower half.
__device__ inline uint32_t bf16_pair(float low, float high) {
  return static_cast<uint32_t>(bf16_bits(low)) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}

__device__ inline float low_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ inline float high_float(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Every lane gets the same bits: each step adds two numbers that both of their lanes hold.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Of the whole block, known to every thread; a block has up to 32 warps. `partial` is a float per warp.
__device__ inline float block_sum(float x, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) {
    partial[warp] = x;
  }
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

__device__ inline float rms_factor(float squares, int dim, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
}

inline uint16_t* bits(bf16* values) {
  return reinterpret_cast<uint16_t*>(values);
}

}  // namespace vericache::cuda
