#include "text/tokenizer_json.h"

#include <algorithm>
#include <functional>

#include "text/json_fields.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace vericache {
namespace {

constexpr int kMaxNesting = 8;  // of Sequences

[[noreturn]] void refuse(std::string_view where, std::string_view what, std::string_view value,
                         std::string_view supported) {
  throw Error("{}: {} '{}' is not supported; supported: {}", where, what, value, supported);
}

// Calls `visit` for the object, or for each member of a Sequence, however deep.
void for_each_step(const Json& object, const char* members, const std::string& where, int depth,
                   const std::function<void(const Json&, const std::string& type, const std::string& where)>& visit) {
  const std::string type = string_field(object, "type", where);
  if (type != "Sequence") return visit(object, type, where);
  if (depth >= kMaxNesting) throw Error("{}: more than {} Sequences inside each other", where, kMaxNesting);
  const Json& list = array_field(object, members, where);
  for (size_t i = 0; i < list.size(); ++i) {
    for_each_step(list[i], members, fmt::format("{}.{}[{}]", where, members, i), depth + 1, visit);
  }
}

// {"String": ...} or {"Regex": ...}
Pattern read_pattern(const Json& step, const std::string& where) {
  const Json& pattern = object_field(step, "pattern", where);
  if (optional_field(pattern, "String", where) != nullptr) {
    return Pattern::literal(string_field(pattern, "String", where), where);
  }
  if (optional_field(pattern, "Regex", where) != nullptr) {
    return Pattern::regex(string_field(pattern, "Regex", where), where);
  }
  refuse(where, "pattern", pattern.dump(-1, ' ', true, Json::error_handler_t::replace), "String, Regex");
}

std::string read_one_character(const Json& step, const char* name, const std::string& where) {
  std::string text = string_field(step, name, where);
  size_t pos = 0;
  if (!text.empty()) next_code_point(text, pos);
  if (text.empty() || pos != text.size()) throw Error("{}: '{}' must be one character, not '{}'", where, name, text);
  return text;
}

Normalizer read_normalizer(const Json& root) {
  std::vector<Normalizer::Step> steps;
  if (const Json* field = optional_field(root, "normalizer", "tokenizer.json")) {
    for_each_step(*field, "normalizers", "tokenizer.json: normalizer", 0,
                  [&](const Json& step, const std::string& type, const std::string& where) {
                    if (type == "NFC") {
                      steps.emplace_back(Nfc{});
                    } else if (type == "Prepend") {
                      steps.emplace_back(Prepend{string_field(step, "prepend", where)});
                    } else if (type == "Replace") {
                      steps.emplace_back(Replace{read_pattern(step, where), string_field(step, "content", where)});
                    } else {
                      refuse(where, "type", type, "Sequence, NFC, Prepend, Replace");
                    }
                  });
  }
  return Normalizer(std::move(steps));
}

SplitBehavior read_behavior(const Json& step, const std::string& where) {
  const std::string name = string_field(step, "behavior", where);
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  refuse(where, "behavior", name, "Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous");
}

Metaspace::Prepend read_prepend_scheme(const Json& step, const std::string& where) {
  const std::string name =
      optional_field(step, "prepend_scheme", where) ? string_field(step, "prepend_scheme", where) : "always";
  // The older form of the same field; both must agree.
  const bool older = bool_field(step, "add_prefix_space", true, where);
  if (!older && name != "never") throw Error("{}: add_prefix_space is false, but prepend_scheme is '{}'", where, name);
  if (name == "always") return Metaspace::Prepend::kAlways;
  if (name == "first") return Metaspace::Prepend::kFirst;
  if (name == "never") return Metaspace::Prepend::kNever;
  refuse(where, "prepend_scheme", name, "always, first, never");
}

PreTokenizer::Step read_pre_tokenizer_step(const Json& step, const std::string& type, const std::string& where) {
  if (type == "Split")
    return Split{read_pattern(step, where), read_behavior(step, where), bool_field(step, "invert", where)};
  if (type == "ByteLevel") {
    return ByteLevelSplit{bool_field(step, "add_prefix_space", where), bool_field(step, "use_regex", true, where),
                          Pattern::regex(kGpt2Words, where)};
  }
  if (type == "Metaspace") {
    return Metaspace{read_one_character(step, "replacement", where), read_prepend_scheme(step, where),
                     bool_field(step, "split", true, where)};
  }
  if (type == "Digits") {
    const bool alone = bool_field(step, "individual_digits", where);
    return Split{Pattern::char_class(numeric_class(), where),
                 alone ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false};
  }
  refuse(where, "type", type, "Sequence, Split, ByteLevel, Metaspace, Digits");
}

PreTokenizer read_pre_tokenizer(const Json& root) {
  std::vector<PreTokenizer::Step> steps;
  if (const Json* field = optional_field(root, "pre_tokenizer", "tokenizer.json")) {
    for_each_step(*field, "pretokenizers", "tokenizer.json: pre_tokenizer", 0,
                  [&](const Json& step, const std::string& type, const std::string& where) {
                    steps.push_back(read_pre_tokenizer_step(step, type, where));
                  });
  }
  return PreTokenizer(std::move(steps));
}

// "a b", the older form.
std::pair<std::string, std::string> cut_merge(const std::string& line, size_t index) {
  const size_t space = line.find(' ');
  if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
    throw Error("tokenizer.json: model.merges[{}]: '{}' is not two tokens with a space between", index, line);
  }
  return {line.substr(0, space), line.substr(space + 1)};
}

