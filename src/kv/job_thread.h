// JobThread: a thread that does what blocks, one job after the other, for one that must not.
// enqueue() by one thread, done() by any.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace vericache {

class JobThread {
 public:
  JobThread() : thread_([this] { work(); }) {}
  // Ends with the job that runs; those behind it are not begun.
  ~JobThread() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    condition_.notify_all();
    thread_.join();
  }
  JobThread(const JobThread&) = delete;
  JobThread& operator=(const JobThread&) = delete;

  // The number of the job, 1 and up.
  uint64_t enqueue(std::function<void()> job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    condition_.notify_all();
    return ++enqueued_;
  }
  bool done(uint64_t job) const { return done_.load(std::memory_order_acquire) >= job; }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      condition_.wait(lock, [this] { return closing_ || !jobs_.empty(); });
      if (closing_) {
        return;
      }
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      done_.fetch_add(1, std::memory_order_release);
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable condition_;
  std::deque<std::function<void()>> jobs_;
  bool closing_ = false;
  uint64_t enqueued_ = 0;  // the enqueuing thread's
  std::atomic<uint64_t> done_ = 0;
  std::thread thread_;
};

}  // namespace vericache
