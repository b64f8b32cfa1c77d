#include "base/threads.h"

#include <chrono>

#include "base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vericache {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the gaps between the ops of one forward pass, short enough to leave the core to a wire worker.
constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int kPausesPerLook = 16;

thread_local int this_thread_index = 0;
thread_local bool inside_body = false;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until ready() or until the time is up; the last answer of ready().
template <typename Ready>
bool spin(const Ready& ready) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (ready()) {
        return true;
      }
      pause();
    }
  } while (Clock::now() < end);
  return ready();
}

bool has_items(uint64_t ticket) {
  return static_cast<uint32_t>(ticket) < static_cast<uint32_t>(ticket >> 32);
}

}  // namespace

FlushDenormals::FlushDenormals() {
#if defined(__x86_64__)
  constexpr uint32_t kFlushToZero = 0x8000;
  constexpr uint32_t kDenormalsAreZero = 0x0040;
  saved_ = _mm_getcsr();
  _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero);
#endif
}

FlushDenormals::~FlushDenormals() {
#if defined(__x86_64__)
  _mm_setcsr(saved_);
#endif
}

ThreadPool::ThreadPool(int threads) {
  check(threads >= 1, "a pool has at least the calling thread");
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this, i] { work(i); });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

int ThreadPool::thread_index() {
  return this_thread_index;
}

void ThreadPool::run(int count, const void* state, void (*body)(const void* state, int i)) {
  if (inside_body || workers_.empty() || count <= 1) {
    for (int i = 0; i < count; ++i) {
      body(state, i);
    }
    return;
  }
  check(!busy_.exchange(true, std::memory_order_acquire), "parallel_for called from two threads at once");
  state_ = state;
  body_ = body;
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(static_cast<uint32_t>(count)) << 32);
  epoch_.fetch_add(1);
  if (sleepers_.load() > 0) {
    epoch_.notify_all();
  }
  inside_body = true;
  const uint32_t mine = take_items();
  inside_body = false;
  if (mine > 0) {
    done_.fetch_add(mine, std::memory_order_acq_rel);
  }
  wait_until_done(static_cast<uint32_t>(count));
  busy_.store(false, std::memory_order_release);
}

uint32_t ThreadPool::take_items() {
  uint32_t taken = 0;
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (has_items(ticket)) {
    // A job cannot end before each of its items is done, so after a successful exchange state_ and body_ are this
    // item's.
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      body_(state_, static_cast<int>(static_cast<uint32_t>(ticket)));
      ++taken;
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }
  return taken;
}

void ThreadPool::wait_until_done(uint32_t count) {
  if (spin([&] { return done_.load(std::memory_order_acquire) == count; })) {
    return;
  }
  for (uint32_t seen = done_.load(std::memory_order_acquire); seen != count;
       seen = done_.load(std::memory_order_acquire)) {
    done_.wait(seen, std::memory_order_acquire);
  }
}

void ThreadPool::wait_for_work() {
  const uint32_t epoch = epoch_.load();
  const auto ready = [&] { return epoch_.load() != epoch || has_items(ticket_.load()) || stop_.load(); };
  if (spin(ready)) {
    return;
  }
  // The job is published before the epoch moves and sleepers_ is read after: either we see the new epoch or run() sees
  // us.
  sleepers_.fetch_add(1);
  if (!ready()) {
    epoch_.wait(epoch);
  }
  sleepers_.fetch_sub(1);
}

void ThreadPool::work(int index) {
  this_thread_index = index;
  inside_body = true;
  const FlushDenormals flush;
  while (!stop_.load()) {
    if (const uint32_t taken = take_items(); taken > 0) {
      done_.fetch_add(taken, std::memory_order_acq_rel);
      done_.notify_one();
    } else {
      wait_for_work();
    }
  }
}

}  // namespace vericache
