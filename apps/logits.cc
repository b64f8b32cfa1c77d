#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "base/error.h"
#include "flags.h"
#include "kv/page_pool.h"
#include "kv/tail.h"
#include "model/safetensors.h"
#include "model_session.h"
#include "prompts.h"
#include "terminal.h"

namespace vericache {
namespace {

// Rows of logits held at a time: a large vocabulary makes them the largest buffer of the pass.
constexpr int kLogitRows = 64;

struct LogitsFlags {
  ModelFlags model;
  std::string ids_file;
  std::string prompt_file;
  std::string out;
  int chunk = 512;
  bool json = false;
};

// -log of the probability that the row gives to `token`, in double.
double surprise(std::span<const float> row, TokenId token) {
  const double most = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float logit : row) {
    sum += std::exp(logit - most);
  }
  return most + std::log(sum) - row[static_cast<size_t>(token)];
}

struct Scored {
  std::vector<float> logits;  // (tokens, vocabulary), empty unless kept
  double surprise = 0;        // summed over the tokens after the first
};

// One sequence, chunk by chunk, its whole KV in the tail: the plainest use of the transformer that there is.
class Scorer {
 public:
  Scorer(ModelSession& session, std::span<const TokenId> ids, int chunk, bool keep)
      : session_(session),
        ids_(ids),
        keep_(keep),
        lane_(session.kernels()),
        device_(make_device(session.device_kind(), std::numeric_limits<size_t>::max() / 2)),
        host_(device_->make_host_memory(std::numeric_limits<size_t>::max() / 2)),
        sets_(static_cast<int>((ids.size() + kPageTokens - 1) / kPageTokens)),
        pool_(device_->allocate(page_set_bytes(session.kv_shape()) * static_cast<size_t>(sets_), "KV"),
              page_set_bytes(session.kv_shape()), sets_),
        tail_(session.kv_shape(), pool_, sets_, lane_,
              device_->addressable() ? nullptr
                                     : device_->allocate(Tail::index_bytes(session.kv_shape(), sets_), "tables")),
        activations_(session.transformer().make_activations(chunk, kLogitRows, *device_, lane_)),
        board_(host_->allocate_array<TokenId>(ids.size(), "tokens")),
        chosen_(host_->allocate_array<TokenId>(kLogitRows, "choices")),
        logits_(kLogitRows * vocabulary()) {
    std::copy(ids.begin(), ids.end(), board_);
    if (keep) {
      scored_.logits.resize(ids.size() * vocabulary());
    }
  }

  Scored run(int chunk, ProgressLine& progress) {
    const int count = static_cast<int>(ids_.size());
    tail_.grow(count);
    for (int first = 0; first < count; first += chunk) {
      pass(first, std::min(chunk, count - first));
      progress.show("computing", static_cast<size_t>(first), ids_.size());
    }
    progress.clear();
    return std::move(scored_);
  }

 private:
  size_t vocabulary() const { return static_cast<size_t>(session_.config().vocab_size); }

  void pass(int first, int rows) {
    const Transformer& model = session_.transformer();
    std::vector<SequenceRows> sequences;
    for (int layer = 0; layer < session_.config().layers; ++layer) {
      SequenceRows sequence{.first_row = 0, .rows = rows, .position = first, .tokens = board_, .kv = {}, .queries = {}};
      sequence.kv.tail = tail_.view(layer, 0);
      sequences.push_back(sequence);
    }
    PassRows pass{.rows = rows, .layers = session_.config().layers, .sequences = sequences};
    lane_.stage(pass);
    model.embed(pass, activations_);
    for (int layer = 0; layer < pass.layers; ++layer) {
      model.layer(layer, pass, activations_);
    }
    for (int row = 0; row < rows; row += kLogitRows) {
      take_rows(pass, first, row, std::min(kLogitRows, rows - row));
    }
  }

  // Rows [row, row + count) of the pass, whose first stands at `first`.
  void take_rows(PassRows& pass, int first, int row, int count) {
    std::vector<LogitRow> wanted;
    wanted.reserve(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      wanted.push_back({.row = row + i, .position = first + row + i + 1, .token = chosen_ + i});
    }
    pass.logit_rows = wanted;
    lane_.stage(pass);
    session_.transformer().logits(pass, activations_);
    lane_.wait(lane_.mark());
    device_->read(logits_.data(), reinterpret_cast<const std::byte*>(activations_.logits),
                  static_cast<size_t>(count) * vocabulary() * sizeof(float));
    for (int i = 0; i < count; ++i) {
      take_row(first + row + i, {logits_.data() + static_cast<size_t>(i) * vocabulary(), vocabulary()});
    }
  }

