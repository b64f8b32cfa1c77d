// ModelConfig: the architecture that config.json describes, checked; a model outside what the engine computes is
// refused. Plain data and pure functions: any thread.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/token.h"
#include "model/rope.h"

namespace vericache {

enum class Family { llama, mistral, qwen2, qwen3 };

struct ModelConfig {
  Family family = Family::llama;
  std::string family_name;  // model_type: "llama"
  int hidden_size = 0;
  int intermediate_size = 0;
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;  // divides heads
  int head_dim = 0;  // a multiple of 16; heads * head_dim need not be hidden_size
  int vocab_size = 0;
  int max_position = 0;  // tokens of context; yarn: of the stretched context
  float rms_norm_eps = 0;
  Rope rope;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;            // of gate, up and down
  bool qk_norm = false;             // RMS norm of each head's q and k before the rotation
  std::vector<TokenId> eos_tokens;  // may be empty
  std::optional<TokenId> bos_token;
};

// Reads both forms of config.json: transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters,
// dtype). generation_config.json may be empty; its eos and bos ids win. Error for an unknown family, a field whose
// value changes the mathematics, or a size out of range; `where` names the model in it.
ModelConfig parse_config(std::string_view config_json, std::string_view generation_config_json = {},
                         std::string_view where = "the model");

// config.json and, if it is there, generation_config.json of a model directory.
ModelConfig load_config(const std::filesystem::path& model_dir);

}  // namespace vericache
