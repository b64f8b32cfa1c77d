// The least device memory in which an engine can work.
// Pure arithmetic; any thread.
#pragma once

#include <cstddef>

#include "base/error.h"
#include "engine/memory_plan.h"
#include "test_device.h"

namespace vericache::test {

// Bytes that hold one sequence.
inline size_t least_budget(const Transformer& model, const Compressor* compressor, const EngineOptions& options) {
  size_t low = 0;
  size_t high = size_t{1} << 34;
  while (low + 1 < high) {
    const size_t middle = (low + high) / 2;
    try {
      plan_memory(model, compressor, options, *make_test_device(middle));
      high = middle;
    } catch (const Error&) {
      low = middle;
    }
  }
  return high;
}

}  // namespace vericache::test
