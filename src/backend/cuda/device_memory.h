// DeviceMemory: a block of the GPU's memory beside the Device's budget: staging, scratch, what a proof needs.
// Made and freed on the thread that loads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "backend/cuda/ops.h"

namespace vericache::cuda {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  // Error, naming `what`, when the GPU has no more.
  DeviceMemory(size_t bytes, const char* what);
  ~DeviceMemory() { check_cuda(cudaFree(data_), "freeing device memory"); }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace vericache::cuda
