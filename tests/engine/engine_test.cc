#include "engine/engine.h"

#include <random>

#include "engine/least_budget.h"
#include "engine/memory_plan.h"
#include "memory_store.h"
#include "model/loaded_model.h"

namespace vericache {
namespace {

struct Answer {
  std::vector<DecidedToken> tokens;
  std::optional<FinishReason> finish;
};

// One model for all tests of the binary: loading is most of a small test's time. It is never freed: a device's runtime
// may be gone when statics go.
LoadedModel& small_model() {
  static LoadedModel& model = *new LoadedModel(bundled_model("vericode-5m"));
  return model;
}

std::vector<TokenId> random_prompt(int tokens, uint64_t seed) {
  // Repeated phrases, so that drafts from a lossy cache have something to agree on.
  std::mt19937_64 random(seed);
  std::vector<TokenId> phrase(200);
  for (TokenId& token : phrase) {
    token = static_cast<TokenId>(20 + random() % 8000);
  }
  std::vector<TokenId> prompt;
  while (static_cast<int>(prompt.size()) < tokens) {
    prompt.push_back(random() % 50 == 0 ? static_cast<TokenId>(20 + random() % 8000)
                                        : phrase[prompt.size() % phrase.size()]);
  }
  return prompt;
}

Request make_request(std::vector<TokenId> prompt, int max_tokens, float temperature, Answer& answer) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.sampling.temperature = temperature;
  request.sampling.seed = 7;
  request.on_progress = [&answer](const Progress& progress) {
    ASSERT_FALSE(answer.finish) << "a sequence says nothing after its end";
    answer.tokens.insert(answer.tokens.end(), progress.tokens.begin(), progress.tokens.end());
    answer.finish = progress.finish;
  };
  return request;
}

struct Outcome {
  std::vector<Answer> answers;
  EngineStats stats;
};

Outcome run(const char* compressor, EngineOptions options, const std::vector<std::vector<TokenId>>& prompts,
            int max_tokens, float temperature, size_t budget = test::kPlenty) {
  LoadedModel& loaded = small_model();
  std::unique_ptr<Device> device = test::make_test_device(budget);
  Engine engine(*loaded.model, *device, compressor ? make_compressor(compressor) : nullptr, options);
  Outcome result;
  result.answers.resize(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    engine.submit(make_request(prompts[i], max_tokens, temperature, result.answers[i]));
  }
  engine.run();
  EXPECT_TRUE(engine.pools_whole());
  result.stats = engine.stats();
  return result;
}

void expect_identical(const Outcome& reference, const Outcome& run, const std::string& what) {
  ASSERT_EQ(reference.answers.size(), run.answers.size());
  for (size_t i = 0; i < run.answers.size(); ++i) {
    ASSERT_EQ(reference.answers[i].finish, run.answers[i].finish) << what;
    ASSERT_EQ(reference.answers[i].tokens.size(), run.answers[i].tokens.size()) << what;
    for (size_t t = 0; t < run.answers[i].tokens.size(); ++t) {
      ASSERT_EQ(reference.answers[i].tokens[t].id, run.answers[i].tokens[t].id)
          << what << ": token " << t << " of prompt " << i;
      ASSERT_EQ(reference.answers[i].tokens[t].logits_hash, run.answers[i].tokens[t].logits_hash)
          << what << ": logits " << t << " of prompt " << i;
    }
  }
}

const std::vector<std::vector<TokenId>>& prompts() {
  static const std::vector<std::vector<TokenId>> prompts{random_prompt(700, 1), random_prompt(61, 2),
                                                         random_prompt(320, 3)};
  return prompts;
}

EngineOptions full_mode() {
  EngineOptions options;
  options.horizon = 0;
  options.max_model_len = 1024;
  return options;
}

// The same cache drafts the same tokens; where drafts have kernels of their own, all but a few that stand on an edge.
void expect_drafts_stand(const SequenceStats& speculation) {
  if (test::tested_device() == DeviceKind::cuda) {
    EXPECT_GE(static_cast<double>(speculation.accepted), 0.9 * static_cast<double>(speculation.drafted));
  } else {
    EXPECT_EQ(speculation.accepted, speculation.drafted);
  }
}

TEST(Engine, EveryCompressorHorizonAndTemperatureGivesTheFullAnswer) {
  for (const float temperature : {0.0f, 0.9f}) {
    const Outcome reference = run(nullptr, full_mode(), prompts(), 40, temperature);
    ASSERT_TRUE(reference.stats.full_on_device);
    const char* const kinds[] = {"none",
                                 "kivi:bits=4",
                                 "kivi:bits=2",
                                 "kivi:k=8,v=4",
                                 "streaming-llm:window=0.2",
                                 "snapkv:budget=0.3",
                                 "snapkv:budget=0.3+kivi:bits=4",
                                 "streaming-llm:window=100+kivi:bits=8",
                                 "quest:budget=0.2",
                                 "quest:budget=0.2+kivi:bits=4"};
    const char* const scorers[] = {"pyramidkv:budget=0.4",
                                   "h2o:budget=0.3",
                                   "tova:budget=0.3+kivi:bits=8",
                                   "knorm:budget=0.4",
                                   "keydiff:budget=0.4+kivi:bits=4",
                                   "expected:budget=0.3",
                                   "kvzip:budget=0.3",
                                   "adakv:alpha=0.5(kvzip:budget=0.3)+kivi:bits=8",
                                   "h2o:budget=0.3;layers=1-2:kvzip:budget=0.2",
                                   "adakv(snapkv:budget=0.3)",
                                   "adakv:alpha=0.8(pyramidkv:budget=0.3)+kivi:k=8,v=4",
                                   "snapkv:budget=0.3;layers=0-1:none;layers=3:h2o:budget=100"};
    std::vector<std::pair<const char*, int>> cells;
    for (const char* kind : kinds) {
      for (const int horizon : {EngineOptions::kAdaptive, 1, 7, 32}) {
        cells.emplace_back(kind, horizon);
      }
    }
    for (const char* scorer : scorers) {  // they differ in what they keep, not in when
      cells.emplace_back(scorer, EngineOptions::kAdaptive);
      cells.emplace_back(scorer, 7);
    }
    for (const auto& [compressor, horizon] : cells) {
      EngineOptions options = full_mode();
      options.horizon = horizon;
      options.max_sequences = horizon == 7 ? 1 : 3;
      options.pass_rows = horizon == 1 ? 67 : 200;
      const Outcome compressed = run(compressor, options, prompts(), 40, temperature);
      expect_identical(reference, compressed, std::string(compressor) + " horizon " + std::to_string(horizon));
      EXPECT_GT(compressed.stats.speculation.drafted, 0);
      if (std::string_view(compressor) == "none") {
        expect_drafts_stand(compressed.stats.speculation);
      }
    }
  }
}

// What is held at the peak is what the layers' steps add up to, head page by head page.
TEST(Engine, LayersOfDifferentBudgetsTakeWhatTheyPromise) {
  const KvShape shape = small_model().model->kv_shape();
  EngineOptions options = full_mode();
  options.horizon = 8;
  for (const char* spec : {"snapkv:budget=0.5", "pyramidkv:budget=0.5", "knorm:budget=64;layers=1:none"}) {
    const Outcome outcome = run(spec, options, {prompts()[0]}, 40, 0.0f);
    const auto compressor = make_compressor(spec);
    int pages = 0;
    for (int layer = 0; layer < shape.layers; ++layer) {
      pages += compressor->layer_pages(704, layer, shape);  // the whole pages of 700 + 40 tokens
    }
    EXPECT_EQ(outcome.stats.peak_resident_bytes, static_cast<size_t>(pages) * head_page_bytes(KvFormat{}, shape))
        << spec;
  }
  const Outcome shared = run("adakv:alpha=0.9(snapkv:budget=0.5)", options, {prompts()[0]}, 40, 0.0f);
  EXPECT_LE(shared.stats.peak_resident_bytes, make_compressor("adakv(snapkv:budget=0.5)")->resident_bytes(740, shape));
}

// Pages with the bounds of their keys are the full KV too: it stays on the device, and passes read it there. A budget
// that is everything drafts what the full cache does.
TEST(Engine, ChosenPagesOfTheFullKvStayOnTheDevice) {
  const KvShape shape = small_model().model->kv_shape();
  EngineOptions options = full_mode();
  options.horizon = 8;
  const Outcome reference = run(nullptr, full_mode(), prompts(), 40, 0.0f);
  for (const auto& [spec, everything] : {std::pair{"quest:budget=1,dense=0", true},
                                         {"quest:budget=0.1,dense=99", true},
                                         {"quest:budget=0.1,dense=0", false}}) {
    const Outcome outcome = run(spec, options, prompts(), 40, 0.0f);
    expect_identical(reference, outcome, spec);
    EXPECT_TRUE(outcome.stats.full_on_device);
    EXPECT_EQ(outcome.stats.wire_in_bytes, 0u);
    if (everything) {
      expect_drafts_stand(outcome.stats.speculation);
    } else {
      EXPECT_LT(outcome.stats.speculation.accepted, outcome.stats.speculation.drafted);
    }
  }
  const auto quest = make_compressor("quest");
  const Outcome alone = run("quest", options, {prompts()[0]}, 40, 0.0f);
  EXPECT_EQ(alone.stats.peak_resident_bytes, quest->resident_bytes(704, shape));
  EXPECT_GT(quest->resident_bytes(704, shape), make_compressor("none")->resident_bytes(704, shape));
}

// The other formats of resident KV, each at one horizon: what they have of their own lies below the engine.
TEST(Engine, EveryFormatGivesTheFullAnswer) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 40, 0.6f);
  for (const char* compressor : {"kivi:bits=3",
                                 "kivi:bits=6",
                                 "kivi:k=3,v=8",
                                 "plane:bits=6",
                                 "plane:bits=7",
                                 "plane:bits=8",
                                 "plane:bits=9",
                                 "plane:k=16,v=6",
                                 "fp8",
                                 "int8",
                                 "quarot:bits=4",
                                 "quarot:bits=3",
                                 "kvquant:bits=3",
                                 "kvquant:k=16,v=2,outliers=0.03",
                                 "snapkv:budget=0.3+kvquant:bits=4",
                                 "snapkv:budget=0.3+plane",
                                 "snapkv:budget=0.3+quarot:bits=3",
                                 "streaming-llm:window=100+int8",
                                 "quest:budget=100,dense=1+quarot:bits=4",
                                 "quest:budget=0,dense=0+plane:bits=8"}) {
    EngineOptions options = full_mode();
    options.horizon = 7;
    const Outcome compressed = run(compressor, options, prompts(), 40, 0.6f);
    expect_identical(reference, compressed, compressor);
    EXPECT_GT(compressed.stats.speculation.accepted, 0);
  }
}

