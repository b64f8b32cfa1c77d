// Exact attention on the GPU: GB/s of KV read and TFLOP/s for decode, verify and prefill passes of an 8B shape, random
// data in scattered pages. bench/cuda/sdpa_peer.py measures what PyTorch makes of the same decode shapes.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

constexpr KvShape kShape{.layers = 1, .kv_heads = 8, .head_dim = 128};
constexpr int kHeads = 32;
constexpr size_t kPageBytes = size_t{kPageTokens} * 128 * 2 * sizeof(bf16);  // of one head, K and V
constexpr size_t kArenaPages = size_t{16} * 8 * 513;                         // 16 sequences of 32k and a page
constexpr int kMaxRows = 2048;
constexpr int kMaxContext = 33 << 10;

struct Freed {
  void operator()(void* data) const { cudaFree(data); }
};
template <typename T>
using DeviceArray = std::unique_ptr<T[], Freed>;
template <typename T>
DeviceArray<T> device_array(size_t count) {
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
  return DeviceArray<T>(static_cast<T*>(data));
}
template <typename T>
DeviceArray<T> uploaded(const std::vector<T>& values) {
  auto out = device_array<T>(std::max<size_t>(values.size(), 1));
  check_cuda(cudaMemcpy(out.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return out;
}

// Uniform in (-1, 1).
__global__ void fill_kernel(uint32_t* pairs, size_t count, uint32_t seed) {
  const auto pair = [](uint32_t x) {
    const float value = static_cast<float>(x & 0xffffu) / 32768.0f - 1.0f + 1.0f / 65536.0f;
    return __float_as_uint(value) >> 16;
  };
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b1u + seed;
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    pairs[i] = pair(x) | pair(x >> 16) << 16;
  }
}
DeviceArray<bf16> random_values(size_t count, uint32_t seed) {
  auto out = device_array<bf16>(count);
  fill_kernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(out.get()), count / 2, seed);
  check_cuda(cudaGetLastError(), "fill");
  return out;
}

enum class Way { chosen, cut, walk };  // PlanBounds::enough_blocks

struct Shape {
  const char* what;
  int sequences;
  int rows;      // of each
  int position;  // of the first
  Way way = Way::chosen;
};

class Bench {
 public:
  Bench()
      : arena_(random_values(kArenaPages * kPageBytes / sizeof(bf16), 1)),
        q_(random_values(size_t{kMaxRows} * kHeads * 128, 2)),
        out_(device_array<bf16>(size_t{kMaxRows} * kHeads * 128)),
        log_sum_exp_(device_array<float>(size_t{kMaxRows} * kHeads)),
        scratch_(device_array<float>(attention_scratch_bytes(kLimits) / sizeof(float))),
        order_(kArenaPages) {
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::shuffle(order_.begin(), order_.end(), std::mt19937_64(3));
  }

  // Median microseconds of one call.
  double time(const Shape& shape) {
    stage(shape);
    const PassRows pass{.rows = shape.sequences * shape.rows, .layers = layers_, .sequences = sequences_};
    const StagedPass staged{.rows = pass.rows, .count = shape.sequences, .sequences = staged_.get()};
    PlanBounds bounds = plan_bounds(kLimits);
    if (shape.way != Way::chosen) {
      bounds.enough_blocks = shape.way == Way::walk ? 0 : INT_MAX;
    }
    AttentionPlan plan;
    plan_attention(pass, kLimits, bounds, plan);
    const auto tiles = uploaded(plan.tiles);
    const auto combine = uploaded(plan.combine);
    constexpr int kWarm = 4;
    constexpr int kTimed = 25;
    std::vector<cudaEvent_t> events(2 * (kWarm + kTimed));
    for (cudaEvent_t& event : events) {
      check_cuda(cudaEventCreate(&event), "event");
    }
    for (int i = 0; i < kWarm + kTimed; ++i) {
      check_cuda(cudaEventRecord(events[static_cast<size_t>(2 * i)]), "event");
      attention({kShape, kHeads, 0.088388f, q_.get(), &pass, i % layers_, out_.get(), log_sum_exp_.get()}, staged, plan,
                tiles.get(), combine.get(), scratch_.get(), nullptr);
      check_cuda(cudaEventRecord(events[static_cast<size_t>(2 * i + 1)]), "event");
    }
    check_cuda(cudaDeviceSynchronize(), "attention");
    std::vector<float> ms(kTimed);
    for (int i = 0; i < kTimed; ++i) {
      const size_t first = static_cast<size_t>(2 * (kWarm + i));
      check_cuda(cudaEventElapsedTime(&ms[static_cast<size_t>(i)], events[first], events[first + 1]), "event");
    }
    for (cudaEvent_t event : events) {
      cudaEventDestroy(event);
    }
    std::nth_element(ms.begin(), ms.begin() + kTimed / 2, ms.end());
    return 1e3 * ms[kTimed / 2];
  }

