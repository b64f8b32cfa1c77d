#include "speculate/verification.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <random>
#include <vector>

#include "backend/sampling.h"
#include "base/hash.h"

namespace vericache {
namespace {

constexpr int kVocabulary = 12;

// A model without a model: the token that follows, chosen from logits that depend on every token before.
TokenId next_token(const std::vector<TokenId>& tokens, uint64_t model, const Sampling& sampling) {
  std::mt19937_64 random(hash_bytes(tokens.data(), tokens.size() * sizeof(TokenId), model));
  std::vector<float> logits;
  for (int i = 0; i < kVocabulary; ++i) {
    logits.push_back(static_cast<float>(random() % 50) * 0.1f);  // coarse: ties happen
  }
  return choose(logits, sampling, static_cast<int>(tokens.size()));
}

std::vector<TokenId> decode_one_at_a_time(std::vector<TokenId> tokens, uint64_t model, const Sampling& sampling,
                                          size_t length) {
  while (tokens.size() < length) {
    tokens.push_back(next_token(tokens, model, sampling));
  }
  return tokens;
}

RC_GTEST_PROP(Verification, GivesWhatDecodingOneAtATimeGives, ()) {
  const auto model = *rc::gen::arbitrary<uint64_t>();
  const Sampling sampling{.temperature = static_cast<float>(*rc::gen::inRange(0, 3)) * 0.5f,
                          .top_k = *rc::gen::inRange(0, 6),
                          .seed = *rc::gen::arbitrary<uint64_t>()};
  const int percent_right = *rc::gen::inRange(0, 101);
  const int percent_left_over = *rc::gen::inRange(0, 101);
  const int horizon = *rc::gen::inRange(0, 9);
  const std::vector<TokenId> prompt = {1, 2, 3};
  constexpr size_t kLength = 60;
  const std::vector<TokenId> truth = decode_one_at_a_time(prompt, model, sampling, kLength + 10);

  std::mt19937_64 random(model + 1);
  std::vector<TokenId> tokens = prompt;
  while (tokens.size() < kLength) {
    // What verified rows choose: the token in the place of each draft, and perhaps the one after the last.
    const bool left_over = horizon == 0 || static_cast<int>(random() % 100) < percent_left_over;
    std::vector<TokenId> drafted;
    std::vector<TokenId> chosen;
    std::vector<TokenId> extended = tokens;
    int right = -1;  // drafts before the first wrong one
    for (int i = 0; i < horizon; ++i) {
      const TokenId true_token = truth[tokens.size() + static_cast<size_t>(i)];
      const bool wrong = static_cast<int>(random() % 100) >= percent_right;
      chosen.push_back(next_token(extended, model, sampling));
      drafted.push_back(wrong ? (true_token + 1) % kVocabulary : true_token);
      right = wrong && right < 0 ? i : right;
      extended.push_back(drafted.back());
    }
    if (left_over) {
      chosen.push_back(next_token(extended, model, sampling));
    }
    const Verdict verdict = verify(drafted, chosen);
    RC_ASSERT(verdict.accepted == (right < 0 ? horizon : right));
    RC_ASSERT(verdict.next.has_value() == (right >= 0 || left_over));
    tokens.insert(tokens.end(), drafted.begin(), drafted.begin() + verdict.accepted);
    if (verdict.next) {
      tokens.push_back(*verdict.next);
    }
  }
  tokens.resize(kLength);
  RC_ASSERT(tokens == std::vector<TokenId>(truth.begin(), truth.begin() + kLength));
}

TEST(Verification, NothingFollowsWhereEveryChoiceConfirmsADraft) {
  const std::vector<TokenId> drafted = {4, 9, 4};
  const Verdict all = verify(drafted, std::vector<TokenId>{4, 9, 4});
  EXPECT_EQ(all.accepted, 3);
  EXPECT_EQ(all.next, std::nullopt);
  const Verdict refused = verify(drafted, std::vector<TokenId>{4, 9, 5});
  EXPECT_EQ(refused.accepted, 2);
  EXPECT_EQ(refused.next, 5);
}

TEST(Verification, TheTokenLeftOverFollowsWhenAllStand) {
  const std::vector<TokenId> drafted = {4, 9};
  const Verdict all = verify(drafted, std::vector<TokenId>{4, 9, 0});
  EXPECT_EQ(all.accepted, 2);
  EXPECT_EQ(all.next, 0);
  const Verdict none = verify({}, std::vector<TokenId>{7});
  EXPECT_EQ(none.accepted, 0);
  EXPECT_EQ(none.next, 7);
}

TEST(Verification, ChoicesBehindTheFirstRefusalAreNotRead) {
  const std::vector<TokenId> drafted = {1, 2, 3};
  const Verdict verdict = verify(drafted, std::vector<TokenId>{1, 8, 3, 6});
  EXPECT_EQ(verdict.accepted, 1);
  EXPECT_EQ(verdict.next, 8);
}

TEST(VerificationDeathTest, NeedsAChoiceForEveryDraftAndOneMoreAtMost) {
  const std::vector<TokenId> drafted = {1, 1};
  EXPECT_DEATH(verify(drafted, std::vector<TokenId>{1}), "every draft has its judgement");
  EXPECT_DEATH(verify(drafted, std::vector<TokenId>{1, 1, 1, 1}), "every draft has its judgement");
  EXPECT_DEATH(verify({}, {}), "every draft has its judgement");
}

}  // namespace
}  // namespace vericache
