#include "speculate/verification.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <random>
#include <vector>

#include "base/hash.h"

namespace vericache {
namespace {

constexpr int kVocabulary = 12;

// A model without a model: logits that depend on every token before.
void append_logits(const std::vector<TokenId>& tokens, uint64_t model, std::vector<float>& out) {
  std::mt19937_64 random(hash_bytes(tokens.data(), tokens.size() * sizeof(TokenId), model));
  for (int i = 0; i < kVocabulary; ++i) {
    out.push_back(static_cast<float>(random() % 50) * 0.1f);  // coarse: ties happen
  }
}

std::vector<TokenId> decode_one_at_a_time(std::vector<TokenId> tokens, uint64_t model, const Sampling& sampling,
                                          size_t length) {
  while (tokens.size() < length) {
    std::vector<float> logits;
    append_logits(tokens, model, logits);
    tokens.push_back(choose(logits, sampling, static_cast<int>(tokens.size())));
  }
  return tokens;
}

RC_GTEST_PROP(Verification, GivesWhatDecodingOneAtATimeGives, ()) {
  const auto model = *rc::gen::arbitrary<uint64_t>();
  const Sampling sampling{.temperature = static_cast<float>(*rc::gen::inRange(0, 3)) * 0.5f,
                          .top_k = *rc::gen::inRange(0, 6),
                          .seed = *rc::gen::arbitrary<uint64_t>()};
  const int percent_right = *rc::gen::inRange(0, 101);
  const int horizon = *rc::gen::inRange(0, 9);
  const std::vector<TokenId> prompt = {1, 2, 3};
  constexpr size_t kLength = 60;
  const std::vector<TokenId> truth = decode_one_at_a_time(prompt, model, sampling, kLength + 10);

  std::mt19937_64 random(model + 1);
  std::vector<TokenId> tokens = prompt;
  while (tokens.size() < kLength) {
    std::vector<TokenId> drafted;
    std::vector<TokenId> extended = tokens;
    std::vector<float> logits;
    append_logits(extended, model, logits);
    int right = -1;  // drafts before the first wrong one
    for (int i = 0; i < horizon; ++i) {
      const TokenId true_token = truth[tokens.size() + static_cast<size_t>(i)];
      const bool wrong = static_cast<int>(random() % 100) >= percent_right;
      drafted.push_back(wrong ? (true_token + 1) % kVocabulary : true_token);
      right = wrong && right < 0 ? i : right;
      extended.push_back(drafted.back());
      append_logits(extended, model, logits);
    }
    const LogitsView view{logits.data(), horizon + 1, kVocabulary};
    const Verdict verdict = verify(drafted, view, sampling, static_cast<int>(tokens.size()));
    RC_ASSERT(verdict.accepted == (right < 0 ? horizon : right));
    tokens.insert(tokens.end(), drafted.begin(), drafted.begin() + verdict.accepted);
    tokens.push_back(verdict.next);
  }
  tokens.resize(kLength);
  RC_ASSERT(tokens == std::vector<TokenId>(truth.begin(), truth.begin() + kLength));
}

TEST(Verification, RowsBeyondTheDraftsAreNotRead) {
  const std::vector<float> logits = {0, 1, 0, /**/ 1, 0, 0, /**/ 0, 0, 9};
  const LogitsView view{logits.data(), 3, 3};
  const std::vector<TokenId> drafted = {1};
  const Verdict verdict = verify(drafted, view, {}, 5);
  EXPECT_EQ(verdict.accepted, 1);
  EXPECT_EQ(verdict.next, 0);
}

TEST(VerificationDeathTest, NeedsARowAfterTheLastDraft) {
  const std::vector<float> logits = {0, 1, 0, 1};
  const LogitsView view{logits.data(), 2, 2};
  const std::vector<TokenId> drafted = {1, 1};
  EXPECT_DEATH(verify(drafted, view, {}, 0), "row more than drafts");
}

}  // namespace
}  // namespace vericache
