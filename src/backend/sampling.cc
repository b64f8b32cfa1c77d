#include "backend/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/philox.h"
#include "base/check.h"
#include "base/error.h"

namespace vericache {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Ranked {
  float logit;
  TokenId id;
};

bool ranks_before(const Ranked& a, const Ranked& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// What the filters leave: in the order of ranks_before a prefix that ends with `last`, cut further by the distance to
// the best.
struct Survivors {
  Ranked last{kLowest, std::numeric_limits<TokenId>::max()};
  float distance = kInfinity;
};

// Scaled logits below the best one. Never negative; NaN for NaN, +inf for -inf.
struct Distance {
  float best;
  float temperature;
  float operator()(float logit) const { return (best - logit) / temperature; }
};

// Probability relative to the best token's, in fixed point: integer sums do not depend on their order, so the nucleus
// is the same set whichever way it is found. 2^40 leaves room for 2^24 tokens.
constexpr float kWeighedDistance = 28;  // beyond it a weight is 0: exp(-28) * 2^40 < 1
uint64_t weight(float distance) {
  return distance < kWeighedDistance ? static_cast<uint64_t>(std::exp(-distance) * 0x1p40f) : 0;
}

uint64_t needed_mass(float top_p, uint64_t total) {
  const auto needed = static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return std::clamp<uint64_t>(needed, 1, total);
}

// -inf if there is none, or none but NaN.
float largest(std::span<const float> logits) {
  constexpr size_t kLanes = 8;  // independent maxima, so that one comparison need not wait for the one before
  float most[kLanes];
  std::fill(most, most + kLanes, -kInfinity);
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      most[lane] = logits[i + lane] > most[lane] ? logits[i + lane] : most[lane];
    }
  }
  for (; i < logits.size(); ++i) {
    most[0] = logits[i] > most[0] ? logits[i] : most[0];
  }
  return *std::max_element(most, most + kLanes);
}

// Index of the largest logit; 0 if all are NaN or -inf.
TokenId arg_max(std::span<const float> logits) {
  const float best = largest(logits);
  if (best == -kInfinity) {
    return 0;
  }
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

// Leaves the k tokens that rank first in `kept`, unordered but for the last; fewer if fewer are above -inf.
void keep_top_k(std::span<const float> logits, size_t k, std::vector<Ranked>& kept) {
  // Selecting whenever the buffer has doubled costs O(1) a token, whatever the order of the logits.
  const size_t room = std::max<size_t>(2 * k, 1024);
  const auto select = [&] {
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), ranks_before);
    kept.resize(k);
  };
  float bar = -kInfinity;  // k tokens with lower ids are at or above it: an equal logit comes too late
  for (size_t id = 0; id < logits.size(); ++id) {
    if (!(logits[id] > bar)) {
      continue;
    }
    kept.push_back({logits[id], static_cast<TokenId>(id)});
    if (kept.size() == room) {
      select();
      bar = kept.back().logit;
    }
  }
  if (kept.size() > k) {
    select();
  }
}

// The last token of the shortest ranked prefix of `tokens` that weighs `needed` or more; all together weigh at least
// that.
Ranked nucleus_end(std::span<Ranked> tokens, uint64_t needed, const Distance& distance) {
  while (tokens.size() > 1) {
    const size_t half = tokens.size() / 2;
    std::nth_element(tokens.begin(), tokens.begin() + half, tokens.end(), ranks_before);
    uint64_t mass = 0;
    for (const Ranked& token : tokens.first(half)) {
      mass += weight(distance(token.logit));
    }
    if (mass >= needed) {
      tokens = tokens.first(half);
    } else {
      tokens = tokens.subspan(half);
      needed -= mass;
    }
  }
  return tokens.front();
}

