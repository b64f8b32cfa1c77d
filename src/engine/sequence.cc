#include "engine/sequence.h"

#include <algorithm>
#include <cstring>

namespace vericache {

QueryWindow::QueryWindow(std::byte* memory, int capacity, int row_queries, int heads)
    : q_(reinterpret_cast<bf16*>(memory)),
      log_sum_exp_(reinterpret_cast<float*>(memory + static_cast<size_t>(capacity) * static_cast<size_t>(row_queries) *
                                                         sizeof(bf16))),
      capacity_(capacity),
      row_queries_(row_queries),
      heads_(heads) {}

size_t QueryWindow::bytes(int capacity, int row_queries, int heads) {
  return static_cast<size_t>(capacity) *
         (static_cast<size_t>(row_queries) * sizeof(bf16) + static_cast<size_t>(heads) * sizeof(float));
}

void QueryWindow::append(const bf16* q, const float* log_sum_exp, int rows, int position) {
  const int taken = std::min(rows, capacity_);
  const int first = position + rows - taken;  // position of the first row that is taken
  int kept = std::clamp(first - position_, 0, rows_);
  if (position_ + kept != first) {
    kept = 0;  // a gap: rows must be consecutive
  }
  const int dropped = std::max(0, kept + taken - capacity_);
  kept -= dropped;
  const auto shift = [&](auto* rows_of, int width) {
    std::memmove(rows_of, rows_of + static_cast<ptrdiff_t>(dropped) * width,
                 sizeof(*rows_of) * static_cast<size_t>(kept) * static_cast<size_t>(width));
  };
  shift(q_, row_queries_);
  shift(log_sum_exp_, heads_);
  std::copy_n(q + static_cast<ptrdiff_t>(rows - taken) * row_queries_, static_cast<ptrdiff_t>(taken) * row_queries_,
              q_ + static_cast<ptrdiff_t>(kept) * row_queries_);
  std::copy_n(log_sum_exp + static_cast<ptrdiff_t>(rows - taken) * heads_, static_cast<ptrdiff_t>(taken) * heads_,
              log_sum_exp_ + static_cast<ptrdiff_t>(kept) * heads_);
  rows_ = kept + taken;
  position_ = first - kept;
}

Attended QueryWindow::attended(int heads, float scale) const {
  return {.heads = heads, .scale = scale, .q = q_, .log_sum_exp = log_sum_exp_, .rows = rows_, .position = position_};
}

void Sequence::restart() {
  tail->clear();
  if (resident) {
    resident->clear();
  }
  if (full) {
    full->set_stored(0);
  }
  for (QueryWindow& window : windows) {
    window.clear();
  }
  drafted.clear();
  verified = 0;
  folded = 0;
  storing = 0;
  std::fill(resident_end.begin(), resident_end.end(), 0);
  ++restarts;
}

void Sequence::release_tail() {
  const int outside = full ? full->stored() * kPageTokens : folded;
  tail->release_before(std::min(folded, outside));
}

}  // namespace vericache
