// Random weights, the same as on every backend.
// A thread computes four neighbours, which share a block of Philox.
#include <algorithm>

#include "backend/cuda/ops.h"
#include "backend/cuda/row_math.cuh"
#include "backend/random_fill.h"

namespace vericache::cuda {
namespace {

// random_value() of backend/random_fill.h: four columns a thread, one block of Philox.
__global__ void fill_random_kernel(int out, int in, int quads, uint64_t seed, float scale, uint2* __restrict__ data) {
  const size_t count = at(out, quads);
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const auto row = static_cast<uint32_t>(i / static_cast<size_t>(quads));
    const auto quad = static_cast<uint32_t>(i % static_cast<size_t>(quads));
    uint32_t words[4] = {quad, row, 0, 0};
    philox_rounds(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const int column = static_cast<int>(quad) * 4;
    const float a = column < in ? random_uniform(words[0], scale) : 0.0f;
    const float b = column + 1 < in ? random_uniform(words[1], scale) : 0.0f;
    const float c = column + 2 < in ? random_uniform(words[2], scale) : 0.0f;
    const float d = column + 3 < in ? random_uniform(words[3], scale) : 0.0f;
    data[i] = make_uint2(bf16_pair(a, b), bf16_pair(c, d));
  }
}

}  // namespace

void fill_random(PackedMatrix& matrix, uint64_t seed, float scale, cudaStream_t stream) {
  const int quads = padded_dim(matrix.in) / 4;
  const size_t count = static_cast<size_t>(matrix.out) * static_cast<size_t>(quads);
  if (count == 0) {
    return;
  }
  const size_t blocks = std::min<size_t>((count + kThreads - 1) / kThreads, size_t{1} << 16);
  fill_random_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(matrix.out, matrix.in, quads, seed, scale,
                                                                             reinterpret_cast<uint2*>(matrix.data));
  check_cuda(cudaGetLastError(), "fill_random");
}

}  // namespace vericache::cuda
