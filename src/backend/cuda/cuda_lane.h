// CudaLane: a stream with its marks and a ring of pinned memory through which small uploads go. DeviceClock: the zero
// that the lanes of a GPU count time from. Called from the engine's thread. Nothing is allocated after construction;
// the host waits only when it is a whole ring ahead of the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/device.h"

namespace vericache::cuda {

class DeviceClock {
 public:
  DeviceClock();
  ~DeviceClock();
  DeviceClock(const DeviceClock&) = delete;
  DeviceClock& operator=(const DeviceClock&) = delete;

  double seconds(cudaEvent_t reached);

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t origin_ = nullptr;
  cudaEvent_t next_ = nullptr;  // will be the origin when it is reached
  bool moving_ = false;
  double origin_seconds_ = 0;
};

class CudaLane {
 public:
  // priority: of the stream, lower is more urgent. largest_upload: that must be sent in one piece.
  CudaLane(int priority, size_t largest_upload, std::shared_ptr<DeviceClock> clock);
  ~CudaLane();
  CudaLane(const CudaLane&) = delete;
  CudaLane& operator=(const CudaLane&) = delete;

  cudaStream_t stream() const { return stream_; }

  Mark mark();
  bool reached(Mark mark) const;
  void wait(Mark mark) const;
  double seconds(Mark from, Mark to) const;
  double time(Mark mark) const;
  void follow(const CudaLane& other, Mark mark);

  // Pinned memory to fill at once and to send before the next reserve(); up to `largest_upload` bytes.
  std::byte* reserve(size_t bytes);
  void send(std::byte* target, const std::byte* reserved, size_t bytes);
  void upload(std::byte* target, const void* source, size_t bytes);

 private:
  // A mark whose event belongs to a later mark by now was reached: mark() saw to it.
  bool known(Mark mark) const { return mark + events_.size() > last_; }
  cudaEvent_t event(Mark mark) const { return events_[mark % events_.size()]; }

  std::shared_ptr<DeviceClock> clock_;
  cudaStream_t stream_ = nullptr;
  std::vector<cudaEvent_t> events_;
  Mark last_ = 0;

  // The ring is cut into pieces; a piece is filled anew when the copies out of it are done.
  std::byte* ring_ = nullptr;
  size_t piece_bytes_ = 0;
  std::vector<cudaEvent_t> piece_sent_;
  size_t piece_ = 0;
  size_t piece_used_ = 0;
};

}  // namespace vericache::cuda
