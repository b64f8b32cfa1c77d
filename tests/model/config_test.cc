#include "model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "model/temp_directory.h"

namespace vericache {
namespace {

using nlohmann::json;

// A small model that every family accepts, in the form of transformers 5.
json base(std::string_view family, std::string_view architecture) {
  return {{"model_type", family},
          {"architectures", {architecture}},
          {"hidden_size", 128},
          {"intermediate_size", 256},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 32},
          {"vocab_size", 512},
          {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-5},
          {"hidden_act", "silu"},
          {"sliding_window", nullptr},
          {"dtype", "bfloat16"},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}}};
}
json llama() {
  return base("llama", "LlamaForCausalLM");
}
json mistral() {
  return base("mistral", "MistralForCausalLM");
}
json qwen2() {
  return base("qwen2", "Qwen2ForCausalLM");
}
json qwen3() {
  return base("qwen3", "Qwen3ForCausalLM");
}

ModelConfig parse(const json& config, std::string_view generation = {}) {
  return parse_config(config.dump(), generation);
}

json with(json config, std::string_view key, json value) {
  config[key] = std::move(value);
  return config;
}

json without(json config, std::string_view key) {
  config.erase(config.find(key));
  return config;
}

#define EXPECT_REFUSED(config, part) EXPECT_ERROR(parse(config), part)

TEST(Config, ReadsEveryFamily) {
  const ModelConfig l = parse(with(llama(), "mlp_bias", true));
  EXPECT_EQ(l.family, Family::llama);
  EXPECT_EQ(l.family_name, "llama");
  EXPECT_EQ(std::tie(l.hidden_size, l.intermediate_size, l.layers, l.heads), std::tuple(128, 256, 3, 4));
  EXPECT_EQ(std::tie(l.kv_heads, l.head_dim, l.vocab_size, l.max_position), std::tuple(2, 32, 512, 4096));
  EXPECT_FLOAT_EQ(l.rms_norm_eps, 1e-5f);
  EXPECT_EQ(l.rope.theta, 1e6);
  EXPECT_EQ(l.eos_tokens, std::vector<TokenId>{2});
  EXPECT_EQ(l.bos_token, 1);
  EXPECT_TRUE(l.mlp_bias);
  EXPECT_FALSE(l.qkv_bias || l.o_bias || l.qk_norm || l.tied_embeddings);

  const ModelConfig biased = parse(with(llama(), "attention_bias", true));
  EXPECT_TRUE(biased.qkv_bias && biased.o_bias);
  const ModelConfig m = parse(with(mistral(), "tie_word_embeddings", true));
  EXPECT_EQ(m.family, Family::mistral);
  EXPECT_TRUE(m.tied_embeddings);
  EXPECT_FALSE(m.qkv_bias || m.o_bias || m.qk_norm);
  const ModelConfig q2 = parse(qwen2());
  EXPECT_EQ(q2.family, Family::qwen2);
  EXPECT_TRUE(q2.qkv_bias && !q2.o_bias && !q2.qk_norm);
  const ModelConfig q3 = parse(with(qwen3(), "head_dim", 64));
  EXPECT_EQ(q3.family, Family::qwen3);
  EXPECT_EQ(q3.head_dim, 64);
  EXPECT_TRUE(q3.qk_norm && !q3.qkv_bias);
}

TEST(Config, ReadsTheFormOfTransformers4) {
  json config = without(without(llama(), "rope_parameters"), "dtype");
  config.update(
      {{"rope_theta", 500000.0}, {"rope_scaling", nullptr}, {"torch_dtype", "float16"}, {"pretraining_tp", 1}});
  EXPECT_EQ(parse(config).rope.theta, 500000.0);
  EXPECT_EQ(parse(config).rope.type, RopeType::standard);

  config["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  EXPECT_EQ(parse(config).rope.type, RopeType::linear);
  EXPECT_EQ(parse(config).rope.factor, 4.0);
  EXPECT_EQ(parse(config).rope.theta, 500000.0);
  EXPECT_EQ(parse(without(config, "rope_theta")).rope.theta, 10000.0);

  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 1024}};
  const Rope rope = parse(config).rope;
  EXPECT_EQ(rope.type, RopeType::llama3);
  EXPECT_EQ(std::tuple(rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position),
            std::tuple(8.0, 1.0, 4.0, 1024.0));
}

