// Weights: the checkpoint in the backend's layout, in device memory.
// Built once at load; read-only afterwards.
#pragma once

#include <functional>
#include <vector>

#include "backend/device.h"
#include "backend/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace vericache {

struct LayerWeights {
  const float* attention_norm = nullptr;  // (hidden)
  PackedMatrix qkv;                       // ((heads + 2 kv_heads) * head_dim, hidden): q, k, v one below the other
  const float* qkv_bias = nullptr;        // null without
  const float* q_norm = nullptr;          // (head_dim), null without
  const float* k_norm = nullptr;
  PackedMatrix output;  // (hidden, heads * head_dim)
  const float* output_bias = nullptr;
  const float* mlp_norm = nullptr;  // (hidden)
  PackedMatrix gate_up;             // (2 * intermediate, hidden): gate, then up
  const float* gate_up_bias = nullptr;
  PackedMatrix down;  // (hidden, intermediate)
  const float* down_bias = nullptr;
};

struct Weights {
  PackedMatrix embedding;  // (vocabulary, hidden)
  PackedMatrix head;       // the same matrix when tied
  const float* final_norm = nullptr;
  std::vector<LayerWeights> layers;
  RopeTable rope;  // positions [0, max_positions)
  size_t bytes = 0;
};

// Device bytes that load_weights will take.
size_t weight_bytes(const ModelConfig& config, const Kernels& kernels, int max_positions);

// Error naming the tensor if one is missing or has another shape. progress(done, total) in bytes, may be empty.
Weights load_weights(const Checkpoint& checkpoint, const ModelConfig& config, const Kernels& kernels, Device& device,
                     int max_positions, const std::function<void(size_t, size_t)>& progress = {});

}  // namespace vericache
