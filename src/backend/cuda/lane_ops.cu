// What a lane does beside computing. Small uploads are read from pinned host memory by a kernel, in vectors as wide as
// both addresses allow, a few blocks in all: a copy engine would queue them behind what the wire brings.
#include <algorithm>

#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // loads of a thread: the host is far
constexpr size_t kMostBlocks = 32;

template <typename Vector>
__global__ void __launch_bounds__(kThreads) upload_kernel(Vector* target, const Vector* source, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t first = blockIdx.x * size_t{kThreads} + threadIdx.x; first < count; first += kInFlight * step) {
    Vector values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const size_t at = first + static_cast<size_t>(i) * step;
      if (at < count) {
        values[i] = source[at];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const size_t at = first + static_cast<size_t>(i) * step;
      if (at < count) {
        target[at] = values[i];
      }
    }
  }
}

template <typename Vector>
void launch(std::byte* target, const std::byte* source, size_t bytes, cudaStream_t stream) {
  const size_t count = bytes / sizeof(Vector);
  if (count == 0) {
    return;
  }
  const size_t blocks = std::clamp(count / (kThreads * kInFlight), size_t{1}, kMostBlocks);
  upload_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(reinterpret_cast<Vector*>(target),
                                                                        reinterpret_cast<const Vector*>(source), count);
  check_cuda(cudaGetLastError(), "uploading");
}

__global__ void delay_kernel(uint64_t nanoseconds) {
  uint64_t begin;
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    __nanosleep(1000);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

}  // namespace

bool kernels_fit_gpu() {
  cudaFuncAttributes attributes;
  const bool fit = cudaFuncGetAttributes(&attributes, delay_kernel) == cudaSuccess;
  (void)cudaGetLastError();
  return fit;
}

void upload(std::byte* target, const std::byte* source, size_t bytes, cudaStream_t stream) {
  const auto both = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  const size_t whole = both % 16 == 0 ? bytes / 16 * 16 : both % 4 == 0 ? bytes / 4 * 4 : 0;
  if (both % 16 == 0) {
    launch<uint4>(target, source, whole, stream);
  } else {
    launch<uint32_t>(target, source, whole, stream);
  }
  launch<unsigned char>(target + whole, source + whole, bytes - whole, stream);
}

void delay(int microseconds, cudaStream_t stream) {
  delay_kernel<<<1, 1, 0, stream>>>(static_cast<uint64_t>(microseconds) * 1000);
  check_cuda(cudaGetLastError(), "delay");
}

}  // namespace vericache::cuda
