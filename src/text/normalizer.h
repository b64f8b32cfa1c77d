// Normalizer: what is done to a text before it is split: NFC, prepending, replacing.
// Immutable, any thread.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/pattern.h"

namespace vericache {

// Unicode canonical composition, linear in the text whatever its combining marks.
std::string to_nfc(std::string_view text);

struct Nfc {};
struct Prepend {
  std::string text;
};
struct Replace {
  Pattern pattern;
  std::string content;
};

class Normalizer {
 public:
  using Step = std::variant<Nfc, Prepend, Replace>;
  Normalizer() = default;
  explicit Normalizer(std::vector<Step> steps) : steps_(std::move(steps)) {}

  bool empty() const { return steps_.empty(); }
  std::string apply(std::string_view text) const;

 private:
  std::vector<Step> steps_;
};

}  // namespace vericache
