// Throttle: makes a worker as slow as a link of a given bandwidth.
// One worker each.
#pragma once

#include <chrono>
#include <cstddef>
#include <thread>

namespace vericache {

class Throttle {
 public:
  explicit Throttle(double gbps) : seconds_per_byte_(gbps > 0 ? 1e-9 / gbps : 0) {}

  // Returns when a link that was idle before, or just done with the last spend, would have carried `bytes` more.
  void spend(size_t bytes) {
    if (seconds_per_byte_ == 0) {
      return;
    }
    using Clock = std::chrono::steady_clock;
    const Clock::time_point now = Clock::now();
    // Time the worker itself took since it turned to this transfer counts as carrying; time in which it idled does not.
    const Clock::time_point start = begin_ > free_at_ ? begin_ : free_at_;
    free_at_ = start + std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(seconds_per_byte_ * static_cast<double>(bytes)));
    late_ = {};
    if (free_at_ > now) {
      std::this_thread::sleep_until(free_at_);
      late_ = Clock::now() - free_at_;
    }
  }
  // The worker turns to a new piece of work. A link would have done so earlier by what the last sleep took too long.
  void begin() { begin_ = std::chrono::steady_clock::now() - late_; }

 private:
  double seconds_per_byte_;
  std::chrono::steady_clock::time_point begin_{};
  std::chrono::steady_clock::time_point free_at_{};
  std::chrono::steady_clock::duration late_{};
};

}  // namespace vericache
