// Random traffic over a real engine: requests join and leave at random, each is held against itself run alone with the
// full cache. Each test owns its engine and drives it on its thread; the model is shared.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/least_budget.h"
#include "model/loaded_model.h"

namespace vericache::test {

constexpr int kMaxModelLen = 1024;

struct Answer {
  std::vector<DecidedToken> tokens;
  std::optional<FinishReason> finish;
};

struct Visitor {
  Request request;
  Answer expected;        // alone, with the full cache, nobody cancels
  int joins = 0;          // at this step
  int leaves = -1;        // cancelled so many steps after it joined; -1 = stays
  int leaves_after = -1;  // cancelled from its own progress, once it has so many tokens
};

// Never freed: a device's runtime may be gone when statics go.
inline LoadedModel& small_model() {
  static LoadedModel& model = *new LoadedModel(bundled_model("vericode-5m"), {.max_rows = kMaxModelLen});
  return model;
}

// Phrases that repeat, so that drafts from a lossy cache have something to agree on.
inline std::vector<TokenId> random_prompt(int tokens, std::mt19937_64& random) {
  std::vector<TokenId> phrase(20 + random() % 150);
  for (TokenId& token : phrase) {
    token = static_cast<TokenId>(20 + random() % 8000);
  }
  std::vector<TokenId> prompt;
  while (static_cast<int>(prompt.size()) < tokens) {
    prompt.push_back(random() % 60 == 0 ? static_cast<TokenId>(20 + random() % 8000)
                                        : phrase[prompt.size() % phrase.size()]);
  }
  return prompt;
}

// Answers to a request in full-KV mode, alone in its engine.
class Reference {
 public:
  Reference() : device_(make_test_device()) {
    EngineOptions options;
    options.horizon = 0;
    options.max_model_len = kMaxModelLen;
    engine_ = std::make_unique<Engine>(*small_model().model, *device_, nullptr, options);
  }
  Answer answer(Request request) {
    Answer answer;
    request.on_progress = [&answer](const Progress& progress) {
      answer.tokens.insert(answer.tokens.end(), progress.tokens.begin(), progress.tokens.end());
      answer.finish = progress.finish;
    };
    engine_->submit(std::move(request));
    engine_->run();
    return answer;
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Engine> engine_;
};

inline Visitor random_visitor(Reference& reference, std::mt19937_64& random, int last_join) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  Visitor visitor;
  // Page borders are where mistakes live.
  const int length = below(4) == 0 ? 64 * (1 + below(13)) + below(3) - 1 : 1 + below(900);
  visitor.request.prompt = random_prompt(length, random);
  visitor.request.max_tokens = below(5) == 0 ? 1 + below(3) : 1 + below(70);
  visitor.request.sampling.temperature = static_cast<float>(below(3)) * 0.45f;
  visitor.request.sampling.top_k = below(4) == 0 ? 50 : 0;
  visitor.request.sampling.seed = random();
  visitor.expected = reference.answer(visitor.request);
  if (below(3) == 0) {
    // A stop token out of the middle of the answer: the answer ends where it first stands.
    std::vector<DecidedToken>& tokens = visitor.expected.tokens;
    const TokenId stop = tokens[random() % tokens.size()].id;
    visitor.request.stop_tokens = {stop};
    tokens.erase(std::find_if(tokens.begin(), tokens.end(), [&](const DecidedToken& t) { return t.id == stop; }) + 1,
                 tokens.end());
    visitor.expected.finish = FinishReason::stop;
  }
  visitor.joins = below(last_join + 1);
  if (below(5) == 0) {
    visitor.leaves = below(3) == 0 ? below(4) : below(250);
  } else if (below(10) == 0) {
    visitor.leaves_after = 1 + below(20);
  }
  return visitor;
}

struct TrafficSetup {
  std::string compressor;  // empty = full-KV mode
  EngineOptions options;
  double budget = 0;  // device bytes, in multiples of the least that works; 0 = plenty
};

// A wire so slow that pages wait for it. Nothing can slow a GPU's link, but its lanes can be held up.
inline void slow_wire(EngineOptions& options, double gbps, int delay_us) {
  if (make_test_device()->addressable()) {
    options.wire_gbps = gbps;
  } else {
    options.inject_delay_us = std::max(options.inject_delay_us, delay_us);
  }
}

inline std::string expect_as_alone(const Visitor& visitor, const Answer& answer) {
  if (!answer.finish) {
    return "never finished";
  }
  const std::vector<DecidedToken>& expected = visitor.expected.tokens;
  const bool cancelled = answer.finish == FinishReason::cancelled;
  if (cancelled && visitor.leaves < 0 && visitor.leaves_after < 0) {
    return "cancelled though nobody asked for it";
  }
  if (!cancelled && answer.finish != visitor.expected.finish) {
    return std::string("finished by ") + std::string(finish_reason_name(*answer.finish));
  }
  if (answer.tokens.size() > expected.size() || (!cancelled && answer.tokens.size() != expected.size())) {
    return "has " + std::to_string(answer.tokens.size()) + " tokens, not " + std::to_string(expected.size());
  }
  for (size_t i = 0; i < answer.tokens.size(); ++i) {
    if (answer.tokens[i].id != expected[i].id || answer.tokens[i].logits_hash != expected[i].logits_hash) {
      return "differs at token " + std::to_string(i);
    }
  }
  return "";
}

// Drives all visitors through one engine; every answer must be the one given alone.
inline EngineStats run_traffic(const TrafficSetup& setup, const std::vector<Visitor>& visitors) {
  const Transformer& model = *small_model().model;
  std::unique_ptr<Compressor> compressor = setup.compressor.empty() ? nullptr : make_compressor(setup.compressor);
  size_t budget = kPlenty;
  if (setup.budget != 0) {
    const size_t least = least_budget(model, compressor.get(), setup.options);
    budget = static_cast<size_t>(static_cast<double>(least) * setup.budget);
  }
  const std::unique_ptr<Device> device = make_test_device(budget);
  Engine engine(model, *device, std::move(compressor), setup.options);
  std::vector<Answer> answers(visitors.size());
  std::map<int, std::vector<size_t>> joining;
  std::multimap<int, SeqId> leaving;
  for (size_t i = 0; i < visitors.size(); ++i) {
    joining[visitors[i].joins].push_back(i);
  }
  bool working = false;
  for (int step = 0; working || !joining.empty(); ++step) {
    while (!joining.empty() && (joining.begin()->first <= step || !working)) {
      for (const size_t i : joining.begin()->second) {
        const Visitor& visitor = visitors[i];
        Request request = visitor.request;
        request.on_progress = [&, i](const Progress& progress) {
          Answer& answer = answers[i];
          EXPECT_FALSE(answer.finish) << "a sequence says nothing after its end";
          answer.tokens.insert(answer.tokens.end(), progress.tokens.begin(), progress.tokens.end());
          answer.finish = progress.finish;
          if (visitors[i].leaves_after >= 0 && static_cast<int>(answer.tokens.size()) >= visitors[i].leaves_after) {
            engine.cancel(progress.id);
          }
        };
        const SeqId id = engine.submit(std::move(request));
        if (visitor.leaves >= 0) {
          leaving.emplace(step + visitor.leaves, id);
        }
      }
      joining.erase(joining.begin());
      working = true;
    }
    while (!leaving.empty() && leaving.begin()->first <= step) {
      engine.cancel(leaving.begin()->second);
      leaving.erase(leaving.begin());
    }
    working = engine.step();
  }
  for (size_t i = 0; i < visitors.size(); ++i) {
    EXPECT_EQ(expect_as_alone(visitors[i], answers[i]), "")
        << "visitor " << i << ": prompt of " << visitors[i].request.prompt.size() << ", " << setup.compressor
        << " horizon " << setup.options.horizon;
  }
  EXPECT_TRUE(engine.pools_whole());
  return engine.stats();
}

}  // namespace vericache::test
