// Any bytes as config.json, a zero byte, generation_config.json: an Error, or an architecture within the limits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "base/error.h"
#include "model/config.h"

namespace {

void check_limits(const vericache::ModelConfig& config) {
  using vericache::check;
  check(config.hidden_size > 0 && config.hidden_size % 2 == 0, "hidden_size is positive and even");
  check(config.intermediate_size > 0 && config.intermediate_size % 2 == 0, "intermediate_size is positive and even");
  check(config.layers >= 1 && config.layers <= 1024, "layers are within the limit");
  check(config.kv_heads > 0 && config.heads % config.kv_heads == 0, "heads share the key-value heads evenly");
  check(config.head_dim > 0 && config.head_dim % 16 == 0 && config.head_dim <= 1024, "head_dim suits the kernels");
  check(config.vocab_size > 0 && config.vocab_size <= 1 << 24, "the vocabulary is within the limit");
  check(config.max_position > 0 && config.max_position <= 1 << 24, "the context is within the limit");
  check(config.rms_norm_eps > 0, "the norm's epsilon is positive");
  const auto in_vocabulary = [&](vericache::TokenId token) { return token >= 0 && token < config.vocab_size; };
  check(std::all_of(config.eos_tokens.begin(), config.eos_tokens.end(), in_vocabulary), "eos is in the vocabulary");
  check(!config.bos_token || in_vocabulary(*config.bos_token), "bos is in the vocabulary");
  check(std::isfinite(config.rope.attention_factor) && config.rope.attention_factor > 0, "the temperature is positive");
  for (const double frequency : vericache::rope_inverse_frequencies(config.rope, config.head_dim)) {
    check(frequency > 0 && frequency <= 1, "frequencies lie in (0, 1]");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = std::min(input.find('\0'), size);
  try {
    check_limits(vericache::parse_config(input.substr(0, zero), input.substr(std::min(zero + 1, size)), "fuzz"));
  } catch (const vericache::Error&) {  // the one way to refuse
  }
  return 0;
}
