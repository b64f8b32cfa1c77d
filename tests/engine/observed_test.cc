// What observe() is shown: every query of every decided token once, however prefill was cut and drafts were judged.
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "model/loaded_model.h"

namespace vericache {
namespace {

// H2O, whose notes of one layer are copied whenever it chooses.
class Watched final : public Compressor {
 public:
  struct Seen {
    int observed = 0;
    int max_tokens = 0;
    std::vector<float> mass;  // (kv_heads, max_tokens)
  };
  explicit Watched(Seen& seen) : h2o_(make_compressor("h2o:budget=0.5")), seen_(seen) {}
  std::string name() const override { return h2o_->name(); }
  KvFormat format() const override { return h2o_->format(); }
  int query_window() const override { return h2o_->query_window(); }
  bool chooses_anew() const override { return true; }
  bool observes() const override { return true; }
  size_t notes_bytes(int max_tokens, const KvShape& shape) const override {
    return h2o_->notes_bytes(max_tokens, shape);
  }
  size_t scratch_bytes(int max_tokens, const KvShape& shape) const override {
    return h2o_->scratch_bytes(max_tokens, shape);
  }
  void set_scratch(std::byte* memory) override { h2o_->set_scratch(memory); }
  int kept_tokens(int tokens) const override { return h2o_->kept_tokens(tokens); }
  void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) override {
    EXPECT_GT(seen.rows, 0);
    if (full.layer == 0) {
      EXPECT_EQ(seen.position, end_) << "each position once, in order";
      EXPECT_EQ(seen.notes.observed, end_);
      end_ = seen.position + seen.rows;
    }
    h2o_->observe(kernels, full, seen);
  }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) override {
    if (full.layer == 1) {
      const auto* mass = reinterpret_cast<const float*>(seen.notes.device);
      seen_ = {seen.notes.observed,
               seen.notes.max_tokens,
               {mass, mass + static_cast<ptrdiff_t>(full.shape.kv_heads) * seen.notes.max_tokens}};
    }
    return h2o_->compress(kernels, full, fresh, seen, out);
  }

 private:
  std::unique_ptr<Compressor> h2o_;
  Seen& seen_;
  int end_ = 0;
};

struct Answered {
  std::vector<TokenId> tokens;  // with the prompt
  Watched::Seen seen;
  int64_t accepted = 0;
};

Answered run(const std::vector<TokenId>& prompt, int max_tokens, int horizon, int pass_rows) {
  static LoadedModel& loaded = *new LoadedModel(bundled_model("vericode-5m"));
  EngineOptions options;
  options.horizon = horizon;
  options.max_model_len = 600;
  options.pass_rows = pass_rows;
  Answered out;
  out.tokens = prompt;
  const auto device = test::make_test_device();
  Engine engine(*loaded.model, *device, std::make_unique<Watched>(out.seen), options);
  Request request;
  request.prompt = prompt;
  request.max_tokens = max_tokens;
  request.on_progress = [&](const Progress& progress) {
    for (const DecidedToken& token : progress.tokens) {
      out.tokens.push_back(token.id);
    }
  };
  engine.submit(std::move(request));
  engine.run();
  out.accepted = engine.stats().speculation.accepted;
  return out;
}

TEST(Observed, EveryQueryOfADecidedTokenOnce) {
  if (test::tested_name() != "cpu") {
    GTEST_SKIP() << "notes are read where they lie";
  }
  std::vector<TokenId> prompt;
  for (int i = 0; i < 330; ++i) {
    prompt.push_back(static_cast<TokenId>(100 + i % 37 * 11 + i % 5));
  }
  const Answered drafted = run(prompt, 120, 9, 70);
  EXPECT_GT(drafted.accepted, 0);
  ASSERT_GT(drafted.seen.observed, 400);
  // The same tokens as a prompt, in one piece.
  const Answered whole = run({drafted.tokens.begin(), drafted.tokens.begin() + drafted.seen.observed}, 1, 1, 500);
  ASSERT_EQ(whole.seen.observed, drafted.seen.observed);
  for (size_t head = 0; head < 2; ++head) {
    for (int token = 0; token < whole.seen.observed; ++token) {
      const size_t at = head * static_cast<size_t>(whole.seen.max_tokens) + static_cast<size_t>(token);
      ASSERT_NEAR(drafted.seen.mass[at], whole.seen.mass[at], 1e-4 * static_cast<double>(whole.seen.mass[at]))
          << "token " << token << " of " << whole.seen.observed;
    }
  }
}

}  // namespace
}  // namespace vericache
