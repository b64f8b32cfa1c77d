#include "text/unicode.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <span>

namespace vericache {
namespace {

struct Range {
  char32_t first, last;
};
using Ranges = std::span<const Range>;

// Assigned in Unicode 15.0, 15.1 and 16.0: Debian 12's PCRE2 knows Unicode 14, the tokenizers library's regular
// expressions Unicode 16. A PCRE2 that knows them already is not disturbed: the ranges only add.
constexpr Range kNewLu[] = {{0x1C89, 0x1C89}, {0xA7CB, 0xA7CC}, {0xA7DA, 0xA7DA}, {0xA7DC, 0xA7DC}, {0x10D50, 0x10D65}};
constexpr Range kNewLl[] = {
    {0x1C8A, 0x1C8A}, {0xA7CD, 0xA7CD}, {0xA7DB, 0xA7DB}, {0x10D70, 0x10D85}, {0x1DF25, 0x1DF2A}};
constexpr Range kNewLm[] = {{0x10D4E, 0x10D4E}, {0x10D6F, 0x10D6F}, {0x16D40, 0x16D42},
                            {0x16D6B, 0x16D6C}, {0x1E030, 0x1E06D}, {0x1E4EB, 0x1E4EB}};
constexpr Range kNewLo[] = {
    {0x105C0, 0x105F3}, {0x10D4A, 0x10D4D}, {0x10D4F, 0x10D4F}, {0x10EC2, 0x10EC4}, {0x1123F, 0x11240},
    {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5}, {0x113B7, 0x113B7},
    {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0}, {0x11F02, 0x11F02}, {0x11F04, 0x11F10},
    {0x11F12, 0x11F33}, {0x1342F, 0x1342F}, {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D},
    {0x16D43, 0x16D6A}, {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1E4D0, 0x1E4EA},
    {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF}};
constexpr Range kNewNd[] = {{0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9},
                            {0x11F50, 0x11F59}, {0x16130, 0x16139}, {0x16D70, 0x16D79},
                            {0x1CCF0, 0x1CCF9}, {0x1E4F0, 0x1E4F9}, {0x1E5F1, 0x1E5FA}};
constexpr Range kNewNo[] = {{0x1D2C0, 0x1D2D3}};
constexpr Range kNewM[] = {{0x897, 0x897},     {0xCF3, 0xCF3},     {0xECE, 0xECE},     {0x10D69, 0x10D6D},
                           {0x10EFC, 0x10EFF}, {0x11241, 0x11241}, {0x113B8, 0x113C0}, {0x113C2, 0x113C2},
                           {0x113C5, 0x113C5}, {0x113C7, 0x113CA}, {0x113CC, 0x113D0}, {0x113D2, 0x113D2},
                           {0x113E1, 0x113E2}, {0x11F00, 0x11F01}, {0x11F03, 0x11F03}, {0x11F34, 0x11F3A},
                           {0x11F3E, 0x11F42}, {0x11F5A, 0x11F5A}, {0x13440, 0x13440}, {0x13447, 0x13455},
                           {0x1611E, 0x1612F}, {0x1E08F, 0x1E08F}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};
constexpr Range kMarksAfterUnicode9[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99},
    {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136},
    {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}};

// U+11DE0.. and U+16FF4.. are of Unicode 17, which the Digits pre-tokenizer alone knows.
constexpr Range kNewNumeric[] = {{0x11DE0, 0x11DE9}, {0x16FF4, 0x16FF6}};

constexpr Range kWhiteSpace[] = {{0x09, 0x0D},     {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},
                                 {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F},
                                 {0x205F, 0x205F}, {0x3000, 0x3000}};

std::string class_of(std::string_view start, std::initializer_list<Ranges> tables) {
  std::string out(start);
  for (const Ranges table : tables) {
    for (const Range range : table) {
      out +=
          fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", static_cast<uint32_t>(range.first), static_cast<uint32_t>(range.last));
    }
  }
  return out;
}

bool contains(Ranges table, char32_t c) {
  const auto at = std::upper_bound(table.begin(), table.end(), c, [](char32_t x, Range r) { return x < r.first; });
  return at != table.begin() && c <= std::prev(at)->last;
}

}  // namespace

std::string property_class(std::string_view property) {
  if (property == "L") return class_of("\\p{L}", {kNewLu, kNewLl, kNewLm, kNewLo});
  if (property == "Lu") return class_of("\\p{Lu}", {kNewLu});
  if (property == "Ll") return class_of("\\p{Ll}", {kNewLl});
  if (property == "Lt") return "\\p{Lt}";
  if (property == "Lm") return class_of("\\p{Lm}", {kNewLm});
  if (property == "Lo") return class_of("\\p{Lo}", {kNewLo});
  if (property == "M") return class_of("\\p{M}", {kNewM});
  if (property == "N") return class_of("\\p{N}", {kNewNd, kNewNo});
  if (property == "Nd") return class_of("\\p{Nd}", {kNewNd});
  return {};
}

// Spelled out because PCRE2's \s also takes U+180E, which lost its White_Space property in Unicode 6.3.
std::string white_space_class() {
  return class_of("", {kWhiteSpace});
}

std::string not_white_space_class() {
  std::string out;
  char32_t first = 0;
  for (const Range range : kWhiteSpace) {
    out += fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", static_cast<uint32_t>(first), static_cast<uint32_t>(range.first - 1));
    first = range.last + 1;
  }
  return out + fmt::format("\\x{{{:x}}}-\\x{{10ffff}}", static_cast<uint32_t>(first));
}

std::string word_class() {
  return class_of("\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}",
                  {kNewLu, kNewLl, kNewLm, kNewLo, kNewM, kNewNd});
}

std::string numeric_class() {
  return class_of("\\p{N}", {kNewNd, kNewNo, kNewNumeric});
}

bool unknown_to_nfc(char32_t c) {
  for (const Ranges table : {Ranges(kMarksAfterUnicode9), Ranges(kNewM), Ranges(kNewLu), Ranges(kNewLo)}) {
    if (contains(table, c)) return true;
  }
  return false;
}

}  // namespace vericache