// Pages that cross the wire as what their resident form lacks, or coded by themselves; late, and some of them broken.
TEST(Engine, EncodedResidualsGiveTheFullAnswer) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 40, 0.7f);
  for (const char* compressor :
       {"kivi:bits=4", "kivi:k=8,v=3", "plane:bits=8", "fp8", "int8", "quarot:bits=4", "quarot:bits=3",
        "kvquant:bits=3", "kvquant:bits=2,outliers=0", "snapkv+quarot:bits=3", "snapkv:budget=0.3",
        "snapkv:budget=0.3+plane:bits=6", "quest:budget=0.3+kivi:bits=4", "quest:budget=0.3+int8"}) {
    for (const WireForm form : {WireForm::plain, WireForm::coded}) {
      EngineOptions options = full_mode();
      options.horizon = 8;
      options.max_sequences = 3;
      options.wire_form = form;
      options.inject_delay_us = 200;
      options.inject_corruption_every = 151;
      const Outcome compressed = run(compressor, options, prompts(), 40, 0.7f);
      expect_identical(reference, compressed, compressor);
      EXPECT_GT(compressed.stats.wire_out_bytes, 0u);
    }
  }
}

TEST(Engine, StreamingFullKvGivesTheFullAnswer) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 40, 0.7f);
  EngineOptions options = full_mode();
  options.pass_rows = 128;
  options.ring_layers = 2;
  const size_t budget = test::least_budget(*small_model().model, nullptr, options);
  const Outcome streamed = run(nullptr, options, prompts(), 40, 0.7f, budget + budget / 50);
  ASSERT_FALSE(streamed.stats.full_on_device);
  EXPECT_GT(streamed.stats.wire_in_bytes, 0u);
  expect_identical(reference, streamed, "streaming");
  options.wire_form = WireForm::coded;
  const size_t coded_budget = test::least_budget(*small_model().model, nullptr, options);
  const Outcome coded = run(nullptr, options, prompts(), 40, 0.7f, coded_budget + coded_budget / 50);
  expect_identical(reference, coded, "streaming, coded");
  EXPECT_LT(coded.stats.wire_out_bytes, streamed.stats.wire_out_bytes + 1);
}

