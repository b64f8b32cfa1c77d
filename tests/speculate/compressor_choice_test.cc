#include "speculate/compressor_choice.h"

#include <gtest/gtest.h>

#include <vector>

namespace vericache {
namespace {

// Seconds and bytes of round numbers: 1 ms a draft step, 2 ms an exact pass, nothing for rows.
CompressorCandidate drafting(const char* name, double agreement) {
  return {.name = name,
          .sequence_bytes = 100,
          .wire_bytes = 1000,
          .agreed = 1e6 * agreement,
          .judged = 1e6,
          .draft_base = 1e-3};
}
CompressorCandidate full_cache(size_t bytes) {
  return {.name = "none", .drafts = false, .sequence_bytes = bytes};
}
DecodingCircumstances roomy() {
  return {.device_bytes = 10000, .verify_base = 2e-3, .sequences = 1};
}

TEST(CompressorChoice, PlainDecodingTakesAPassForEachToken) {
  const CompressorForecast f = forecast(full_cache(1000), roomy());
  EXPECT_NEAR(f.tokens_per_second, 500, 1e-6);
  EXPECT_EQ(f.horizon, 0);
  EXPECT_EQ(f.bound, DecodingBound::verify);
  DecodingCircumstances streaming = roomy();
  streaming.wire_bytes_per_second = 1000;
  CompressorCandidate streamed = full_cache(1000);
  streamed.wire_bytes = 100;
  EXPECT_NEAR(forecast(streamed, streaming).tokens_per_second, 10, 1e-6);
  EXPECT_EQ(forecast(streamed, streaming).bound, DecodingBound::wire);
}

TEST(CompressorChoice, AFixedHorizonIsKept) {
  DecodingCircumstances here = roomy();
  here.least_horizon = here.most_horizon = 3;
  CompressorCandidate sure = drafting("x", 0.5);
  const CompressorForecast f = forecast(sure, here);
  // 1 + 1/2 + 1/4 + 1/8 tokens in 3 ms of drafts and 2 ms of verification.
  EXPECT_NEAR(f.tokens_per_second, 1.875 / 5e-3, 1e-2);
  EXPECT_EQ(f.horizon, 3);
  EXPECT_EQ(f.bound, DecodingBound::draft);
}

TEST(CompressorChoice, AgreementLengthensTheHorizon) {
  const CompressorForecast poor = forecast(drafting("poor", 0.6), roomy());
  const CompressorForecast good = forecast(drafting("good", 0.99), roomy());
  EXPECT_LT(poor.horizon, good.horizon);
  EXPECT_LT(poor.tokens_per_second, good.tokens_per_second);
}

TEST(CompressorChoice, FewJudgedTokensSayLittle) {
  CompressorCandidate lucky = drafting("lucky", 1);
  lucky.agreed = lucky.judged = 4;
  EXPECT_NEAR(forecast(lucky, roomy()).agreement, 5.0 / 6, 1e-9);
}

TEST(CompressorChoice, MemoryDecidesHowManySequencesRun) {
  DecodingCircumstances here = roomy();
  here.sequences = 50;
  CompressorCandidate small = drafting("small", 0.9);
  small.fixed_bytes = 5000;
  EXPECT_EQ(forecast(small, here).sequences, 50);
  small.sequence_bytes = 1000;
  EXPECT_EQ(forecast(small, here).sequences, 5);
  small.fixed_bytes = 10001;
  EXPECT_EQ(forecast(small, here).sequences, 0);
  EXPECT_EQ(forecast(small, here).tokens_per_second, 0);
}

TEST(CompressorChoice, SoDoesTheRoomForTheirFullKv) {
  DecodingCircumstances here = roomy();
  here.sequences = 8;
  CompressorCandidate candidate = drafting("x", 0.9);
  EXPECT_EQ(forecast(candidate, here).sequences, 8);
  candidate.stored_sequences = 3;
  EXPECT_EQ(forecast(candidate, here).sequences, 3);
  candidate.stored_sequences = 0;
  EXPECT_EQ(forecast(candidate, here).tokens_per_second, 0);
  EXPECT_EQ(forecast(candidate, here).bound, DecodingBound::memory);
}

TEST(CompressorChoice, TheBestForecastWinsAndSaysWhy) {
  // With room for one sequence the exact drafts win; where memory is short, those that let many run.
  CompressorCandidate fine = drafting("fine", 0.99);
  fine.sequence_bytes = 5000;
  CompressorCandidate coarse = drafting("coarse", 0.9);
  coarse.sequence_bytes = 500;
  const std::vector<CompressorCandidate> candidates = {full_cache(9000), fine, coarse};
  const CompressorChoice alone = choose_compressor(candidates, roomy());
  ASSERT_EQ(alone.winner, 1);
  EXPECT_NE(alone.reason.find("fine: "), std::string::npos) << alone.reason;
  EXPECT_NE(alone.reason.find("next best coarse"), std::string::npos) << alone.reason;
  EXPECT_NE(alone.reason.find("draft steps"), std::string::npos) << alone.reason;
  EXPECT_EQ(alone.reason.find('\n'), std::string::npos);

  DecodingCircumstances crowded = roomy();
  crowded.sequences = 20;
  const CompressorChoice many = choose_compressor(candidates, crowded);
  ASSERT_EQ(many.winner, 2) << many.reason;
  EXPECT_NE(many.reason.find("20 of 20 sequences fit"), std::string::npos) << many.reason;
}

TEST(CompressorChoice, ASlowWireFavoursWhatBringsLittle) {
  CompressorCandidate heavy = drafting("heavy", 0.99);
  heavy.wire_bytes = 100000;
  const CompressorCandidate light = drafting("light", 0.95);
  DecodingCircumstances here = roomy();
  const std::vector<CompressorCandidate> candidates = {light, heavy};
  EXPECT_EQ(choose_compressor(candidates, here).winner, 1);
  here.wire_bytes_per_second = 1e5;  // 10 ms against 1 s
  const CompressorChoice slow = choose_compressor(candidates, here);
  EXPECT_EQ(slow.winner, 0);
  EXPECT_EQ(slow.forecasts[1].bound, DecodingBound::wire);
}

TEST(CompressorChoice, WhatIsDraftedBeforeARefusalIsKnownIsLost) {
  DecodingCircumstances here = roomy();
  here.least_horizon = here.most_horizon = 3;
  here.wire_bytes_per_second = 1e6;  // 1 ms, less than three drafts take
  // 1.875 tokens in 3 ms of drafts, 2 ms of verification and, seven times of eight, 1 ms of drafts for nothing.
  EXPECT_NEAR(forecast(drafting("x", 0.5), here).tokens_per_second, 1.875 / 5.875e-3, 1e-2);
  EXPECT_NEAR(forecast(drafting("sure", 1), here).tokens_per_second, 4 / 5e-3, 1e-1);
}

TEST(ContextStretch, ALongerContextTakesLongerAndNoLessThanItsReading) {
  const ContextStretch stretch{.tokens = 8000, .probed = 2000, .bytes_per_second = 1e6};
  EXPECT_NEAR(stretch.draft_row(1e-3, 0), 4e-3, 1e-12);
  EXPECT_NEAR(stretch.draft_row(1e-3, 5000), 5e-3, 1e-12) << "5 ms to read";
  EXPECT_NEAR(stretch.verify_base(2e-3, 0.5), 5e-3, 1e-12) << "6,000 tokens more, half a byte each";
  const ContextStretch whole{.tokens = 1900, .probed = 2000};
  EXPECT_NEAR(whole.draft_row(1e-3, 1e9), 1e-3, 1e-12) << "nothing is known of reading";
  EXPECT_NEAR(whole.verify_base(2e-3, 1e9), 2e-3, 1e-12);
}

TEST(CompressorChoice, NothingMayFit) {
  const std::vector<CompressorCandidate> candidates = {full_cache(20000)};
  const CompressorChoice choice = choose_compressor(candidates, roomy());
  EXPECT_EQ(choice.winner, -1);
  EXPECT_NE(choice.reason.find("no compressor"), std::string::npos);
  EXPECT_EQ(choose_compressor({}, roomy()).winner, -1);
}

TEST(CompressorChoice, EqualForecastsFallToTheFirst) {
  const std::vector<CompressorCandidate> candidates = {drafting("a", 0.9), drafting("b", 0.9)};
  EXPECT_EQ(choose_compressor(candidates, roomy()).winner, 0);
}

}  // namespace
}  // namespace vericache
