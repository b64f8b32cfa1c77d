#include "backend/cuda/draft_graphs.h"

#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

// Batch sizes times the steps in which contexts grow: a workload sees some dozens. Beyond this it starts over.
constexpr size_t kMostGraphs = 512;

}  // namespace

void DraftGraphs::run(const DraftShape& shape, cudaStream_t stream, const void* state,
                      void (*body)(const void* state)) {
  auto found = graphs_.find(shape);
  if (found == graphs_.end()) {
    if (graphs_.size() == kMostGraphs) {
      clear();
    }
    graphs_.emplace(shape, nullptr);
    body(state);
    return;
  }
  if (found->second == nullptr) {
    found->second = capture(stream, state, body);
  }
  check_cuda(cudaGraphLaunch(found->second, stream), "launching a draft pass");
}

// Relaxed: other threads pin memory meanwhile, which captures of the other modes forbid.
cudaGraphExec_t DraftGraphs::capture(cudaStream_t stream, const void* state, void (*body)(const void* state)) {
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capturing a draft pass");
  body(state);
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(stream, &graph), "capturing a draft pass");
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaGraphInstantiate(&exec, graph, 0), "making a draft pass's graph");
  check_cuda(cudaGraphDestroy(graph), "freeing a graph");
  return exec;
}

// A graph that still runs is freed when it is done.
void DraftGraphs::clear() {
  for (const auto& [shape, exec] : graphs_) {
    if (exec != nullptr) {
      check_cuda(cudaGraphExecDestroy(exec), "freeing a graph");
    }
  }
  graphs_.clear();
}

}  // namespace vericache::cuda
