#include "text/decoder.h"

#include <optional>

#include "base/error.h"
#include "text/byte_level.h"

namespace vericache {
namespace {

constexpr size_t kMaxTokenTextBytes = size_t{16} << 20;  // against replacements that multiply each other

void replace_all(std::string& text, std::string_view pattern, std::string_view content) {
  std::string out;
  size_t behind = 0;
  for (size_t at = text.find(pattern); at != std::string::npos; at = text.find(pattern, behind)) {
    out.append(text, behind, at - behind);
    out += content;
    behind = at + pattern.size();
    if (out.size() > kMaxTokenTextBytes)
      throw Error("the decoder makes a token longer than {} bytes", kMaxTokenTextBytes);
  }
  if (behind > 0) text = out.append(text, behind);
}

struct PerToken {
  std::string& text;
  bool first;

  void operator()(const DecodeReplace& step) const { replace_all(text, step.pattern, step.content); }
  void operator()(const DecodeMetaspace& step) const {
    replace_all(text, step.replacement, first && !step.keep_first ? "" : " ");
  }
  void operator()(const DecodeStrip& step) const {
    for (int i = 0; i < step.start && text.starts_with(step.content); ++i) text.erase(0, step.content.size());
    for (int i = 0; i < step.stop && text.ends_with(step.content); ++i) text.resize(text.size() - step.content.size());
  }
};

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const int low = hex_digit(token[4]);
  // The tokenizers library reads the two characters as a number, which may carry a plus sign.
  const int high = token[3] == '+' ? 0 : hex_digit(token[3]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(high << 4 | low);
}

}  // namespace

std::string Decoder::token_text(std::string_view token, bool first) const {
  std::string text(token);
  for (const auto& step : per_token) {
    std::visit(PerToken{text, first}, step);
  }
  return text;
}

void DecoderStream::push(std::string_view token, std::string& out) {
  if (decoder_->join == Decoder::Join::kSpaces && !first_) out += ' ';
  const std::string text = decoder_->token_text(token, first_);
  first_ = false;
  if (decoder_->join == Decoder::Join::kByteLevel) {
    std::string bytes;
    append_bytes_of(text, bytes);
    return utf8_.push(bytes, out);
  }
  if (decoder_->byte_fallback) {
    if (const std::optional<char> byte = fallback_byte(text)) {
      byte_run_.push_back(*byte);
      return;
    }
    end_byte_run(out);
  }
  strip_whole(text, out);
}

void DecoderStream::end_byte_run(std::string& out) {
  if (find_invalid_utf8(byte_run_) == std::string_view::npos) {
    strip_whole(byte_run_, out);
  } else {
    for (size_t i = 0; i < byte_run_.size(); ++i) strip_whole(kReplacementCharacter, out);
  }
  byte_run_.clear();
}

void DecoderStream::strip_whole(std::string_view text, std::string& out) {
  const DecodeStrip& strip = decoder_->whole;
  if (start_left_ < 0) start_left_ = strip.start;
  while (!text.empty() && start_left_ > 0) {
    if (text.starts_with(strip.content)) {
      text.remove_prefix(strip.content.size());
      --start_left_;
    } else {
      start_left_ = 0;
    }
  }
  if (strip.stop == 0) {
    out += text;
    return;
  }
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    next_code_point(text, pos);
    const std::string_view character = text.substr(begin, pos - begin);
    if (character == strip.content && held_ < strip.stop) {
      ++held_;
      continue;
    }
    if (character != strip.content) {
      for (; held_ > 0; --held_) out += strip.content;
    }
    out += character;
  }
}

void DecoderStream::flush(std::string& out) {
  end_byte_run(out);
  utf8_.flush(out);
  held_ = 0;
}

}  // namespace vericache
