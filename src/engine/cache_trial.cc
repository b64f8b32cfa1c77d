#include "engine/cache_trial.h"

#include <algorithm>

#include "base/check.h"
#include "kv/resident.h"

namespace vericache {
namespace {

int pages_for(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}
bool stops(TokenId token, std::span<const TokenId> stop) {
  return std::find(stop.begin(), stop.end(), token) != stop.end();
}

}  // namespace

// What one compressor keeps.
struct CacheTrial::Cache {
  std::unique_ptr<Compressor> compressor;
  std::unique_ptr<PagePool> pool;
  std::unique_ptr<ResidentKv> resident;
  int folded = 0;  // tokens that the resident part stands for
  Notes notes;     // of layer 0
  size_t notes_bytes = 0;
  int report_values = 0;
  PassCost cost;

  // Whether it takes in pages that follow, without having to look at queries for that.
  bool extends() const {
    return !compressor->chooses_anew() && !compressor->observes() && compressor->query_window() == 0;
  }
};

CacheTrial::CacheTrial(const Transformer& model, Device& device, std::vector<std::unique_ptr<Compressor>> compressors,
                       const TrialLimits& limits)
    : model_(model),
      limits_(limits),
      shape_(model.kv_shape()),
      pass_lane_(model.kernels().lane(Kernels::Place::pass)),
      draft_lane_(model.kernels().lane(Kernels::Place::draft)) {
  const bool replayed =
      std::any_of(compressors.begin(), compressors.end(), [](const auto& one) { return one->reconstructs(); });
  const int pages = pages_for(limits.max_tokens + (replayed ? limits.pass_rows : 0));
  const bool mirrored = !device.addressable();
  const int choices = std::max(limits.pass_rows, limits.batch);
  size_t report_values = 0;
  for (const std::unique_ptr<Compressor>& compressor : compressors) {
    report_values += static_cast<size_t>(compressor->report_values(shape_) * shape_.layers) + 1024;
  }
  host_ = device.make_host_memory((static_cast<size_t>(limits.max_tokens + choices + 2) + report_values) * sizeof(int) +
                                  65536);
  board_ = host_->allocate_array<TokenId>(static_cast<size_t>(limits.max_tokens) + 1, "tokens");
  chosen_ = host_->allocate_array<TokenId>(static_cast<size_t>(choices), "results");
  exact_activations_ = model.make_activations(limits.pass_rows, limits.batch, device, pass_lane_);
  draft_activations_ = model.make_activations(limits.batch, limits.batch, device, draft_lane_);
  draft_lane_.forget_passes();

  const size_t set_bytes = page_set_bytes(shape_);
  tail_pool_ = std::make_unique<PagePool>(device.allocate(set_bytes * static_cast<size_t>(pages), "the full KV"),
                                          set_bytes, pages);
  tail_ = std::make_unique<Tail>(shape_, *tail_pool_, pages, pass_lane_,
                                 mirrored ? device.allocate(Tail::index_bytes(shape_, pages), "tables") : nullptr);
  for (std::unique_ptr<Compressor>& given : compressors) {
    auto cache = std::make_unique<Cache>();
    cache->compressor = std::move(given);
    Compressor& compressor = *cache->compressor;
    const int kept = compressor.kept_tokens(limits.max_tokens);
    const int count = compressor.resident_pages(limits.max_tokens, shape_);
    const size_t page = head_page_bytes(compressor.format(), shape_);
    cache->pool =
        std::make_unique<PagePool>(device.allocate(page * static_cast<size_t>(count), "resident KV"), page, count);
    const int stride = compressor.chooses_anew() ? kept : 0;
    cache->resident = std::make_unique<ResidentKv>(
        shape_, compressor.format(), *cache->pool,
        ResidentIndex{
            .memory = device.allocate(ResidentIndex::bytes(shape_, pages_for(kept), stride, mirrored), "tables"),
            .max_pages = pages_for(kept),
            .chosen_stride = stride,
            .mirrored = mirrored});
    if (const size_t scratch = compressor.scratch_bytes(limits.max_tokens, shape_); scratch > 0) {
      compressor.set_scratch(device.allocate(scratch, "the compressor's scratch"));
    }
    cache->notes.max_tokens = limits.max_tokens;
    cache->notes_bytes = (compressor.notes_bytes(limits.max_tokens, shape_) + 63) / 64 * 64;
    if (cache->notes_bytes > 0) {
      cache->notes.device =
          device.allocate(cache->notes_bytes * static_cast<size_t>(shape_.layers), "the compressor's notes");
    }
    cache->report_values = compressor.report_values(shape_);
    if (cache->report_values > 0) {
      cache->notes.report = host_->allocate_array<int>(
          static_cast<size_t>(cache->report_values) * static_cast<size_t>(shape_.layers), "reports");
    }
    query_window_ = std::max(query_window_, compressor.query_window());
    if (const size_t bytes = KeyRounding::bytes(compressor.format(), shape_); bytes > 0 && rounding_ == nullptr) {
      rounding_ = std::make_unique<KeyRounding>(shape_, device.allocate(bytes, "the rounding of keys"));
    }
    caches_.push_back(std::move(cache));
  }
  if (query_window_ > 0) {
    const size_t row = static_cast<size_t>(model.config().heads) *
                       (static_cast<size_t>(shape_.key_dim()) * sizeof(bf16) + sizeof(float));
    queries_ =
        device.allocate(row * static_cast<size_t>(query_window_) * static_cast<size_t>(shape_.layers), "query windows");
  }
}

CacheTrial::~CacheTrial() = default;

QueryRing CacheTrial::queries(int layer) const {
  if (query_window_ == 0) {
    return {};
  }
  const size_t heads = static_cast<size_t>(model_.config().heads);
  const size_t rows = static_cast<size_t>(query_window_) * heads;
  const size_t q_bytes = rows * static_cast<size_t>(shape_.key_dim()) * sizeof(bf16);
  std::byte* memory = queries_ + static_cast<size_t>(layer) * (q_bytes + rows * sizeof(float));
  return {reinterpret_cast<bf16*>(memory), reinterpret_cast<float*>(memory + q_bytes), query_window_};
}

TokenId CacheTrial::read(std::span<const TokenId> prompt, const Sampling& sampling) {
  prompt_tokens_ = static_cast<int>(prompt.size());
  check(prompt_tokens_ > 0 && prompt_tokens_ < limits_.max_tokens, "a trial has room for its prompt");
  sampling_ = sampling;
  std::copy(prompt.begin(), prompt.end(), board_);
  tail_->clear();
  check(tail_->grow(tail_pool_->count() * kPageTokens), "a trial's tail holds its whole context");
  for (const std::unique_ptr<Cache>& cache : caches_) {
    cache->resident->clear();
    cache->folded = 0;
    cache->notes.observed = 0;
    cache->notes.reconstructed = 0;
    std::fill_n(cache->notes.report, cache->report_values * shape_.layers, 0);
  }
  for (int position = 0; position < prompt_tokens_; position += limits_.pass_rows) {
    const int rows = std::min(limits_.pass_rows, prompt_tokens_ - position);
    run_exact(position, rows, position + rows == prompt_tokens_ ? 1 : 0, true);
    for (const std::unique_ptr<Cache>& cache : caches_) {
      cache->folded = (position + rows) / kPageTokens * kPageTokens;
      cache->notes.observed = position + rows;
      cache->resident->settle(pass_lane_);
    }
  }
  pass_lane_.wait(pass_lane_.mark());
  const TokenId first = chosen_[0];
  replay();
  return first;
}

// One pass as an engine runs it: the full KV is tail from its beginning. The last `choices` rows choose.
void CacheTrial::run_exact(int position, int rows, int choices, bool reading) {
  rows_.clear();
  for (int layer = 0; layer < shape_.layers; ++layer) {
    rows_.push_back({.first_row = 0,
                     .rows = rows,
                     .position = position,
                     .tokens = board_,
                     .kv = full_view(layer),
                     .queries = reading ? queries(layer) : QueryRing{}});
  }
  choices_.clear();
  for (int i = 0; i < choices; ++i) {
    const int row = rows - choices + i;
    choices_.push_back(
        {.row = row, .position = position + row + 1, .sampling = sampling_, .token = chosen_ + i, .hash = nullptr});
  }
  const PassRows pass{.buffers = exact_activations_.hidden,
                      .rows = rows,
                      .layers = shape_.layers,
                      .draft = false,
                      .sequences = rows_,
                      .logit_rows = choices_};
  Kernels& lane = pass_lane_;
  lane.stage(pass);
  const Mark begin = lane.mark();
  model_.embed(pass, exact_activations_);
  for (int layer = 0; layer < shape_.layers; ++layer) {
    model_.layer(layer, pass, exact_activations_);
    const QueryRing fed{exact_activations_.q, exact_activations_.log_sum_exp, rows, position};
    for (size_t i = 0; reading && i < caches_.size(); ++i) {
      if (caches_[i]->compressor->observes()) {
        caches_[i]->compressor->observe(lane, {shape_, full_view(layer), layer},
                                        attended(*caches_[i], fed, position, position + rows, layer));
      }
    }
    if (reading && query_window_ > 0) {
      lane.keep_queries(exact_activations_.q, exact_activations_.log_sum_exp, model_.config().heads, shape_, pass,
                        layer);
    }
    if (reading && rounding_ != nullptr) {
      rounding_->learn(lane, layer, model_.config().heads, fed, rows);
    }
    for (size_t i = 0; reading && i < caches_.size(); ++i) {
      compress(*caches_[i], layer, position + rows, choices > 0 && !replays(*caches_[i]));
    }
  }
  if (choices > 0) {
    model_.logits(pass, exact_activations_);
  }
  const Mark end = lane.mark();
  lane.wait(end);
  if (!reading) {
    exact_cost_.add(rows, lane.seconds(begin, end));
  }
}

Attended CacheTrial::attended(const Cache& cache, const QueryRing& queries, int first, int end, int layer) const {
  Notes notes = cache.notes;
  if (notes.device != nullptr) {
    notes.device += static_cast<size_t>(layer) * cache.notes_bytes;
  }
  if (notes.report != nullptr) {
    notes.report += layer * cache.report_values;
  }
  return {.heads = model_.config().heads,
          .scale = model_.attention_scale(),
          .queries = queries,
          .rows = end - first,
          .position = first,
          .rope = model_.weights().rope,
          .notes = notes,
          .rounding = rounding_ == nullptr ? nullptr : rounding_->of(layer)};
}

// As a full pass does behind each layer: methods that choose among all tokens do so once, at the prompt's end.
void CacheTrial::compress(Cache& cache, int layer, int end, bool choose) {
  Compressor& compressor = *cache.compressor;
  const int first = std::max(end - compressor.query_window(), 0);
  Attended seen = attended(cache, compressor.query_window() > 0 ? queries(layer) : QueryRing{}, first, end, layer);
  seen.notes.observed = end;
  const TokenRange fresh{cache.folded, end / kPageTokens * kPageTokens};
  const bool due = compressor.chooses_anew_in(layer) ? choose && fresh.end > 0 : fresh.end > fresh.begin;
  if (due) {
    check(compressor.compress(pass_lane_, {shape_, full_view(layer), layer}, fresh, seen, cache.resident->layer(layer)),
          "a trial has the resident pages of its context");
  }
}

bool CacheTrial::replays(const Cache& cache) const {
  return cache.compressor->reconstructs() && prompt_tokens_ >= kPageTokens &&
         model_.weights().rope.positions - prompt_tokens_ >= kLeastReplayRoom;
}

// As an engine does once it has decided a token.
void CacheTrial::replay() {
  if (std::none_of(caches_.begin(), caches_.end(), [&](const auto& cache) { return replays(*cache); })) {
    return;
  }
  for (int replayed = 0; replayed < prompt_tokens_;) {
    const int room = model_.weights().rope.positions - prompt_tokens_;
    const ReplayChunk chunk = replay_chunk(replayed, prompt_tokens_,
                                           std::min(limits_.pass_rows, replay_rows(replayed, prompt_tokens_, room)));
    run_replay(chunk);
    replayed = chunk.end;
  }
}

void CacheTrial::run_replay(const ReplayChunk& chunk) {
  rows_.clear();
  choices_.clear();
  for (int layer = 0; layer < shape_.layers; ++layer) {
    rows_.push_back({.first_row = 0,
                     .rows = chunk.rows(),
                     .position = prompt_tokens_,
                     .tokens = board_,
                     .kv = full_view(layer),
                     .queries = {},
                     .token_lag = prompt_tokens_ - chunk.first});
  }
  const PassRows pass{.buffers = exact_activations_.hidden,
                      .rows = chunk.rows(),
                      .layers = shape_.layers,
                      .draft = false,
                      .sequences = rows_,
                      .logit_rows = choices_};
  Kernels& lane = pass_lane_;
  lane.stage(pass);
  model_.embed(pass, exact_activations_);
  const QueryRing fed{exact_activations_.q, exact_activations_.log_sum_exp, chunk.rows(), prompt_tokens_};
  for (int layer = 0; layer < shape_.layers; ++layer) {
    model_.layer(layer, pass, exact_activations_);
    for (const std::unique_ptr<Cache>& cache : caches_) {
      if (replays(*cache)) {
        const int weighed = cache->notes.reconstructed;
        cache->compressor->reconstruct(lane, {shape_, full_view(layer), layer}, prompt_tokens_,
                                       attended(*cache, fed, prompt_tokens_, prompt_tokens_ + chunk.rows(), layer));
        cache->notes.reconstructed = prompt_tokens_;
        compress(*cache, layer, prompt_tokens_, chunk.end == prompt_tokens_);
        cache->notes.reconstructed = weighed;
      }
    }
  }
  for (const std::unique_ptr<Cache>& cache : caches_) {
    cache->notes.reconstructed = replays(*cache) ? prompt_tokens_ : 0;
    cache->resident->settle(lane);
  }
  lane.wait(lane.mark());
}

// One row for each token, all of them over the same compressed cache: each attends to what stands before it.
void CacheTrial::run_drafts(Cache& cache, int position, int rows) {
  rows_.clear();
  choices_.clear();
  for (int layer = 0; layer < shape_.layers; ++layer) {
    const LayerKv kv{cache.resident->layer(layer).view(), tail_->view(layer, cache.folded), cache.folded};
    for (int i = 0; i < rows; ++i) {
      rows_.push_back({.first_row = i, .rows = 1, .position = position + i, .tokens = board_, .kv = kv, .queries = {}});
    }
  }
  for (int i = 0; i < rows; ++i) {
    choices_.push_back(
        {.row = i, .position = position + i + 1, .sampling = sampling_, .token = chosen_ + i, .hash = nullptr});
  }
  const PassRows pass{.buffers = draft_activations_.hidden,
                      .rows = rows,
                      .layers = shape_.layers,
                      .draft = true,
                      .sequences = rows_,
                      .logit_rows = choices_};
  Kernels& lane = draft_lane_;
  lane.stage(pass);
  const Mark begin = lane.mark();
  model_.embed(pass, draft_activations_);
  for (int layer = 0; layer < shape_.layers; ++layer) {
    model_.layer(layer, pass, draft_activations_);
  }
  model_.logits(pass, draft_activations_);
  const Mark end = lane.mark();
  lane.wait(end);
  cache.cost.add(rows, lane.seconds(begin, end));
}

std::vector<TokenId> CacheTrial::exact(TokenId first, int tokens, std::span<const TokenId> stop) {
  std::vector<TokenId> text = {first};
  while (static_cast<int>(text.size()) < tokens && !stops(text.back(), stop)) {
    const int position = prompt_tokens_ + static_cast<int>(text.size()) - 1;
    check(position < limits_.max_tokens, "a trial has room for what it decodes");
    board_[position] = text.back();
    run_exact(position, 1, 1, false);
    text.push_back(chosen_[0]);
  }
  return text;
}

std::vector<TokenId> CacheTrial::forced(size_t compressor, std::span<const TokenId> exact) {
  check(prompt_tokens_ + static_cast<int>(exact.size()) <= limits_.max_tokens, "a trial has room for what it scores");
  std::copy(exact.begin(), exact.end(), board_ + prompt_tokens_);
  std::vector<TokenId> choices;
  while (choices.size() + 1 < exact.size()) {
    const int rows = std::min(limits_.batch, static_cast<int>(exact.size() - 1 - choices.size()));
    run_drafts(*caches_[compressor], prompt_tokens_ + static_cast<int>(choices.size()), rows);
    choices.insert(choices.end(), chosen_, chosen_ + rows);
  }
  return choices;
}

std::vector<TokenId> CacheTrial::verified(std::span<const TokenId> exact, int rows) {
  check(prompt_tokens_ + static_cast<int>(exact.size()) <= limits_.max_tokens, "a trial has room for what it scores");
  std::copy(exact.begin(), exact.end(), board_ + prompt_tokens_);
  const int most = std::min({rows, limits_.batch, limits_.pass_rows});
  std::vector<TokenId> choices;
  while (choices.size() + 1 < exact.size()) {
    const int count = std::min(most, static_cast<int>(exact.size() - 1 - choices.size()));
    run_exact(prompt_tokens_ + static_cast<int>(choices.size()), count, count, false);
    choices.insert(choices.end(), chosen_, chosen_ + count);
  }
  return choices;
}

std::vector<TokenId> CacheTrial::alone(size_t compressor, TokenId first, int tokens, std::span<const TokenId> stop) {
  Cache& cache = *caches_[compressor];
  std::vector<TokenId> text = {first};
  while (static_cast<int>(text.size()) < tokens && !stops(text.back(), stop)) {
    const int position = prompt_tokens_ + static_cast<int>(text.size()) - 1;
    check(position < limits_.max_tokens, "a trial has room for what it decodes");
    board_[position] = text.back();
    run_drafts(cache, position, 1);
    text.push_back(chosen_[0]);
    if ((position + 1) % kPageTokens == 0 && cache.extends()) {
      extend(cache, position + 1);
    }
  }
  return text;
}

// The lossy cache compresses what it computed itself.
void CacheTrial::extend(Cache& cache, int end) {
  for (int layer = 0; layer < shape_.layers; ++layer) {
    compress(cache, layer, end, false);
  }
  cache.folded = end;
  cache.resident->settle(pass_lane_);
  pass_lane_.wait(pass_lane_.mark());
}

CacheTrial::Resident CacheTrial::resident(size_t compressor) const {
  const Cache& cache = *caches_[compressor];
  return {static_cast<double>(cache.resident->bytes()),
          2.0 * cache.folded * shape_.layers * shape_.kv_heads * shape_.head_dim};
}

const PassCost& CacheTrial::draft_cost(size_t compressor) const {
  return caches_[compressor]->cost;
}

}  // namespace vericache
