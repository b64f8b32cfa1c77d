// Arrays in device memory and in pinned host memory, for tests. What nobody wrote is all ones: NaN, -1.
// Called from the test's thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "backend/cuda/ops.h"

namespace vericache::cuda::test {

// The ops enqueued so far are done and none has failed.
inline void finish() {
  check_cuda(cudaGetLastError(), "launch");
  check_cuda(cudaDeviceSynchronize(), "synchronize");
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), bytes() + 16), "cudaMalloc");
    check_cuda(cudaMemset(data_, 0xff, bytes() + 16), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { write(values); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  void write(const std::vector<T>& values) {
    check_cuda(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    check_cuda(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_;
  T* data_ = nullptr;
};

template <typename T>
class PinnedArray {
 public:
  explicit PinnedArray(size_t count) {
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&data_), count * sizeof(T) + 16, cudaHostAllocDefault),
               "cudaHostAlloc");
    for (size_t i = 0; i < count * sizeof(T); ++i) {
      reinterpret_cast<unsigned char*>(data_)[i] = 0xff;
    }
  }
  ~PinnedArray() { cudaFreeHost(data_); }
  PinnedArray(const PinnedArray&) = delete;
  PinnedArray& operator=(const PinnedArray&) = delete;

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace vericache::cuda::test
