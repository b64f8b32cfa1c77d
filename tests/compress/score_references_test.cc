// What droppers score and keep, against values that tools/score_references.py computed from the papers' formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "compress/compress_harness.h"
#include "compress/scoring.h"

namespace vericache::test {
namespace {

constexpr KvShape kShape{.layers = 1, .kv_heads = 2, .head_dim = 32};
constexpr int kHeads = 4;
constexpr int kTokens = 256;
constexpr int kRepeated = 192;

// Value `index` of a stream: a multiple of 1/64 in [-2, 2), as the script draws it (splitmix64).
float uniform(uint64_t stream, uint64_t index) {
  uint64_t x = (stream << 32) + index + 1;
  x *= 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return static_cast<float>(static_cast<int>(x >> 56) - 128) / 64;
}

// The layer of the script, and all its queries in one ring.
class ReferenceLayer {
 public:
  ReferenceLayer() : full_(kShape, kHeads, 1) {
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (int token = 0; token < kTokens; ++token) {
        float key[kShape.head_dim];
        float value[kShape.head_dim];
        for (int d = 0; d < kShape.head_dim; ++d) {
          const auto index = static_cast<uint64_t>((head * kTokens + token) * kShape.head_dim + d);
          key[d] = uniform(1, index) / static_cast<float>((token % 7 == 0 ? 4 : 1) * (head + 1));
          value[d] = uniform(2, index) / (token % 11 == 5 ? 2.0f : 1.0f);
        }
        full_.write(head, token, key, value);
      }
    }
    for (uint64_t i = 0; i < uint64_t{kTokens * kHeads * kShape.head_dim}; ++i) {
      q_.push_back(to_bf16(uniform(3, i)));
    }
    for (int row = 0; row < kTokens * kHeads; ++row) {
      log_sum_exp_.push_back(log_sum_exp(row / kHeads, row % kHeads));
    }
  }

  // Queries of the positions from `position` on, as an engine shows them to this compressor.
  Attended seen(int position, int end, const Notes& notes) {
    return {.heads = kHeads,
            .scale = full_.scale(),
            .queries = {q_.data(), log_sum_exp_.data(), kTokens},
            .rows = end - position,
            .position = position,
            .rope = full_.rope(2 * kTokens),
            .notes = notes};
  }
  Attended seen_by(Compressor& compressor, Notes& notes) {
    for (const int end : {100, 101, kTokens}) {
      if (compressor.observes()) {
        compressor.observe(full_.kernels(), full_.layer(64), seen(notes.observed, end, notes));
        notes.observed = end;
      }
    }
    if (compressor.reconstructs()) {
      for (const auto& [first, end] : {std::pair{0, 96}, {96, 97}, {97, kRepeated}}) {
        repeat(compressor, notes, first, end);
      }
    }
    return seen(kTokens - compressor.query_window(), kTokens, notes);
  }
  RandomLayer& full() { return full_; }

 private:
  // A chunk of rows behind the tokens, which sees all of them and itself.
  void repeat(Compressor& compressor, Notes& notes, int first, int end) {
    std::vector<bf16> q;
    std::vector<float> log_sum_exp;
    for (int row = first; row < end; ++row) {
      for (int head = 0; head < kHeads; ++head) {
        const int kv_head = head * kShape.kv_heads / kHeads;
        const auto query = [&](int d) {
          return uniform(5, static_cast<uint64_t>((row * kHeads + head) * kShape.head_dim + d));
        };
        double sum = 0;
        for (int token = 0; token < kTokens + row - first + 1; ++token) {
          double dot = 0;
          for (int d = 0; d < kShape.head_dim; ++d) {
            const int at = (kv_head * kRepeated + first + token - kTokens) * kShape.head_dim + d;
            dot += static_cast<double>(query(d)) * static_cast<double>(token < kTokens
                                                                           ? full_.key(kv_head, token, d)
                                                                           : uniform(4, static_cast<uint64_t>(at)));
          }
          sum += std::exp(dot * static_cast<double>(full_.scale()));
        }
        log_sum_exp.push_back(static_cast<float>(std::log(sum)));
        for (int d = 0; d < kShape.head_dim; ++d) {
          q.push_back(to_bf16(query(d)));
        }
      }
    }
    compressor.reconstruct(full_.kernels(), full_.layer(64), kTokens,
                           {.heads = kHeads,
                            .scale = full_.scale(),
                            .queries = {q.data(), log_sum_exp.data(), end - first, kTokens},
                            .rows = end - first,
                            .position = kTokens,
                            .notes = notes});
    notes.reconstructed = kTokens;
  }
  float log_sum_exp(int position, int head) {
    double sum = 0;
    for (int token = 0; token <= position; ++token) {
      double dot = 0;
      for (int d = 0; d < kShape.head_dim; ++d) {
        dot +=
            static_cast<double>(to_float(q_[static_cast<size_t>((position * kHeads + head) * kShape.head_dim + d)])) *
            full_.key(head * kShape.kv_heads / kHeads, token, d);
      }
      sum += std::exp(dot * static_cast<double>(full_.scale()));
    }
    return static_cast<float>(std::log(sum));
  }

