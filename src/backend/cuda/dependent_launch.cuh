// Kernels that are made ready while the kernel before them on their stream still runs (programmatic dependent launch,
// sm_90 and later; CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"). Device code, and
// its launch.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/ops.h"

namespace vericache::cuda {

// Every thread of a kernel started by launch_behind calls this before it touches what kernels before it on the stream
// read or write: behind it they are over, and what they wrote is there.
__device__ inline void await_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may be made ready once every block of this one has come here.
__device__ inline void allow_kernel_behind() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... Formal, typename... Actual>
void launch_behind(void (*kernel)(Formal...), const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
                   cudaStream_t stream, Actual... arguments) {
  static const bool supported = [] {
    int device = 0;
    int major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return major >= 9;
  }();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = supported ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...), name);
}

}  // namespace vericache::cuda
