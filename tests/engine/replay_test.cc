// Replays: how contexts are cut, and that what a compressor is shown of one is what reading the context twice looks at.
#include "engine/replay.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstring>

#include "engine/engine.h"
#include "model/loaded_model.h"

namespace vericache {
namespace {

TEST(Replay, ChunksAreLedInByTheEndOfTheOneBefore) {
  EXPECT_EQ(replay_rows(0, 5000, 9000), 2048);
  EXPECT_EQ(replay_rows(2048, 5000, 9000), 2056);
  EXPECT_EQ(replay_rows(4096, 5000, 9000), 912);
  EXPECT_EQ(replay_rows(3, 5000, 9000), 2051);
  EXPECT_EQ(replay_rows(2048, 5000, 100), 100);
  const auto expect = [](const ReplayChunk& chunk, int first, int end) {
    EXPECT_EQ(chunk.first, first);
    EXPECT_EQ(chunk.end, end);
  };
  expect(replay_chunk(0, 5000, 2048), 0, 2048);
  expect(replay_chunk(2048, 5000, 2056), 2040, 4096);
  expect(replay_chunk(4096, 5000, 912), 4088, 5000);
  expect(replay_chunk(2048, 5000, 9), 2044, 2053);
  expect(replay_chunk(2048, 5000, 1), 2048, 2049);
  expect(replay_chunk(4999, 5000, 9), 4995, 5000);
}

RC_GTEST_PROP(Replay, EveryTokenHasItsTurnOnce, ()) {
  const int tokens = *rc::gen::inRange(1, 9000);
  const int room = *rc::gen::inRange(1, 4000);
  int replayed = 0;
  while (replayed < tokens) {
    const int most = replay_rows(replayed, tokens, room);
    RC_ASSERT(most >= 1 && most <= room);
    const int rows = *rc::gen::inRange(std::max(1, most / 2), most + 1);  // a pass may have room for fewer
    const ReplayChunk chunk = replay_chunk(replayed, tokens, rows);
    RC_ASSERT(chunk.first >= 0 && chunk.first <= replayed && chunk.first >= replayed - kReplayLead);
    RC_ASSERT(chunk.end > replayed && chunk.end <= tokens && chunk.rows() <= rows);
    replayed = chunk.end;
  }
}

// The largest weights of the rows from a position on, of one layer.
struct Largest {
  std::vector<int> positions;  // of chunks
  std::vector<int> rows;
  std::vector<float> weights;  // (kv_heads, max_tokens), when it last chose
  int chosen_at = -1;          // chunks that were seen when it first chose
};

// KVzip, which is shown either a replay or, as observed queries, the second half of a prompt that says everything
// twice.
class Watched final : public Compressor {
 public:
  static constexpr int kLayer = 3;  // the last: everything below has to be right
  Watched(Largest& seen, int twice) : kvzip_(make_compressor("kvzip:budget=0.3")), seen_(seen), twice_(twice) {}
  std::string name() const override { return kvzip_->name(); }
  KvFormat format() const override { return kvzip_->format(); }
  bool chooses_anew() const override { return true; }
  bool observes() const override { return twice_ > 0; }
  bool reconstructs() const override { return twice_ == 0; }
  size_t notes_bytes(int tokens, const KvShape& shape) const override { return kvzip_->notes_bytes(tokens, shape); }
  size_t scratch_bytes(int tokens, const KvShape& shape) const override { return kvzip_->scratch_bytes(tokens, shape); }
  void set_scratch(std::byte* memory) override { kvzip_->set_scratch(memory); }
  int kept_tokens(int tokens) const override { return kvzip_->kept_tokens(tokens); }
  void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) override {
    if (seen.position == twice_) {
      reconstruct(kernels, full, twice_, seen);
    }
  }
  void reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) override {
    if (full.layer == kLayer) {
      EXPECT_EQ(seen.notes.reconstructed, seen_.rows.empty() ? 0 : tokens);
      seen_.positions.push_back(seen.position);
      seen_.rows.push_back(seen.rows);
    }
    kvzip_->reconstruct(kernels, full, tokens, seen);
  }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) override {
    if (full.layer == kLayer && seen_.chosen_at < 0) {
      seen_.chosen_at = static_cast<int>(seen_.rows.size());
      if (test::tested_name() == "cpu") {
        const auto* weights = reinterpret_cast<const float*>(seen.notes.device);
        seen_.weights = {weights, weights + static_cast<ptrdiff_t>(full.shape.kv_heads) * seen.notes.max_tokens};
      }
    }
    return kvzip_->compress(kernels, full, fresh, seen, out);
  }

 private:
  std::unique_ptr<Compressor> kvzip_;
  Largest& seen_;
  int twice_;
};

constexpr int kMaxLen = 600;

LoadedModel& model() {
  static LoadedModel& loaded = *new LoadedModel(bundled_model("vericode-5m"));
  return loaded;
}
std::vector<TokenId> context(int tokens) {
  std::vector<TokenId> out;
  for (int i = 0; i < tokens; ++i) {
    out.push_back(static_cast<TokenId>(100 + i % 37 * 11 + i % 5));
  }
  return out;
}
EngineOptions options_of(int pass_rows) {
  EngineOptions options;
  options.horizon = 4;
  options.max_model_len = kMaxLen;
  options.pass_rows = pass_rows;
  return options;
}

