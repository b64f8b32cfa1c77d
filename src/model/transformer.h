// Transformer: the forward pass, layer by layer, so that a pass can wait for a layer's KV and others can run meanwhile.
// The model is const; what a pass changes is its Activations and the KV that it is given. Called from the engine's
// thread.
#pragma once

#include "backend/device.h"
#include "backend/kernels.h"
#include "model/config.h"
#include "model/weights.h"

namespace vericache {

// A lane and its scratch: a draft step and a full pass in progress each have their own.
struct Activations {
  Kernels* lane = nullptr;
  int max_rows = 0;
  int max_logit_rows = 0;
  float* hidden = nullptr;        // (rows, hidden): the residual stream, float
  bf16* normed = nullptr;         // (rows, padded hidden)
  float* qkv = nullptr;           // (rows, (heads + 2 kv_heads) * head_dim)
  bf16* q = nullptr;              // (rows, heads, key_dim)
  bf16* attended = nullptr;       // (rows, padded heads * head_dim)
  float* log_sum_exp = nullptr;   // (rows, heads)
  float* gate_up = nullptr;       // (rows, 2 * intermediate)
  bf16* activated = nullptr;      // (rows, padded intermediate)
  float* chosen = nullptr;        // (logit rows, hidden)
  bf16* chosen_normed = nullptr;  // (logit rows, padded hidden)
  float* logits = nullptr;        // (logit rows, vocabulary)
};

class Transformer {
 public:
  Transformer(const ModelConfig& config, const Weights& weights, Kernels& kernels)
      : config_(config), weights_(weights), kernels_(kernels) {}

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  Kernels& kernels() const { return kernels_; }
  KvShape kv_shape() const { return {config_.layers, config_.kv_heads, config_.head_dim}; }
  float attention_scale() const;

  size_t activation_bytes(int max_rows, int max_logit_rows) const;
  Activations make_activations(int max_rows, int max_logit_rows, Device& device, Kernels& lane) const;

  // What follows enqueues a pass that is staged on a.lane: embed, every layer in order, logits.
  void embed(const PassRows& pass, Activations& a) const;
  // Writes the rows' K and V into the tails and attends to past and tail of each sequence.
  void layer(int index, const PassRows& pass, Activations& a) const;
  // Logits of pass.logit_rows, one below the other in a.logits, and what they choose.
  void logits(const PassRows& pass, Activations& a) const;

 private:
  const ModelConfig& config_;
  const Weights& weights_;
  Kernels& kernels_;
};

}  // namespace vericache
