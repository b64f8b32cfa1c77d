#include "text/utf8.h"

#include <algorithm>
#include <cstdint>

namespace vericache {
namespace {

// The range that the byte after `lead` must lie in rules out overlong forms, surrogates and values above U+10FFFF.
struct Lead {
  int bytes;  // of the whole sequence; 0: not a lead byte
  uint8_t low, high;
};

Lead classify(uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xC2) return {0, 0, 0};
  if (lead < 0xE0) return {2, 0x80, 0xBF};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead < 0xF0) return {3, 0x80, 0xBF};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead < 0xF4) return {4, 0x80, 0xBF};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// How many bytes at the start of `bytes` belong together, and whether they are a whole code point.
struct Prefix {
  int bytes;
  bool complete;
  bool may_continue;  // ran out of bytes before it was decided
};

Prefix scan(std::string_view bytes) {
  const Lead lead = classify(static_cast<uint8_t>(bytes[0]));
  if (lead.bytes == 0) return {1, false, false};
  for (int i = 1; i < lead.bytes; ++i) {
    if (i >= static_cast<int>(bytes.size())) return {i, false, true};
    const uint8_t byte = static_cast<uint8_t>(bytes[i]);
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {i, false, false};
  }
  return {lead.bytes, true, false};
}

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
  size_t pos = 0;
  while (pos < text.size()) {
    if (static_cast<uint8_t>(text[pos]) < 0x80) {
      ++pos;
      continue;
    }
    const Prefix prefix = scan(text.substr(pos));
    if (!prefix.complete) return pos;
    pos += prefix.bytes;
  }
  return std::string_view::npos;
}

char32_t next_code_point(std::string_view text, size_t& pos) {
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[i])); };
  const char32_t lead = byte(pos);
  if (lead < 0x80) {
    pos += 1;
    return lead;
  }
  if (lead < 0xE0) {
    pos += 2;
    return (lead & 0x1F) << 6 | (byte(pos - 1) & 0x3F);
  }
  if (lead < 0xF0) {
    pos += 3;
    return (lead & 0x0F) << 12 | (byte(pos - 2) & 0x3F) << 6 | (byte(pos - 1) & 0x3F);
  }
  pos += 4;
  return (lead & 0x07) << 18 | (byte(pos - 3) & 0x3F) << 12 | (byte(pos - 2) & 0x3F) << 6 | (byte(pos - 1) & 0x3F);
}

size_t previous_boundary(std::string_view text, size_t pos) {
  do {
    --pos;
  } while (pos > 0 && (static_cast<uint8_t>(text[pos]) & 0xC0) == 0x80);
  return pos;
}

void append_utf8(std::string& out, char32_t c) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6);
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

void Utf8Stream::push(std::string_view bytes, std::string& out) {
  while (held_bytes_ > 0 && !bytes.empty()) {
    held_[held_bytes_++] = bytes[0];
    const Prefix prefix = scan({held_, static_cast<size_t>(held_bytes_)});
    if (prefix.may_continue) {
      bytes.remove_prefix(1);
      continue;
    }
    if (prefix.complete) {
      out.append(held_, held_bytes_);
      bytes.remove_prefix(1);
    } else {
      out += kReplacementCharacter;  // the new byte does not belong to it and is looked at again below
    }
    held_bytes_ = 0;
  }
  while (!bytes.empty()) {
    const Prefix prefix = scan(bytes);
    if (prefix.may_continue) {
      std::copy(bytes.begin(), bytes.end(), held_);
      held_bytes_ = static_cast<int>(bytes.size());
      return;
    }
    if (prefix.complete) {
      out.append(bytes.substr(0, prefix.bytes));
    } else {
      out += kReplacementCharacter;
    }
    bytes.remove_prefix(prefix.bytes);
  }
}

void Utf8Stream::flush(std::string& out) {
  if (held_bytes_ > 0) {
    out += kReplacementCharacter;
    held_bytes_ = 0;
  }
}

}  // namespace vericache
