#include "model/weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string>

#include "model/rope.h"

namespace vericache {
namespace {

int qkv_rows(const ModelConfig& c) {
  return (c.heads + 2 * c.kv_heads) * c.head_dim;
}

size_t rope_bytes(const ModelConfig& c, int max_positions) {
  return static_cast<size_t>(max_positions) * static_cast<size_t>(c.head_dim / 2) * sizeof(float);
}

const float* to_device(std::span<const float> values, std::string_view what, Device& device) {
  std::byte* memory = device.allocate(values.size_bytes(), what);
  device.write(memory, values.data(), values.size_bytes());
  return reinterpret_cast<const float*>(memory);
}

// A model's weights as a checkpoint has them.
class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(const Checkpoint& checkpoint, const ModelConfig& config, const Kernels& kernels)
      : checkpoint_(checkpoint), config_(config), kernels_(kernels) {}

  void fill_matrix(MatrixRole role, int layer, PackedMatrix& matrix) override {
    int first = 0;
    for (const NamedTensor& named : tensors_of(role, layer, config_)) {
      const std::array<int64_t, 2> shape{named.rows, named.columns};
      const TensorView& tensor = checkpoint_.find(named.name, shape);
      pack_in_pieces(kernels_, first, named.rows, matrix,
                     [&](int row, int count, std::span<bf16> out) { read_rows(tensor, row, count, out); });
      checkpoint_.release(named.name);
      first += named.rows;
    }
  }

  void fill_vector(VectorRole role, int layer, std::span<float> values) override {
    size_t first = 0;
    for (const NamedTensor& named : tensors_of(role, layer, config_)) {
      const std::array<int64_t, 1> shape{named.rows};
      const size_t size = static_cast<size_t>(named.rows);
      read_rows(checkpoint_.find(named.name, shape), 0, named.rows, values.subspan(first, size));
      first += size;
    }
  }

 private:
  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const Kernels& kernels_;
};

// Takes device memory for each matrix and vector, has the source fill it, and counts what is done.
class Builder {
 public:
  Builder(WeightSource& source, const ModelConfig& config, const Kernels& kernels, Device& device, size_t total,
          const std::function<void(size_t, size_t)>& progress)
      : source_(source), config_(config), kernels_(kernels), device_(device), total_(total), progress_(progress) {}

  PackedMatrix matrix(MatrixRole role, int layer = 0) {
    PackedMatrix matrix;
    for (const NamedTensor& tensor : tensors_of(role, layer, config_)) {
      matrix.out += tensor.rows;
      matrix.in = tensor.columns;
    }
    const size_t bytes = kernels_.packed_bytes(matrix.out, matrix.in);
    matrix.data = reinterpret_cast<bf16*>(device_.allocate(bytes, "weights"));
    source_.fill_matrix(role, layer, matrix);
    count(bytes);
    return matrix;
  }

  const float* vector(VectorRole role, int layer = 0) {
    size_t size = 0;
    for (const NamedTensor& tensor : tensors_of(role, layer, config_)) {
      size += static_cast<size_t>(tensor.rows);
    }
    std::vector<float> values(size);
    source_.fill_vector(role, layer, values);
    count(size * sizeof(float));
    return to_device(values, "weights", device_);
  }

  LayerWeights layer(int index) {
    LayerWeights w;
    w.attention_norm = vector(VectorRole::attention_norm, index);
    w.qkv = matrix(MatrixRole::qkv, index);
    if (config_.qkv_bias) {
      w.qkv_bias = vector(VectorRole::qkv_bias, index);
    }
    if (config_.qk_norm) {
      w.q_norm = vector(VectorRole::q_norm, index);
      w.k_norm = vector(VectorRole::k_norm, index);
    }
    w.output = matrix(MatrixRole::output, index);
    if (config_.o_bias) {
      w.output_bias = vector(VectorRole::output_bias, index);
    }
    w.mlp_norm = vector(VectorRole::mlp_norm, index);
    w.gate_up = matrix(MatrixRole::gate_up, index);
    w.down = matrix(MatrixRole::down, index);
    if (config_.mlp_bias) {
      w.gate_up_bias = vector(VectorRole::gate_up_bias, index);
      w.down_bias = vector(VectorRole::down_bias, index);
    }
    return w;
  }

 private:
  void count(size_t bytes) {
    done_ += bytes;
    if (progress_) {
      progress_(std::min(done_, total_), total_);
    }
  }

  WeightSource& source_;
  const ModelConfig& config_;
  const Kernels& kernels_;
  Device& device_;
  size_t total_;
  size_t done_ = 0;
  const std::function<void(size_t, size_t)>& progress_;
};

RopeTable make_rope(const ModelConfig& c, int positions, Device& device) {
  const std::vector<double> frequencies = rope_inverse_frequencies(c.rope, c.head_dim);
  const size_t half = frequencies.size();
  std::vector<float> cos(static_cast<size_t>(positions) * half);
  std::vector<float> sin(cos.size());
  for (size_t position = 0; position < static_cast<size_t>(positions); ++position) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      cos[position * half + i] = static_cast<float>(std::cos(angle) * c.rope.attention_factor);
      sin[position * half + i] = static_cast<float>(std::sin(angle) * c.rope.attention_factor);
    }
  }
  return {to_device(cos, "RoPE table", device), to_device(sin, "RoPE table", device), positions};
}

}  // namespace

