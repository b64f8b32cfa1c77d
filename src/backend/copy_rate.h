// How fast a lane copies, by its own clock.
// Called from the thread that drives the lane.
#pragma once

#include <algorithm>
#include <span>

#include "backend/kernels.h"

namespace vericache {

// Bytes copied a second, the best of `times` times.
inline double copy_rate(Kernels& lane, std::span<const BlockCopy> copies, int times) {
  double bytes = 0;
  for (const BlockCopy& copy : copies) {
    bytes += static_cast<double>(copy.bytes);
  }
  double best = 0;
  for (int time = 0; time < times; ++time) {
    const Mark begin = lane.mark();
    lane.copy(copies);
    const Mark end = lane.mark();
    lane.wait(end);
    best = std::max(best, bytes / std::max(lane.seconds(begin, end), 1e-9));
  }
  return best;
}

}  // namespace vericache