Bpe::Merges read_merges(const Json& model) {
  const Json& list = array_field(model, "merges", "tokenizer.json: model");
  Bpe::Merges merges;
  merges.reserve(list.size());
  const bool pairs = !list.empty() && list[0].is_array();
  for (size_t i = 0; i < list.size(); ++i) {
    const Json& merge = list[i];
    if (pairs && merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else if (!pairs && merge.is_string()) {
      const std::string& line = merge.get_ref<const std::string&>();
      if (!line.starts_with("#version")) merges.push_back(cut_merge(line, i));
    } else {
      throw Error("tokenizer.json: model.merges[{}] is not {}", i, pairs ? "a pair of strings" : "a string 'a b'");
    }
  }
  return merges;
}

Bpe read_model(const Json& root) {
  constexpr std::string_view kWhere = "tokenizer.json: model";
  const Json& model = object_field(root, "model", "tokenizer.json");
  const std::string type = optional_field(model, "type", kWhere) ? string_field(model, "type", kWhere) : "BPE";
  if (type != "BPE") refuse(kWhere, "type", type, "BPE");
  if (const Json* dropout = optional_field(model, "dropout", kWhere)) {
    if (!dropout->is_number() || dropout->get<double>() != 0) refuse(kWhere, "dropout", dropout->dump(), "null, 0");
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (optional_field(model, affix, kWhere) && !string_field(model, affix, kWhere).empty()) {
      refuse(kWhere, affix, string_field(model, affix, kWhere), "null, the empty string");
    }
  }
  BpeOptions options;
  options.byte_fallback = bool_field(model, "byte_fallback", false, kWhere);
  options.fuse_unknown = bool_field(model, "fuse_unk", false, kWhere);
  options.ignore_merges = bool_field(model, "ignore_merges", false, kWhere);
  if (optional_field(model, "unk_token", kWhere)) options.unknown_token = string_field(model, "unk_token", kWhere);

  const Json& vocabulary = object_field(model, "vocab", kWhere);
  if (!vocabulary.is_object()) throw Error("{}: 'vocab' is {}, not an object", kWhere, vocabulary.type_name());
  Bpe::Vocabulary tokens;
  tokens.reserve(vocabulary.size());
  for (const auto& [token, id] : vocabulary.items()) {
    tokens.emplace_back(token, json_id(id, "tokenizer.json: model.vocab"));
  }
  return Bpe(tokens, read_merges(model), std::move(options));
}

// The library numbers added tokens itself: as in the vocabulary, or from its end on. A file that says otherwise would
// be read differently by different programs.
AddedTokens read_added_tokens(const Json& root, const Bpe& bpe, const Normalizer& normalizer) {
  const Json* list = optional_field(root, "added_tokens", "tokenizer.json");
  if (list == nullptr) return {};
  if (!list->is_array()) throw Error("tokenizer.json: added_tokens is {}, not a list", list->type_name());
  std::vector<AddedToken> tokens;
  TokenId next = static_cast<TokenId>(bpe.size());
  for (size_t i = 0; i < list->size(); ++i) {
    const Json& entry = (*list)[i];
    const std::string where = fmt::format("tokenizer.json: added_tokens[{}]", i);
    AddedToken token{json_id(object_field(entry, "id", where), where),
                     string_field(entry, "content", where),
                     bool_field(entry, "single_word", where),
                     bool_field(entry, "lstrip", where),
                     bool_field(entry, "rstrip", where),
                     bool_field(entry, "normalized", where),
                     bool_field(entry, "special", where)};
    const std::optional<TokenId> known = bpe.id_of(token.content);
    const TokenId expected = known ? *known : next++;
    if (token.id != expected) {
      throw Error("{}: '{}' has id {}, but by the vocabulary and the order of the list it has id {}", where,
                  token.content, token.id, expected);
    }
    tokens.push_back(std::move(token));
  }
  return AddedTokens(std::move(tokens), normalizer);
}

DecodeStrip read_strip(const Json& step, const std::string& where) {
  return {read_one_character(step, "content", where), static_cast<int>(int_field(step, "start", where)),
          static_cast<int>(int_field(step, "stop", where))};
}

// Decoders come in an order that can be followed token by token: what is done to single tokens, then ByteFallback, then
// Fuse, then what is done to the whole.
class DecoderReader {
 public:
  void operator()(const Json& step, const std::string& type, const std::string& where) {
    if (type == "ByteLevel") {
      advance(kJoined, kTokens, type, where);
      decoder_.join = Decoder::Join::kByteLevel;
    } else if (type == "Metaspace") {
      advance(kTokens, kTokens, type, where);
      const bool keep_first = read_prepend_scheme(step, where) == vericache::Metaspace::Prepend::kNever;
      decoder_.per_token.emplace_back(DecodeMetaspace{read_one_character(step, "replacement", where), keep_first});
    } else if (type == "Replace") {
      advance(kTokens, kTokens, type, where);
      const Json& pattern = object_field(step, "pattern", where);
      const std::string text = string_field(pattern, "String", where + ".pattern");
      if (text.empty()) throw Error("{}: an empty pattern is not supported", where);
      decoder_.per_token.emplace_back(DecodeReplace{text, string_field(step, "content", where)});
    } else if (type == "ByteFallback") {
      advance(kBytes, kTokens, type, where);
      decoder_.byte_fallback = true;
    } else if (type == "Fuse") {
      if (decoder_.join != Decoder::Join::kByteLevel) advance(kFused, kFused, type, where);
    } else if (type == "Strip" && stage_ == kFused) {
      advance(kJoined, kFused, type, where);
      decoder_.whole = read_strip(step, where);
    } else if (type == "Strip") {
      advance(kTokens, kTokens, type, where);
      decoder_.per_token.emplace_back(read_strip(step, where));
    } else {
      refuse(where, "type", type, "Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip");
    }
  }

  Decoder take() {
    if (decoder_.join != Decoder::Join::kByteLevel) decoder_.join = Decoder::Join::kConcatenate;
    return std::move(decoder_);
  }

 private:
  enum Stage { kTokens, kBytes, kFused, kJoined };

  void advance(Stage to, Stage latest_from, const std::string& type, const std::string& where) {
    const bool alone = type != "ByteLevel" || decoder_.per_token.empty();
    if (stage_ > latest_from || !alone) {
      refuse(where, type, "at this place of the sequence",
             "ByteLevel alone; Replace, Metaspace and Strip, then ByteFallback, then Fuse, then one Strip");
    }
    stage_ = to;
  }

  Decoder decoder_;
  Stage stage_ = kTokens;
};

Decoder read_decoder(const Json& root) {
  const Json* field = optional_field(root, "decoder", "tokenizer.json");
  if (field == nullptr) return {};
  DecoderReader reader;
  for_each_step(*field, "decoders", "tokenizer.json: decoder", 0, std::ref(reader));
  return reader.take();
}

std::vector<TokenId> read_template_token(const Json& processor, const std::string& name, const TokenizerParts& parts,
                                         const std::string& where) {
  const Json& tokens = object_field(processor, "special_tokens", where);
  const Json& token = object_field(tokens, name.c_str(), where + ".special_tokens");
  std::vector<TokenId> ids;
  for (const Json& id : array_field(token, "ids", where + ".special_tokens")) {
    ids.push_back(json_id(id, where));
    if (!parts.added.find(ids.back()) && !parts.bpe.token_of(ids.back())) {
      throw Error("{}: the special token '{}' has id {}, which no token has", where, name, ids.back());
    }
  }
  return ids;
}

void read_template(const Json& processor, const std::string& where, TokenizerParts& parts) {
  bool text_seen = false;
  for (const Json& piece : array_field(processor, "single", where)) {
    if (const Json* token = optional_field(piece, "SpecialToken", where)) {
      const auto ids = read_template_token(processor, string_field(*token, "id", where), parts, where);
      auto& side = text_seen ? parts.after : parts.before;
      side.insert(side.end(), ids.begin(), ids.end());
    } else if (string_field(object_field(piece, "Sequence", where), "id", where) == "A" && !text_seen) {
      text_seen = true;
    } else {
      refuse(where, "single", processor["single"].dump(-1, ' ', true, Json::error_handler_t::replace),
             "special tokens around the one sequence A");
    }
  }
  if (!text_seen) throw Error("{}: the template 'single' leaves the text out", where);
}

void read_post_processor(const Json& root, TokenizerParts& parts) {
  const Json* field = optional_field(root, "post_processor", "tokenizer.json");
  if (field == nullptr) return;
  bool has_template = false;
  for_each_step(*field, "processors", "tokenizer.json: post_processor", 0,
                [&](const Json& step, const std::string& type, const std::string& where) {
                  if (type == "ByteLevel") return;  // offsets only, which nobody here asks for
                  if (type != "TemplateProcessing") {
                    refuse(where, "type", type, "Sequence, TemplateProcessing, ByteLevel");
                  }
                  if (has_template) throw Error("{}: a second TemplateProcessing is not supported", where);
                  has_template = true;
                  read_template(step, where, parts);
                });
}

// A token of tokenizer_config.json: a string, or an object that holds it as "content".
TokenId config_token(const Json& config, const char* name, const TokenizerParts& parts) {
  constexpr std::string_view kWhere = "tokenizer_config.json";
  const Json& field = object_field(config, name, kWhere);
  const std::string content =
      field.is_object() ? string_field(field, "content", kWhere) : string_field(config, name, kWhere);
  const std::optional<TokenId> added = parts.added.id_of(content);
  const std::optional<TokenId> id = added ? added : parts.bpe.id_of(content);
  if (!id) throw Error("{}: the {} '{}' is not in the vocabulary", kWhere, name, content);
  return *id;
}

}  // namespace