  void take_row(int position, std::span<const float> row) {
    const size_t at = static_cast<size_t>(position);
    if (at + 1 < ids_.size()) {
      scored_.surprise += surprise(row, ids_[at + 1]);
    }
    if (keep_) {
      std::copy(row.begin(), row.end(), scored_.logits.begin() + static_cast<std::ptrdiff_t>(at * vocabulary()));
    }
  }

  ModelSession& session_;
  std::span<const TokenId> ids_;
  bool keep_;
  Kernels& lane_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Device> host_;
  int sets_;
  PagePool pool_;
  Tail tail_;
  Activations activations_;
  TokenId* board_;   // (tokens)
  TokenId* chosen_;  // (kLogitRows): nobody reads them
  std::vector<float> logits_;
  Scored scored_;
};

int logits(const LogitsFlags& flags) {
  if (flags.ids_file.empty() == flags.prompt_file.empty()) {
    throw UsageError("logits needs either --ids-file or --prompt-file");
  }
  ModelSession session(flags.model);
  const ModelConfig& config = session.config();
  const std::vector<TokenId> ids =
      flags.ids_file.empty()
          ? encode_prompt(session.tokenizer(), read_prompt_file(flags.prompt_file), flags.prompt_file)
          : read_ids_file(flags.ids_file, config.vocab_size);
  const int count = static_cast<int>(ids.size());
  if (count > config.max_position) {
    throw Error("{} tokens are more than the context of the model, {}: shorten the text by {}", count,
                config.max_position, count - config.max_position);
  }
  ProgressLine progress;
  const int chunk = std::min(flags.chunk, count);
  session.load(chunk, 1, count, progress);
  Scored scored = Scorer(session, ids, chunk, !flags.out.empty()).run(chunk, progress);

  if (!flags.out.empty()) {
    const std::span<const float> all(scored.logits);
    write_safetensors(flags.out, {{"logits", {TensorDtype::f32, {count, config.vocab_size}, std::as_bytes(all)}}});
  }
  const int predicted = count - 1;
  const double mean = predicted > 0 ? scored.surprise / predicted : 0;
  if (flags.json) {
    const nlohmann::ordered_json json = {
        {"tokens", count},
        {"predicted_tokens", predicted},
        {"loss", predicted > 0 ? nlohmann::ordered_json(mean) : nlohmann::ordered_json()},
        {"perplexity", predicted > 0 ? nlohmann::ordered_json(std::exp(mean)) : nlohmann::ordered_json()},
        {"out", flags.out}};
    write_stdout(json.dump(2) + "\n");
  } else if (predicted > 0) {
    write_stdout(fmt::format("perplexity {:.4f} over {} tokens\n", std::exp(mean), predicted));
  } else {
    write_stdout("perplexity undefined: a single token predicts nothing\n");
  }
  return 0;
}

}  // namespace

void add_logits(CLI::App& app, Command& chosen) {
  CLI::App* command = app.add_subcommand("logits", "Compute the logits of every position, and the perplexity");
  auto flags = std::make_shared<LogitsFlags>();
  add_model_flags(*command, flags->model);
  CLI::Option* ids = command->add_option("--ids-file", flags->ids_file, "JSON: a list of token ids");
  command->add_option("--prompt-file", flags->prompt_file, "Text; - is stdin")->excludes(ids);
  command->add_option(
      "--out", flags->out,
      "Safetensors file to write: tensor 'logits', float32, (tokens, vocabulary); without it only the perplexity");
  command->add_option("--prefill-chunk", flags->chunk, "Rows of one pass; the result does not depend on it")
      ->check(CLI::Range(1, 8192))
      ->capture_default_str();
  command->add_flag("--json", flags->json, "One JSON object on stdout");
  command->footer(R"(Examples:
  vericache logits --model build/models/vericode-26m --prompt-file README.md --out logits.safetensors
  vericache logits --model build/models/vericode-5m --ids-file ids.json --json)");
  command->callback([flags, &chosen] { chosen = [flags] { return logits(*flags); }; });
}

}  // namespace vericache
