// What the KV tests share: pools that own their blocks, a lane, random bf16 page sets, random choices of tokens.
// Each test owns its own, on its thread.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "backend/device.h"
#include "backend/factory.h"
#include "kv/full_kv.h"
#include "kv/page_pool.h"
#include "kv/tail.h"

namespace vericache::test {

struct OwnedPool {
  std::unique_ptr<Device> memory;
  PagePool pool;
  OwnedPool(size_t block_bytes, int count)
      : memory(make_cpu_device((block_bytes + 4096) * static_cast<size_t>(count + 1))),
        pool(memory->allocate(block_bytes * static_cast<size_t>(count), "test"), block_bytes, count) {}
};

// For stores that enqueue what they do: the smallest kernels of a CPU.
inline std::unique_ptr<Kernels> make_lane() {
  return make_kernels({.device = DeviceKind::cpu,
                       .isa = "portable",
                       .threads = 1,
                       .shape = {.layers = 1, .kv_heads = 1, .head_dim = 16},
                       .heads = 1,
                       .max_rows = 1,
                       .max_context_tokens = kPageTokens,
                       .max_sequences = 1});
}

// The pages of every layer for 64 tokens, as a tail holds them: random finite bf16.
inline std::vector<std::byte> random_page_set(const KvShape& shape, std::mt19937_64& random) {
  std::vector<std::byte> set(page_set_bytes(shape));
  auto* values = reinterpret_cast<bf16*>(set.data());
  for (size_t i = 0; i < set.size() / sizeof(bf16); ++i) {
    values[i] = to_bf16(static_cast<float>(static_cast<int64_t>(random() % 20001) - 10000) * 1e-3f);
  }
  return set;
}

// Ascending tokens of [0, tokens), each with the given chance.
inline std::vector<int> random_tokens(int tokens, int percent, std::mt19937_64& random) {
  std::vector<int> chosen;
  for (int token = 0; token < tokens; ++token) {
    if (static_cast<int>(random() % 100) < percent) {
      chosen.push_back(token);
    }
  }
  return chosen;
}

}  // namespace vericache::test
