#include "engine/cache_trial.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"
#include "engine/compressor_probe.h"
#include "engine/engine.h"
#include "engine/least_budget.h"
#include "model/loaded_model.h"
#include "text/records.h"
#include "text/tokenizer.h"

namespace vericache {
namespace {

LoadedModel& model() {
  static LoadedModel& loaded = *new LoadedModel(bundled_model("vericode-5m"));
  return loaded;
}

std::vector<TokenId> document(int records, uint64_t seed) {
  static const Tokenizer tokenizer = Tokenizer::load(bundled_model("vericode-5m"));
  return tokenizer.encode(records_request(seed, records, RecordsTask::calls).prompt, true);
}

std::vector<TokenId> engine_text(const std::vector<TokenId>& prompt, int tokens, const Sampling& sampling) {
  const std::unique_ptr<Device> device = test::make_test_device();
  EngineOptions options;
  options.horizon = 0;
  options.max_model_len = static_cast<int>(prompt.size()) + tokens;
  Engine engine(*model().model, *device, nullptr, options);
  std::vector<TokenId> text;
  engine.submit({.prompt = prompt,
                 .sampling = sampling,
                 .max_tokens = tokens,
                 .stop_tokens = {},
                 .on_progress = [&text](const Progress& progress) {
                   for (const DecidedToken& token : progress.tokens) {
                     text.push_back(token.id);
                   }
                 }});
  engine.run();
  return text;
}

struct Trial {
  std::unique_ptr<Device> device = test::make_test_device();
  std::unique_ptr<CacheTrial> trial;