// Room in host memory for one of three sequences; the others' full KV is in a store, which fails now and then.
EngineOptions with_store(EngineOptions options, uint64_t reads_that_fail, uint64_t* reads = nullptr) {
  options.max_sequences = 3;
  options.host_memory = static_cast<size_t>(extents_for(12, small_model().model->kv_shape(), ResidualCode::plain)) *
                        extent_bytes(small_model().model->kv_shape());
  options.store_bytes = size_t{1} << 30;
  options.open_store = [reads_that_fail, reads](size_t block_bytes, int blocks) {
    return std::make_unique<test::MemoryStore>(block_bytes, blocks, reads_that_fail, reads);
  };
  return options;
}

TEST(Engine, FullKvInAStoreGivesTheFullAnswer) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 40, 0.7f);
  for (const char* compressor : {"kivi:bits=4", "snapkv:budget=0.3"}) {
    for (const WireForm form : {WireForm::plain, WireForm::coded}) {
      EngineOptions options = full_mode();
      options.horizon = 8;
      options.wire_form = form;
      options.inject_delay_us = 200;
      options.inject_corruption_every = form == WireForm::coded ? 151 : 0;
      uint64_t reads = 0;
      const Outcome stored = run(compressor, with_store(options, 0, &reads), prompts(), 40, 0.7f);
      expect_identical(reference, stored, compressor);
      EXPECT_GT(stored.stats.store_bytes, 0u);
      EXPECT_GT(reads, 0u) << "somebody's full KV was in the store";
    }
  }
  EngineOptions options = full_mode();
  options.pass_rows = 128;
  options.ring_layers = 2;
  options.max_model_len = 768;  // a sequence of which the host memory holds
  const size_t budget = test::least_budget(*small_model().model, nullptr, options);
  expect_identical(reference, run(nullptr, with_store(options, 0), prompts(), 40, 0.7f, 2 * budget), "streaming");
}

