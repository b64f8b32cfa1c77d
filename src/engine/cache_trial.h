// CacheTrial: reads one prompt exactly and then decodes from compressed caches of it alone, nothing verified: how often
// drafts agree with the full cache, and what a lossy cache by itself would answer. It measures; no request is served by
// it. Called from the thread that drives the kernels, while no engine has work under way.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/device.h"
#include "compress/compressor.h"
#include "compress/key_rounding.h"
#include "engine/pass_cost.h"
#include "engine/replay.h"
#include "kv/page_pool.h"
#include "kv/tail.h"
#include "model/transformer.h"

namespace vericache {

struct TrialLimits {
  int max_tokens = 0;   // of a prompt and what follows it
  int pass_rows = 512;  // rows of one exact pass; the kernels' at most
  int batch = 32;       // tokens that are scored at once; the kernels' sequences at most
};

class CacheTrial {
 public:
  // Takes memory for the full KV of max_tokens and for what each compressor keeps of it. Error where the device has
  // less.
  CacheTrial(const Transformer& model, Device& device, std::vector<std::unique_ptr<Compressor>> compressors,
             const TrialLimits& limits);
  ~CacheTrial();
  CacheTrial(const CacheTrial&) = delete;
  CacheTrial& operator=(const CacheTrial&) = delete;

  // Reads a prompt of 1 to max_tokens - 1 tokens as an engine does, and compresses it for every compressor. The token
  // that the full cache chooses after it; all that follows samples as is said here.
  TokenId read(std::span<const TokenId> prompt, const Sampling& sampling);

  // Decodes with the full cache: `first` and what it chooses after it, `tokens` in all or up to and with a stop token.
  std::vector<TokenId> exact(TokenId first, int tokens, std::span<const TokenId> stop);

  // Teacher-forced: the compressed prompt is as it was after read(), the exact tokens are fed whatever the compressed
  // cache chooses, and their KV is that which drafts compute, bf16. exact[0] follows the prompt and was chosen by an
  // exact pass; choice i stands in the place of exact[i + 1].
  std::vector<TokenId> forced(size_t compressor, std::span<const TokenId> exact);

  // Decodes from the compressed cache alone, as exact() does. A compressor that extends takes in the pages that the
  // text completes, one that chooses among all tokens chose once, at the end of the prompt. Last for this compressor
  // until the next read().
  std::vector<TokenId> alone(size_t compressor, TokenId first, int tokens, std::span<const TokenId> stop);

  // Runs the exact tokens in passes of up to `rows` rows, as verifications do, for what that costs: choice i stands in
  // the place of exact[i + 1], and is that token. As in forced(), exact[0] follows the prompt.
  std::vector<TokenId> verified(std::span<const TokenId> exact, int rows);

  // Values of K and V that the compressed cache stands for, and the bytes of the pages that it takes for them.
  struct Resident {
    double bytes = 0;
    double values = 0;
  };
  Resident resident(size_t compressor) const;

  // Seconds of what ran so far, by rows: exact passes of a few rows, and scored drafts.
  const PassCost& exact_cost() const { return exact_cost_; }
  const PassCost& draft_cost(size_t compressor) const;

 private:
  struct Cache;
  void run_exact(int position, int rows, int choices, bool reading);
  void run_drafts(Cache& cache, int position, int rows);
  double run(PassRows pass, Activations& activations);
  Attended attended(const Cache& cache, const QueryRing& queries, int first, int end, int layer) const;
  void compress(Cache& cache, int layer, int end, bool choose);
  bool replays(const Cache& cache) const;
  void replay();
  void run_replay(const ReplayChunk& chunk);
  void extend(Cache& cache, int end);
  LayerKv full_view(int layer) const { return {{}, tail_->view(layer, 0), 0}; }
  QueryRing queries(int layer) const;

  const Transformer& model_;
  TrialLimits limits_;
  KvShape shape_;
  Kernels& pass_lane_;
  Kernels& draft_lane_;
  std::unique_ptr<Device> host_;
  TokenId* board_ = nullptr;   // tokens by position
  TokenId* chosen_ = nullptr;  // by a pass
  Activations exact_activations_;
  Activations draft_activations_;
  std::unique_ptr<PagePool> tail_pool_;
  std::unique_ptr<Tail> tail_;  // the full KV, then what is decoded
  std::byte* queries_ = nullptr;
  int query_window_ = 0;                   // the widest
  std::unique_ptr<KeyRounding> rounding_;  // where any format is rounded so
  std::vector<std::unique_ptr<Cache>> caches_;
  std::vector<SequenceRows> rows_;  // (layers, sequences) of the pass that runs
  std::vector<LogitRow> choices_;
  Sampling sampling_;
  int prompt_tokens_ = 0;
  PassCost exact_cost_;
};

}  // namespace vericache
