#include "compress/quest.h"

#include <fmt/format.h>

namespace vericache {

std::string Quest::name() const {
  const PageChoice choice = format().choice;
  const std::string name = fmt::format("quest:budget={},dense={}", choice.budget, choice.dense_layers);
  return format().exact() ? name : name + "+" + PagedCompressor::name();
}

}  // namespace vericache
