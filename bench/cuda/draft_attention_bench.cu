// Draft attention over resident KV of 32k tokens in every width, 8B shape: time and bytes of resident KV per second,
// random data in scattered pages, several layers in turn so that no cache holds them; then of pages that it chooses, of
// which the bounds of all and the chosen ones are read. Then the ops that make resident KV.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "backend/cuda/ops.h"
#include "backend/cuda/packed_layout.h"

namespace vericache::cuda {
namespace {

constexpr KvShape kShape{.layers = 1, .kv_heads = 8, .head_dim = 128};
constexpr int kHeads = 32;
constexpr int kPages = 512;  // 32k tokens
constexpr int kTailTokens = 40;
constexpr size_t kTestedBytes = size_t{1} << 30;  // read in turn
constexpr int kRepeats = 15;

template <typename T>
class Array {
 public:
  explicit Array(size_t count) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "memory");
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check_cuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

__device__ inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
// A pair of bf16, each about `size`, of either sign or none.
__device__ inline uint32_t random_pair(uint32_t seed, uint32_t size, bool positive) {
  const uint32_t bits = mixed(seed);
  return (bits & (positive ? 0x007f007fu : 0x807f807fu)) | size << 16 | size;
}

struct PartBytes {
  int groups;
  int affine;  // of these scales and minima, half and half
  int all;
  KvPart part;
};

// Pages of random codes; scales about 1 / 8, minima about 1, bases 126 and 127, outliers about 4 in every 97th place.
__global__ void fill_kernel(uint32_t* words, size_t count, PartBytes keys, PartBytes values, int bounds) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const int in_page = static_cast<int>(i * 4 % static_cast<size_t>(keys.all + values.all + bounds));
    const bool of_keys = in_page < keys.all;
    const PartBytes& part = of_keys ? keys : values;
    const int at = of_keys ? in_page : in_page - keys.all;
    const auto seed = static_cast<uint32_t>(i);
    if (in_page >= keys.all + values.all) {
      words[i] = random_pair(seed, 0x3f80u, false);
    } else if (at >= part.groups && part.groups > 0) {
      words[i] = mixed(seed);
    } else if (part.part.code == KvCode::plane || part.part.code == KvCode::fp8) {
      words[i] = part.groups == 0 ? random_pair(seed, 0x3f80u, false) : 0x7e7e7e7eu | (mixed(seed) & 0x01010101u);
    } else if (part.part.code == KvCode::int8) {
      words[i] = random_pair(seed, 0x3c00u, true);
    } else if (part.part.code == KvCode::nuq && at >= part.affine + kNuqLevels) {
      words[i] =
          static_cast<uint32_t>((at - part.affine - kNuqLevels) / 4 * 97) | (mixed(seed) & 0x7fu) << 16 | 0x40800000u;
    } else if (part.part.code == KvCode::nuq && at >= part.affine) {
      words[i] = mixed(seed) & 0x7f7f7f7fu;
    } else if (part.groups == 0 || at >= part.affine / 2) {
      words[i] = random_pair(seed, 0x3f80u, false);
    } else {
      words[i] = random_pair(seed, 0x3e00u, true);
    }
  }
}
PartBytes part_bytes(const Pieces& pieces, const KvPart& part) {
  const int levels = part.code == KvCode::nuq ? kNuqLevels + 4 * outlier_slots(part, kShape.head_dim) : 0;
  return {pieces.group_bytes, pieces.group_bytes - levels, bytes_of(pieces), part};
}

// Head pages of one format in random order.
struct Store {
  Store(const KvFormat& format, size_t pages, uint32_t seed)
      : page_bytes(head_page_bytes(format, kShape)), memory(pages * page_bytes), table(pages) {
    fill_kernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(memory.data()), pages * page_bytes / 4,
                               part_bytes(key_pieces(format.key(), kShape.head_dim), format.key()),
                               part_bytes(value_pieces(format.value(), kShape.head_dim), format.value()),
                               static_cast<int>(head_page_bytes(format, kShape) - key_bounds_offset(format, kShape)));
    check_cuda(cudaGetLastError(), "fill");
    std::vector<std::byte*> places(pages);
    for (size_t i = 0; i < pages; ++i) {
      places[i] = memory.data() + i * page_bytes;
    }
    std::shuffle(places.begin(), places.end(), std::mt19937_64(seed));
    check_cuda(cudaMemcpy(table.data(), places.data(), pages * sizeof(std::byte*), cudaMemcpyHostToDevice), "table");
  }
  KvView view(const KvFormat& format, size_t first, int stride, const int* tokens) const {
    return {.format = format, .head_pages = table.data() + first, .page_stride = stride, .tokens = tokens};
  }
  size_t page_bytes;
  Array<std::byte> memory;
  Array<std::byte*> table;
};