TEST(Config, FillsWhatIsSilentAsTransformersDoes) {
  const json bare = without(without(without(llama(), "num_key_value_heads"), "head_dim"), "rms_norm_eps");
  EXPECT_EQ(parse(bare).kv_heads, 4);
  EXPECT_EQ(parse(bare).head_dim, 32);
  EXPECT_FLOAT_EQ(parse(bare).rms_norm_eps, 1e-6f);
  EXPECT_EQ(parse(without(qwen3(), "head_dim")).head_dim, 128);
  EXPECT_EQ(parse(with(without(mistral(), "num_key_value_heads"), "num_attention_heads", 16)).kv_heads, 8);
  EXPECT_EQ(parse(with(mistral(), "num_key_value_heads", nullptr)).kv_heads, 4);
  EXPECT_EQ(parse(without(without(llama(), "architectures"), "hidden_act")).layers, 3);
}

TEST(Config, GenerationConfigWins) {
  EXPECT_EQ(parse(llama(), R"({"eos_token_id":[5,0],"temperature":0.6})").eos_tokens, (std::vector<TokenId>{5, 0}));
  EXPECT_EQ(parse(llama(), R"({"bos_token_id":7})").bos_token, 7);
  EXPECT_EQ(parse(llama(), R"({"eos_token_id":null})").eos_tokens, std::vector<TokenId>{2});
  EXPECT_TRUE(parse(with(llama(), "eos_token_id", nullptr)).eos_tokens.empty());
  EXPECT_EQ(parse(with(llama(), "bos_token_id", nullptr)).bos_token, std::nullopt);
  EXPECT_REFUSED(with(llama(), "eos_token_id", 512), "a token id lies in [0, 512)");
  EXPECT_REFUSED(with(llama(), "eos_token_id", {2, -1}), "a token id lies in [0, 512)");
  EXPECT_REFUSED(with(llama(), "bos_token_id", 18446744073709551615u), "a token id lies in [0, 512)");
  EXPECT_REFUSED(with(llama(), "eos_token_id", "2"), "a token id lies in [0, 512)");
  EXPECT_ERROR(parse(llama(), "{"), "generation_config.json: not valid JSON");
}

TEST(Config, RefusesOtherFamiliesAndSaysWhichAreSupported) {
  for (const std::string name : {"gemma2", "qwen3_moe", "mixtral", "Llama", ""}) {
    EXPECT_REFUSED(with(llama(), "model_type", name),
                   "the model family \"" + name + "\" is not supported; supported are");
  }
  EXPECT_REFUSED(without(llama(), "model_type"), "(no \"model_type\") is not supported; supported are llama");
  EXPECT_REFUSED(with(llama(), "model_type", 3), "\"model_type\" is 3; it must be a string");
  EXPECT_REFUSED(with(llama(), "architectures", {"LlamaForSequenceClassification"}), "expected [\"LlamaForCausalLM\"]");
  EXPECT_REFUSED(with(llama(), "architectures", json::array()), "expected [\"LlamaForCausalLM\"]");
}

