#include "backend/cuda/cuda_lane.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr size_t kMarks = 4096;
constexpr size_t kPieces = 8;
constexpr size_t kLeastPieceBytes = size_t{2} << 20;
constexpr size_t kAlignment = 256;
constexpr std::chrono::microseconds kPolling{100};

bool done(cudaEvent_t event) {
  const cudaError_t status = cudaEventQuery(event);
  if (status == cudaErrorNotReady) {
    (void)cudaGetLastError();  // or the next launch would be blamed
    return false;
  }
  check_cuda(status, "asking whether a lane has come to a mark");
  return true;
}

double seconds_between(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, from, to), "reading the device's clock");
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace

DeviceClock::DeviceClock() {
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  check_cuda(cudaEventCreate(&origin_), "making an event");
  check_cuda(cudaEventCreate(&next_), "making an event");
  check_cuda(cudaEventRecord(origin_, stream_), "starting the device's clock");
  check_cuda(cudaStreamSynchronize(stream_), "starting the device's clock");
}

DeviceClock::~DeviceClock() {
  check_cuda(cudaEventDestroy(origin_), "freeing an event");
  check_cuda(cudaEventDestroy(next_), "freeing an event");
  check_cuda(cudaStreamDestroy(stream_), "freeing a stream");
}

// The driver counts milliseconds in a float: the origin moves along, or hours would leave no microseconds.
double DeviceClock::seconds(cudaEvent_t reached) {
  constexpr double kFar = 4;
  if (moving_ && done(next_)) {
    origin_seconds_ += seconds_between(origin_, next_);
    std::swap(origin_, next_);
    moving_ = false;
  }
  const double since = seconds_between(origin_, reached);
  if (since > kFar && !moving_) {
    check_cuda(cudaEventRecord(next_, stream_), "moving the device's clock");
    moving_ = true;
  }
  return origin_seconds_ + since;
}

CudaLane::CudaLane(int priority, size_t largest_upload, std::shared_ptr<DeviceClock> clock)
    : clock_(std::move(clock)),
      events_(kMarks),
      piece_bytes_((std::max(largest_upload, kLeastPieceBytes) + kAlignment - 1) / kAlignment * kAlignment),
      piece_sent_(kPieces) {
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority), "making a stream");
  for (cudaEvent_t& event : events_) {
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventBlockingSync), "making an event");
  }
  for (cudaEvent_t& event : piece_sent_) {
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming), "making an event");
  }
  void* ring = nullptr;
  check_cuda(cudaHostAlloc(&ring, kPieces * piece_bytes_, cudaHostAllocPortable), "pinning a lane's upload ring");
  ring_ = static_cast<std::byte*>(ring);
}

CudaLane::~CudaLane() {
  check_cuda(cudaStreamSynchronize(stream_), "finishing a lane");
  check_cuda(cudaFreeHost(ring_), "freeing a lane's upload ring");
  for (cudaEvent_t event : piece_sent_) {
    check_cuda(cudaEventDestroy(event), "freeing an event");
  }
  for (cudaEvent_t event : events_) {
    check_cuda(cudaEventDestroy(event), "freeing an event");
  }
  check_cuda(cudaStreamDestroy(stream_), "freeing a stream");
}

Mark CudaLane::mark() {
  const Mark next = last_ + 1;
  if (next > kMarks) {
    wait(next - kMarks);  // its event is taken over
  }
  check_cuda(cudaEventRecord(event(next), stream_), "marking a lane");
  last_ = next;
  return next;
}

bool CudaLane::reached(Mark mark) const {
  check(mark <= last_, "a mark that was made is asked for");
  return mark == 0 || !known(mark) || done(event(mark));
}

void CudaLane::wait(Mark mark) const {
  const auto end = std::chrono::steady_clock::now() + kPolling;
  while (!reached(mark)) {
    if (std::chrono::steady_clock::now() > end) {
      check_cuda(cudaEventSynchronize(event(mark)), "waiting for a lane");
      return;
    }
  }
}

double CudaLane::seconds(Mark from, Mark to) const {
  check(from > 0 && from <= to && to <= last_ && known(from), "time is asked between two marks that are still known");
  return seconds_between(event(from), event(to));
}

double CudaLane::time(Mark mark) const {
  check(mark > 0 && mark <= last_ && known(mark), "the time of a mark is asked while it is known");
  return clock_->seconds(event(mark));
}

void CudaLane::follow(const CudaLane& other, Mark mark) {
  check(mark <= other.last_, "a lane follows a mark that was made");
  if (mark != 0 && other.known(mark)) {
    check_cuda(cudaStreamWaitEvent(stream_, other.event(mark), 0), "following another lane");
  }
}

std::byte* CudaLane::reserve(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  check(rounded <= piece_bytes_, "an upload fits a piece of its lane's ring");
  if (piece_used_ + rounded > piece_bytes_) {
    check_cuda(cudaEventRecord(piece_sent_[piece_], stream_), "marking an upload");
    piece_ = (piece_ + 1) % kPieces;
    piece_used_ = 0;
    if (!done(piece_sent_[piece_])) {  // an event that was never recorded counts as done
      check_cuda(cudaEventSynchronize(piece_sent_[piece_]), "waiting for an upload");
    }
  }
  std::byte* reserved = ring_ + piece_ * piece_bytes_ + piece_used_;
  piece_used_ += rounded;
  return reserved;
}

void CudaLane::send(std::byte* target, const std::byte* reserved, size_t bytes) {
  cuda::upload(target, reserved, bytes, stream_);
}

void CudaLane::upload(std::byte* target, const void* source, size_t bytes) {
  const auto* from = static_cast<const std::byte*>(source);
  while (bytes > 0) {
    const size_t piece = std::min(bytes, piece_bytes_);
    std::byte* reserved = reserve(piece);
    std::memcpy(reserved, from, piece);
    send(target, reserved, piece);
    target += piece;
    from += piece;
    bytes -= piece;
  }
}

}  // namespace vericache::cuda
