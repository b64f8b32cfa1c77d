// Scores of the CPU backend: attention mass pooled over neighbours, and the best tokens of each KV head.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include <cstdint>
#include <vector>

#include "base/threads.h"

namespace vericache {

class Scores {
 public:
  Scores(ThreadPool& pool, int max_tokens);

  // As Kernels of the same names.
  void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores);
  void choose_best(const float* scores, int rows, int n, int count, int* chosen, int stride);

 private:
  ThreadPool& pool_;
  size_t max_tokens_;
  std::vector<uint64_t> keys_;  // (threads, max_tokens)
};

}  // namespace vericache