TEST(Config, RefusesOtherMathematics) {
  const std::vector<std::pair<std::string, json>> fields = {{"hidden_act", "gelu"},
                                                            {"final_logit_softcapping", 30.0},
                                                            {"attn_logit_softcapping", 50.0},
                                                            {"partial_rotary_factor", 0.5},
                                                            {"num_local_experts", 8},
                                                            {"moe_intermediate_size", 768},
                                                            {"attention_multiplier", 0.0078},
                                                            {"residual_multiplier", 0.22},
                                                            {"embedding_multiplier", 12.0},
                                                            {"logits_scaling", 8.0},
                                                            {"pretraining_tp", 2},
                                                            {"alibi", true},
                                                            {"clip_qkv", 8.0},
                                                            {"use_qk_norm", true},
                                                            {"attention_chunk_size", 8192},
                                                            {"dual_chunk_attention_config", {{"chunk_size", 8192}}},
                                                            {"no_rope_layers", {1, 1, 0}},
                                                            {"rope_local_base_freq", 10000.0}};
  for (const auto& [key, value] : fields) {
    EXPECT_REFUSED(with(llama(), key, value), "\"" + key + "\": " + value.dump() + " is not supported; supported are");
  }
  EXPECT_REFUSED(with(llama(), "quantization_config", {{"quant_method", "gptq"}}), "the weights are quantized");
  EXPECT_REFUSED(with(llama(), "torch_dtype", "float8_e4m3fn"), "supported are bfloat16, float16 and float32");
  EXPECT_REFUSED(with(mistral(), "attention_bias", true), "\"attention_bias\": true is not supported");
  EXPECT_REFUSED(with(qwen2(), "attention_bias", false), "\"attention_bias\": false is not supported");
  EXPECT_REFUSED(with(qwen3(), "mlp_bias", true), "\"mlp_bias\": true is not supported");
}

TEST(Config, AcceptsFieldsThatChangeNothing) {
  json config = llama();
  config.update({{"residual_dropout", 0.1},
                 {"resid_pdrop", 0.0},
                 {"logits_scaling", 1.0},
                 {"partial_rotary_factor", 1.0},
                 {"pretraining_tp", 1},
                 {"quantization_config", nullptr},
                 {"use_mrope", false},
                 {"pruned_heads", json::object()},
                 {"num_experts", 0},
                 {"_attn_implementation", "x"},
                 {"chunk_size_feed_forward", 0},
                 {"is_encoder_decoder", false},
                 {"rope_interleaved", false},
                 {"initializer_range", 0.02},
                 {"unsloth_fixed", true},
                 {"final_logit_softcapping", nullptr},
                 {"pad_token_id", -1},
                 {"use_cache", true}});
  EXPECT_EQ(parse(config).layers, 3);
}

