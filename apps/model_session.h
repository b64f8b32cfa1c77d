// ModelSession: an opened model directory with its kernels, weights and transformer, and the engines over them. Weights
// live once, in a device of their own; every engine has a device for its pools. Main thread.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "backend/device.h"
#include "backend/factory.h"
#include "base/trace.h"
#include "engine/engine.h"
#include "flags.h"
#include "model/config.h"
#include "model/transformer.h"
#include "model/weights.h"
#include "model/widen.h"
#include "terminal.h"
#include "text/tokenizer.h"

namespace vericache {

class ModelSession {
 public:
  // Reads the configuration only, so that bad input is found before the weights are loaded.
  explicit ModelSession(const ModelFlags& flags);
  ModelSession(const ModelSession&) = delete;
  ModelSession& operator=(const ModelSession&) = delete;

  DeviceKind device_kind() const { return device_kind_; }
  // The shape that the model is widened to, as it was asked for: every figure measured with it says so. Empty: it is
  // not.
  std::string widened_shape() const { return widened_ ? widened_->shape : ""; }
  const std::filesystem::path& directory() const { return directory_; }
  const ModelConfig& config() const { return config_; }
  KvShape kv_shape() const { return {config_.layers, config_.kv_heads, config_.head_dim}; }
  const Tokenizer& tokenizer();  // read at the first call

  // Kernels for passes of max_rows rows and max_sequences sequences and contexts of max_context tokens, then the
  // weights. Once, before what follows.
  void load(int max_rows, int max_sequences, int max_context, ProgressLine& progress);
  Kernels& kernels() { return *kernels_; }
  const Transformer& transformer() const { return *transformer_; }
  const Weights& weights() const { return weights_; }
  size_t weight_bytes() const { return weights_.bytes; }
  int threads() const { return threads_; }

 private:
  DeviceKind device_kind_;
  std::optional<WidenSpec> widened_;
  std::filesystem::path directory_;
  ModelConfig trained_;
  ModelConfig config_;
  std::string isa_;
  int threads_;
  std::optional<Tokenizer> tokenizer_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Kernels> kernels_;
  Weights weights_;
  std::unique_ptr<Transformer> transformer_;
};

// What the lanes do goes to this file; null for an empty path.
std::unique_ptr<Trace> open_trace(const std::string& path);

// A device for an engine's pools: what the budget leaves beside the weights and the kernels' own memory. 0 = unlimited.
std::unique_ptr<Device> open_pool_device(ModelSession& session, size_t device_memory);

// An engine and the device that its pools live in.
struct OpenEngine {
  std::unique_ptr<Device> device;
  std::unique_ptr<Engine> engine;
  Engine* operator->() const { return engine.get(); }
};

// `compressor` as the factory reads it; "none" with horizon 0 is full-KV mode.
// `device_memory` is for the weights too; 0 = unlimited.
OpenEngine open_engine(ModelSession& session, const EngineOptions& options, size_t device_memory,
                       const std::string& compressor, int horizon);

// Sequences of options.max_model_len tokens that such an engine can have in flight, `most` at most.
int engine_capacity(ModelSession& session, const EngineOptions& options, size_t device_memory,
                    const std::string& compressor, int horizon, int most);

// The context that the work needs: options.max_model_len where it is given, else prompt and output, at most the
// model's. Error if the prompt does not fit.
int plan_context(const ModelConfig& config, const EngineOptions& options, int prompt_tokens, int max_tokens,
                 std::string_view source);

// The most rows of one pass of any kind under these options.
int most_rows(const EngineOptions& options);

}  // namespace vericache
