#include "transcript.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/hash.h"
#include "terminal.h"

namespace vericache {

std::vector<TokenId> Transcript::ids() const {
  std::vector<TokenId> ids;
  ids.reserve(tokens.size());
  for (const DecidedToken& token : tokens) {
    ids.push_back(token.id);
  }
  return ids;
}

uint64_t Transcript::hash() const {
  uint64_t hash = 0;
  for (const DecidedToken& token : tokens) {
    hash = hash_bytes(&token.id, sizeof token.id, hash);
    hash = hash_bytes(&token.logits_hash, sizeof token.logits_hash, hash);
  }
  return hash;
}

double Transcript::prefill_tokens_per_second() const {
  return first_token > submitted ? prompt_tokens / (first_token - submitted) : 0;
}

double Transcript::decode_tokens_per_second() const {
  return tokens.size() > 1 && last_token > first_token
             ? static_cast<double>(tokens.size() - 1) / (last_token - first_token)
             : 0;
}

void submit_recorded(Engine& engine, Request request, Transcript& transcript) {
  transcript = {};
  transcript.prompt_tokens = static_cast<int>(request.prompt.size());
  request.on_progress = [&transcript](const Progress& progress) {
    transcript.prompt_done = progress.prompt_done;
    if (!progress.tokens.empty()) {
      transcript.last_token = now_seconds();
      if (transcript.tokens.empty()) {
        transcript.first_token = transcript.last_token;
      }
      transcript.tokens.insert(transcript.tokens.end(), progress.tokens.begin(), progress.tokens.end());
    }
    if (progress.finish) {
      transcript.finish = progress.finish;
    }
  };
  transcript.submitted = now_seconds();
  transcript.id = engine.submit(std::move(request));
}

Comparison compare(const Transcript& expected, const Transcript& got) {
  Comparison result;
  result.tokens = static_cast<int64_t>(expected.tokens.size());
  const size_t places = std::max(expected.tokens.size(), got.tokens.size());
  for (size_t i = 0; i < places; ++i) {
    Mismatch at{.index = static_cast<int>(i), .expected = {}, .got = {}};
    if (i < expected.tokens.size()) {
      at.expected = expected.tokens[i];
    }
    if (i < got.tokens.size()) {
      at.got = got.tokens[i];
    }
    const bool same =
        at.expected && at.got && at.expected->id == at.got->id && at.expected->logits_hash == at.got->logits_hash;
    if (!same) {
      ++result.mismatches;
      if (!result.first) {
        result.first = at;
      }
    }
  }
  return result;
}

std::string describe(const Mismatch& mismatch) {
  const auto side = [](const std::optional<DecidedToken>& token) {
    return token ? fmt::format("token {} (logits {:016x})", token->id, token->logits_hash) : std::string("the end");
  };
  return fmt::format("at generated token {}: expected {}, got {}", mismatch.index, side(mismatch.expected),
                     side(mismatch.got));
}

double per_round(const SequenceStats& stats) {
  return stats.rounds == 0 ? 0 : static_cast<double>(stats.accepted) / static_cast<double>(stats.rounds);
}

nlohmann::ordered_json speculation_json(const SequenceStats& stats) {
  return {{"rounds", stats.rounds},
          {"drafted", stats.drafted},
          {"accepted", stats.accepted},
          {"accepted_per_round", per_round(stats)}};
}

nlohmann::ordered_json memory_json(const EngineStats& stats) {
  return {{"weight_bytes", stats.weight_bytes},
          {"activation_bytes", stats.activation_bytes},
          {"tail_pool_bytes", stats.tail_pool_bytes},
          {"staging_bytes", stats.staging_bytes},
          {"resident_pool_bytes", stats.resident_pool_bytes},
          {"host_pool_bytes", stats.host_pool_bytes},
          {"store_bytes", stats.store_bytes},
          {"peak_resident_bytes", stats.peak_resident_bytes},
          {"peak_full_bytes", stats.peak_full_bytes},
          {"peak_extent_bytes", stats.peak_extent_bytes},
          {"full_on_device", stats.full_on_device}};
}

size_t pool_bytes(const EngineStats& stats) {
  return stats.activation_bytes + stats.tail_pool_bytes + stats.staging_bytes + stats.resident_pool_bytes +
         stats.host_pool_bytes;
}

}  // namespace vericache
