// The CPU backend's ops beside what the machine can do: GFLOP/s of products, GB/s of decode against the read bandwidth
// of the same run. VERICACHE_BENCH_THREADS and VERICACHE_BENCH_ISA choose threads and instruction class.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "backend/cpu/cpu_kernels.h"
#include "base/threads.h"

namespace vericache {
namespace {

constexpr size_t kColdBytes = size_t{256} << 20;  // more than any cache: what is read in turn comes from memory
constexpr KvShape kShape{8, 4, 64};               // of vericode-26m
constexpr int kHeads = 8;

int threads() {
  const char* value = std::getenv("VERICACHE_BENCH_THREADS");
  return value != nullptr ? std::atoi(value) : static_cast<int>(std::thread::hardware_concurrency());
}

Isa isa() {
  const char* value = std::getenv("VERICACHE_BENCH_ISA");
  return value != nullptr ? parse_isa(value).value_or(best_isa()) : best_isa();
}

std::unique_ptr<Kernels> make(int max_rows) {
  return make_cpu_kernels(isa(), threads(), {kShape, kHeads, max_rows, 32768});
}

// bf16 values in [-1, 1): quick to make, and none is denormal or infinite.
std::vector<bf16> values(size_t n) {
  std::minstd_rand random(1);
  std::vector<bf16> out(n);
  for (bf16& x : out) {
    x = to_bf16(static_cast<float>(random()) / 1073741824.0f - 1.0f);
  }
  return out;
}

using benchmark::Counter;

void read_bandwidth(benchmark::State& state) {
  std::vector<uint64_t> data(kColdBytes / 8, 1);
  ThreadPool pool(threads());
  constexpr int kTasks = 256;
  for (auto _ : state) {
    pool.parallel_for(kTasks, [&](int task) {
      const size_t n = data.size() / kTasks;
      const uint64_t* p = data.data() + static_cast<size_t>(task) * n;
      uint64_t sum[8] = {};
      for (size_t i = 0; i < n; i += 8) {
        for (size_t j = 0; j < 8; ++j) {
          sum[j] += p[i + j];
        }
      }
      benchmark::DoNotOptimize(sum);
    });
  }
  state.counters["GB/s"] = Counter(static_cast<double>(kColdBytes) / 1e9, Counter::kIsIterationInvariantRate);
}

void fork_join(benchmark::State& state) {
  ThreadPool pool(threads());
  for (auto _ : state) {
    pool.parallel_for(threads(), [](int i) { benchmark::DoNotOptimize(i); });
  }
}

// Few rows read matrices in turn from memory, as a forward pass does.
void matmul(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0));
  const int out = static_cast<int>(state.range(1));
  const int in = static_cast<int>(state.range(2));
  const auto kernels = make(rows);
  const size_t bytes = kernels->packed_bytes(out, in);
  const size_t copies = rows <= 8 ? kColdBytes / bytes : 1;
  auto weights = values(copies * bytes / 2 + 32);
  bf16* first = weights.data();
  while (reinterpret_cast<uintptr_t>(first) % 64 != 0) {
    ++first;
  }
  const auto x = values(static_cast<size_t>(rows) * static_cast<size_t>(in));
  std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(out));
  size_t turn = 0;
  for (auto _ : state) {
    kernels->matmul({out, in, first + turn++ % copies * (bytes / 2)}, x.data(), rows, y.data(), Epilogue::store);
  }
  state.counters["GFLOP/s"] = Counter(2e-9 * rows * out * in, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(static_cast<double>(bytes) / 1e9, Counter::kIsIterationInvariantRate);
}

