#include "model_session.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "engine/memory_plan.h"
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
    : device_kind_(vericache::device_kind(flags.device)),
      widened_(parse_widen(flags.model)),
      directory_(model_directory(widened_ ? widened_->model_dir : flags.model)),
      trained_(load_config(directory_)),
      config_(widened_ ? widen_config(trained_, *widened_) : trained_),
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

void ModelSession::load(int max_rows, int max_sequences, int max_context, ProgressLine& progress) {
  // Compressors that replay a context let rows stand behind it.
  const int positions = std::max(max_context, std::min(config_.max_position, max_context + max_rows));
  kernels_ = make_kernels({.device = device_kind_,
                           .isa = isa_,
                           .threads = threads_,
                           .shape = kv_shape(),
                           .heads = config_.heads,
                           .max_rows = max_rows,
                           .max_context_tokens = positions,
                           .max_sequences = max_sequences});
  device_ = make_device(device_kind_, kUnlimited);
  const Checkpoint checkpoint(directory_);
  const auto show = [&](size_t done, size_t total) { progress.show("loading", done, total); };
  weights_ = widened_ ? load_widened(checkpoint, trained_, config_, *kernels_, *device_, positions, show)
                      : load_weights(checkpoint, config_, *kernels_, *device_, positions, show);
  const LayerWeights& layer = weights_.layers.front();
  kernels_->tune(std::array{layer.qkv, layer.output, layer.gate_up, layer.down, weights_.head});
  progress.clear();
  transformer_ = std::make_unique<Transformer>(config_, weights_, *kernels_);
}

std::unique_ptr<Device> open_pool_device(ModelSession& session, size_t device_memory) {
  const size_t taken = session.weight_bytes() + session.kernels().device_bytes();
  if (device_memory != 0 && device_memory <= taken) {
    throw Error("--device-memory {} is less than the weights alone take, with the kernels' scratch ({}): raise it",
                bytes_text(static_cast<double>(device_memory)), bytes_text(static_cast<double>(taken)));
  }
  return make_device(session.device_kind(), device_memory == 0 ? kUnlimited : device_memory - taken);
}

std::unique_ptr<Trace> open_trace(const std::string& path) {
  return path.empty() ? nullptr : std::make_unique<Trace>(path);
}

OpenEngine open_engine(ModelSession& session, const EngineOptions& options, size_t device_memory,
                       const std::string& compressor, int horizon) {
  EngineOptions engine_options = options;
  engine_options.horizon = horizon;
  std::unique_ptr<Compressor> chosen = horizon == 0 ? nullptr : make_compressor(compressor);
  OpenEngine open;
  open.device = open_pool_device(session, device_memory);
  open.engine = std::make_unique<Engine>(session.transformer(), *open.device, std::move(chosen), engine_options);
  return open;
}

int engine_capacity(ModelSession& session, const EngineOptions& options, size_t device_memory,
                    const std::string& compressor, int horizon, int most) {
  EngineOptions engine_options = options;
  engine_options.horizon = horizon;
  const std::unique_ptr<Compressor> chosen = horizon == 0 ? nullptr : make_compressor(compressor);
  return sequences_that_fit(session.transformer(), chosen.get(), engine_options,
                            *open_pool_device(session, device_memory), most);
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
