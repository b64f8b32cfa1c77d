// Weights: the checkpoint in the backend's layout, in device memory.
// Built once at load; read-only afterwards.
#pragma once

#include <functional>
#include <span>
#include <string>
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

// What follows is for weights that are not a checkpoint's as they stand.

enum class MatrixRole { embedding, head, qkv, output, gate_up, down };
enum class VectorRole {
  attention_norm,
  qkv_bias,
  q_norm,
  k_norm,
  output_bias,
  mlp_norm,
  gate_up_bias,
  down_bias,
  final_norm
};

struct NamedTensor {
  std::string name;
  int rows = 0;
  int columns = 0;  // 1 of a vector
};

// The tensors of a checkpoint of this shape that stand in a matrix or vector, one below the other. Roles outside the
// layers do not look at `layer`.
std::vector<NamedTensor> tensors_of(MatrixRole role, int layer, const ModelConfig& config);
std::vector<NamedTensor> tensors_of(VectorRole role, int layer, const ModelConfig& config);

// Where the values of weights come from.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // The matrix has the model's shape and is zero.
  virtual void fill_matrix(MatrixRole role, int layer, PackedMatrix& matrix) = 0;
  virtual void fill_vector(VectorRole role, int layer, std::span<float> values) = 0;  // zeros before
};

Weights build_weights(WeightSource& source, const ModelConfig& config, const Kernels& kernels, Device& device,
                      int max_positions, const std::function<void(size_t, size_t)>& progress);

// Packs rows [first, first + rows) of a matrix, a few MB at a time: a second copy of the model must not stand in
// memory. write(row, count, out) gives rows [row, row + count) counted from `first`; out (count, in).
void pack_in_pieces(const Kernels& kernels, int first, int rows, PackedMatrix& matrix,
                    const std::function<void(int, int, std::span<bf16>)>& write);

}  // namespace vericache
