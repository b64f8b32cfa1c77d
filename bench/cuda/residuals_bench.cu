// Times encode and decode of pages as they cross the wire: one layer of a 31k-token sequence of an 8B model. Medians;
// bytes are those of the bf16 pages.
//   residuals_bench [NAME]    all formats, or those whose name begins so
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

constexpr KvShape kShape{.layers = 1, .kv_heads = 8, .head_dim = 128};
constexpr int kPages = 488;
constexpr int kSets = 4;  // walked through, so that the caches never hold what is read

__global__ void fill_kernel(uint16_t* values, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9u;
    x ^= x >> 29;
    float sum = 0;  // four uniforms: a bell of deviation 1
    for (int part = 0; part < 4; ++part) {
      sum += static_cast<float>(x >> (16 * part) & 0xffff) * 0x1p-15f - 1;
    }
    values[i] = static_cast<uint16_t>(__float_as_uint(sum * 0.866f) >> 16);
  }
}

template <typename T>
T* allocate(size_t count) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

double median_us(const std::function<void(int)>& launch) {
  constexpr int kRounds = 15;
  cudaEvent_t begin;
  cudaEvent_t end;
  check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    check_cuda(cudaEventRecord(begin), "cudaEventRecord");
    for (int set = 0; set < kSets; ++set) {
      launch(set);
    }
    check_cuda(cudaEventRecord(end), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (round >= 2) {
      times.push_back(static_cast<double>(ms) * 1000 / kSets);
    }
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

struct Memory {
  size_t page = page_bytes(kShape);
  std::byte* plain = allocate<std::byte>(kSets * kPages * page);
  std::byte* back = allocate<std::byte>(kSets * kPages * page);
  std::byte* packed = allocate<std::byte>(kSets * kPages * page);
  std::byte* coded = allocate<std::byte>(kSets * kPages * residual_bound(kShape));
  uint32_t* sizes = allocate<uint32_t>(EncodeArgs::kMostPages * kShape.kv_heads);
  uint32_t* ends = nullptr;  // (kSets, kPages), of the host
  uint32_t* device_ends = allocate<uint32_t>(kSets * kPages);
  uint32_t* scratch_ends = nullptr;
  uint64_t* checksums = nullptr;  // (kSets, kPages), of the host
  uint32_t* mismatches = nullptr;
  PageProof* proofs = allocate<PageProof>(kPages + 1);
  Memory() {
    check_cuda(cudaMallocHost(&checksums, kSets * kPages * sizeof(uint64_t)), "cudaMallocHost");
    check_cuda(cudaMallocHost(&mismatches, sizeof(uint32_t)), "cudaMallocHost");
    *mismatches = 0;
    check_cuda(cudaMemset(proofs, 0, (kPages + 1) * sizeof(PageProof)), "cudaMemset");
    check_cuda(cudaMallocHost(&ends, kSets * kPages * sizeof(uint32_t)), "cudaMallocHost");
    check_cuda(cudaMallocHost(&scratch_ends, EncodeArgs::kMostPages * sizeof(uint32_t)), "cudaMallocHost");
  }
};

KvView view_of(const KvFormat& format, std::byte* first) {
  std::vector<std::byte*> table;
  for (int head = 0; head < kShape.kv_heads; ++head) {
    for (int page = 0; page < kPages; ++page) {
      table.push_back(first + static_cast<size_t>(page * kShape.kv_heads + head) * head_page_bytes(format, kShape));
    }
  }
  auto* device = allocate<std::byte*>(table.size());
  check_cuda(cudaMemcpy(device, table.data(), table.size() * sizeof(std::byte*), cudaMemcpyHostToDevice), "upload");
  return {.format = format, .head_pages = device, .page_stride = kPages, .tokens = nullptr};
}

void bench(const char* name, const KvFormat& format, ResidualCode code, const Memory& m) {
  const size_t bytes = kPages * m.page;
  std::vector<KvView> resident;
  for (int set = 0; set < kSets; ++set) {
    const auto s = static_cast<size_t>(set);
    const KvView plain = view_of({}, m.plain + s * bytes);
    resident.push_back(view_of(format, m.packed + s * bytes));
    quantize({.shape = kShape,
              .full = {.past = plain, .tail = {}, .tail_position = kPages * kPageTokens},
              .first = 0,
              .count = kPages,
              .out = resident.back()},
             nullptr);
  }
  const auto encode_some = [&](int set, int first, std::byte* out) {
    std::vector<const std::byte*> pages;
    for (int page = first; page < std::min(kPages, first + EncodeArgs::kMostPages); ++page) {
      pages.push_back(m.plain + static_cast<size_t>(set * kPages + page) * m.page);
    }
    encode({.shape = kShape,
            .code = code,
            .pages = pages,
            .resident = resident[static_cast<size_t>(set)],
            .first = first,
            .sizes = m.sizes,
            .out = out,
            .ends = m.scratch_ends},
           nullptr);
    return static_cast<int>(pages.size());
  };
  size_t coded_bytes = 0;
  for (int set = 0; set < kSets; ++set) {
    std::byte* out = m.coded + static_cast<size_t>(set) * kPages * residual_bound(kShape);
    uint32_t units = 0;
    for (int first = 0; first < kPages;) {
      const int count = encode_some(set, first, out + units * kResidualUnit);
      check_cuda(cudaDeviceSynchronize(), "encode");
      for (int i = 0; i < count; ++i) {
        m.ends[set * kPages + first + i] = units + m.scratch_ends[i];
      }
      units += m.scratch_ends[count - 1];
      first += count;
    }
    coded_bytes = units * kResidualUnit;
  }
  check_cuda(cudaMemcpy(m.device_ends, m.ends, kSets * kPages * sizeof(uint32_t), cudaMemcpyHostToDevice), "upload");
  const auto decode_set = [&](int set, bool proves) {
    decode({.shape = kShape,
            .code = code,
            .in = m.coded + static_cast<size_t>(set) * kPages * residual_bound(kShape),
            .ends = m.device_ends + set * kPages,
            .count = kPages,
            .resident = resident[static_cast<size_t>(set)],
            .out = m.back + static_cast<size_t>(set) * bytes,
            .checksums = proves ? m.checksums + set * kPages : nullptr,
            .mismatches = m.mismatches},
           m.proofs, nullptr);
  };
  for (int set = 0; set < kSets; ++set) {
    checksum({.first = m.plain + static_cast<size_t>(set) * bytes, .stride = m.page, .bytes = m.page, .count = kPages},
             m.checksums + set * kPages, nullptr);
  }
  const double decode_us = median_us([&](int set) { decode_set(set, false); });
  const double proved_us = median_us([&](int set) { decode_set(set, true); });
  std::vector<std::byte> before(bytes);
  std::vector<std::byte> after(bytes);
  check_cuda(cudaMemcpy(before.data(), m.plain, bytes, cudaMemcpyDeviceToHost), "download");
  check_cuda(cudaMemcpy(after.data(), m.back, bytes, cudaMemcpyDeviceToHost), "download");
  const double encode_us = median_us([&](int set) { encode_some(set, 0, m.coded); });
  const double encode_bytes = static_cast<double>(EncodeArgs::kMostPages * m.page);
  std::printf(
      "%-10s %7.3f bits a value  decode %8.1f us %7.0f GB/s of output, proved %6.1f us   encode %4.0f GB/s   %s\n",
      name, 8.0 * static_cast<double>(coded_bytes) / (static_cast<double>(bytes) / 2), decode_us,
      static_cast<double>(bytes) / decode_us * 1e-3, proved_us, encode_bytes / encode_us * 1e-3,
      before == after && *m.mismatches == 0 ? "every bit came back" : "NOT WHAT WAS ENCODED");
}

}  // namespace
}  // namespace vericache::cuda

