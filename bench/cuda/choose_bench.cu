// Times choose, checksum, prove, choose_best and pool_mass: medians over launches that walk through more memory than
// the caches hold, so that every launch reads what it has not read lately.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

constexpr size_t kWalked = size_t{512} << 20;

__global__ void fill_kernel(float* values, size_t count, float spread) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9u;
    x ^= x >> 29;
    float sum = 0;  // four uniforms: a bell of deviation 1
    for (int part = 0; part < 4; ++part) {
      sum += static_cast<float>(x >> (16 * part) & 0xffff) * 0x1p-15f - 1;
    }
    values[i] = sum * 0.866f * spread;
  }
}

// Microseconds of one launch(i), median over rounds of `kLaunches`.
double median_us(const std::function<void(int)>& launch) {
  constexpr int kRounds = 21;
  constexpr int kLaunches = 20;
  cudaEvent_t begin;
  cudaEvent_t end;
  check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  int index = 0;
  for (int round = 0; round < kRounds + 2; ++round) {
    check_cuda(cudaEventRecord(begin), "cudaEventRecord");
    for (int i = 0; i < kLaunches; ++i) {
      launch(index++);
    }
    check_cuda(cudaEventRecord(end), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (round >= 2) {
      times.push_back(static_cast<double>(ms) * 1000 / kLaunches);
    }
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

void print(const char* what, int rows, size_t width, const char* how, double us, size_t bytes) {
  std::printf("%-12s %5d x %-8zu %-24s %8.2f us %8.0f GB/s\n", what, rows, width, how, us,
              static_cast<double>(bytes) / us * 1e-3);
}

struct Mode {
  const char* name;
  Sampling sampling;
  bool hashed;
};

void bench_choose(const float* memory, LogitRow* host_rows, LogitRow* device_rows, TokenId* tokens, uint64_t* hashes) {
  const Mode modes[] = {{"greedy", {}, false},
                        {"greedy, hashed", {}, true},
                        {"temperature 1", {.temperature = 1, .seed = 7}, false},
                        {"top_p 0.95", {.temperature = 1, .top_p = 0.95f, .seed = 7}, false},
                        {"top_k 50, top_p, min_p, hashed",
                         {.temperature = 0.7f, .top_k = 50, .top_p = 0.9f, .min_p = 0.05f, .seed = 7},
                         true}};
  for (const int vocabulary : {8192, 32'000, 128'256, 152'064}) {
    for (const int rows : {1, 16, 64, 256}) {
      const size_t floats = static_cast<size_t>(rows) * static_cast<size_t>(vocabulary);
      const size_t places = std::max<size_t>(1, kWalked / (floats * sizeof(float)));
      for (const Mode& mode : modes) {
        for (int i = 0; i < rows; ++i) {
          host_rows[i] = {.row = i,
                          .position = 1000 + i,
                          .sampling = mode.sampling,
                          .token = tokens + i,
                          .hash = mode.hashed ? hashes + i : nullptr};
        }
        check_cuda(
            cudaMemcpy(device_rows, host_rows, sizeof(LogitRow) * static_cast<size_t>(rows), cudaMemcpyHostToDevice),
            "cudaMemcpy");
        StagedPass pass;
        pass.logit_rows = device_rows;
        pass.logit_count = rows;
        const double us = median_us(
            [&](int i) { choose(memory + static_cast<size_t>(i) % places * floats, pass, vocabulary, nullptr); });
        print("choose", rows, static_cast<size_t>(vocabulary), mode.name, us, floats * sizeof(float));
      }
    }
  }
}

void bench_checksum(const std::byte* memory, uint64_t* sums, uint32_t* mismatches) {
  uint32_t* scratch = nullptr;
  check_cuda(cudaMalloc(reinterpret_cast<void**>(&scratch), 2 * sizeof(uint32_t)), "cudaMalloc");
  check_cuda(cudaMemset(scratch, 0, 2 * sizeof(uint32_t)), "cudaMemset");
  constexpr size_t kBytes = 262144;
  for (const int count : {8, 32, 128, 512}) {
    const size_t bytes = static_cast<size_t>(count) * kBytes;
    const size_t places = kWalked / bytes;
    const auto blocks = [&](int i) {
      return BlockRow{memory + static_cast<size_t>(i) % places * bytes, kBytes, kBytes, count};
    };
    print("checksum", count, kBytes, "", median_us([&](int i) { checksum(blocks(i), sums, nullptr); }), bytes);
    checksum(blocks(0), sums, nullptr);
    print("prove", count, kBytes, "the same blocks, from L2",
          median_us([&](int) { prove(blocks(0), sums, mismatches, scratch, nullptr); }), bytes);
  }
}

void bench_scores(const float* memory, int* chosen, float* scores) {
  for (const int n : {8192, 32'768, 131'072, 1 << 20}) {
    constexpr int kRows = 8;
    const size_t floats = size_t{kRows} * static_cast<size_t>(n);
    const size_t places = kWalked / (floats * sizeof(float));
    const auto at = [&](int i) { return memory + static_cast<size_t>(i) % places * floats; };
    const auto width = static_cast<size_t>(n);
    print("choose_best", kRows, width, "a quarter", median_us([&](int i) {
            choose_best({.scores = at(i), .rows = kRows, .n = n, .count = n / 4, .chosen = chosen, .stride = n},
                        nullptr);
          }),
          floats * sizeof(float));
    print("pool_mass", kRows, width, "reach 3",
          median_us([&](int i) { pool_mass(at(i), kRows, n, 3, 32, scores, nullptr); }), floats * sizeof(float) * 2);
  }
}

template <typename T>
T* device_memory(size_t count) {
  void* out = nullptr;
  check_cuda(cudaMalloc(&out, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(out);
}
template <typename T>
T* pinned_memory(size_t count) {
  void* out = nullptr;
  check_cuda(cudaHostAlloc(&out, count * sizeof(T), cudaHostAllocDefault), "cudaHostAlloc");
  return static_cast<T*>(out);
}

void run() {
  constexpr size_t kMost = 1024;
  auto* memory = device_memory<float>(kWalked / sizeof(float));
  fill_kernel<<<1024, 256>>>(memory, kWalked / sizeof(float), 3);
  check_cuda(cudaDeviceSynchronize(), "fill");
  auto* mismatches = pinned_memory<uint32_t>(1);
  *mismatches = 0;
  auto* hashes = pinned_memory<uint64_t>(kMost);
  bench_choose(memory, pinned_memory<LogitRow>(kMost), device_memory<LogitRow>(kMost), pinned_memory<TokenId>(kMost),
               hashes);
  bench_checksum(reinterpret_cast<const std::byte*>(memory), hashes, mismatches);
  bench_scores(memory, device_memory<int>(size_t{8} << 20), device_memory<float>(size_t{8} << 20));
  std::printf("mismatches: %u\n", *mismatches);
}

}  // namespace
}  // namespace vericache::cuda

int main() {
  vericache::cuda::run();
}
