#include "model/weights.h"

#include <algorithm>
#include <array>
#include <cmath>
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

// Loads tensors of one checkpoint into device memory, and counts what it loads.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const Kernels& kernels, Device& device, size_t total,
         const std::function<void(size_t, size_t)>& progress)
      : checkpoint_(checkpoint), kernels_(kernels), device_(device), total_(total), progress_(progress) {}

  // The rows of the named weights, (rows_i, in) each, one below the other.
  PackedMatrix matrix(std::span<const std::string> names, std::span<const int> rows, int in) {
    PackedMatrix matrix;
    matrix.in = in;
    for (const int count : rows) {
      matrix.out += count;
    }
    const size_t bytes = kernels_.packed_bytes(matrix.out, in);
    matrix.data = reinterpret_cast<bf16*>(device_.allocate(bytes, "weights"));
    int first = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      pack(names[i], rows[i], first, matrix);
      first += rows[i];
    }
    count(bytes);
    return matrix;
  }
  PackedMatrix matrix(const std::string& name, int rows, int in) { return matrix({&name, 1}, {&rows, 1}, in); }

  const float* vector(std::span<const std::string> names, std::span<const int> sizes) {
    size_t size = 0;
    for (const int n : sizes) {
      size += static_cast<size_t>(n);
    }
    float* values = device_.allocate_array<float>(size, "weights");
    size_t first = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      const std::array<int64_t, 1> shape{sizes[i]};
      const TensorView& tensor = checkpoint_.find(names[i], shape);
      read_rows(tensor, 0, sizes[i], {values + first, static_cast<size_t>(sizes[i])});
      first += static_cast<size_t>(sizes[i]);
    }
    count(size * sizeof(float));
    return values;
  }
  const float* vector(const std::string& name, int size) { return vector({&name, 1}, {&size, 1}); }

 private:
  void pack(const std::string& name, int rows, int first, PackedMatrix& matrix) {
    const std::array<int64_t, 2> shape{rows, matrix.in};
    const TensorView& tensor = checkpoint_.find(name, shape);
    // A few MB at a time: the source is bf16, f16 or f32 on disk, and a second copy of the model must not stand in
    // memory.
    const int step = std::max(16, (1 << 21) / matrix.in / 16 * 16);
    for (int row = 0; row < rows; row += step) {
      const int count = std::min(step, rows - row);
      rows_.resize(static_cast<size_t>(count) * static_cast<size_t>(matrix.in));
      read_rows(tensor, row, count, std::span<bf16>(rows_));
      kernels_.pack_rows(rows_.data(), first + row, count, matrix);
    }
    checkpoint_.release(name);
  }
  void count(size_t bytes) {
    done_ += bytes;
    if (progress_) {
      progress_(std::min(done_, total_), total_);
    }
  }

  const Checkpoint& checkpoint_;
  const Kernels& kernels_;
  Device& device_;
  size_t total_;
  size_t done_ = 0;
  const std::function<void(size_t, size_t)>& progress_;
  std::vector<bf16> rows_;
};

LayerWeights load_layer(Loader& loader, const ModelConfig& c, int index) {
  const std::string at = "model.layers." + std::to_string(index) + ".";
  const std::string attention = at + "self_attn.";
  const std::string mlp = at + "mlp.";
  const std::array<int, 3> qkv{c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim};
  const std::array<int, 2> gate_up{c.intermediate_size, c.intermediate_size};

  LayerWeights w;
  w.attention_norm = loader.vector(at + "input_layernorm.weight", c.hidden_size);
  w.qkv =
      loader.matrix(std::array{attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
                    qkv, c.hidden_size);
  if (c.qkv_bias) {
    w.qkv_bias =
        loader.vector(std::array{attention + "q_proj.bias", attention + "k_proj.bias", attention + "v_proj.bias"}, qkv);
  }
  if (c.qk_norm) {
    w.q_norm = loader.vector(attention + "q_norm.weight", c.head_dim);
    w.k_norm = loader.vector(attention + "k_norm.weight", c.head_dim);
  }
  w.output = loader.matrix(attention + "o_proj.weight", c.hidden_size, c.heads * c.head_dim);
  if (c.o_bias) {
    w.output_bias = loader.vector(attention + "o_proj.bias", c.hidden_size);
  }
  w.mlp_norm = loader.vector(at + "post_attention_layernorm.weight", c.hidden_size);
  w.gate_up = loader.matrix(std::array{mlp + "gate_proj.weight", mlp + "up_proj.weight"}, gate_up, c.hidden_size);
  w.down = loader.matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size);
  if (c.mlp_bias) {
    w.gate_up_bias = loader.vector(std::array{mlp + "gate_proj.bias", mlp + "up_proj.bias"}, gate_up);
    w.down_bias = loader.vector(mlp + "down_proj.bias", c.hidden_size);
  }
  return w;
}

RopeTable make_rope(const ModelConfig& c, int positions, Device& device) {
  const std::vector<double> frequencies = rope_inverse_frequencies(c.rope, c.head_dim);
  const size_t half = frequencies.size();
  float* cos = reinterpret_cast<float*>(device.allocate(rope_bytes(c, positions), "RoPE table"));
  float* sin = reinterpret_cast<float*>(device.allocate(rope_bytes(c, positions), "RoPE table"));
  for (size_t position = 0; position < static_cast<size_t>(positions); ++position) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      cos[position * half + i] = static_cast<float>(std::cos(angle) * c.rope.attention_factor);
      sin[position * half + i] = static_cast<float>(std::sin(angle) * c.rope.attention_factor);
    }
  }
  return {cos, sin, positions};
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

Weights load_weights(const Checkpoint& checkpoint, const ModelConfig& c, const Kernels& kernels, Device& device,
                     int max_positions, const std::function<void(size_t, size_t)>& progress) {
  Weights weights;
  weights.bytes = weight_bytes(c, kernels, max_positions);
  Loader loader(checkpoint, kernels, device, weights.bytes, progress);
  weights.embedding = loader.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  weights.head = c.tied_embeddings ? weights.embedding : loader.matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  weights.final_norm = loader.vector("model.norm.weight", c.hidden_size);
  for (int i = 0; i < c.layers; ++i) {
    weights.layers.push_back(load_layer(loader, c, i));
  }
  weights.rope = make_rope(c, max_positions, device);
  return weights;
}

}  // namespace vericache
