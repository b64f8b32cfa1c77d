#include "compress/adakv.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace vericache {

void share_budget(std::span<const int> marks, double alpha, int mean, int most, std::span<int> counts) {
  const auto heads = static_cast<int>(counts.size());
  const int64_t all_marks = std::accumulate(marks.begin(), marks.end(), int64_t{0});
  if (all_marks <= 0) {
    std::fill(counts.begin(), counts.end(), mean);
    return;
  }
  std::vector<double> behind(counts.size());  // the wanted share, less what is given
  int left = mean * heads;
  for (size_t head = 0; head < counts.size(); ++head) {
    const double share = static_cast<double>(marks[head]) / static_cast<double>(all_marks);
    const double wanted = mean * ((1 - alpha) + alpha * heads * share);
    counts[head] = std::min(most, static_cast<int>(wanted));
    behind[head] = wanted - counts[head];
    left -= counts[head];
  }
  std::vector<int> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return behind[static_cast<size_t>(a)] > behind[static_cast<size_t>(b)]; });
  while (left > 0) {
    const auto open = std::count_if(counts.begin(), counts.end(), [&](int count) { return count < most; });
    const int each = std::max(1, left / static_cast<int>(open));
    for (const int head : order) {
      int& count = counts[static_cast<size_t>(head)];
      const int more = std::min({each, most - count, left});
      count += more;
      left -= more;
    }
  }
}

std::string AdaKv::name() const {
  const std::string suffix = format_suffix();
  std::string inner = scorer_->name();
  inner.resize(inner.size() - suffix.size());  // it stands behind the parenthesis
  return fmt::format("adakv:alpha={}({}){}", alpha_, inner, suffix);
}

// The scorer's, then the marked tokens of all heads.
size_t AdaKv::scratch_bytes(int max_tokens, const KvShape& shape) const {
  return scorer_->scratch_bytes(max_tokens, shape) +
         static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(scorer_->kept_tokens(max_tokens)) * sizeof(int);
}

void AdaKv::set_scratch(std::byte* memory) {
  ScoringCompressor::set_scratch(memory);
  scorer_->set_scratch(memory);
}

int AdaKv::kept_tokens(int tokens) const {
  return std::min(tokens, kMostShare * scorer_->kept_tokens(tokens));
}

// Each head's last page may be partly filled.
int AdaKv::layer_pages(int tokens, int layer, const KvShape& shape) const {
  const int mean = head_tokens(tokens, layer, shape.layers);
  const int most = std::min(tokens, kMostShare * mean);
  return std::min(shape.kv_heads * (mean + kPageTokens - 1) / kPageTokens,
                  shape.kv_heads * ((most + kPageTokens - 1) / kPageTokens));
}

void AdaKv::count_heads(const FullLayer& full, int tokens, const Attended& seen, std::span<int> counts) const {
  check(seen.notes.report != nullptr, "the marks of the last look have a place");
  const int mean = head_tokens(tokens, full.layer, full.shape.layers);
  share_budget({seen.notes.report, counts.size()}, alpha_, mean, std::min(tokens, kMostShare * mean), counts);
}

void AdaKv::choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) {
  const KvShape& shape = full.shape;
  float* scores = scores_in_scratch(shape);
  score(kernels, full, choice.tokens, seen, scores);
  const int marks = layer_tokens(choice.tokens, full.layer, shape);
  auto* marked = reinterpret_cast<int*>(scratch() + scorer_->scratch_bytes(choice.tokens, shape));
  kernels.choose_best({.scores = scores,
                       .rows = 1,
                       .n = shape.kv_heads * choice.tokens,
                       .count = marks,
                       .chosen = marked,
                       .stride = marks});
  kernels.count_rows(marked, marks, shape.kv_heads, choice.tokens, seen.notes.report);
  keep_best(kernels, scores, shape, choice);
}

}  // namespace vericache