TEST(Config, RefusesOtherRopes) {
  const auto rope = [](json parameters) { return with(llama(), "rope_parameters", std::move(parameters)); };
  EXPECT_REFUSED(rope({{"rope_type", "dynamic"}, {"factor", 2.0}}), "the rope type \"dynamic\" is not supported");
  EXPECT_REFUSED(rope({{"rope_type", "longrope"}}), "default, linear, llama3 and yarn");
  EXPECT_REFUSED(rope({{"rope_type", "yarn"}, {"type", "linear"}, {"factor", 2}}),
                 "\"rope_type\" is \"yarn\" but \"type\"");
  EXPECT_REFUSED(rope({{"rope_type", "default"}, {"mrope_section", {16, 24, 24}}}), "\"mrope_section\": [16,24,24]");
  EXPECT_REFUSED(rope({{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}), "\"partial_rotary_factor\": 0.5");
  EXPECT_REFUSED(rope({{"rope_type", "linear"}}), "\"factor\" is missing");
  EXPECT_REFUSED(rope({{"rope_type", "linear"}, {"factor", 0}}), "\"factor\" is 0; it must be a number from 1");
  EXPECT_REFUSED(rope({{"rope_type", "linear"}, {"factor", "2"}}), "it must be a number from 1");
  EXPECT_REFUSED(rope({{"rope_type", "llama3"}, {"factor", 8}}), "\"low_freq_factor\" and a larger");
  EXPECT_REFUSED(rope({{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}}),
                 "\"low_freq_factor\" and a larger");
  EXPECT_REFUSED(rope({{"rope_theta", 1.0}}), "\"rope_theta\" is 1.0; it must be a number from");
  EXPECT_REFUSED(rope({{"rope_theta", -1}}), "\"rope_theta\" is -1");
  EXPECT_REFUSED(rope({1, 2}), "not a JSON object");
  EXPECT_REFUSED(rope({{"rope_type", "yarn"}, {"factor", 4}, {"beta_fast", 1}, {"beta_slow", 2}}), "yarn needs");
  EXPECT_REFUSED(rope({{"rope_type", "yarn"}, {"factor", 4}, {"attention_factor", 0}}), "\"attention_factor\" is 0");
}

TEST(Config, ReadsYarn) {
  json config = with(qwen2(), "rope_parameters", nullptr);
  config["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 2048}};
  config["rope_theta"] = 1e6;
  const ModelConfig parsed = parse(config);
  EXPECT_EQ(parsed.max_position, 8192);  // 4 times the original context, beyond max_position_embeddings
  EXPECT_EQ(parsed.rope.original_max_position, 2048);
  EXPECT_EQ(std::tuple(parsed.rope.beta_fast, parsed.rope.beta_slow, parsed.rope.truncate),
            std::tuple(32.0, 1.0, true));
  EXPECT_DOUBLE_EQ(parsed.rope.attention_factor, 1.138629436111989);

  config["rope_scaling"].update({{"factor", 40},
                                 {"mscale", 0.707},
                                 {"mscale_all_dim", 1.0},
                                 {"beta_fast", 16},
                                 {"beta_slow", 2},
                                 {"truncate", false}});
  const Rope rope = parse(config).rope;
  EXPECT_DOUBLE_EQ(rope.attention_factor, 0.9210423553163399);
  EXPECT_EQ(std::tuple(rope.beta_fast, rope.beta_slow, rope.truncate), std::tuple(16.0, 2.0, false));
  config["rope_scaling"]["mscale_all_dim"] = 0;
  EXPECT_DOUBLE_EQ(parse(config).rope.attention_factor, 1.3688879454113936);
  config["rope_scaling"]["attention_factor"] = 0.5;
  EXPECT_EQ(parse(config).rope.attention_factor, 0.5);

  // Without an original context it is max_position_embeddings; without a factor, their ratio.
  const json short_form = with(llama(), "rope_parameters", {{"rope_type", "yarn"}, {"factor", 2.0}});
  EXPECT_EQ(parse(short_form).rope.original_max_position, 4096);
  EXPECT_EQ(parse(short_form).max_position, 8192);
  EXPECT_EQ(parse(with(llama(), "rope_parameters", {{"rope_type", "yarn"}, {"original_max_position_embeddings", 512}}))
                .rope.factor,
            8.0);
}

TEST(Config, RefusesSlidingWindowsUnlessTheyHideNothing) {
  const auto types = [](const char* a, const char* b) { return json{a, a, b}; };
  EXPECT_REFUSED(with(mistral(), "sliding_window", 1024), "sliding-window attention (1024 tokens) is not supported");
  EXPECT_REFUSED(with(without(mistral(), "sliding_window"), "max_position_embeddings", 32768), "mistral's default");
  EXPECT_REFUSED(with(with(mistral(), "sliding_window", 1024), "use_sliding_window", false), "sliding-window");
  EXPECT_REFUSED(with(llama(), "sliding_window", 1024), "sliding-window attention (1024 tokens)");
  const json slides = with(with(qwen2(), "sliding_window", 1024), "use_sliding_window", true);
  EXPECT_REFUSED(with(slides, "max_window_layers", 2), "sliding-window attention (1024 tokens)");
  EXPECT_REFUSED(with(slides, "layer_types", types("full_attention", "sliding_attention")), "sliding-window attention");
  EXPECT_REFUSED(with(qwen3(), "layer_types", types("full_attention", "sliding_attention")),
                 "sliding-window attention");
  EXPECT_REFUSED(with(qwen3(), "layer_types", types("full_attention", "linear_attention")), "\"linear_attention\"");
  EXPECT_REFUSED(with(qwen3(), "layer_types", json{"full_attention"}), "a list of 3 types, one per layer");
  EXPECT_REFUSED(with(mistral(), "sliding_window", 0), "\"sliding_window\" is 0");

  EXPECT_EQ(parse(with(mistral(), "sliding_window", 4096)).layers, 3);
  EXPECT_EQ(parse(without(mistral(), "sliding_window")).layers, 3);  // 4,096 of 4,096
  EXPECT_EQ(parse(with(slides, "use_sliding_window", false)).layers, 3);
  EXPECT_EQ(parse(without(slides, "use_sliding_window")).layers, 3);
  EXPECT_EQ(parse(with(slides, "max_window_layers", 3)).layers, 3);
  EXPECT_EQ(parse(with(slides, "layer_types", types("full_attention", "full_attention"))).layers, 3);
  // Yarn stretches the context past the window.
  EXPECT_REFUSED(with(with(mistral(), "sliding_window", 4096), "rope_parameters", {{"type", "yarn"}, {"factor", 2}}),
                 "sliding-window");
}

TEST(Config, RefusesSizesOutOfRange) {
  for (const std::string key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"}) {
    for (const json& value : {json(0), json(-16), json(1ull << 40), json(18446744073709551615ull), json(16.5),
                              json(1e300), json("16"), json(true), json(json::array({16}))}) {
      EXPECT_REFUSED(with(llama(), key, value), "\"" + key + "\" is");
    }
  }
  EXPECT_REFUSED(without(llama(), "vocab_size"), "\"vocab_size\" is missing");
  EXPECT_REFUSED(with(llama(), "vocab_size", (1 << 24) + 1), "from 1 to 16777216");
  EXPECT_REFUSED(with(llama(), "num_hidden_layers", 1025), "from 1 to 1024");
  EXPECT_REFUSED(with(llama(), "num_key_value_heads", 3), "4 attention heads cannot share 3 key-value heads");
  EXPECT_REFUSED(with(llama(), "num_key_value_heads", 8), "4 attention heads cannot share 8 key-value heads");
  EXPECT_REFUSED(with(llama(), "head_dim", 40), "a head size of 40 is not supported; the attention kernels need");
  EXPECT_REFUSED(with(llama(), "hidden_size", 129), "need an even size");
  EXPECT_REFUSED(with(llama(), "intermediate_size", 255), "need an even size");
  EXPECT_REFUSED(with(without(llama(), "head_dim"), "hidden_size", 130), "4 heads do not divide \"hidden_size\" 130");
  EXPECT_REFUSED(with(without(llama(), "head_dim"), "hidden_size", 8192), "a head size of 2048 is not supported");
  EXPECT_REFUSED(with(llama(), "rms_norm_eps", -1e-6), "\"rms_norm_eps\" is -1e-06");
  EXPECT_REFUSED(with(llama(), "tie_word_embeddings", 1), "\"tie_word_embeddings\" is 1; it must be true or false");
}

TEST(Config, RefusesTextThatIsNoConfig) {
  EXPECT_ERROR(parse_config(""), "the model: config.json: not valid JSON");
  EXPECT_ERROR(parse_config("[1]", "", "models/x"), "models/x: config.json: not a JSON object");
  EXPECT_ERROR(parse_config(std::string(1'000'000, '[')), "nested deeper than 32");
  EXPECT_ERROR(parse_config(R"({"a":1,"a":2})"), "\"a\" appears twice");
  EXPECT_ERROR(parse_config("{\"model_type\":\"\x1b[2J\"}"), "not valid JSON");
  EXPECT_ERROR(parse_config(R"({"model_type":"\u001b[2J"})"), "\\x1b[2J");  // shown, never sent to the terminal
}

TEST(Config, LoadsADirectory) {
  const TempDirectory directory;
  EXPECT_ERROR(load_config(directory.path() / "none"), "is not a directory");
  EXPECT_ERROR(load_config(directory.path()), "has no config.json");
  directory.write("config.json", llama().dump());
  EXPECT_EQ(load_config(directory.path()).eos_tokens, std::vector<TokenId>{2});
  directory.write("generation_config.json", R"({"eos_token_id":[5,0]})");
  EXPECT_EQ(load_config(directory.path()).eos_tokens, (std::vector<TokenId>{5, 0}));
  directory.write("config.json", std::string((4 << 20) + 1, ' '));
  EXPECT_ERROR(load_config(directory.path()), "download it again");
  directory.write("config.json", "");
  EXPECT_ERROR(load_config(directory.path()), "config.json: not valid JSON");
}

struct Frequency {
  size_t pair;
  double value;
};

// Expected values: float64 Python from the wavelength form of the published formulas, written apart from this code.
void expect_frequencies(const Rope& rope, int head_dim, const std::vector<Frequency>& expected) {
  const std::vector<double> got = rope_inverse_frequencies(rope, head_dim);
  ASSERT_EQ(got.size(), static_cast<size_t>(head_dim) / 2);
  for (const auto& [pair, value] : expected) {
    EXPECT_NEAR(got[pair] / value, 1.0, 1e-12) << "pair " << pair;
  }
}

TEST(Rope, StandardAndLinear) {
  expect_frequencies({.theta = 500000.0}, 128,
                     {{0, 1.0}, {1, 0.8146172338565447}, {31, 0.0017360467021768655}, {63, 2.455140791131609e-06}});
  expect_frequencies({.type = RopeType::linear, .theta = 10000.0, .factor = 2.5}, 64,
                     {{0, 0.4}, {1, 0.29995768373298237}, {15, 0.005334085728653296}, {31, 5.3340857286532955e-05}});
}

TEST(Rope, Llama3) {
  Rope rope{.type = RopeType::llama3, .theta = 500000.0, .factor = 8.0, .original_max_position = 8192};
  expect_frequencies(rope, 128,
                     {{0, 1.0},
                      {20, 0.016560440080994446},
                      {28, 0.0032114459947525913},
                      {29, 0.002166570763503359},
                      {31, 0.0008567514129196321},
                      {33, 0.00031269375038406517},
                      {34, 0.00017850781276799638},
                      {35, 9.556212353964683e-05},
                      {36, 7.78465527393245e-05},
                      {63, 3.068925988914511e-07}});
  rope.original_max_position = 64;
  expect_frequencies(rope, 64,
                     {{3, 0.20500094811345032},
                      {4, 0.0794030091792082},
                      {5, 0.027751387869683307},
                      {6, 0.010674637535720701},
                      {7, 0.0070837026806613804},
                      {31, 3.7673226901739635e-07}});
}

TEST(Rope, Yarn) {
  Rope rope{.type = RopeType::yarn, .theta = 1e6, .factor = 4.0, .original_max_position = 32768};
  expect_frequencies(rope, 128,
                     {{0, 1.0},
                      {22, 0.008659643233600653},
                      {23, 0.006978305848598663},
                      {24, 0.005375321490790102},
                      {30, 0.0010643609812470017},
                      {38, 9.262301704129459e-05},
                      {39, 6.490394320837028e-05},
                      {40, 4.445698525097307e-05},
                      {41, 3.582531425592407e-05},
                      {63, 3.102344401879299e-07}});
  rope.truncate = false;
  expect_frequencies(rope, 128,
                     {{23, 0.006978305848598663},
                      {24, 0.0055172704751341225},
                      {30, 0.0010792377416765538},
                      {38, 8.957925287117513e-05},
                      {39, 6.187806812450695e-05},
                      {40, 4.445698525097307e-05}});
  expect_frequencies({.type = RopeType::yarn,
                      .theta = 10000.0,
                      .factor = 16.0,
                      .original_max_position = 256,
                      .beta_fast = 8,
                      .beta_slow = 2},
                     64,
                     {{5, 0.23713737056616555},
                      {6, 0.15004232522203412},
                      {8, 0.053125000000000006},
                      {10, 0.012301216488538883},
                      {12, 0.001976423537605237},
                      {31, 8.334508951020775e-06}});
  // An original context too short for any rotation: the ramp is a step.
  expect_frequencies({.type = RopeType::yarn, .theta = 10000.0, .factor = 16.0, .original_max_position = 6}, 64,
                     {{0, 1.0}, {1, 0.04686838808327849}, {31, 8.334508951020775e-06}});
}

}  // namespace
}  // namespace vericache
