#include "read_ceiling.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>

#include "backend/device.h"
#include "base/check.h"
#include "terminal.h"

namespace vericache {

double read_ceiling_gbps(Kernels& kernels, int threads, size_t bytes) {
  constexpr int kTimes = 12;
  constexpr size_t kAhead = 256;  // words that are asked for before they are read
  constexpr size_t kLanes = 16;   // independent sums, so that the adds do not wait for each other
  const std::unique_ptr<Device> device = make_cpu_device(bytes + 4096);
  auto* words = device->allocate_array<uint64_t>(bytes / sizeof(uint64_t), "the buffer that measures bandwidth");
  const int parts = threads * 16;
  const size_t part_words = bytes / sizeof(uint64_t) / static_cast<size_t>(parts) / kLanes * kLanes;
  // Pages that were never written are all the same zero page: write each once.
  kernels.parallel_for(parts, [&](int part) {
    for (size_t i = 0; i < part_words; i += 64) {
      words[static_cast<size_t>(part) * part_words + i] = 1;
    }
  });
  double best = 0;
  for (int time = 0; time < kTimes; ++time) {
    std::atomic<uint64_t> total = 0;
    const double start = now_seconds();
    kernels.parallel_for(parts, [&](int part) {
      const uint64_t* from = words + static_cast<size_t>(part) * part_words;
      std::array<uint64_t, kLanes> sums{};
      for (size_t i = 0; i < part_words; i += kLanes) {
        __builtin_prefetch(from + i + kAhead);
        __builtin_prefetch(from + i + kAhead + kLanes / 2);
        for (size_t lane = 0; lane < kLanes; ++lane) {
          sums[lane] += from[i + lane];
        }
      }
      uint64_t sum = 0;
      for (const uint64_t lane_sum : sums) {
        sum += lane_sum;
      }
      total += sum;
    });
    const double seconds = now_seconds() - start;
    check(total.load() == static_cast<uint64_t>(parts) * ((part_words + 63) / 64),
          "the bandwidth buffer reads as it was written");
    best = std::max(best, static_cast<double>(part_words) * parts * sizeof(uint64_t) / seconds / 1e9);
  }
  return best;
}

}  // namespace vericache
