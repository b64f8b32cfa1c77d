#include "eval_measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <memory>

#include "engine/cache_trial.h"
#include "prompts.h"
#include "transcript.h"

namespace vericache {
namespace {

class Measurement {
 public:
  Measurement(const EvalPlan& plan, const EvalSet& set, ModelSession& session,
              const std::function<void(std::string_view)>& show)
      : plan_(plan), set_(set), session_(session), show_(show) {
    for (const std::string& compressor : plan.compressors) {
      EvalCell cell;
      cell.workload = set.workload;
      cell.context = set.context;
      cell.temperature = plan.sampling.temperature;
      cell.compressor = compressor;
      cell.prompts = static_cast<int>(set.prompts.size());
      cell.has_answers = set.has_answers();
      cells_.push_back(std::move(cell));
    }
  }

  std::vector<EvalCell> run() {
    decode_full();
    for (size_t i = 0; i < set_.prompts.size(); ++i) {
      try_alone(i);
    }
    for (EvalCell& cell : cells_) {
      decode_verified(cell);
    }
    return std::move(cells_);
  }

 private:
  Sampling sampling_of(size_t prompt) const {
    Sampling sampling = plan_.sampling;
    sampling.seed += prompt;
    return sampling;
  }
  // Code goes on for as long as it is told to.
  const std::vector<TokenId>& stops() const {
    static const std::vector<TokenId> kNone;
    return set_.has_answers() ? session_.config().eos_tokens : kNone;
  }
  int max_len() const {
    return plan_context(session_.config(), plan_.options, set_.longest() - 1, 1, "the longest prompt with its answer");
  }
  std::string text_of(std::vector<TokenId> tokens) {
    if (!tokens.empty() && std::count(stops().begin(), stops().end(), tokens.back()) > 0) {
      tokens.pop_back();
    }
    return session_.tokenizer().decode(tokens);
  }
  void grade_into(size_t prompt, const std::vector<TokenId>& tokens, Answers& answers) {
    if (set_.has_answers()) {
      const Grade result = grade(set_.prompts[prompt], text_of(tokens));
      answers.right += result.right ? 1 : 0;
      answers.items += result.items;
    }
  }
  void tell(std::string_view what) {
    show_(fmt::format("{} at {}, temperature {}: {}", set_.workload, set_.context, plan_.sampling.temperature, what));
  }

  std::deque<Transcript> decode(Engine& engine, std::string_view what) {
    std::deque<Transcript> transcripts(set_.prompts.size());
    for (size_t i = 0; i < transcripts.size(); ++i) {
      submit_recorded(engine,
                      {.prompt = set_.prompts[i].ids,
                       .sampling = sampling_of(i),
                       .max_tokens = set_.prompts[i].max_tokens,
                       .stop_tokens = stops(),
                       .on_progress = {}},
                      transcripts[i]);
    }
    while (engine.step()) {
      tell(what);
    }
    return transcripts;
  }

  // The plainest decoding there is: the full KV in device memory, no drafts, one sequence at a time.
  void decode_full() {
    EngineOptions options;
    options.max_model_len = max_len();
    const OpenEngine engine = open_engine(session_, options, 0, "none", 0);
    full_ = decode(*engine.engine, "the full cache");
    Answers answers;
    std::vector<std::vector<TokenId>> texts;
    for (size_t i = 0; i < full_.size(); ++i) {
      texts.push_back(full_[i].ids());
      grade_into(i, texts.back(), answers);
    }
    for (EvalCell& cell : cells_) {
      cell.full = answers;
      cell.distinct_8gram_share = distinct_8gram_share(texts);
    }
  }