int main(int argc, char** argv) {
  using namespace vericache;
  const std::string_view wanted = argc > 1 ? argv[1] : "";
  const cuda::Memory memory;
  cuda::fill_kernel<<<1024, 256>>>(reinterpret_cast<uint16_t*>(memory.plain),
                                   cuda::kSets * cuda::kPages * memory.page / 2);
  const auto bench = [&](const std::string& name, const KvFormat& format, ResidualCode code = ResidualCode::resident) {
    if (name.starts_with(wanted)) {
      cuda::bench(name.c_str(), format, code, memory);
    }
  };
  for (const int bits : {9, 8, 7, 6}) {
    bench("plane " + std::to_string(bits), {bits, bits, KvCode::plane});
  }
  for (const int bits : {4, 3, 2}) {
    bench("kvquant " + std::to_string(bits), {bits, bits, KvCode::nuq, false, 10});
  }
  bench("int8", {8, 8, KvCode::int8});
  bench("fp8", {8, 8, KvCode::fp8});
  for (const int bits : {8, 6, 4, 3, 2}) {
    bench("kivi " + std::to_string(bits), {bits, bits});
  }
  for (const int bits : {8, 6, 4, 3, 2}) {
    bench("quarot " + std::to_string(bits), {bits, bits, KvCode::affine, true});
  }
  bench("lossless", {4, 4}, ResidualCode::lossless);
  return 0;
}