// The nucleus of the whole vocabulary: a histogram over distance finds the bucket in which it ends, and only that
// bucket is searched.
Ranked nucleus_end_of_all(std::span<const float> logits, float top_p, const Distance& distance,
                          std::vector<Ranked>& scratch) {
  constexpr int kPerUnit = 8;
  constexpr int kBuckets = static_cast<int>(kWeighedDistance) * kPerUnit;
  const auto bucket_of = [](float far) { return static_cast<int>(far * kPerUnit); };
  uint64_t masses[kBuckets] = {};
  uint64_t total = 0;
  for (const float logit : logits) {
    const float far = distance(logit);
    if (far < kWeighedDistance) {
      const uint64_t mass = weight(far);
      masses[bucket_of(far)] += mass;
      total += mass;
    }
  }
  uint64_t needed = needed_mass(top_p, total);
  int bucket = 0;
  while (masses[bucket] < needed) {
    needed -= masses[bucket++];
  }
  for (size_t id = 0; id < logits.size(); ++id) {
    const float far = distance(logits[id]);
    if (far < kWeighedDistance && bucket_of(far) == bucket) {
      scratch.push_back({logits[id], static_cast<TokenId>(id)});
    }
  }
  return nucleus_end(scratch, needed, distance);
}

// top-k, then top-p, then min-p. Each keeps a prefix of the ranked tokens, so where the prefix ends is all there is to
// find.
Survivors filter(std::span<const float> logits, const Distance& distance, const Sampling& sampling) {
  thread_local std::vector<Ranked> scratch;
  scratch.clear();
  Survivors survivors;
  const bool by_count = sampling.top_k > 0 && static_cast<size_t>(sampling.top_k) < logits.size();
  if (by_count) {
    const auto k = static_cast<size_t>(sampling.top_k);
    keep_top_k(logits, k, scratch);
    survivors.last = *std::max_element(scratch.begin(), scratch.end(), ranks_before);
  }
  if (sampling.top_p < 1) {
    if (by_count) {
      uint64_t total = 0;
      for (const Ranked& token : scratch) {
        total += weight(distance(token.logit));
      }
      survivors.last = nucleus_end(scratch, needed_mass(sampling.top_p, total), distance);
    } else {
      survivors.last = nucleus_end_of_all(logits, sampling.top_p, distance, scratch);
    }
  }
  if (sampling.min_p > 0) {
    survivors.distance = static_cast<float>(-std::log(static_cast<double>(sampling.min_p)));
  }
  return survivors;
}

// The noise of one position: one Philox block serves four neighbouring tokens.
class Noise {
 public:
  Noise(uint64_t seed, int position)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        position_(static_cast<uint32_t>(position)) {}

  uint32_t word(TokenId token) {
    const uint32_t block = static_cast<uint32_t>(token) / 4;
    if (block != block_) {
      words_ = philox4x32({block, position_, 0, 0}, key_);
      block_ = block;
    }
    return words_[static_cast<uint32_t>(token) % 4];
  }

 private:
  PhiloxKey key_;
  uint32_t position_;
  uint32_t block_ = ~0u;  // no token's: ids have 31 bits
  std::array<uint32_t, 4> words_{};
};

// word -> uniform in (0, 1), 2^-33 or more from both ends -> Gumbel.
double gumbel(uint32_t word) {
  return -std::log(-std::log((word + 0.5) * 0x1p-32));
}

// Upper bounds of gumbel(): of any word, and of a word with that many leading ones (1 - u >= 2^-(ones + 1), and -log u
// >= 1 - u).
constexpr double kMostNoise = 22.9;
double noise_bound(uint32_t word) {
  return (std::countl_one(word) + 1) * 0.69315;
}

// `logit` as a float that is not above it, by more than the arithmetic on terms of size `scale` can have erred.
float rounded_down(double logit, double scale) {
  return static_cast<float>(std::max<double>(logit - scale * 1e-6, kLowest));
}

// Below this logit no noise can lift a token to `value`.
float hopeless_below(double value, double temperature) {
  const double logit = (value - kMostNoise) * temperature;
  return rounded_down(logit, std::abs(logit));
}