  // One prompt, read once, with every compressor.
  void try_alone(size_t prompt) {
    const EvalPrompt& asked = set_.prompts[prompt];
    const std::vector<TokenId> exact = full_[prompt].ids();
    std::vector<std::unique_ptr<Compressor>> compressors;
    compressors.reserve(cells_.size());
    for (const EvalCell& cell : cells_) {
      compressors.push_back(make_compressor(cell.compressor));
    }
    const std::unique_ptr<Device> device = open_pool_device(session_, 0);
    CacheTrial trial(session_.transformer(), *device, std::move(compressors),
                     {.max_tokens = static_cast<int>(asked.ids.size()) + asked.max_tokens,
                      .pass_rows = most_rows(EngineOptions{}),
                      .batch = kEvalBatch});
    tell(fmt::format("prompt {} of {}, reading", prompt + 1, set_.prompts.size()));
    trial.read(asked.ids, sampling_of(prompt));
    for (size_t i = 0; i < cells_.size(); ++i) {
      EvalCell& cell = cells_[i];
      tell(fmt::format("prompt {} of {}, {} alone", prompt + 1, set_.prompts.size(), cell.compressor));
      const CacheTrial::Resident resident = trial.resident(i);
      cell.resident_bytes += resident.bytes;
      cell.resident_values += resident.values;
      judge(trial.forced(i, exact), exact, cell);
      const std::vector<TokenId> alone = trial.alone(i, exact.front(), asked.max_tokens, stops());
      cell.alone_same += alone == exact ? 1 : 0;
      grade_into(prompt, alone, cell.alone);
    }
  }

  // A round: drafts up to the first that disagrees, at most a horizon of them, and the token that its verification
  // chooses.
  static void judge(const std::vector<TokenId>& choices, const std::vector<TokenId>& exact, EvalCell& cell) {
    const auto agrees = [&](size_t i) { return choices[i] == exact[i + 1]; };
    for (size_t i = 0; i < choices.size(); ++i) {
      cell.agreed += agrees(i) ? 1 : 0;
    }
    cell.judged += static_cast<int64_t>(choices.size());
    for (size_t h = 0; h < kEvalHorizons.size(); ++h) {
      for (size_t i = 0; i < choices.size(); ++i, ++cell.rounds[h]) {
        for (int drafts = 0; drafts < kEvalHorizons[h] && i < choices.size() && agrees(i); ++drafts) {
          ++i;
        }
      }
    }
  }

  void decode_verified(EvalCell& cell) {
    EngineOptions options = plan_.options;
    options.max_model_len = max_len();
    const OpenEngine engine =
        open_engine(session_, options, plan_.device_memory, cell.compressor, plan_.options.horizon);
    const std::deque<Transcript> got = decode(*engine.engine, cell.compressor + " verified");
    cell.stats = engine->stats();
    for (size_t i = 0; i < got.size(); ++i) {
      grade_into(i, got[i].ids(), cell.verified);
      const Comparison comparison = compare(full_[i], got[i]);
      cell.tokens += comparison.tokens;
      cell.mismatches += comparison.mismatches;
      if (comparison.first && cell.first_mismatch.empty()) {
        cell.first_mismatch = fmt::format("prompt {}: {}", i, describe(*comparison.first));
      }
    }
  }

  const EvalPlan& plan_;
  const EvalSet& set_;
  ModelSession& session_;
  const std::function<void(std::string_view)>& show_;
  std::vector<EvalCell> cells_;
  std::deque<Transcript> full_;
};

}  // namespace

double EvalCell::agreement() const {
  return judged == 0 ? 1 : static_cast<double>(agreed) / static_cast<double>(judged);
}

double EvalCell::tokens_per_round(size_t horizon) const {
  return rounds[horizon] == 0 ? 0 : static_cast<double>(judged) / static_cast<double>(rounds[horizon]);
}

double EvalCell::resident_bits() const {
  return resident_values == 0 ? 0 : 8 * resident_bytes / resident_values;
}

std::optional<double> EvalCell::wire_bits(const KvShape& shape) const {
  const double values =
      2.0 * static_cast<double>(stats.verify_wire_tokens) * shape.layers * shape.kv_heads * shape.head_dim;
  return values == 0 ? std::nullopt : std::optional(8 * static_cast<double>(stats.verify_wire_bytes) / values);
}

std::optional<double> EvalCell::wire_bytes_per_accepted() const {
  return stats.speculation.accepted == 0 ? std::nullopt
                                         : std::optional(static_cast<double>(stats.verify_wire_bytes) /
                                                         static_cast<double>(stats.speculation.accepted));
}

std::vector<EvalCell> measure_eval(const EvalPlan& plan, const EvalSet& set, ModelSession& session,
                                   const std::function<void(std::string_view)>& show) {
  return Measurement(plan, set, session, show).run();
}

}  // namespace vericache