// Median microseconds of one of `count` calls of body(i) in a row.
double median_us(int count, const std::function<void(int)>& body) {
  cudaEvent_t events[2];
  check_cuda(cudaEventCreate(&events[0]), "event");
  check_cuda(cudaEventCreate(&events[1]), "event");
  std::vector<double> times;
  for (int repeat = 0; repeat < kRepeats + 2; ++repeat) {
    check_cuda(cudaEventRecord(events[0], nullptr), "event");
    for (int i = 0; i < count; ++i) {
      body(i);
    }
    check_cuda(cudaEventRecord(events[1], nullptr), "event");
    check_cuda(cudaEventSynchronize(events[1]), "event");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, events[0], events[1]), "event");
    if (repeat >= 2) {
      times.push_back(1000.0 * static_cast<double>(ms) / count);
    }
  }
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  cudaEventDestroy(events[0]);
  cudaEventDestroy(events[1]);
  return times[kRepeats / 2];
}

const char* name_of(const KvFormat& format) {
  switch (format.code) {
    case KvCode::plane:
      return "plane";
    case KvCode::fp8:
      return "fp8";
    case KvCode::int8:
      return "int8";
    case KvCode::nuq:
      return "kvquant";
    default:
      return format.rotated ? "affine, rotated" : "affine";
  }
}

void bench_attention(const KvFormat& format, int batch) {
  const size_t head_pages = static_cast<size_t>(batch) * static_cast<size_t>(kShape.kv_heads);
  const size_t layer_bytes = head_pages * kPages * head_page_bytes(format, kShape);
  const int layers = static_cast<int>(std::max<size_t>(2, kTestedBytes / layer_bytes));
  const Store past(format, static_cast<size_t>(layers) * head_pages * kPages, 1);
  const Store tail({}, static_cast<size_t>(layers) * head_pages, 2);
  const Array<int> tokens(std::vector<int>(static_cast<size_t>(kShape.kv_heads), kPages * kPageTokens));
  std::vector<SequenceRows> rows;
  for (int layer = 0; layer < layers; ++layer) {
    for (int i = 0; i < batch; ++i) {
      SequenceRows row{.first_row = i, .rows = 1, .position = kPages * kPageTokens + kTailTokens - 1};
      const auto first = static_cast<size_t>((layer * batch + i) * kShape.kv_heads);
      row.kv = {past.view(format, first * kPages, kPages, tokens.data()), tail.view({}, first, 1, nullptr),
                kPages * kPageTokens};
      rows.push_back(row);
    }
  }
  const Array<SequenceRows> staged(rows);
  const Store q({}, head_pages, 3);  // random bf16, more than enough
  const Array<bf16> out(static_cast<size_t>(batch * kHeads * kShape.head_dim));
  const Limits limits{
      .shape = kShape, .heads = kHeads, .max_rows = batch, .max_sequences = batch, .max_context_tokens = 1 << 16};
  const Array<std::byte> scratch(draft_attention_scratch_bytes(limits));
  const Array<int> counts(std::vector<int>(draft_attention_counts(limits)));
  const StagedPass pass{.rows = batch, .count = batch, .draft = true, .sequences = staged.data()};
  AttentionArgs args{.shape = kShape, .heads = kHeads, .scale = 0.0883883f};
  args.q = reinterpret_cast<const bf16*>(q.memory.data());
  args.out = out.data();
  const int read_pages = format.choice.bounded ? format.choice.pages_of(kPages) : kPages;
  const double us = median_us(std::max(layers, 32), [&](int i) {
    args.layer = i % layers;
    draft_attention(args, format, pass, kPages * kPageTokens + kTailTokens, read_pages * kPageTokens + kTailTokens,
                    reinterpret_cast<float*>(scratch.data()), counts.data(), nullptr);
  });
  const size_t bounds = format.choice.bounded ? kPages * key_bounds_bytes(kShape) : 0;
  const size_t read_bytes = head_pages * (bounds + static_cast<size_t>(read_pages) * key_bounds_offset(format, kShape));
  std::printf("%-14s %2d bits K, %2d bits V, batch %2d: %8.1f us  %7.0f GB/s", name_of(format), format.key_bits,
              format.value_bits, batch, us, static_cast<double>(read_bytes) / us * 1e-3);
  if (format.choice.bounded) {
    std::printf("  quest, budget %g: %.1f of %.1f MB read", format.choice.budget, static_cast<double>(read_bytes) / 1e6,
                static_cast<double>(layer_bytes) / 1e6);
  }
  std::printf("\n");
}

