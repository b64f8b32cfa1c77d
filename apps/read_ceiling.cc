#include "read_ceiling.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "backend/copy_rate.h"
#include "base/check.h"
#include "terminal.h"

namespace vericache {
namespace {

constexpr int kTimes = 12;

// body(part) on a thread of its own for each part.
template <typename Body>
void on_threads(int parts, const Body& body) {
  std::vector<std::thread> threads;
  for (int part = 0; part < parts; ++part) {
    threads.emplace_back([&body, part] { body(part); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Sums the words, and reads each once.
uint64_t read_all(const uint64_t* from, size_t words) {
  constexpr size_t kAhead = 256;  // words that are asked for before they are read
  constexpr size_t kLanes = 16;   // independent sums, so that the adds do not wait for each other
  std::array<uint64_t, kLanes> sums{};
  for (size_t i = 0; i < words; i += kLanes) {
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
  return sum;
}

double host_read_gbps(Device& device, int threads, size_t bytes) {
  auto* words = device.allocate_array<uint64_t>(bytes / sizeof(uint64_t), "the buffer that measures bandwidth");
  const size_t part_words = bytes / sizeof(uint64_t) / static_cast<size_t>(threads) / 64 * 64;
  // Pages that were never written are all the same zero page: write each once.
  on_threads(threads, [&](int part) {
    for (size_t i = 0; i < part_words; i += 64) {
      words[static_cast<size_t>(part) * part_words + i] = 1;
    }
  });
  // Often enough that starting the threads counts for nothing.
  const size_t rounds = std::max<size_t>(1, (size_t{512} << 20) / bytes);
  double best = 0;
  for (int time = 0; time < kTimes; ++time) {
    std::atomic<uint64_t> total = 0;
    const double start = now_seconds();
    on_threads(threads, [&](int part) {
      for (size_t round = 0; round < rounds; ++round) {
        total += read_all(words + static_cast<size_t>(part) * part_words, part_words);
      }
    });
    const double seconds = now_seconds() - start;
    check(total.load() == rounds * static_cast<uint64_t>(threads) * (part_words / 64),
          "the bandwidth buffer reads as it was written");
    best = std::max(best, static_cast<double>(rounds * part_words) * threads * sizeof(uint64_t) / seconds / 1e9);
  }
  return best;
}

// Bytes read and written by copies within the device's memory.
double device_copy_gbps(Device& device, Kernels& kernels, size_t bytes) {
  const size_t half = std::min(bytes / 2, size_t{1} << 30) / 4096 * 4096;
  std::byte* from = device.allocate(half, "the buffer that measures bandwidth");
  std::byte* to = device.allocate(half, "the buffer that measures bandwidth");
  const BlockCopy copy{to, from, half};
  return 2 * copy_rate(kernels, {&copy, 1}, kTimes) / 1e9;
}

}  // namespace

double read_ceiling_gbps(DeviceKind kind, Kernels& kernels, int threads, size_t bytes) {
  const std::unique_ptr<Device> device = make_device(kind, bytes + 8192);
  return device->addressable() ? host_read_gbps(*device, threads, bytes) : device_copy_gbps(*device, kernels, bytes);
}

}  // namespace vericache
