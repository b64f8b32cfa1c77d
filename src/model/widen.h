// Widening: a model with the shape of a large one, and so its cost, that computes the function of a small trained one.
// Specs and shapes are pure; loading belongs to the thread that builds the engine.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "model/weights.h"

namespace vericache {

// Real text and real acceptance at the cost of a large model, where none is at hand: every weight is read, every
// product computed on data that is not zero, every head writes keys and values. A number measured so must say so.
//
// - Residual stream: the trained channels come first, the others stay zero: whatever writes to the stream has zero rows
//   there. What reads it has random columns there, and the output head is a matrix of its own.
// - Norms: the mean of squares is hidden / wide hidden of the trained one; the weights and eps make up for it.
// - Heads: trained KV head j is wide KV head j, trained query head g of its group is query head g of the wide group.
//   The group's other query heads ask what the trained ones ask (g modulo the trained group), so that compressors that
//   rank tokens by attention find the trained ranking. Other KV heads have random queries, keys and values. The output
//   projection of all but the trained heads is zero.
// - Head size m times the trained one: rotated pair i becomes pair m i, which turns at the same rate. The other
//   dimensions are zero in queries and random in keys and values; the query weights carry the factor sqrt(m) that the
//   attention scale lost, and are rounded to bf16 once more.
// - MLP: the trained channels come first, the others are random and project down to zero. Layers behind the trained
//   ones are random and write zero to the stream.
//
// The vocabulary stays the trained one's (the embedding and the head are smaller than the large model's), as do
// positions, biases and the absence of q/k norms.
struct WidenSpec {
  std::string model_dir;  // of the trained model
  std::string shape;      // what was asked for, "shape=llama-8b"
  int layers = 0;
  int hidden_size = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
};

// "widen:DIR?shape=NAME", NAME one of llama-8b, qwen-14b, qwen-32b and llama-70b, or all of "layers=..,hidden=..,
// heads=..,kv_heads=..,head_dim=..,intermediate=.."; behind shape=NAME they change that shape. nullopt: not of this
// form, a directory. UsageError for a shape that is none.
std::optional<WidenSpec> parse_widen(std::string_view model_flag);

// Error if the shape cannot hold the trained model.
ModelConfig widen_config(const ModelConfig& trained, const WidenSpec& spec);

// `wide` is widen_config's; takes weight_bytes(wide, ...). Errors and progress as load_weights.
Weights load_widened(const Checkpoint& checkpoint, const ModelConfig& trained, const ModelConfig& wide,
                     const Kernels& kernels, Device& device, int max_positions,
                     const std::function<void(size_t, size_t)>& progress = {});

}  // namespace vericache
