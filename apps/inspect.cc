#include <fmt/format.h>

#include <array>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "backend/factory.h"
#include "compress/compressor.h"
#include "flags.h"
#include "kv/tail.h"
#include "model/checkpoint.h"
#include "model_session.h"
#include "terminal.h"

namespace vericache {
namespace {

struct InspectFlags {
  ModelFlags model;
  bool json = false;
};

constexpr std::array<const char*, 11> kShownCompressors = {"none",
                                                           "kivi:bits=8",
                                                           "kivi:bits=4",
                                                           "kivi:bits=2",
                                                           "quarot:bits=4",
                                                           "streaming-llm",
                                                           "snapkv:budget=0.2",
                                                           "snapkv:budget=0.2+kivi:bits=4",
                                                           "pyramidkv:budget=0.2",
                                                           "adakv(snapkv:budget=0.2)",
                                                           "kivi:k=8,v=4"};

int64_t parameter_count(const Checkpoint& checkpoint, bool tied) {
  int64_t count = 0;
  for (const std::string& name : checkpoint.names()) {
    if (tied && name == "lm_head.weight") {
      continue;  // some files hold the shared matrix twice
    }
    int64_t elements = 1;
    for (const int64_t size : checkpoint.find(name).shape) {
      elements *= size;
    }
    count += elements;
  }
  return count;
}

nlohmann::ordered_json describe_model(ModelSession& session, const ModelFlags& flags) {
  const ModelConfig& c = session.config();
  const Checkpoint checkpoint(session.directory());
  const KvShape shape = session.kv_shape();
  const std::unique_ptr<Kernels> kernels = make_kernels({.device = DeviceKind::cpu,
                                                         .isa = flags.isa,
                                                         .threads = flags.threads,
                                                         .shape = shape,
                                                         .heads = c.heads,
                                                         .max_rows = 1,
                                                         .max_context_tokens = kPageTokens,
                                                         .max_sequences = 1});
  const int context = std::max(kPageTokens, c.max_position / kPageTokens * kPageTokens);

  nlohmann::ordered_json compressors;
  for (const char* spec : kShownCompressors) {
    const auto compressor = make_compressor(spec);
    compressors[compressor->name()] = {
        {"resident_bytes_per_token", static_cast<double>(compressor->resident_bytes(context, shape)) / context},
        {"wire_bytes_per_token", static_cast<double>(compressor->wire_bytes(context, shape)) / context}};
  }
  nlohmann::ordered_json json = {
      {"family", c.family_name},
      {"parameters", parameter_count(checkpoint, c.tied_embeddings)},
      {"file_bytes", checkpoint.file_bytes()},
      {"device_weight_bytes", weight_bytes(c, *kernels, c.max_position)},
      {"layers", c.layers},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"heads", c.heads},
      {"kv_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"vocabulary", c.vocab_size},
      {"context_tokens", c.max_position},
      {"tied_embeddings", c.tied_embeddings},
      {"qkv_bias", c.qkv_bias},
      {"qk_norm", c.qk_norm},
      {"end_tokens", c.eos_tokens},
      {"kv_bytes_per_token", static_cast<double>(page_set_bytes(shape)) / kPageTokens},
      {"kv_bytes_of_full_context", page_set_bytes(shape) * static_cast<size_t>(context / kPageTokens)},
      {"compressors", compressors},
  };
  if (std::filesystem::exists(session.directory() / "tokenizer.json")) {
    json["tokenizer"] = {{"kind", std::string(session.tokenizer().kind())},
                         {"vocabulary", session.tokenizer().vocab_size()}};
  } else {
    json["tokenizer"] = nullptr;
  }
  json["default_device"] = std::string(device_kind_name(device_kind("auto")));
  json["backends"] = {{"cpu", {{"kernels", std::string(kernels->name())}, {"isa", supported_isas()}}}};
  return json;
}

void print_model(const nlohmann::ordered_json& m) {
  const auto bytes = [](const nlohmann::ordered_json& value) { return bytes_text(value.get<double>()); };
  fmt::print("architecture  {}, {} layers, hidden {}, MLP {}, {} query heads and {} KV heads of {}{}{}\n",
             m["family"].get<std::string>(), m["layers"].get<int>(), m["hidden_size"].get<int>(),
             m["intermediate_size"].get<int>(), m["heads"].get<int>(), m["kv_heads"].get<int>(),
             m["head_dim"].get<int>(), m["tied_embeddings"].get<bool>() ? ", tied embeddings" : "",
             m["qk_norm"].get<bool>() ? ", q and k norm" : "");
  fmt::print("parameters    {:.1f} M, {} in files, {} on the device\n", m["parameters"].get<double>() / 1e6,
             bytes(m["file_bytes"]), bytes(m["device_weight_bytes"]));
  fmt::print("context       {} tokens, vocabulary {}\n", m["context_tokens"].get<int>(), m["vocabulary"].get<int>());
  if (m["tokenizer"].is_null()) {
    fmt::print("tokenizer     none (no tokenizer.json)\n");
  } else {
    fmt::print("tokenizer     {}, {} entries\n", m["tokenizer"]["kind"].get<std::string>(),
               m["tokenizer"]["vocabulary"].get<int>());
  }
  fmt::print("full KV       {} a token, {} at the full context\n", bytes(m["kv_bytes_per_token"]),
             bytes(m["kv_bytes_of_full_context"]));
  const double full = m["kv_bytes_per_token"].get<double>();
  for (const auto& [name, sizes] : m["compressors"].items()) {
    const double resident = sizes["resident_bytes_per_token"].get<double>();
    fmt::print("  {:<48} resident {:>9} a token ({:4.1f} %), wire {} a token\n", name, bytes_text(resident),
               100 * resident / full, bytes(sizes["wire_bytes_per_token"]));
  }
  std::string isas;
  for (const auto& isa : m["backends"]["cpu"]["isa"]) {
    isas += (isas.empty() ? "" : ", ") + isa.get<std::string>();
  }
  fmt::print("backend       {} (there are: {})\n", m["backends"]["cpu"]["kernels"].get<std::string>(), isas);
}

int inspect(const InspectFlags& flags) {
  ModelSession session(flags.model);
  const nlohmann::ordered_json model = describe_model(session, flags.model);
  if (flags.json) {
    write_stdout(model.dump(2) + "\n");
  } else {
    print_model(model);
  }
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Command& chosen) {
  CLI::App* command = app.add_subcommand("inspect", "Say what a model is and what its KV cache costs");
  auto flags = std::make_shared<InspectFlags>();
  add_model_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "One JSON object on stdout");
  command->footer(R"(Examples:
  vericache inspect --model build/models/vericode-26m
  vericache inspect --model build/models/vericode-5m --json)");
  command->callback([flags, &chosen] { chosen = [flags] { return inspect(*flags); }; });
}

}  // namespace vericache
