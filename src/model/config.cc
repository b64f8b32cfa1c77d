#include "model/config.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "model/config_fields.h"
#include "model/rope_config.h"
#include "model/strict_json.h"

namespace vericache {
namespace {

constexpr size_t kMaxConfigBytes = 4 << 20;
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 4096;
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxHidden = 1 << 20;
constexpr int kMaxVocabulary = 1 << 24;
constexpr size_t kMaxEosTokens = 1024;
constexpr int kHeadDimStep = 16;  // attention kernels read whole 16-element blocks of a head

// What transformers takes where config.json is silent.
struct FamilyDefaults {
  Family family;
  std::string_view model_type;
  std::string_view architecture;
  int kv_heads;  // 0: as many as heads
  int head_dim;  // 0: hidden_size / heads
};
constexpr std::array<FamilyDefaults, 4> kFamilies = {{{Family::llama, "llama", "LlamaForCausalLM", 0, 0},
                                                      {Family::mistral, "mistral", "MistralForCausalLM", 8, 0},
                                                      {Family::qwen2, "qwen2", "Qwen2ForCausalLM", 32, 0},
                                                      {Family::qwen3, "qwen3", "Qwen3ForCausalLM", 32, 128}}};

// Fields that this file reads, or that change nothing at inference although their names look it.
constexpr std::array kKnownFields = {"rms_norm_eps",
                                     "rope_theta",
                                     "rope_scaling",
                                     "rope_parameters",
                                     "sliding_window",
                                     "attention_bias",
                                     "mlp_bias",
                                     "use_sliding_window",
                                     "max_window_layers",
                                     "quantization_config",
                                     "layer_types",
                                     "partial_rotary_factor",
                                     "_experts_implementation",
                                     "chunk_size_feed_forward"};

// Names, or parts of names, that announce mathematics which the engine does not do.
constexpr std::array kMathematics = {"softcap",
                                     "multiplier",
                                     "expert",
                                     "moe",
                                     "quant",
                                     "alibi",
                                     "window",
                                     "rope",
                                     "rotary",
                                     "clip",
                                     "norm",
                                     "bias",
                                     "scal",
                                     "mup",
                                     "sink",
                                     "chunk",
                                     "residual",
                                     "cross_att",
                                     "mamba",
                                     "lora",
                                     "kv_shared",
                                     "linear_attn",
                                     "per_layer",
                                     "no_rope",
                                     "temperature_tuning",
                                     "is_encoder_decoder",
                                     "query_pre_attn",
                                     "attention_type",
                                     "pruned_heads",
                                     "hybrid"};

// Multiplying or dividing by one changes nothing.
constexpr std::array kNeutralAtOne = {"pretraining_tp", "residual_multiplier", "embedding_multiplier",
                                      "logits_scaling", "logit_scale",         "partial_rotary_factor",
                                      "embedding_scale"};

bool names_mathematics(std::string_view key) {
  return key.find("drop") == std::string_view::npos &&  // dropout: training only
         std::any_of(kMathematics.begin(), kMathematics.end(),
                     [key](std::string_view part) { return key.find(part) != std::string_view::npos; });
}

bool counts_experts(std::string_view key) {
  return key.find("expert") != std::string_view::npos || key.find("moe") != std::string_view::npos;
}

// A field unknown to us whose name says that it changes the result is not passed over in silence.
void refuse_other_mathematics(const ConfigFields& fields) {
  for (const auto& [key, value] : fields.json().items()) {
    const bool one = value.is_number() && value.get<double>() == 1.0;
    const bool zero = value.is_number() && value.get<double>() == 0.0;
    if (lists(kNeutralAtOne, key)) {
      if (!is_nothing(value) && !one) {
        refuse(fields, key, value);
      }
    } else if (!lists(kKnownFields, key) && names_mathematics(key) && !is_nothing(value) &&
               !(zero && counts_experts(key))) {
      refuse(fields, key, value);
    }
  }
  for (const std::string_view key : {"quantization_config", "compression_config"}) {
    if (const nlohmann::json* value = fields.find(key); value != nullptr && !is_nothing(*value)) {
      throw Error("{}: \"{}\" says that the weights are quantized; supported are bf16, f16 and f32 checkpoints",
                  fields.where(), key);
    }
  }
  if (const auto activation = fields.text("hidden_act");
      activation && *activation != "silu" && *activation != "swish") {
    refuse(fields, "hidden_act", *activation);
  }
  for (const std::string_view key : {"dtype", "torch_dtype"}) {
    const auto dtype = fields.text(key);
    if (dtype && !lists(std::array{"bfloat16", "float16", "float32", "auto"}, *dtype)) {
      throw Error("{}: \"{}\" is {}; supported are bfloat16, float16 and float32", fields.where(), key,
                  printable(*dtype));
    }
  }
}

const FamilyDefaults& read_family(const ConfigFields& fields) {
  const auto type = fields.text("model_type");
  const auto family = std::find_if(kFamilies.begin(), kFamilies.end(),
                                   [&](const FamilyDefaults& f) { return type && f.model_type == *type; });
  if (family == kFamilies.end()) {
    throw Error("{}: the model family {} is not supported; {}", fields.where(),
                type ? fmt::format("\"{}\"", printable(*type)) : "(no \"model_type\")", kSupported);
  }
  if (const nlohmann::json* architectures = fields.find("architectures"); architectures != nullptr) {
    const bool as_expected = architectures->is_array() && architectures->size() == 1 &&
                             (*architectures)[0].is_string() &&
                             (*architectures)[0].get_ref<const std::string&>() == family->architecture;
    if (!as_expected) {
      throw Error("{}: \"architectures\" is {}, expected [\"{}\"]; {}", fields.where(),
                  ConfigFields::shown(*architectures), family->architecture, kSupported);
    }
  }
  return *family;
}

void read_sizes(const ConfigFields& fields, const FamilyDefaults& family, ModelConfig& config) {
  config.hidden_size = fields.required_integer("hidden_size", 2, kMaxHidden);
  config.intermediate_size = fields.required_integer("intermediate_size", 2, kMaxHidden);
  config.layers = fields.required_integer("num_hidden_layers", 1, kMaxLayers);
  config.heads = fields.required_integer("num_attention_heads", 1, kMaxHeads);
  config.vocab_size = fields.required_integer("vocab_size", 1, kMaxVocabulary);
  config.max_position = fields.required_integer("max_position_embeddings", 1, kMaxPosition);
  for (const auto& [key, size] :
       {std::pair("hidden_size", config.hidden_size), std::pair("intermediate_size", config.intermediate_size)}) {
    if (size % 2 != 0) {
      throw Error("{}: \"{}\" is {}; the engine's kernels need an even size", fields.where(), key, size);
    }
  }
  const bool kv_heads_default = !fields.has_key("num_key_value_heads") && family.kv_heads != 0;
  config.kv_heads =
      fields.integer("num_key_value_heads", 1, kMaxHeads).value_or(kv_heads_default ? family.kv_heads : config.heads);
  if (config.heads % config.kv_heads != 0) {
    throw Error("{}: {} attention heads cannot share {} key-value heads evenly; correct \"num_key_value_heads\"",
                fields.where(), config.heads, config.kv_heads);
  }
  const bool head_dim_default = !fields.has_key("head_dim") && family.head_dim != 0;
  const auto head_dim = fields.integer("head_dim", 1, kMaxHeadDim);
  if (!head_dim && !head_dim_default && config.hidden_size % config.heads != 0) {
    throw Error("{}: {} heads do not divide \"hidden_size\" {} and there is no \"head_dim\"", fields.where(),
                config.heads, config.hidden_size);
  }
  config.head_dim = head_dim.value_or(head_dim_default ? family.head_dim : config.hidden_size / config.heads);
  if (config.head_dim % kHeadDimStep != 0 || config.head_dim > kMaxHeadDim) {
    throw Error("{}: a head size of {} is not supported; the attention kernels need a multiple of {} up to {}",
                fields.where(), config.head_dim, kHeadDimStep, kMaxHeadDim);
  }
}

void read_biases(const ConfigFields& fields, ModelConfig& config) {
  const bool attention_bias = fields.flag("attention_bias", config.family == Family::qwen2);
  switch (config.family) {
    case Family::llama:
    case Family::qwen3:
      config.qkv_bias = config.o_bias = attention_bias;
      break;
    case Family::mistral:  // never has any
    case Family::qwen2:    // always has them on q, k, v and never on o
      config.qkv_bias = config.family == Family::qwen2;
      if (attention_bias != config.qkv_bias) {
        refuse(fields, "attention_bias", attention_bias);
      }
      break;
  }
  config.mlp_bias = fields.flag("mlp_bias", false);
  if (config.mlp_bias && config.family != Family::llama) {
    refuse(fields, "mlp_bias", true);
  }
  config.qk_norm = config.family == Family::qwen3;
}

// A window at least as long as the context hides nothing and is accepted.
void refuse_sliding_window(const ConfigFields& fields, const ModelConfig& config) {
  const bool qwen = config.family == Family::qwen2 || config.family == Family::qwen3;
  const auto window = fields.integer("sliding_window", 1, std::numeric_limits<int>::max());
  // Mistral's default is a window; a missing field is not a null one.
  const bool by_default = config.family == Family::mistral && !fields.has_key("sliding_window");
  const int tokens = window.value_or(by_default ? 4096 : std::numeric_limits<int>::max());
  const bool enabled = config.family == Family::mistral || fields.flag("use_sliding_window", !qwen);
  const bool used = enabled && tokens < config.max_position;

  const nlohmann::json* layer_types = fields.find("layer_types");
  bool slides = used;
  if (layer_types != nullptr) {
    if (!layer_types->is_array() || layer_types->size() != static_cast<size_t>(config.layers)) {
      throw Error("{}: \"layer_types\" must be a list of {} types, one per layer", fields.where(), config.layers);
    }
    slides = false;
    for (const nlohmann::json& type : *layer_types) {
      if (type == "full_attention" || (type == "sliding_attention" && window && *window >= config.max_position)) {
        continue;
      }
      if (type != "sliding_attention") {
        refuse(fields, "layer_types", type);
      }
      slides = true;
    }
    slides = slides || (used && config.family == Family::mistral);  // Mistral does not look at layer_types
  } else if (qwen && used) {
    // Qwen slides in the layers from max_window_layers on.
    slides = fields.integer("max_window_layers", 0, std::numeric_limits<int>::max()).value_or(28) < config.layers;
  }
  if (slides) {
    throw Error(
        "{}: sliding-window attention{} is not supported; the engine attends to the whole context. For a model that "
        "works "
        "without it set \"sliding_window\": null; {}",
        fields.where(),
        by_default ? " (4096 tokens, mistral's default)"
        : window   ? fmt::format(" ({} tokens)", *window)
                   : "",
        kSupported);
  }
}

TokenId read_token(const ConfigFields& fields, std::string_view key, const nlohmann::json& value, int vocab_size) {
  if (!value.is_number_integer() || value < 0 || value >= vocab_size) {
    throw Error("{}: \"{}\" has {}; a token id lies in [0, {})", fields.where(), key, ConfigFields::shown(value),
                vocab_size);
  }
  return value.get<TokenId>();
}

// Of config.json or generation_config.json; the latter is read second and wins where it says anything.
void read_tokens(const ConfigFields& fields, ModelConfig& config) {
  if (const nlohmann::json* eos = fields.find("eos_token_id"); eos != nullptr) {
    config.eos_tokens.clear();
    if (eos->is_array() && eos->size() > kMaxEosTokens) {
      throw Error("{}: \"eos_token_id\" lists {} tokens; at most {} are supported", fields.where(), eos->size(),
                  kMaxEosTokens);
    }
    if (eos->is_array()) {
      for (const nlohmann::json& token : *eos) {
        config.eos_tokens.push_back(read_token(fields, "eos_token_id", token, config.vocab_size));
      }
    } else {
      config.eos_tokens.push_back(read_token(fields, "eos_token_id", *eos, config.vocab_size));
    }
  }
  if (const nlohmann::json* bos = fields.find("bos_token_id"); bos != nullptr) {
    config.bos_token = read_token(fields, "bos_token_id", *bos, config.vocab_size);
  }
}

}  // namespace

ModelConfig parse_config(std::string_view config_json, std::string_view generation_config_json,
                         std::string_view where) {
  const std::string config_where = fmt::format("{}: config.json", where);
  const nlohmann::json json = parse_strict_json(config_json, config_where);
  const ConfigFields fields(json, config_where);
  const FamilyDefaults& family = read_family(fields);
  ModelConfig config;
  config.family = family.family;
  config.family_name = family.model_type;
  read_sizes(fields, family, config);
  config.rms_norm_eps = static_cast<float>(fields.number("rms_norm_eps", 1e-30, 1).value_or(1e-6));
  config.tied_embeddings = fields.flag("tie_word_embeddings", false);
  read_biases(fields, config);
  read_rope(fields, config.rope, config.max_position);
  refuse_sliding_window(fields, config);
  refuse_other_mathematics(fields);
  read_tokens(fields, config);
  if (!generation_config_json.empty()) {
    const std::string generation_where = fmt::format("{}: generation_config.json", where);
    const nlohmann::json generation = parse_strict_json(generation_config_json, generation_where);
    read_tokens(ConfigFields(generation, generation_where), config);
  }
  return config;
}

ModelConfig load_config(const std::filesystem::path& model_dir) {
  std::error_code error;
  if (!std::filesystem::is_directory(model_dir, error)) {
    throw Error("{} is not a directory; --model takes the folder that holds config.json and model.safetensors",
                model_dir.string());
  }
  if (!std::filesystem::exists(model_dir / "config.json", error)) {
    throw Error("{} has no config.json; --model takes a Hugging Face model folder", model_dir.string());
  }
  const std::filesystem::path generation = model_dir / "generation_config.json";
  return parse_config(read_text_file(model_dir / "config.json", kMaxConfigBytes),
                      std::filesystem::exists(generation, error) ? read_text_file(generation, kMaxConfigBytes) : "",
                      model_dir.string());
}

}  // namespace vericache