// Rows of one sequence behind `context` tokens of past; its layers are read in turn, as a forward pass does.
void attention(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0));
  const int context = static_cast<int>(state.range(1)) / kPageTokens * kPageTokens;
  const int bits = static_cast<int>(state.range(2));
  const auto kernels = make(rows);
  const KvFormat format{bits, bits};
  const size_t page_size = head_page_bytes(format, kShape);
  const int pages = context / kPageTokens;
  const int tail_pages = (rows + kPageTokens - 1) / kPageTokens;
  auto data =
      values(static_cast<size_t>(kShape.layers * kShape.kv_heads) * static_cast<size_t>(pages) * page_size / 2 + 32);
  auto tail_data = values(static_cast<size_t>(kShape.kv_heads * tail_pages) * head_page_bytes({}, kShape) / 2);
  if (bits != 16) {
    std::fill(data.begin(), data.end(), to_bf16(0.125f));  // scales and minima have to be numbers
  }
  std::byte* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(data.data()) + 63) / 64 * 64);
  std::vector<std::byte*> past;
  for (int i = 0; i < kShape.layers * pages; ++i) {  // pages lie one after the other, heads side by side within a page
    past.push_back(base + static_cast<size_t>(i) * static_cast<size_t>(kShape.kv_heads) * page_size);
  }
  std::vector<std::byte*> tail;
  for (int i = 0; i < kShape.kv_heads * tail_pages; ++i) {
    tail.push_back(reinterpret_cast<std::byte*>(tail_data.data()) +
                   static_cast<size_t>(i) * head_page_bytes({}, kShape));
  }
  const std::vector<int> tokens(static_cast<size_t>(kShape.kv_heads), context);
  const auto q = values(static_cast<size_t>(rows * kHeads * kShape.key_dim()));
  std::vector<bf16> out(static_cast<size_t>(rows * kHeads * kShape.head_dim));
  std::vector<std::byte*> heads(static_cast<size_t>(kShape.kv_heads * pages));
  std::vector<std::vector<std::byte*>> layers;
  for (int layer = 0; layer < kShape.layers; ++layer) {
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (int page = 0; page < pages; ++page) {
        heads[static_cast<size_t>(head * pages + page)] =
            past[static_cast<size_t>(layer * pages + page)] + static_cast<size_t>(head) * page_size;
      }
    }
    layers.push_back(heads);
  }
  size_t turn = 0;
  for (auto _ : state) {
    const KvView past_view{format, layers[turn++ % layers.size()].data(), pages, tokens.data()};
    const KvView tail_view{{}, tail.data(), tail_pages, nullptr};
    const SequenceRows sequence{0, rows, context, nullptr, {past_view, tail_view, context}};
    const PassRows pass{.rows = rows, .layers = 1, .sequences = {&sequence, 1}};
    kernels->attention({kShape, kHeads, 0.125f, q.data(), &pass, 0, out.data(), nullptr});
  }
  const double attended = static_cast<double>(context) + 0.5 * rows;
  state.counters["GFLOP/s"] =
      Counter(4e-9 * rows * attended * kHeads * kShape.head_dim, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(static_cast<double>(pages * kShape.kv_heads) * static_cast<double>(page_size) / 1e9,
                                   Counter::kIsIterationInvariantRate);
}

void quantize(benchmark::State& state) {
  const auto kernels = make(1);
  const int bits = static_cast<int>(state.range(0));
  const auto source = values(head_page_bytes({}, kShape) / 2);
  std::vector<std::byte> out(head_page_bytes({}, kShape));
  for (auto _ : state) {
    kernels->quantize_head_page(reinterpret_cast<const std::byte*>(source.data()), kPageTokens, kShape, {bits, bits},
                                out.data());
  }
  state.counters["GB/s"] = Counter(static_cast<double>(source.size() * 2) / 1e9, Counter::kIsIterationInvariantRate);
}

BENCHMARK(read_bandwidth)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(fork_join)->UseRealTime();
BENCHMARK(matmul)
    ->ArgNames({"rows", "out", "in"})
    ->ArgsProduct({{1, 8, 64, 512}, {1024, 8192}, {512}})
    ->ArgsProduct({{1, 8, 64, 512}, {512}, {512, 1280}})
    ->ArgsProduct({{1, 8, 64, 512}, {2560}, {512}})
    ->ArgsProduct({{1, 8, 64, 512}, {4096}, {4096}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(attention)
    ->ArgNames({"rows", "context", "bits"})
    ->ArgsProduct({{1, 8, 64, 512}, {4096, 16384}, {16}})
    ->ArgsProduct({{1}, {16384}, {2, 4, 8}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(quantize)->ArgName("bits")->Arg(2)->Arg(4)->Arg(8)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace vericache

BENCHMARK_MAIN();