// Coded pages leave room for another sequence than those that surely fit; one whose pages come back broken gives all
// its room back, and has it anew.
TEST(Engine, WhatCodedPagesLeaveIsTheNextSequences) {
  constexpr int kPrompt = 4300;
  constexpr int kAnswer = 60;
  const std::vector<std::vector<TokenId>> both{random_prompt(kPrompt, 8), random_prompt(kPrompt, 9)};
  EngineOptions options = full_mode();
  options.max_sequences = 2;
  options.max_model_len = kPrompt + kAnswer;
  const KvShape shape = small_model().model->kv_shape();
  const int pages = (kPrompt + kAnswer + kPageTokens - 1) / kPageTokens;
  const int most = extents_for(pages, shape, ResidualCode::resident);
  ASSERT_EQ(most, 3 * shape.layers);
  const Outcome reference = run(nullptr, options, both, kAnswer, 0);
  options.horizon = 8;
  options.host_memory = static_cast<size_t>(most + shape.layers) * extent_bytes(shape);
  const auto expect_together = [&](bool together) {
    Outcome result;
    result.answers.resize(both.size());
    bool second_began = false;
    {
      const std::unique_ptr<Device> device = test::make_test_device();
      Engine engine(*small_model().model, *device, make_compressor("plane:bits=8"), options);
      engine.hold_decoding(true);
      engine.submit(make_request(both[0], kAnswer, 0, result.answers[0]));
      Request second = make_request(both[1], kAnswer, 0, result.answers[1]);
      second.on_progress = [&, inner = second.on_progress](const Progress& progress) {
        second_began = second_began || !result.answers[0].finish;
        inner(progress);
      };
      engine.submit(std::move(second));
      while (engine.reading() && engine.step()) {
      }
      engine.hold_decoding(false);
      engine.run();
      EXPECT_TRUE(engine.pools_whole());
      result.stats = engine.stats();
    }
    expect_identical(reference, result, together ? "together" : "one after the other");
    EXPECT_EQ(second_began, together);
    EXPECT_LE(result.stats.peak_extent_bytes, result.stats.host_pool_bytes);
    return result.stats.recomputed_tokens;
  };
  const auto at_once = [&] {
    const std::unique_ptr<Device> device = test::make_test_device();
    const std::unique_ptr<Compressor> compressor = make_compressor("plane:bits=8");
    return sequences_that_fit(*small_model().model, compressor.get(), options, *device, 8);
  };
  options.wire_form = WireForm::plain;
  EXPECT_EQ(at_once(), 1);
  EXPECT_EQ(expect_together(false), 0);
  options.wire_form = WireForm::coded;
  EXPECT_EQ(at_once(), 2);
  EXPECT_EQ(expect_together(true), 0);
  options.inject_corruption_every = 450;  // a page of the second, which has fewer
  EXPECT_GT(expect_together(true), 0);
}

