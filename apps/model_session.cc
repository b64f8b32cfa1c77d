#include "model_session.h"

#include <algorithm>
#include <limits>

#include "backend/factory.h"
#include "base/error.h"
#include "model/checkpoint.h"

namespace vericache {
namespace {

// Half of what can be counted, so that sums of sizes cannot overflow.
constexpr size_t kUnlimited = std::numeric_limits<size_t>::max() / 2;

std::filesystem::path model_directory(const std::string& name) {
  std::error_code failure;
  if (!std::filesystem::is_directory(name, failure)) {
    throw Error(
        "--model '{}' is no directory: give the folder that holds config.json and model.safetensors (make build "
        "unpacks "
        "build/models/vericode-26m)",
        name);
  }
  return name;
}

}  // namespace

ModelSession::ModelSession(const ModelFlags& flags)
    : directory_(model_directory(flags.model)),
      config_(load_config(directory_)),
      isa_(flags.isa),
      threads_(flags.threads > 0 ? flags.threads : core_count()) {
  require_isa(isa_);
}

const Tokenizer& ModelSession::tokenizer() {
  if (!tokenizer_) {
    tokenizer_.emplace(Tokenizer::load(directory_));
  }
  return *tokenizer_;
}

void ModelSession::load(int max_rows, int max_context, ProgressLine& progress) {
  kernels_ = make_kernels({.isa = isa_,
                           .threads = threads_,
                           .shape = kv_shape(),
                           .heads = config_.heads,
                           .max_rows = max_rows,
                           .max_context_tokens = max_context});
  device_ = make_cpu_device(kUnlimited);
  const Checkpoint checkpoint(directory_);
  weights_ = load_weights(checkpoint, config_, *kernels_, *device_, max_context,
                          [&](size_t done, size_t total) { progress.show("loading", done, total); });
  progress.clear();
  transformer_ = std::make_unique<Transformer>(config_, weights_, *kernels_);
}

OpenEngine open_engine(ModelSession& session, const EngineOptions& options, size_t device_memory,
                       const std::string& compressor, int horizon) {
  if (device_memory != 0 && device_memory <= session.weight_bytes()) {
    throw Error("--device-memory {} is less than the weights alone take ({}): raise it",
                bytes_text(static_cast<double>(device_memory)),
                bytes_text(static_cast<double>(session.weight_bytes())));
  }
  EngineOptions engine_options = options;
  engine_options.horizon = horizon;
  std::unique_ptr<Compressor> chosen = horizon == 0 ? nullptr : make_compressor(compressor);
  OpenEngine open;
  open.device = make_cpu_device(device_memory == 0 ? kUnlimited : device_memory - session.weight_bytes());
  open.engine = std::make_unique<Engine>(session.transformer(), *open.device, std::move(chosen), engine_options);
  return open;
}

int plan_context(const ModelConfig& config, const EngineOptions& options, int prompt_tokens, int max_tokens,
                 std::string_view source) {
  if (options.max_model_len > config.max_position) {
    throw UsageError("--max-model-len {} is more than the context of the model, {} tokens: lower it",
                     options.max_model_len, config.max_position);
  }
  const int limit = options.max_model_len > 0 ? options.max_model_len : config.max_position;
  if (prompt_tokens >= limit) {
    throw Error("{} has {} tokens, but the context holds {} and must leave room for one more: shorten it by {} tokens",
                source, prompt_tokens, limit, prompt_tokens - limit + 1);
  }
  if (options.max_model_len > 0) {
    return limit;
  }
  const int64_t needed = (static_cast<int64_t>(prompt_tokens) + max_tokens + kPageTokens) / kPageTokens * kPageTokens;
  return static_cast<int>(std::min<int64_t>(needed, limit));
}

int most_rows(const EngineOptions& options) {
  return std::max(options.pass_rows, options.max_sequences);
}

}  // namespace vericache