  RandomLayer full_;
  std::vector<bf16> q_;
  std::vector<float> log_sum_exp_;
};

const nlohmann::json& references() {
  static const nlohmann::json all = nlohmann::json::parse(std::ifstream(VERICACHE_TEST_DATA "/compress/scores.json"));
  return all;
}

std::vector<double> scores_of(const nlohmann::json& row) {
  std::vector<double> out;
  for (const nlohmann::json& one : row) {
    out.push_back(one.is_string() ? INFINITY : one.get<double>());
  }
  return out;
}

// How far off scores of a method may be: those of attention come from bf16 products and an approximate exp2.
double tolerance_of(const std::string& spec) {
  return spec.starts_with("expected") ? 1e-2 : spec.starts_with("knorm") || spec.starts_with("keydiff") ? 1e-5 : 2e-3;
}

// Equal, but for tokens whose scores are as good as equal to the last one's that is kept.
void expect_kept(const std::vector<int>& kept, const std::vector<int>& expected, const std::vector<double>& scores,
                 double tolerance, const std::string& what) {
  ASSERT_EQ(kept.size(), expected.size()) << what;
  const auto worth = [&](int token) { return scores[static_cast<size_t>(token)]; };
  const double last =
      worth(*std::min_element(expected.begin(), expected.end(), [&](int a, int b) { return worth(a) < worth(b); }));
  std::vector<int> differing;
  std::set_symmetric_difference(kept.begin(), kept.end(), expected.begin(), expected.end(),
                                std::back_inserter(differing));
  for (const int token : differing) {
    EXPECT_NEAR(worth(token), last, 2 * tolerance * std::abs(last)) << what << ", token " << token;
  }
  EXPECT_LE(differing.size(), 6u) << what;
}

TEST(ScoreReferences, ScoresAreThoseOfThePapers) {
  ReferenceLayer layer;
  int compared = 0;
  for (const nlohmann::json& one : references()) {
    if (!one.contains("scores")) {
      continue;
    }
    const std::string spec = one.at("spec");
    const auto compressor = layer.full().compressor(spec);
    Notes notes = layer.full().lend_notes(*compressor);
    const Attended seen = layer.seen_by(*compressor, notes);
    std::vector<float> scores(size_t{kShape.kv_heads} * kTokens, NAN);
    dynamic_cast<ScoringCompressor&>(*compressor)
        .score(layer.full().kernels(), layer.full().layer(128), kTokens, seen, scores.data());
    Resident resident({}, kShape);
    ASSERT_TRUE(
        compressor->compress(layer.full().kernels(), layer.full().layer(128), {0, kTokens}, seen, resident.layer));
    for (int head = 0; head < kShape.kv_heads; ++head) {
      const std::vector<double> expected = scores_of(one.at("scores")[static_cast<size_t>(head)]);
      for (int token = 0; token < kTokens; ++token) {
        const double want = expected[static_cast<size_t>(token)];
        const float have = scores[static_cast<size_t>(head * kTokens + token)];
        if (std::isinf(want)) {
          ASSERT_EQ(have, INFINITY) << spec << ", token " << token;
        } else {
          ASSERT_NEAR(have, want, tolerance_of(spec) * std::abs(want) + 1e-6) << spec << ", token " << token;
        }
      }
      expect_kept(kept_of(resident.layer, head), one.at("kept")[static_cast<size_t>(head)], expected,
                  tolerance_of(spec), spec);
    }
    ++compared;
  }
  EXPECT_EQ(compared, 7);
}

// Even at the first look; at the second by the marks of the first.
TEST(ScoreReferences, AdaKvSharesByTheMarksOfTheLookBefore) {
  ReferenceLayer layer;
  int compared = 0;
  int different = 0;
  for (const nlohmann::json& one : references()) {
    if (!one.contains("scores_of")) {
      continue;
    }
    const std::string spec = one.at("spec");
    const auto scorer = std::find_if(references().begin(), references().end(),
                                     [&](const nlohmann::json& other) { return other["spec"] == one["scores_of"]; });
    const auto compressor = layer.full().compressor(spec);
    Notes notes = layer.full().lend_notes(*compressor);
    const Attended seen = layer.seen_by(*compressor, notes);
    Resident resident({}, kShape);
    for (int look = 0; look < 2; ++look) {
      ASSERT_TRUE(
          compressor->compress(layer.full().kernels(), layer.full().layer(64), {0, kTokens}, seen, resident.layer));
      const nlohmann::json& kept = look == 0 ? scorer->at("kept") : one.at("kept");
      for (int head = 0; head < kShape.kv_heads; ++head) {
        // A mark on the edge may go to either head.
        std::vector<int> have = kept_of(resident.layer, head);
        std::vector<int> want = kept[static_cast<size_t>(head)];
        ASSERT_NEAR(static_cast<double>(have.size()), static_cast<double>(want.size()), look) << spec;
        if (have.size() == want.size()) {
          expect_kept(have, want, scores_of(scorer->at("scores")[static_cast<size_t>(head)]),
                      tolerance_of(scorer->at("spec")), spec + ", look " + std::to_string(look));
        }
      }
      EXPECT_EQ(resident.layer.tokens(0) + resident.layer.tokens(1), compressor->layer_tokens(kTokens, 0, kShape));
    }
    different += resident.layer.tokens(0) != resident.layer.tokens(1) ? 1 : 0;
    ++compared;
  }
  EXPECT_EQ(compared, 14);
  EXPECT_GE(different, 8) << "heads differ, but where they score alike";
}

TEST(ScoreReferences, PyramidKvStepsDownLayerByLayer) {
  int compared = 0;
  for (const nlohmann::json& one : references()) {
    if (!one.contains("layers")) {
      continue;
    }
    const std::vector<int> kept = one.at("kept");
    const KvShape shape{.layers = one.at("layers"), .kv_heads = 3, .head_dim = 32};
    const auto compressor = make_compressor(one.at("spec").get<std::string>());
    for (int layer = 0; layer < shape.layers; ++layer) {
      EXPECT_NEAR(compressor->layer_tokens(one.at("tokens"), layer, shape), 3 * kept[static_cast<size_t>(layer)], 3)
          << one.at("spec") << ", layer " << layer;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 7);
}

}  // namespace
}  // namespace vericache::test
