// Scores of tokens that the CPU backend reads off keys, values and the distribution of queries: as Kernels of the same
// names. Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include "backend/cpu/simd.h"
#include "backend/kernels.h"
#include "base/threads.h"

namespace vericache {

class TokenScores {
 public:
  TokenScores(PanelProduct product, ThreadPool& pool) : product_(product), pool_(pool) {}

  void keys(const KeyScoreArgs& args);
  void expected(const ExpectedArgs& args);

 private:
  PanelProduct product_;
  ThreadPool& pool_;
};

}  // namespace vericache
