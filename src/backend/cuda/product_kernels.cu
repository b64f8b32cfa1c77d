// The kernels around a product: slices of K are added up, four floats a thread; and, for the proof that rows keep their
// bits, random rows and a hash of each row, a block a row.
#include <algorithm>

#include "backend/cuda/ops.h"
#include "backend/cuda/product_call.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ float4 sum(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <bool kAdd, int kSlices>
__global__ void add_slices_kernel(const float4* __restrict__ slices, size_t quads, float4* __restrict__ y) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= quads) {
    return;
  }
  float4 parts[kSlices];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    parts[s] = slices[static_cast<size_t>(s) * quads + i];
  }
  float4 total = kAdd ? sum(y[i], parts[0]) : parts[0];
#pragma unroll
  for (int s = 1; s < kSlices; ++s) {
    total = sum(total, parts[s]);
  }
  y[i] = total;
}

__device__ uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Sign, mantissa, and an exponent of 2^-6 .. 2^0.
__device__ void random_value(uint64_t word, float* value) {
  const auto sign_and_mantissa = static_cast<uint32_t>(word) & 0x807fffffu;
  const auto exponent = 121 + static_cast<uint32_t>(word >> 32) % 7;
  *value = __uint_as_float(sign_and_mantissa | exponent << 23);
}
__device__ void random_value(uint64_t word, uint16_t* value) {
  float wide;
  random_value(word, &wide);
  *value = static_cast<uint16_t>(__float_as_uint(wide) >> 16);
}

template <typename T>
__global__ void fill_proof_rows_kernel(T* __restrict__ values, int rows, int columns, int shift, int period,
                                       uint64_t seed) {
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint64_t row = (i / static_cast<size_t>(columns) + static_cast<size_t>(shift)) % static_cast<size_t>(period);
    const uint64_t column = i % static_cast<size_t>(columns);
    random_value(mixed(mixed(seed + row * 0x9e3779b97f4a7c15ull) + column), &values[i]);
  }
}

// Integer sums do not depend on their order.
__global__ void hash_rows_kernel(const uint32_t* __restrict__ values, int columns, unsigned long long* hashes) {
  const uint32_t* row = values + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(columns);
  unsigned long long hash = 0;
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += static_cast<int>(blockDim.x)) {
    hash += mixed(static_cast<uint64_t>(row[i]) | static_cast<uint64_t>(i + 1) << 32);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    hash += __shfl_xor_sync(0xffffffffu, hash, distance);
  }
  __shared__ unsigned long long partial[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = hash;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) {
      hash += partial[warp];
    }
    hashes[blockIdx.x] = hash == 0 ? 1 : hash;
  }
}

template <typename T>
void fill(T* values, int rows, int columns, int shift, int period, uint64_t seed, cudaStream_t stream) {
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
  if (count == 0) {
    return;
  }
  const size_t blocks = std::min<size_t>((count + kThreads - 1) / kThreads, size_t{1} << 16);
  fill_proof_rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(values, rows, columns, shift, period,
                                                                                 seed);
  check_cuda(cudaGetLastError(), "fill_proof_rows");
}

}  // namespace

void add_slices(const float* slices, int slice_count, size_t count, float* y, bool add, cudaStream_t stream) {
  check(slice_count == 4 && count % 4 == 0, "K is cut into four slices, and rows into quads");
  const size_t quads = count / 4;
  if (quads == 0) {
    return;
  }
  const auto blocks = static_cast<unsigned>((quads + kThreads - 1) / kThreads);
  const auto* from = reinterpret_cast<const float4*>(slices);
  auto* to = reinterpret_cast<float4*>(y);
  if (add) {
    add_slices_kernel<true, 4><<<blocks, kThreads, 0, stream>>>(from, quads, to);
  } else {
    add_slices_kernel<false, 4><<<blocks, kThreads, 0, stream>>>(from, quads, to);
  }
  check_cuda(cudaGetLastError(), "add_slices");
}

void fill_proof_rows(bf16* values, int rows, int columns, int shift, int period, uint64_t seed, cudaStream_t stream) {
  fill(reinterpret_cast<uint16_t*>(values), rows, columns, shift, period, seed, stream);
}
void fill_proof_rows(float* values, int rows, int columns, int shift, int period, uint64_t seed, cudaStream_t stream) {
  fill(values, rows, columns, shift, period, seed, stream);
}

void hash_rows(const float* values, int rows, int columns, uint64_t* hashes, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  hash_rows_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      reinterpret_cast<const uint32_t*>(values), columns, reinterpret_cast<unsigned long long*>(hashes));
  check_cuda(cudaGetLastError(), "hash_rows");
}

}  // namespace vericache::cuda