EngineStats run(std::unique_ptr<Compressor> compressor, const std::vector<TokenId>& prompt, int max_tokens,
                const EngineOptions& options) {
  const auto device = test::make_test_device();
  Engine engine(*model().model, *device, std::move(compressor), options);
  engine.submit({.prompt = prompt, .sampling = {}, .max_tokens = max_tokens, .stop_tokens = {}, .on_progress = {}});
  engine.run();
  EXPECT_TRUE(engine.pools_whole());
  return engine.stats();
}

TEST(Replay, LooksAtWhatASecondReadingLooksAt) {
  if (test::tested_name() != "cpu") {
    GTEST_SKIP() << "notes are read where they lie";
  }
  const int tokens = 200;
  Largest replayed;
  const EngineStats stats = run(std::make_unique<Watched>(replayed, 0), context(tokens), 12, options_of(tokens));
  EXPECT_EQ(stats.prompt_tokens, tokens - 1) << "but for the row that decides";
  EXPECT_EQ(stats.replayed_tokens, tokens);
  EXPECT_EQ(replayed.positions, std::vector<int>{tokens});
  EXPECT_EQ(replayed.rows, std::vector<int>{tokens});
  EXPECT_EQ(replayed.chosen_at, 1) << "first chooses once the context is replayed";

  std::vector<TokenId> twice = context(tokens);
  twice.insert(twice.end(), twice.begin(), twice.begin() + tokens);
  Largest read;
  run(std::make_unique<Watched>(read, tokens), twice, 3, options_of(tokens));
  ASSERT_EQ(read.rows, std::vector<int>{tokens});
  for (int head = 0; head < model().model->kv_shape().kv_heads; ++head) {
    const float* a = replayed.weights.data() + static_cast<ptrdiff_t>(head) * kMaxLen;
    const float* b = read.weights.data() + static_cast<ptrdiff_t>(head) * kMaxLen;
    ASSERT_EQ(std::memcmp(a, b, tokens * sizeof(float)), 0) << "bit for bit, head " << head;
    EXPECT_GT(*std::max_element(a, a + tokens), 0.0f);
  }
}

TEST(Replay, ComesInPassesAndAtTheSamePositions) {
  Largest seen;
  const EngineStats stats = run(std::make_unique<Watched>(seen, 0), context(250), 12, options_of(100));
  EXPECT_EQ(seen.positions, (std::vector<int>{250, 250, 250}));
  EXPECT_EQ(seen.rows, (std::vector<int>{100, 100, 66}));  // of them 0, 8 and 8 lead in
  EXPECT_EQ(seen.chosen_at, 3);
  EXPECT_EQ(stats.replayed_tokens, 266);
  EXPECT_EQ(stats.prompt_tokens, 249);
}

TEST(Replay, IsLeftOutWhereItIsOfNoUse) {
  const auto replayed = [](int tokens, int max_tokens, int horizon) {
    EngineOptions options = options_of(100);
    options.horizon = horizon;
    return run(make_compressor("kvzip"), context(tokens), max_tokens, options).replayed_tokens;
  };
  EXPECT_EQ(replayed(63, 20, 4), 0) << "nothing is folded";
  EXPECT_EQ(replayed(64, 20, 4), 64);
  EXPECT_EQ(replayed(80, 2, 4), 0) << "no draft could be of use";
  EXPECT_EQ(replayed(80, 3, 4), 80);
  EXPECT_EQ(replayed(80, 20, 0), 0) << "nobody drafts";
  EXPECT_EQ(run(make_compressor("h2o"), context(80), 20, options_of(100)).replayed_tokens, 0);
}

// What is cancelled between its first token and its first draft gives everything back; a held engine replays.
TEST(Replay, IsCancelledAndHeld) {
  const auto device = test::make_test_device();
  EngineOptions options = options_of(70);
  options.max_sequences = 2;
  Engine engine(*model().model, *device, make_compressor("kvzip"), options);
  int ends = 0;
  SeqId doomed = 0;
  const auto submit = [&](const std::function<void(const Progress&)>& progress) {
    return engine.submit(
        {.prompt = context(400), .sampling = {}, .max_tokens = 9, .stop_tokens = {}, .on_progress = progress});
  };
  doomed = submit([&](const Progress& progress) {
    if (!progress.tokens.empty()) {
      engine.cancel(doomed);
    }
    if (progress.finish) {
      EXPECT_EQ(*progress.finish, FinishReason::cancelled);
      ++ends;
    }
  });
  submit([&](const Progress& progress) { ends += progress.finish ? 1 : 0; });
  engine.hold_decoding(true);
  while (engine.reading() && engine.step()) {
  }
  EXPECT_EQ(engine.stats().draft_steps, 0);
  EXPECT_GT(engine.stats().replayed_tokens, 400);
  EXPECT_LT(engine.stats().replayed_tokens, 2 * 400);
  engine.hold_decoding(false);
  engine.run();
  EXPECT_EQ(ends, 2);
  EXPECT_TRUE(engine.pools_whole());
}

}  // namespace
}  // namespace vericache
