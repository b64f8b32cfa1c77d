#include "compress/scoring.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compress/paged.h"

namespace vericache {
namespace {

// The `count` best of the scores, ascending by token.
void choose_best(std::span<const float> scores, int count, std::vector<int>& chosen) {
  chosen.resize(scores.size());
  std::iota(chosen.begin(), chosen.end(), 0);
  if (count < static_cast<int>(scores.size())) {
    std::nth_element(chosen.begin(), chosen.begin() + count, chosen.end(), [&](int a, int b) {
      const float left = scores[static_cast<size_t>(a)];
      const float right = scores[static_cast<size_t>(b)];
      return left != right ? left > right : a > b;
    });
    chosen.resize(static_cast<size_t>(count));
    std::sort(chosen.begin(), chosen.end());
  }
}

}  // namespace

int Budget::tokens_of(int tokens) const {
  const int wanted = amount <= 1 ? static_cast<int>(std::ceil(amount * tokens)) : static_cast<int>(amount);
  return std::min(tokens, std::max(wanted, least));
}

std::string ScoringCompressor::format_suffix() const {
  return format_.exact() ? "" : "+" + PagedCompressor(format_).name();
}

size_t ScoringCompressor::wire_bytes(int tokens, const KvShape& shape) const {
  const int whole = tokens / kPageTokens * kPageTokens;
  const int crossing = format_.exact() ? whole - kept_tokens(whole) : whole;
  return static_cast<size_t>(crossing) * (page_bytes(shape) / kPageTokens) * static_cast<size_t>(shape.layers);
}

bool ScoringCompressor::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                                 ResidentLayer& out) {
  const int tokens = fresh.end;
  const int heads = full.shape.kv_heads;
  scores_.resize(static_cast<size_t>(heads) * static_cast<size_t>(tokens));
  score(kernels, full, tokens, seen, scores_);
  const int count = kept_tokens(tokens);
  for (int head = 0; head < heads; ++head) {
    if (!out.resize(head, count)) {
      return false;
    }
  }
  kernels.parallel_for(heads, [&](int head) {
    // A NaN score (the model overflowed) would break the order: it counts as worthless.
    const std::span<float> scores(scores_.data() + static_cast<size_t>(head) * static_cast<size_t>(tokens),
                                  static_cast<size_t>(tokens));
    for (float& value : scores) {
      value = std::isnan(value) ? -INFINITY : value;
    }
    choose_best(scores, count, out.positions(head));
    keep(kernels, full, head, out);
  });
  return true;
}

// Gathers the chosen tokens of one head into its resident pages.
void ScoringCompressor::keep(Kernels& kernels, const FullLayer& full, int head, ResidentLayer& out) const {
  const std::vector<int>& chosen = out.positions(head);
  const KvShape& shape = full.shape;
  alignas(64) thread_local std::vector<std::byte> gathered;
  gathered.resize(head_page_bytes(KvFormat{}, shape) + 64);
  std::byte* page_of_kept = gathered.data() + (64 - reinterpret_cast<uintptr_t>(gathered.data()) % 64) % 64;
  for (size_t first = 0; first < chosen.size(); first += kPageTokens) {
    const int count = static_cast<int>(std::min<size_t>(kPageTokens, chosen.size() - first));
    std::byte* target = out.head_page(head, static_cast<int>(first) / kPageTokens);
    std::byte* gather = format_.exact() ? target : page_of_kept;
    if (count < kPageTokens) {
      std::fill_n(gather, head_page_bytes(KvFormat{}, shape), std::byte{0});
    }
    for (int i = 0; i < count; ++i) {
      const int token = chosen[first + static_cast<size_t>(i)];
      copy_token(full.head_page(head, token / kPageTokens), token % kPageTokens, gather, i, shape);
    }
    if (!format_.exact()) {
      kernels.quantize_head_page(gather, count, shape, format_, target);
    }
  }
}

}  // namespace vericache
