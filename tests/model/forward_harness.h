// Sequences that a test drives through the transformer by hand: their tails hold all KV, or the first pages of it stand
// elsewhere. One thread, the test's.
#pragma once

#include <random>
#include <vector>

#include "kv/tail.h"
#include "model/loaded_model.h"

namespace vericache {

class DrivenSequence {
 public:
  DrivenSequence(const KvShape& shape, PagePool& pool, std::vector<TokenId> tokens)
      : shape_(shape), tokens_(std::move(tokens)), tail_(shape, pool, pages()) {
    check(tail_.grow(static_cast<int>(tokens_.size())), "the test's pool is large enough");
  }

  int left() const { return static_cast<int>(tokens_.size()) - done_; }
  int done() const { return done_; }
  int pages() const { return (static_cast<int>(tokens_.size()) + kPageTokens - 1) / kPageTokens; }
  std::span<const TokenId> next(int rows) const { return {tokens_.data() + done_, static_cast<size_t>(rows)}; }
  void advance(int rows) { done_ += rows; }

  // Copies the whole pages computed so far to another place, as the wire's staging does; attention then reads them from
  // there.
  void move_past(std::byte* memory, int past_pages) {
    moved_ = memory;
    past_pages_ = past_pages;
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int page = 0; page < past_pages; ++page) {
        std::memcpy(moved_page(layer, page), tail_.set(page) + static_cast<size_t>(layer) * page_bytes(shape_),
                    page_bytes(shape_));
      }
    }
    past_tokens_.assign(static_cast<size_t>(shape_.kv_heads), past_pages * kPageTokens);
  }

  LayerKv view(int layer) {
    LayerKv kv;
    kv.tail_position = past_pages_ * kPageTokens;
    kv.tail = tail_.view(layer, kv.tail_position);
    table_.resize(static_cast<size_t>(shape_.kv_heads * pages()));
    for (int page = 0; page < past_pages_; ++page) {
      for (int head = 0; head < shape_.kv_heads; ++head) {
        table_[static_cast<size_t>(head * pages() + page)] =
            moved_page(layer, page) + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape_);
      }
    }
    kv.past.head_pages = table_.data();
    kv.past.page_stride = pages();
    kv.past.tokens = past_tokens_.empty() ? nullptr : past_tokens_.data();
    return kv;
  }

  // All KV bits of the tokens computed so far, position by position.
  std::vector<uint16_t> kv_bits() const {
    std::vector<uint16_t> bits;
    const size_t keys = static_cast<size_t>(kPageTokens * shape_.key_dim());
    for (int token = 0; token < done_; ++token) {
      for (int layer = 0; layer < shape_.layers; ++layer) {
        const auto* page = reinterpret_cast<const bf16*>(tail_.set(token / kPageTokens) +
                                                         static_cast<size_t>(layer) * page_bytes(shape_));
        for (int head = 0; head < shape_.kv_heads; ++head) {
          const bf16* at = page + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape_) / sizeof(bf16);
          for (int d = 0; d < shape_.head_dim; ++d) {
            bits.push_back(at[key_index(token % kPageTokens, d, shape_)].bits);
            bits.push_back(at[keys + value_index(token % kPageTokens, d)].bits);
          }
        }
      }
    }
    return bits;
  }

 private:
  std::byte* moved_page(int layer, int page) const {
    return moved_ + (static_cast<size_t>(layer) * static_cast<size_t>(past_pages_) + static_cast<size_t>(page)) *
                        page_bytes(shape_);
  }

  KvShape shape_;
  std::vector<TokenId> tokens_;
  Tail tail_;
  int done_ = 0;
  std::byte* moved_ = nullptr;
  int past_pages_ = 0;
  std::vector<int> past_tokens_;
  std::vector<std::byte*> table_;
};

// One pass: `rows[i]` more tokens of sequence i; logits (rows of the pass, vocabulary) of every row.
inline std::vector<float> run_pass(const Transformer& model, Activations& a, std::span<DrivenSequence* const> sequences,
                                   std::span<const int> rows) {
  std::vector<TokenId> tokens;
  std::vector<SequenceRows> members;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const std::span<const TokenId> next = sequences[i]->next(rows[i]);
    members.push_back(
        {.first_row = static_cast<int>(tokens.size()), .rows = rows[i], .position = sequences[i]->done(), .kv = {}});
    tokens.insert(tokens.end(), next.begin(), next.end());
  }
  const int total = static_cast<int>(tokens.size());
  model.embed(tokens, a);
  for (int layer = 0; layer < model.config().layers; ++layer) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      members[i].kv = sequences[i]->view(layer);
    }
    model.layer(layer, total, members, a);
  }
  std::vector<int> all(tokens.size());
  for (int i = 0; i < total; ++i) {
    all[static_cast<size_t>(i)] = i;
  }
  model.logits(all, a);
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i]->advance(rows[i]);
  }
  return {a.logits, a.logits + static_cast<size_t>(total) * static_cast<size_t>(model.config().vocab_size)};
}

// Logits of every position, in chunks.
inline std::vector<float> all_logits(LoadedModel& loaded, std::vector<TokenId> tokens, int chunk) {
  const KvShape shape = loaded.model->kv_shape();
  std::unique_ptr<Device> device = make_cpu_device(size_t{1} << 40);
  const int pages = (static_cast<int>(tokens.size()) + kPageTokens - 1) / kPageTokens;
  PagePool pool(device->allocate(page_set_bytes(shape) * static_cast<size_t>(pages), "test"), page_set_bytes(shape),
                pages);
  Activations a = loaded.model->make_activations(chunk, chunk, *device);
  DrivenSequence sequence(shape, pool, std::move(tokens));
  std::vector<float> logits;
  while (sequence.left() > 0) {
    const int rows = std::min(chunk, sequence.left());
    DrivenSequence* const one = &sequence;
    const std::vector<float> part = run_pass(*loaded.model, a, {&one, 1}, {&rows, 1});
    logits.insert(logits.end(), part.begin(), part.end());
  }
  return logits;
}

}  // namespace vericache