TEST(Engine, AStoreThatFailsIsNeverAnAnswer) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 150, 0.0f);
  EngineOptions options = full_mode();
  options.horizon = 8;
  const Outcome failing = run("kivi:bits=4", with_store(options, 23), prompts(), 150, 0.0f);
  expect_identical(reference, failing, "a store that fails");
  EXPECT_GT(failing.stats.corrupt_blocks, 0);
  EXPECT_GT(failing.stats.recomputed_tokens, 0);

  // Of a store that gives nothing back, those who depend on it say so; the one in host memory answers.
  const std::vector<std::vector<TokenId>> same(2, prompts()[0]);
  Outcome hopeless = run("kivi:bits=4", with_store(options, 1), same, 300, 0.0f);
  EXPECT_EQ(hopeless.answers[1].finish, FinishReason::failed);
  hopeless.answers.pop_back();
  expect_identical(run(nullptr, full_mode(), {prompts()[0]}, 300, 0.0f), hopeless, "beside a store that fails");
}

// A pass that is opened before anybody is ready must hold all that is drafted until then.
TEST(Engine, DraftsThatStandAreVerified) {
  EngineOptions options;
  options.max_model_len = 2048;
  const Outcome drafted = run("kivi:bits=8", options, {prompts()[0]}, 300, 0.0f);
  EXPECT_LT(static_cast<double>(drafted.stats.draft_steps), 1.25 * static_cast<double>(drafted.stats.decided_tokens));
}

TEST(Engine, InjectedDelaysChangeNothing) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 30, 0.0f);
  EngineOptions options = full_mode();
  options.horizon = 8;
  options.max_sequences = 3;
  options.inject_delay_us = 3000;
  expect_identical(reference, run("snapkv:budget=0.3", options, prompts(), 30, 0.0f), "delays");
}

TEST(Engine, CorruptedBlocksAreRecomputedNeverAnswered) {
  const Outcome reference = run(nullptr, full_mode(), prompts(), 30, 0.0f);
  EngineOptions options = full_mode();
  options.horizon = 8;
  options.max_sequences = 2;
  options.inject_corruption_every = 59;
  const Outcome corrupted = run("kivi:bits=4", options, prompts(), 30, 0.0f);
  EXPECT_GT(corrupted.stats.corrupt_blocks, 0);
  EXPECT_GT(corrupted.stats.recomputed_tokens, 0);
  expect_identical(reference, corrupted, "corruption");

  // Where every block comes back broken no answer can be trusted, and the sequence says so. (Long enough for a slow
  // machine, which decides some tokens from pages that have not left the device.)
  options.inject_corruption_every = 1;
  const Outcome hopeless = run("kivi:bits=4", options, {prompts()[0]}, 300, 0.0f);
  EXPECT_EQ(hopeless.answers[0].finish, FinishReason::failed);
}

}  // namespace
}  // namespace vericache