void bench_ops() {
  const auto heads = static_cast<size_t>(kShape.kv_heads);
  const int layers = 4;
  const Store full({}, layers * heads * kPages, 4);
  const Array<int> tokens(std::vector<int>(heads, kPages * kPageTokens));
  const auto kv = [&](int layer) {
    return LayerKv{
        full.view({}, static_cast<size_t>(layer) * heads * kPages, kPages, tokens.data()), {}, kPages * kPageTokens};
  };
  const double full_bytes = static_cast<double>(heads) * kPages * static_cast<double>(full.page_bytes);
  for (const KvFormat& format :
       {KvFormat{2, 2}, KvFormat{4, 4}, KvFormat{8, 8}, KvFormat{6, 6}, KvFormat{8, 8, KvCode::plane},
        KvFormat{4, 4, KvCode::affine, true}, KvFormat{3, 3, KvCode::nuq, false, 10}}) {
    const Store packed(format, layers * heads * kPages, 5);
    const double us = median_us(16, [&](int i) {
      quantize({.shape = kShape,
                .full = kv(i % layers),
                .count = kPages,
                .out = packed.view(format, static_cast<size_t>(i % layers) * heads * kPages, kPages, nullptr)},
               nullptr);
    });
    std::printf("quantize, %-14s %d bits, 32k tokens: %8.1f us  %7.0f GB/s of bf16\n", name_of(format), format.key_bits,
                us, full_bytes / us * 1e-3);
  }
  const int kept = kPages * kPageTokens / 4;
  std::vector<int> chosen;
  std::mt19937 engine(6);
  for (size_t head = 0; head < heads; ++head) {
    for (int i = 0; i < kept; ++i) {
      chosen.push_back(4 * i + static_cast<int>(engine() % 4));
    }
  }
  const Array<int> device_chosen(chosen);
  const Store gathered({}, layers * heads * kPages / 4, 7);
  const double gather_us = median_us(16, [&](int i) {
    const size_t first = static_cast<size_t>(i % layers) * heads * kPages / 4;
    gather({.shape = kShape,
            .full = kv(i % layers),
            .chosen = device_chosen.data(),
            .stride = kept,
            .count = kept,
            .out = gathered.view({}, first, kPages / 4, nullptr)},
           nullptr);
  });
  std::printf("gather of every fourth token:      %8.1f us  %7.0f GB/s of bf16 written\n", gather_us,
              full_bytes / 4 / gather_us * 1e-3);
  const int rows = 64;
  const Array<float> log_sum_exp(std::vector<float>(size_t{rows} * kHeads, 12.0f));
  const Array<float> mass(heads * kPages * kPageTokens);
  const double mass_us = median_us(16, [&](int i) {
    attention_mass({.shape = kShape,
                    .heads = kHeads,
                    .scale = 0.0883883f,
                    .queries = {reinterpret_cast<bf16*>(gathered.memory.data()), log_sum_exp.data(), rows},
                    .rows = rows,
                    .position = kPages * kPageTokens - rows,
                    .kv = kv(i % layers),
                    .tokens = kPages * kPageTokens,
                    .mass = mass.data(),
                    .stride = kPages * kPageTokens},
                   nullptr);
  });
  std::printf("attention mass of %d rows:         %8.1f us  %7.0f GB/s of keys\n", rows, mass_us,
              full_bytes / 2 / mass_us * 1e-3);
}

void bench_all() {
  for (const KvFormat format :
       {KvFormat{2, 2}, KvFormat{4, 4}, KvFormat{8, 8}, KvFormat{16, 16}, KvFormat{4, 2}, KvFormat{3, 3},
        KvFormat{6, 6}, KvFormat{8, 8, KvCode::plane}, KvFormat{6, 6, KvCode::plane}, KvFormat{7, 7, KvCode::plane},
        KvFormat{9, 9, KvCode::plane}, KvFormat{8, 8, KvCode::fp8}, KvFormat{8, 8, KvCode::int8},
        KvFormat{4, 4, KvCode::affine, true}, KvFormat{2, 2, KvCode::nuq, false, 10},
        KvFormat{3, 3, KvCode::nuq, false, 10}, KvFormat{4, 4, KvCode::nuq, false, 10},
        KvFormat{4, 4, KvCode::nuq, false, 0}}) {
    for (const int batch : {1, 4, 16}) {
      bench_attention(format, batch);
    }
  }
  for (KvFormat format : {KvFormat{16, 16}, KvFormat{4, 4}}) {
    format.choice = {.bounded = true, .budget = 0.1};
    for (const int batch : {1, 4, 16}) {
      bench_attention(format, batch);
    }
  }
  bench_ops();
}

}  // namespace
}  // namespace vericache::cuda

int main() {
  vericache::cuda::bench_all();
}