// A cheap lower bound on the logits of the survivors.
float filtered_below(const Survivors& survivors, const Distance& distance) {
  const double span = static_cast<double>(survivors.distance) * distance.temperature;
  return std::max(survivors.last.logit, rounded_down(distance.best - span, std::abs(distance.best) + span));
}

// What was chosen, and how far the best of the others stands behind it; +inf if it is `reach` or more.
struct Drawn {
  TokenId token;
  double ahead;
};

Drawn gumbel_max(std::span<const float> logits, TokenId best, const Distance& distance, const Survivors& survivors,
                 const Sampling& sampling, int position, double reach) {
  Noise noise(sampling.seed, position);
  const double temperature = sampling.temperature;
  double best_value = logits[static_cast<size_t>(best)] / temperature + gumbel(noise.word(best));
  double second_value = -std::numeric_limits<double>::infinity();
  float floor = std::max(filtered_below(survivors, distance), hopeless_below(best_value - reach, temperature));
  for (size_t i = 0; i < logits.size(); ++i) {
    const float logit = logits[i];
    if (!(logit >= floor)) {  // NaN fails here too
      continue;
    }
    const auto token = static_cast<TokenId>(i);
    if ((logit == survivors.last.logit && token > survivors.last.id) || distance(logit) > survivors.distance) {
      continue;
    }
    const double scaled = logit / temperature;
    const uint32_t word = noise.word(token);
    if (scaled + noise_bound(word) < best_value - reach) {
      continue;
    }
    const double value = scaled + gumbel(word);
    if (value > best_value || (value == best_value && token < best)) {
      best = token;
      second_value = best_value;
      best_value = value;
      floor = std::max(floor, hopeless_below(best_value - reach, temperature));
    } else if (token != best) {
      second_value = std::max(second_value, value);
    }
  }
  return {best, best_value - second_value};
}

}  // namespace

void validate(const Sampling& sampling) {
  if (!(sampling.temperature >= 0) || std::isinf(sampling.temperature)) {
    throw Error("temperature is {}: it must be 0 (greedy) or a positive number, usually at most 2",
                sampling.temperature);
  }
  if (sampling.top_k < 0) {
    throw Error("top_k is {}: it must be 0 (off) or a positive count of tokens", sampling.top_k);
  }
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    throw Error("top_p is {}: it must be above 0 and at most 1 (off)", sampling.top_p);
  }
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) {
    throw Error("min_p is {}: it must be from 0 (off) to 1", sampling.min_p);
  }
}

TokenId choose(std::span<const float> logits, const Sampling& sampling, int position, float* margin) {
  check(!logits.empty() && logits.size() <= size_t{1} << 24, "a row of logits has 1 to 2^24 tokens");
  check(position >= 0, "a position is not negative");
  const TokenId best = arg_max(logits);
  const float most = logits[static_cast<size_t>(best)];
  // A denormal temperature would divide as 0 does where denormals are flushed: greedy as well.
  if (sampling.temperature < std::numeric_limits<float>::min() || !std::isfinite(most)) {
    if (margin != nullptr) {
      const auto chosen = static_cast<size_t>(best);
      const float second = std::max(largest(logits.first(chosen)), largest(logits.subspan(chosen + 1)));
      *margin = std::isfinite(most) ? std::min(most - second, kMostMargin) : 0;
    }
    return best;
  }
  const Distance distance{most, sampling.temperature};
  const double temperature = sampling.temperature;
  const Drawn drawn = gumbel_max(logits, best, distance, filter(logits, distance, sampling), sampling, position,
                                 margin != nullptr ? kMostMargin / temperature : 0);
  if (margin != nullptr) {
    *margin = static_cast<float>(std::min<double>(drawn.ahead * temperature, kMostMargin));
  }
  return drawn.token;
}

}  // namespace vericache
