// How rotated keys are rounded, from queries: as Kernels::fit_rounding.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include "backend/kernels.h"
#include "base/threads.h"

namespace vericache {

void fit_key_rounding(const RoundingArgs& args, ThreadPool& pool);

}  // namespace vericache
