// ThreadPool: fork-join over a fixed set of threads, 1-2 us a join. parallel_for is called by one thread at a time (the
// one that drives the engine); the same call from inside a body runs inline.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace vericache {

// Denormals are flushed to zero while this lives, on this thread. The matrix instructions flush always; all other
// arithmetic has to do the same on every thread, or a row's bits would depend on where it ran.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint32_t saved_ = 0;
};

class ThreadPool {
 public:
  // The calling thread counts as one of `threads` (>= 1).
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // 0 on a thread that is not a worker, 1 .. threads()-1 on the workers: names per-thread scratch.
  static int thread_index();

  // body(i) for every i of [0, count), in no order, on any thread; returns when all are done. The body must not throw.
  template <typename Body>
  void parallel_for(int count, const Body& body) {
    run(count, &body, [](const void* state, int i) { (*static_cast<const Body*>(state))(i); });
  }
  void run(int count, const void* state, void (*body)(const void* state, int i));

 private:
  void work(int index);
  uint32_t take_items();  // runs items until none is left to take; their number
  void wait_for_work();
  void wait_until_done(uint32_t count);

  // Count in the high half, next index in the low half: one word, so that a successful exchange proves that the job is
  // alive.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  const void* state_ = nullptr;
  void (*body_)(const void* state, int i) = nullptr;
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> busy_{false};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace vericache
