#include "model/transformer.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace vericache {
namespace {

// Visits every buffer of Activations with its size, so that counting and allocating cannot disagree.
template <typename Visit>
void visit_buffers(const ModelConfig& c, int max_rows, int max_logit_rows, Activations& a, const Visit& visit) {
  const KvShape shape{c.layers, c.kv_heads, c.head_dim};
  const size_t rows = static_cast<size_t>(max_rows);
  const size_t logit_rows = static_cast<size_t>(max_logit_rows);
  visit(a.hidden, rows * static_cast<size_t>(c.hidden_size));
  visit(a.normed, rows * static_cast<size_t>(padded_dim(c.hidden_size)));
  visit(a.qkv, rows * static_cast<size_t>((c.heads + 2 * c.kv_heads) * c.head_dim));
  visit(a.q, rows * static_cast<size_t>(c.heads * shape.key_dim()));
  visit(a.attended, rows * static_cast<size_t>(padded_dim(c.heads * c.head_dim)));
  visit(a.log_sum_exp, rows * static_cast<size_t>(c.heads));
  visit(a.gate_up, rows * 2 * static_cast<size_t>(c.intermediate_size));
  visit(a.activated, rows * static_cast<size_t>(padded_dim(c.intermediate_size)));
  visit(a.chosen, logit_rows * static_cast<size_t>(c.hidden_size));
  visit(a.chosen_normed, logit_rows * static_cast<size_t>(padded_dim(c.hidden_size)));
  visit(a.logits, logit_rows * static_cast<size_t>(c.vocab_size));
}

// Each buffer is an array of its own, on cache lines of its own.
size_t buffer_bytes(size_t count, size_t element_bytes) {
  return (count * element_bytes + 4095) / 4096 * 4096;
}

}  // namespace

float Transformer::attention_scale() const {
  return 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
}

size_t Transformer::activation_bytes(int max_rows, int max_logit_rows) const {
  size_t bytes = 0;
  Activations a;
  visit_buffers(config_, max_rows, max_logit_rows, a,
                [&](auto*& buffer, size_t count) { bytes += buffer_bytes(count, sizeof(*buffer)); });
  return bytes;
}

Activations Transformer::make_activations(int max_rows, int max_logit_rows, Device& device, Kernels& lane) const {
  Activations a;
  a.lane = &lane;
  a.max_rows = max_rows;
  a.max_logit_rows = max_logit_rows;
  visit_buffers(config_, max_rows, max_logit_rows, a,
                [&]<typename T>(T*& buffer, size_t count) { buffer = device.allocate_array<T>(count, "activations"); });
  return a;
}

void Transformer::embed(const PassRows& pass, Activations& a) const {
  check(pass.rows <= a.max_rows && static_cast<int>(pass.logit_rows.size()) <= a.max_logit_rows,
        "a pass fits its activations");
  a.lane->embed(weights_.embedding, pass, a.hidden);
}

void Transformer::layer(int index, const PassRows& pass, Activations& a) const {
  Kernels& kernels = *a.lane;
  const int rows = pass.rows;
  const LayerWeights& w = weights_.layers[static_cast<size_t>(index)];
  const KvShape shape = kv_shape();

  kernels.rms_norm(a.hidden, w.attention_norm, config_.rms_norm_eps, rows, config_.hidden_size, a.normed);
  kernels.matmul(w.qkv, a.normed, rows, a.qkv, Epilogue::store);
  kernels.store_qkv({.shape = shape,
                     .heads = config_.heads,
                     .qkv = a.qkv,
                     .bias = w.qkv_bias,
                     .q_norm = w.q_norm,
                     .k_norm = w.k_norm,
                     .norm_eps = config_.rms_norm_eps,
                     .rope = weights_.rope,
                     .pass = &pass,
                     .layer = index,
                     .q = a.q});
  kernels.attention({.shape = shape,
                     .heads = config_.heads,
                     .scale = attention_scale(),
                     .q = a.q,
                     .pass = &pass,
                     .layer = index,
                     .out = a.attended,
                     .log_sum_exp = a.log_sum_exp});
  kernels.matmul(w.output, a.attended, rows, a.hidden, Epilogue::add);
  if (w.output_bias != nullptr) {
    kernels.add_bias(w.output_bias, rows, config_.hidden_size, a.hidden);
  }

  kernels.rms_norm(a.hidden, w.mlp_norm, config_.rms_norm_eps, rows, config_.hidden_size, a.normed);
  kernels.matmul(w.gate_up, a.normed, rows, a.gate_up, Epilogue::store);
  if (w.gate_up_bias != nullptr) {
    kernels.add_bias(w.gate_up_bias, rows, 2 * config_.intermediate_size, a.gate_up);
  }
  kernels.silu_mul(a.gate_up, rows, config_.intermediate_size, a.activated);
  kernels.matmul(w.down, a.activated, rows, a.hidden, Epilogue::add);
  if (w.down_bias != nullptr) {
    kernels.add_bias(w.down_bias, rows, config_.hidden_size, a.hidden);
  }
}

void Transformer::logits(const PassRows& pass, Activations& a) const {
  Kernels& kernels = *a.lane;
  const int count = static_cast<int>(pass.logit_rows.size());
  kernels.select_rows(a.hidden, pass, config_.hidden_size, a.chosen);
  kernels.rms_norm(a.chosen, weights_.final_norm, config_.rms_norm_eps, count, config_.hidden_size, a.chosen_normed);
  kernels.matmul(weights_.head, a.chosen_normed, count, a.logits, Epilogue::store);
  kernels.choose(a.logits, pass, config_.vocab_size);
}

}  // namespace vericache
