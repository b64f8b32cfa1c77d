// Scores of the CPU backend: attention mass pooled over neighbours, and the best tokens of each KV head.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/kernels.h"
#include "base/threads.h"

namespace vericache {

// The `count` best of n scores, ascending by index, as BestArgs says. keys (n): scratch.
void choose_best_of_row(const float* scores, int n, int count, uint64_t* keys, int* chosen);

class Scores {
 public:
  Scores(ThreadPool& pool, int max_tokens, int kv_heads);

  // As Kernels of the same names.
  void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores);
  void choose_best(const BestArgs& args);
  void mean_rows(float* values, int rows, int n);
  void count_rows(const int* chosen, int count, int rows, int n, int* counts);

 private:
  ThreadPool& pool_;
  size_t max_tokens_;
  std::vector<uint64_t> keys_;  // (threads, max_tokens), or one row as long as those of all KV heads
};

}  // namespace vericache
