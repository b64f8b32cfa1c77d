#include "backend/cuda/device_memory.h"

#include "base/error.h"

namespace vericache::cuda {

DeviceMemory::DeviceMemory(size_t bytes, const char* what) : bytes_(bytes) {
  if (bytes > 0 && cudaMalloc(&data_, bytes) != cudaSuccess) {
    (void)cudaGetLastError();
    throw Error("the GPU has no {:.1f} MB left for {}; lower --device-memory", static_cast<double>(bytes) / 1e6, what);
  }
}

}  // namespace vericache::cuda
