// A tokenizer.json from anywhere: refused with an Error or good for encoding and decoding, never anything else.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vericache;
  try {
    const Tokenizer tokenizer = Tokenizer::parse({reinterpret_cast<const char*>(data), size});
    constexpr std::string_view kText =
        "It's  a \u00e9\u0323\u0301 t\u00ebst, 123 <s> word\r\n\t\u2581x \U0001F642 <|end|>  ---__,,~~";
    std::vector<TokenId> ids = tokenizer.encode(kText, true);
    for (TokenId id = -1; id <= std::min(tokenizer.vocab_size(), 300); ++id) ids.push_back(id);
    Detokenizer detokenizer(tokenizer);
    std::string streamed;
    for (const TokenId id : ids) streamed += detokenizer.push(id);
    streamed += detokenizer.flush();
    if (streamed != tokenizer.decode(ids)) __builtin_trap();
  } catch (const Error&) {
  }
  return 0;
}
