#include "text/byte_level.h"

#include "text/utf8.h"

namespace vericache {
namespace {

// Printable Latin-1 stands for itself; the other bytes take the code points from U+0100 on, in order.
std::array<char32_t, 256> make_alphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

struct EncodedBytes {
  char text[256][2];
  uint8_t length[256];
};

const EncodedBytes& encoded_bytes() {
  static const EncodedBytes table = [] {
    EncodedBytes made{};
    for (int byte = 0; byte < 256; ++byte) {
      std::string one;
      append_utf8(one, byte_level_alphabet()[byte]);
      made.length[byte] = static_cast<uint8_t>(one.size());
      one.copy(made.text[byte], 2);
    }
    return made;
  }();
  return table;
}

const std::array<int16_t, kByteLevelEnd>& byte_of_code_point() {
  static const auto table = [] {
    std::array<int16_t, kByteLevelEnd> made;
    made.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      made[byte_level_alphabet()[byte]] = static_cast<int16_t>(byte);
    }
    return made;
  }();
  return table;
}

}  // namespace

const std::array<char32_t, 256>& byte_level_alphabet() {
  static const std::array<char32_t, 256> alphabet = make_alphabet();
  return alphabet;
}

void append_byte_level(std::string_view bytes, std::string& out) {
  const EncodedBytes& table = encoded_bytes();
  for (const char c : bytes) {
    const uint8_t byte = static_cast<uint8_t>(c);
    out.append(table.text[byte], table.length[byte]);
  }
}

size_t byte_level_length(std::string_view bytes) {
  const EncodedBytes& table = encoded_bytes();
  size_t length = 0;
  for (const char c : bytes) length += table.length[static_cast<uint8_t>(c)];
  return length;
}

void append_bytes_of(std::string_view token, std::string& out) {
  const auto& table = byte_of_code_point();
  const size_t before = out.size();
  for (size_t pos = 0; pos < token.size();) {
    const char32_t c = next_code_point(token, pos);
    if (c >= kByteLevelEnd || table[c] < 0) {
      out.resize(before);
      out += token;
      return;
    }
    out.push_back(static_cast<char>(table[c]));
  }
}

}  // namespace vericache