  explicit Trial(const std::vector<std::string>& specs, int max_tokens, int pass_rows = 512, int batch = 16) {
    std::vector<std::unique_ptr<Compressor>> compressors;
    for (const std::string& spec : specs) {
      compressors.push_back(make_compressor(spec));
    }
    trial = std::make_unique<CacheTrial>(*model().model, *device, std::move(compressors),
                                         TrialLimits{max_tokens, pass_rows, batch});
  }
  CacheTrial* operator->() const { return trial.get(); }
};

int agreed(const std::vector<TokenId>& choices, const std::vector<TokenId>& exact) {
  int count = 0;
  for (size_t i = 0; i < choices.size(); ++i) {
    count += choices[i] == exact[i + 1] ? 1 : 0;
  }
  return count;
}

TEST(CacheTrial, ReadsAndDecodesAsAnEngineDoes) {
  const std::vector<TokenId> prompt = document(12, 3);
  for (const float temperature : {0.0f, 0.9f}) {
    Sampling sampling;
    sampling.temperature = temperature;
    sampling.seed = 5;
    const std::vector<TokenId> expected = engine_text(prompt, 80, sampling);
    for (const int pass_rows : {512, 100}) {
      Trial trial({}, static_cast<int>(prompt.size()) + 80, pass_rows);
      const TokenId first = trial->read(prompt, sampling);
      EXPECT_EQ(trial->exact(first, 80, {}), expected);
      // Verification passes choose the text once more.
      EXPECT_EQ(agreed(trial->verified(expected, 16), expected), 79);
    }
  }
}

TEST(CacheTrial, WhatKeepsAllAgreesWithAll) {
  const std::vector<TokenId> prompt = document(12, 4);
  Sampling sampling;
  sampling.temperature = 0.7f;
  const std::vector<TokenId> expected = engine_text(prompt, 100, sampling);
  Trial trial({"none", "kivi:bits=2", "snapkv:budget=64,window=8"}, static_cast<int>(prompt.size()) + 100);
  trial->read(prompt, sampling);
  EXPECT_EQ(trial->forced(0, expected).size(), 99u);
  EXPECT_EQ(agreed(trial->forced(0, expected), expected), 99);
  EXPECT_EQ(trial->alone(0, expected[0], 100, {}), expected);
  EXPECT_LT(agreed(trial->forced(1, expected), expected), 99);
  EXPECT_LT(agreed(trial->forced(2, expected), expected), 99);
  EXPECT_NE(trial->alone(1, expected[0], 100, {}), expected);

  const CacheTrial::Resident exact = trial->resident(0);
  EXPECT_NEAR(exact.bytes * 8 / exact.values, 16, 1e-9);  // its pages hold both prompt and text by now
  EXPECT_GT(trial->draft_cost(1).base(), 0);
}

// What an engine accepts in its first round is the run of agreeing drafts that the trial sees.
TEST(CacheTrial, DraftsAreThoseOfAnEngine) {
  constexpr int kHorizon = 40;
  const std::vector<std::string> specs = {"kivi:bits=2",
                                          "kivi:bits=4",
                                          "snapkv:budget=100",
                                          "streaming-llm:window=90",
                                          "snapkv:budget=0.4+kivi:bits=2",
                                          "h2o:budget=0.3",
                                          "tova:budget=0.3",
                                          "pyramidkv:budget=0.3",
                                          "adakv(snapkv:budget=0.3)",
                                          "expected:budget=0.3",
                                          "knorm:budget=0.5",
                                          "keydiff:budget=0.5",
                                          "kvzip:budget=0.3",
                                          "snapkv;layers=0-1:none",
                                          "quest:budget=0.2",
                                          "quest:budget=0.3,dense=0+kivi:bits=2"};
  int refused = 0;
  for (const uint64_t seed : {20u, 21u, 22u}) {
    const std::vector<TokenId> prompt = document(11, seed);
    Sampling sampling;
    sampling.temperature = seed == 21 ? 0.8f : 0.0f;
    const std::vector<TokenId> text = engine_text(prompt, kHorizon + 20, sampling);
    Trial trial(specs, static_cast<int>(prompt.size()) + kHorizon + 20);
    trial->read(prompt, sampling);
    for (size_t i = 0; i < specs.size(); ++i) {
      const std::vector<TokenId> choices = trial->forced(i, text);
      int run = 0;
      while (run < kHorizon && choices[static_cast<size_t>(run)] == text[static_cast<size_t>(run) + 1]) {
        ++run;
      }
      refused += run < kHorizon ? 1 : 0;
      EngineOptions options;
      options.horizon = kHorizon;
      options.max_model_len = static_cast<int>(prompt.size()) + kHorizon + 20;
      const std::unique_ptr<Device> device = test::make_test_device();
      Engine engine(*model().model, *device, make_compressor(specs[i]), options);
      std::vector<size_t> decided;
      const SeqId id = engine.submit({.prompt = prompt,
                                      .sampling = sampling,
                                      .max_tokens = kHorizon + 20,
                                      .stop_tokens = {},
                                      .on_progress = [&decided](const Progress& progress) {
                                        if (!progress.tokens.empty()) {
                                          decided.push_back(progress.tokens.size());
                                        }
                                      }});
      while (decided.size() < 2 && engine.step()) {
      }
      engine.cancel(id);
      engine.run();
      ASSERT_GE(decided.size(), 2u);
      EXPECT_EQ(decided[0], 1u);
      // A sequence that drafts on while all its drafts stand leaves the token behind them to the next round.
      const size_t least = static_cast<size_t>(run < kHorizon ? run + 1 : kHorizon);
      EXPECT_GE(decided[1], least) << specs[i] << ", seed " << seed;
      EXPECT_LE(decided[1], static_cast<size_t>(run) + 1) << specs[i] << ", seed " << seed;
    }
  }
  EXPECT_GT(refused, 5) << "caches this lossy have their drafts refused";
}

TEST(CacheTrial, TokensAreScoredAloneOrTogetherAlike) {
  const std::vector<TokenId> prompt = document(10, 6);
  const std::vector<TokenId> text = engine_text(prompt, 70, {});
  const int most = static_cast<int>(prompt.size()) + 70;
  const std::vector<std::string> specs = {"kivi:bits=2", "snapkv:budget=64+kivi:bits=4", "streaming-llm:window=64"};
  Trial together(specs, most, 512, 16);
  Trial alone(specs, most, 512, 1);
  together->read(prompt, {});
  alone->read(prompt, {});
  for (size_t i = 0; i < specs.size(); ++i) {
    EXPECT_EQ(together->forced(i, text), alone->forced(i, text)) << specs[i];
  }
}

TEST(CacheTrial, PromptsFollowOneAnotherWithoutATrace) {
  const std::vector<TokenId> first = document(12, 7);
  const std::vector<TokenId> second = document(7, 8);
  const int most = static_cast<int>(std::max(first.size(), second.size())) + 90;
  const std::vector<std::string> specs = {"kivi:bits=4", "snapkv:budget=0.3"};
  Trial fresh(specs, most);
  Trial used(specs, most);
  const TokenId begins = used->read(first, {});
  for (size_t i = 0; i < specs.size(); ++i) {
    used->alone(i, begins, 90, {});
  }
  const TokenId token = fresh->read(second, {});
  ASSERT_EQ(used->read(second, {}), token);
  for (size_t i = 0; i < specs.size(); ++i) {
    EXPECT_EQ(used->resident(i).bytes, fresh->resident(i).bytes);
    EXPECT_EQ(used->alone(i, token, 90, {}), fresh->alone(i, token, 90, {})) << specs[i];
  }
}

TEST(CacheTrial, StopTokensEndTheText) {
  const std::vector<TokenId> prompt = document(8, 9);
  Trial trial({"kivi:bits=8"}, static_cast<int>(prompt.size()) + 40);
  const TokenId first = trial->read(prompt, {});
  const std::vector<TokenId> whole = trial->exact(first, 40, {});
  const TokenId stop = whole[20];
  const std::vector<TokenId> cut = trial->exact(first, 40, std::vector<TokenId>{stop});
  ASSERT_LE(cut.size(), 21u);
  EXPECT_EQ(cut.back(), stop);
}

// What is kept shrinks as it should: measured in pages.
TEST(CacheTrial, ResidentBytesAreThoseOfThePagesHeld) {
  const std::vector<TokenId> prompt = document(60, 10);
  Trial trial({"none", "kivi:bits=4", "snapkv:budget=0.25"}, static_cast<int>(prompt.size()) + 8);
  trial->read(prompt, {});
  const auto bits = [&](size_t i) { return 8 * trial->resident(i).bytes / trial->resident(i).values; };
  EXPECT_NEAR(bits(0), 16, 1e-9);
  EXPECT_GT(bits(1), 4);
  EXPECT_LT(bits(1), 5);
  EXPECT_GE(bits(2), 4);
  EXPECT_LT(bits(2), 5);
}

TEST(CompressorProbe, MeasuresAndChooses) {
  ProbeRequest request;
  request.prompts = {document(30, 11)};
  request.tokens = 32;
  request.batch = 16;
  EngineOptions options;
  options.max_model_len = static_cast<int>(request.prompts[0].size()) + 64;
  const ProbeReport report =
      probe_compressors(*model().model, options, request, [] { return test::make_test_device(); });
  ASSERT_EQ(report.candidates.size(), probe_candidates().size());
  ASSERT_GE(report.choice.winner, 0);
  EXPECT_TRUE(report.line.starts_with(report.candidates[static_cast<size_t>(report.choice.winner)].name))
      << report.line;
  EXPECT_GT(report.circumstances.verify_base, 0);
  EXPECT_GT(report.circumstances.wire_bytes_per_second, 0);
  for (const CompressorCandidate& candidate : report.candidates) {
    EXPECT_EQ(candidate.judged, candidate.drafts ? 32 : 0) << candidate.name;
    EXPECT_LE(candidate.agreed, candidate.judged);
    EXPECT_GT(candidate.sequence_bytes, 0u);
    if (candidate.name == "kivi:bits=8") {
      EXPECT_GE(candidate.agreed, 30);
    }
  }
}

TEST(CompressorProbe, TightMemoryAndASlowWireCallForCompression) {
  ProbeRequest request;
  request.prompts = {document(140, 12)};
  request.tokens = 32;
  request.batch = 16;
  EngineOptions options;
  options.max_model_len = static_cast<int>(request.prompts[0].size()) + 64;
  options.pass_rows = 160;
  options.max_horizon = 16;
  options.wire_gbps = 0.02;
  options.ring_layers = 1;
  // Enough for the compressed cache of one sequence and its staging, not for the full one.
  const std::unique_ptr<Compressor> coarse = make_compressor("kivi:bits=4");
  const size_t budget = test::least_budget(*model().model, coarse.get(), options) + (size_t{1} << 18);
  const ProbeReport report =
      probe_compressors(*model().model, options, request, [&] { return test::make_test_device(budget); });
  EXPECT_NE(report.candidates[static_cast<size_t>(report.choice.winner)].name, "none") << report.line;
  EXPECT_NE(report.line.find("probed on the last"), std::string::npos) << report.line;
  for (size_t i = 0; i < report.candidates.size(); ++i) {
    if (report.candidates[i].name == "none") {
      EXPECT_EQ(report.choice.forecasts[i].bound, DecodingBound::wire) << "the full cache streams";
    }
  }
  // Where nothing fits, the remedy is named.
  EXPECT_THROW(
      probe_compressors(*model().model, options, request, [] { return test::make_test_device(size_t{1} << 20); }),
      Error);
}

}  // namespace
}  // namespace vericache
