// A model from the build folder, loaded for a test.
// One thread, the test's.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <memory>

#include "backend/cpu/cpu_kernels.h"
#include "model/checkpoint.h"
#include "model/transformer.h"

namespace vericache {

struct LoadedModel {
  ModelConfig config;
  std::unique_ptr<Device> memory;
  std::unique_ptr<Kernels> kernels;
  Weights weights;
  std::unique_ptr<Transformer> model;

  explicit LoadedModel(const std::filesystem::path& dir, int threads = 2, Isa isa = best_isa(), int max_rows = 512)
      : config(load_config(dir)), memory(make_cpu_device(size_t{1} << 40)) {
    kernels = make_cpu_kernels(isa, threads,
                               {.shape = {config.layers, config.kv_heads, config.head_dim},
                                .heads = config.heads,
                                .max_rows = max_rows,
                                .max_context_tokens = config.max_position});
    weights = load_weights(Checkpoint(dir), config, *kernels, *memory, config.max_position);
    model = std::make_unique<Transformer>(config, weights, *kernels);
  }
};

inline std::filesystem::path bundled_model(const char* name) {
  return std::filesystem::path(VERICACHE_MODELS) / name;
}

}  // namespace vericache