size_t weight_bytes(const ModelConfig& c, const Kernels& kernels, int max_positions) {
  const auto page = [](size_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  const auto floats = [&](int count) { return page(static_cast<size_t>(count) * sizeof(float)); };
  size_t layer = page(kernels.packed_bytes(qkv_rows(c), c.hidden_size)) +
                 page(kernels.packed_bytes(c.hidden_size, c.heads * c.head_dim)) +
                 page(kernels.packed_bytes(2 * c.intermediate_size, c.hidden_size)) +
                 page(kernels.packed_bytes(c.hidden_size, c.intermediate_size)) + 2 * floats(c.hidden_size);
  layer += c.qkv_bias ? floats(qkv_rows(c)) : 0;
  layer += c.qk_norm ? 2 * floats(c.head_dim) : 0;
  layer += c.o_bias ? floats(c.hidden_size) : 0;
  layer += c.mlp_bias ? floats(2 * c.intermediate_size) + floats(c.hidden_size) : 0;
  const size_t table = page(kernels.packed_bytes(c.vocab_size, c.hidden_size));
  return layer * static_cast<size_t>(c.layers) + table * (c.tied_embeddings ? 1 : 2) + floats(c.hidden_size) +
         2 * page(rope_bytes(c, max_positions));
}

std::vector<NamedTensor> tensors_of(MatrixRole role, int layer, const ModelConfig& c) {
  const std::string at = "model.layers." + std::to_string(layer) + ".";
  const std::string attention = at + "self_attn.";
  const std::string mlp = at + "mlp.";
  const int q = c.heads * c.head_dim;
  const int kv = c.kv_heads * c.head_dim;
  const int hidden = c.hidden_size;
  switch (role) {
    case MatrixRole::embedding:
      return {{"model.embed_tokens.weight", c.vocab_size, hidden}};
    case MatrixRole::head:
      return {{c.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight", c.vocab_size, hidden}};
    case MatrixRole::qkv:
      return {{attention + "q_proj.weight", q, hidden},
              {attention + "k_proj.weight", kv, hidden},
              {attention + "v_proj.weight", kv, hidden}};
    case MatrixRole::output:
      return {{attention + "o_proj.weight", hidden, q}};
    case MatrixRole::gate_up:
      return {{mlp + "gate_proj.weight", c.intermediate_size, hidden},
              {mlp + "up_proj.weight", c.intermediate_size, hidden}};
    case MatrixRole::down:
      return {{mlp + "down_proj.weight", hidden, c.intermediate_size}};
  }
  return {};
}

std::vector<NamedTensor> tensors_of(VectorRole role, int layer, const ModelConfig& c) {
  const std::string at = "model.layers." + std::to_string(layer) + ".";
  const std::string attention = at + "self_attn.";
  const std::string mlp = at + "mlp.";
  const int kv = c.kv_heads * c.head_dim;
  switch (role) {
    case VectorRole::attention_norm:
      return {{at + "input_layernorm.weight", c.hidden_size, 1}};
    case VectorRole::qkv_bias:
      return {{attention + "q_proj.bias", c.heads * c.head_dim, 1},
              {attention + "k_proj.bias", kv, 1},
              {attention + "v_proj.bias", kv, 1}};
    case VectorRole::q_norm:
      return {{attention + "q_norm.weight", c.head_dim, 1}};
    case VectorRole::k_norm:
      return {{attention + "k_norm.weight", c.head_dim, 1}};
    case VectorRole::output_bias:
      return {{attention + "o_proj.bias", c.hidden_size, 1}};
    case VectorRole::mlp_norm:
      return {{at + "post_attention_layernorm.weight", c.hidden_size, 1}};
    case VectorRole::gate_up_bias:
      return {{mlp + "gate_proj.bias", c.intermediate_size, 1}, {mlp + "up_proj.bias", c.intermediate_size, 1}};
    case VectorRole::down_bias:
      return {{mlp + "down_proj.bias", c.hidden_size, 1}};
    case VectorRole::final_norm:
      return {{"model.norm.weight", c.hidden_size, 1}};
  }
  return {};
}

void pack_in_pieces(const Kernels& kernels, int first, int rows, PackedMatrix& matrix,
                    const std::function<void(int, int, std::span<bf16>)>& write) {
  const int step = std::max(16, (1 << 21) / matrix.in / 16 * 16);
  std::vector<bf16> piece;
  for (int row = 0; row < rows; row += step) {
    const int count = std::min(step, rows - row);
    piece.resize(static_cast<size_t>(count) * static_cast<size_t>(matrix.in));
    write(row, count, piece);
    kernels.pack_rows(piece.data(), first + row, count, matrix);
  }
}

Weights build_weights(WeightSource& source, const ModelConfig& c, const Kernels& kernels, Device& device,
                      int max_positions, const std::function<void(size_t, size_t)>& progress) {
  Weights weights;
  weights.bytes = weight_bytes(c, kernels, max_positions);
  Builder builder(source, c, kernels, device, weights.bytes, progress);
  weights.embedding = builder.matrix(MatrixRole::embedding);
  weights.head = c.tied_embeddings ? weights.embedding : builder.matrix(MatrixRole::head);
  weights.final_norm = builder.vector(VectorRole::final_norm);
  for (int i = 0; i < c.layers; ++i) {
    weights.layers.push_back(builder.layer(i));
  }
  weights.rope = make_rope(c, max_positions, device);
  return weights;
}

Weights load_weights(const Checkpoint& checkpoint, const ModelConfig& c, const Kernels& kernels, Device& device,
                     int max_positions, const std::function<void(size_t, size_t)>& progress) {
  CheckpointSource source(checkpoint, c, kernels);
  return build_weights(source, c, kernels, device, max_positions, progress);
}

}  // namespace vericache
