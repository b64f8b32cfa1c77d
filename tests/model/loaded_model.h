// A model from the build folder, loaded for a test on the device under test.
// One thread, the test's.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/transformer.h"
#include "test_device.h"

namespace vericache {

// What the kernels are made for, beside the model's own shape.
struct LoadedLimits {
  int threads = 2;
  std::string isa{};  // empty = the best
  int max_rows = 512;
  int max_sequences = 16;
};

struct LoadedModel {
  ModelConfig config;
  std::unique_ptr<Device> memory;
  std::unique_ptr<Kernels> kernels;
  Weights weights;
  std::unique_ptr<Transformer> model;

  explicit LoadedModel(const std::filesystem::path& dir, const LoadedLimits& limits = {})
      : config(load_config(dir)), memory(test::make_test_device()) {
    kernels = test::make_test_kernels({.isa = limits.isa,
                                       .threads = limits.threads,
                                       .shape = {config.layers, config.kv_heads, config.head_dim},
                                       .heads = config.heads,
                                       .max_rows = limits.max_rows,
                                       .max_context_tokens = config.max_position,
                                       .max_sequences = limits.max_sequences});
    weights = load_weights(Checkpoint(dir), config, *kernels, *memory, config.max_position);
    kernels->tune(one_of_each_shape(weights));
    model = std::make_unique<Transformer>(config, weights, *kernels);
  }

 private:
  static std::vector<PackedMatrix> one_of_each_shape(const Weights& weights) {
    const LayerWeights& layer = weights.layers.front();
    std::vector<PackedMatrix> shapes;
    for (const PackedMatrix& matrix : {layer.qkv, layer.output, layer.gate_up, layer.down, weights.head}) {
      const bool known = std::any_of(shapes.begin(), shapes.end(), [&](const PackedMatrix& other) {
        return other.out == matrix.out && other.in == matrix.in;
      });
      if (!known) {
        shapes.push_back(matrix);
      }
    }
    return shapes;
  }
};

inline std::filesystem::path bundled_model(const char* name) {
  return std::filesystem::path(VERICACHE_MODELS) / name;
}

}  // namespace vericache
