// The CUDA backend: every op of kernels.h on four lanes of one GPU. The object that make_cuda_kernels returns is the
// lane of full passes and owns the others. Built once by the factory; called from the thread that drives the engine.
#pragma once

#include <memory>

#include "backend/kernels.h"

namespace vericache::cuda {

// Scratch and staging are sized from these at construction; they lie outside the Device's budget.
struct CudaOptions {
  KvShape shape{};
  int heads = 0;
  int max_rows = 0;            // of one pass
  int max_context_tokens = 0;  // of one sequence
  int max_sequences = 0;       // of one pass
  bool graphs = true;          // off: draft passes are enqueued op by op too, for debuggers and sanitizers
  bool exact_products = true;  // off: full passes multiply as drafts do, for measuring what exactness costs
};

// Error when there is no GPU, or for a shape that the kernels do not take.
std::unique_ptr<Kernels> make_cuda_kernels(const CudaOptions& options);

}  // namespace vericache::cuda