 private:
  static constexpr Limits kLimits{kShape, kHeads, kMaxRows, 64, kMaxContext};

  // As many layers as the arena has pages for: each call reads other memory than the one before.
  void stage(const Shape& shape) {
    const int pages = (shape.position + shape.rows + kPageTokens - 1) / kPageTokens;
    const int past = shape.position / kPageTokens;
    const size_t per_layer = static_cast<size_t>(shape.sequences) * kShape.kv_heads * static_cast<size_t>(pages);
    layers_ = static_cast<int>(std::min<size_t>(16, kArenaPages / per_layer));
    std::vector<std::byte*> addresses;
    for (size_t i = 0; i < per_layer * static_cast<size_t>(layers_); ++i) {
      addresses.push_back(reinterpret_cast<std::byte*>(arena_.get()) + order_[i] * kPageBytes);
    }
    addresses_ = uploaded(addresses);
    sequences_.clear();
    for (int i = 0; i < layers_ * shape.sequences; ++i) {
      SequenceRows rows{.first_row = i % shape.sequences * shape.rows, .rows = shape.rows, .position = shape.position};
      std::byte** first = addresses_.get() + static_cast<ptrdiff_t>(i) * kShape.kv_heads * pages;
      rows.kv.past.head_pages = first;
      rows.kv.tail.head_pages = first + past;
      rows.kv.past.page_stride = rows.kv.tail.page_stride = pages;
      rows.kv.tail_position = past * kPageTokens;
      sequences_.push_back(rows);
    }
    staged_ = uploaded(sequences_);
  }

  DeviceArray<bf16> arena_;
  DeviceArray<bf16> q_;
  DeviceArray<bf16> out_;
  DeviceArray<float> log_sum_exp_;
  DeviceArray<float> scratch_;
  std::vector<size_t> order_;
  int layers_ = 0;
  std::vector<SequenceRows> sequences_;
  DeviceArray<SequenceRows> staged_;
  DeviceArray<std::byte*> addresses_;
};

double kv_bytes(const Shape& shape) {
  return double{2 * sizeof(bf16)} * kShape.kv_heads * kShape.head_dim * shape.sequences * (shape.position + shape.rows);
}
double flops(const Shape& shape) {
  const double tokens = shape.rows * (shape.position + 0.5 * (shape.rows + 1));  // seen by all rows of a sequence
  return 4.0 * kShape.head_dim * kHeads * shape.sequences * tokens;
}

int run() {
  Bench bench;
  std::printf("exact attention, 32 query heads, 8 KV heads, head_dim 128\n%-34s %10s %10s %10s\n", "", "us", "GB/s",
              "TFLOP/s");
  const Shape shapes[] = {
      {"decode, batch 1, 8k", 1, 1, 8191},
      {"decode, batch 8, 8k", 8, 1, 8191},
      {"decode, batch 16, 8k", 16, 1, 8191},
      {"decode, batch 1, 32k", 1, 1, 32767},
      {"decode, batch 8, 32k", 8, 1, 32767},
      {"decode, batch 16, 32k", 16, 1, 32767},
      {"verify, batch 16 x 4 rows, 32k", 16, 4, 32760},
      {"verify, batch 16 x 8 rows, 32k", 16, 8, 32760},
      {"verify, batch 8 x 16 rows, 32k", 8, 16, 32750},
      {"verify, batch 4 x 32 rows, 32k", 4, 32, 32730},
      {"verify, batch 1 x 64 rows, 32k", 1, 64, 32700},
      {"prefill, 512 rows at 30k", 1, 512, 30720},
      {"prefill, 512 rows at 30k, cut", 1, 512, 30720, Way::cut},
      {"prefill, 512 rows at 30k, walked", 1, 512, 30720, Way::walk},
      {"prefill, 1024 rows at 30k, cut", 1, 1024, 30720, Way::cut},
      {"prefill, 1024 rows at 30k, walked", 1, 1024, 30720, Way::walk},
      {"prefill, 2048 rows at 30k", 1, 2048, 30720},
      {"prefill, 2048 rows at 0", 1, 2048, 0},
  };
  for (const Shape& shape : shapes) {
    const double us = bench.time(shape);
    std::printf("%-34s %10.1f %10.0f %10.1f\n", shape.what, us, kv_bytes(shape) / us * 1e-3, flops(shape) / us * 1e-6);
  }
  double us = 0;
  double sum = 0;
  for (int position = 0; position < 32768; position += 2048) {
    const Shape chunk{"", 1, 2048, position};
    us += bench.time(chunk);
    sum += flops(chunk);
  }
  std::printf("%-34s %10.1f %10s %10.1f\n", "prefill, 32k in chunks of 2048", us, "", sum / us * 1e-6);
  return 0;
}

}  // namespace
}  // namespace vericache::cuda

int main() {
  return vericache::cuda::run();
}