TokenizerParts read_tokenizer(std::string_view tokenizer_json) {
  const Json root = parse_json(tokenizer_json, "tokenizer.json");
  if (optional_field(root, "version", "tokenizer.json") && string_field(root, "version", "tokenizer.json") != "1.0") {
    refuse("tokenizer.json", "version", string_field(root, "version", "tokenizer.json"), "1.0");
  }
  // "truncation" and "padding" are the wishes of whoever saved the file, for batches of theirs: not followed here.
  TokenizerParts parts;
  parts.normalizer = read_normalizer(root);
  parts.pre_tokenizer = read_pre_tokenizer(root);
  parts.bpe = read_model(root);
  parts.added = read_added_tokens(root, parts.bpe, parts.normalizer);
  parts.decoder = read_decoder(root);
  read_post_processor(root, parts);
  return parts;
}

void apply_tokenizer_config(std::string_view tokenizer_config_json, TokenizerParts& parts) {
  constexpr std::string_view kWhere = "tokenizer_config.json";
  const Json config = parse_json(tokenizer_config_json, kWhere);
  const auto apply = [&](const char* flag, const char* name, std::vector<TokenId>& side) {
    if (optional_field(config, flag, kWhere) == nullptr) return;
    if (bool_field(config, flag, kWhere)) {
      side = {config_token(config, name, parts)};
    } else if (optional_field(config, name, kWhere) != nullptr) {
      std::erase(side, config_token(config, name, parts));
    }
  };
  apply("add_bos_token", "bos_token", parts.before);
  apply("add_eos_token", "eos_token", parts.after);
}

}  // namespace vericache
