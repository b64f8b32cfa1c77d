// DraftGraphs: draft passes of a lane as captured graphs, one per shape: a pass of some hundreds of launches becomes
// one. Called from the engine's thread.
#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <map>

#include "backend/kv_view.h"

namespace vericache::cuda {

// All that the launches of a draft pass depend on.
struct DraftShape {
  int rows = 0;
  int sequences = 0;
  int logit_rows = 0;
  int layers = 0;
  int longest_tokens = 0;
  int read_tokens = 0;
  const void* buffers = nullptr;
  KvFormat format{};
  auto operator<=>(const DraftShape&) const = default;
};

class DraftGraphs {
 public:
  DraftGraphs() = default;
  ~DraftGraphs() { clear(); }
  DraftGraphs(const DraftGraphs&) = delete;
  DraftGraphs& operator=(const DraftGraphs&) = delete;

  // The first pass of a shape runs as it is, which loads its kernels; the second is captured, and replayed from then
  // on.
  void run(const DraftShape& shape, cudaStream_t stream, const void* state, void (*body)(const void* state));
  void clear();

 private:
  static cudaGraphExec_t capture(cudaStream_t stream, const void* state, void (*body)(const void* state));

  std::map<DraftShape, cudaGraphExec_t> graphs_;  // null: seen once
};

}  // namespace vericache::cuda
