// Sequences that a test drives through the transformer by hand, on whatever device: the first pages of their full KV
// stand somewhere, as the wire's staging has them, the rest in their tails. One thread, the test's.
#pragma once

#include <cstring>
#include <random>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cuda/layout.h"
#include "kv/tail.h"
#include "model/loaded_model.h"

namespace vericache {

// The memory in which sequences are driven, and the lane that drives them. Outlives them.
struct Workbench {
  const Transformer& model;
  KvShape shape;
  int max_rows;    // of a pass
  int max_tokens;  // of a sequence
  Kernels& lane;
  std::unique_ptr<Device> device = test::make_test_device();
  std::unique_ptr<Device> host = device->make_host_memory(size_t{64} << 20);
  Activations activations;
  PagePool sets;    // of tails
  PagePool pages;   // of what lies before the tails
  PagePool tables;  // a block per sequence: by which attention finds its pages
  PagePool boards;  // a block per sequence, host memory: its tokens
  TokenId* chosen;  // (max_rows): of the logit rows of a pass, host memory
  uint64_t* hashes;

  Workbench(const Transformer& given, int rows, int sequences, int tokens)
      : model(given),
        shape(given.kv_shape()),
        max_rows(rows),
        max_tokens(tokens),
        lane(given.kernels().lane(Kernels::Place::pass)),
        activations(given.make_activations(rows, rows, *device, lane)),
        sets(make_pool(*device, page_set_bytes(shape), sequences * max_pages())),
        // While pages move, their old places are taken too.
        pages(make_pool(*device, page_bytes(shape), (sequences + 1) * max_pages() * shape.layers)),
        tables(make_pool(*device, table_bytes() + count_bytes() + Tail::index_bytes(shape, max_pages()), sequences)),
        boards(make_pool(*host, static_cast<size_t>(tokens) * sizeof(TokenId), sequences)),
        chosen(host->allocate_array<TokenId>(static_cast<size_t>(rows), "test")),
        hashes(host->allocate_array<uint64_t>(static_cast<size_t>(rows), "test")) {
    await_ready(reinterpret_cast<std::byte*>(chosen), static_cast<size_t>(rows) * sizeof(TokenId));
    await_ready(reinterpret_cast<std::byte*>(hashes), static_cast<size_t>(rows) * sizeof(uint64_t));
    await_ready(boards.memory(), boards.block_bytes() * static_cast<size_t>(sequences));
  }
  Workbench(const Workbench&) = delete;
  Workbench& operator=(const Workbench&) = delete;

  int max_pages() const { return (max_tokens + kPageTokens - 1) / kPageTokens; }
  // A table block: pages before the tail (layers, kv_heads, max_pages), their tokens (kv_heads), the tail's index.
  size_t table_bytes() const {
    return static_cast<size_t>(shape.layers * shape.kv_heads * max_pages()) * sizeof(std::byte*);
  }
  size_t count_bytes() const { return (static_cast<size_t>(shape.kv_heads) * sizeof(int) + 15) / 16 * 16; }

  // Free pages of KV come in random order from here on, and no bit pattern in them is a number.
  void shuffle(std::mt19937& random) {
    for (PagePool* pool : {&sets, &pages}) {
      const std::vector<std::byte> garbage(pool->block_bytes(), std::byte{0xff});
      std::vector<std::byte*> taken;
      while (std::byte* block = pool->take()) {
        device->write(block, garbage.data(), garbage.size());
        taken.push_back(block);
      }
      std::shuffle(taken.begin(), taken.end(), random);
      for (std::byte* block : taken) {
        pool->give(block);
      }
    }
  }

 private:
  static PagePool make_pool(Device& memory, size_t block_bytes, int count) {
    constexpr size_t kAlignment = 256;
    const size_t aligned = (block_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return {memory.allocate(aligned * static_cast<size_t>(count), "test"), aligned, count};
  }
  void await_ready(const std::byte* block, size_t bytes) const {
    while (host->ready(block, bytes) < bytes) {
      std::this_thread::yield();
    }
  }
};

class DrivenSequence {
 public:
  DrivenSequence(Workbench& bench, std::vector<TokenId> tokens)
      : bench_(bench),
        shape_(bench.shape),
        tokens_(std::move(tokens)),
        board_(take<TokenId>(bench.boards)),
        table_(take<std::byte*>(bench.tables)),
        tail_(shape_, bench.sets, bench.max_pages(), bench.lane, bench.device->addressable() ? nullptr : tail_index()) {
    check(static_cast<int>(tokens_.size()) <= bench.max_tokens, "a sequence fits its workbench");
    std::copy(tokens_.begin(), tokens_.end(), board_);
  }
  ~DrivenSequence() {
    for (std::byte* page : past_) {
      bench_.pages.give(page);
    }
    bench_.tables.give(reinterpret_cast<std::byte*>(table_));
    bench_.boards.give(reinterpret_cast<std::byte*>(board_));
  }
  DrivenSequence(const DrivenSequence&) = delete;
  DrivenSequence& operator=(const DrivenSequence&) = delete;

  int left() const { return static_cast<int>(tokens_.size()) - done_; }
  int length() const { return static_cast<int>(tokens_.size()); }
  int done() const { return done_; }
  int past_pages() const { return past_pages_; }
  TokenId* board() const { return board_; }
  void grow(int rows) { check(tail_.grow(done_ + rows), "the test's pool is large enough"); }
  void advance(int rows) { done_ += rows; }

  // Moves pages [0, pages) out of the tail, and those that had moved before to places anew, as the wire's staging does;
  // attention reads them from there. The tail's sets are another sequence's to use.
  void move_past(int pages) {
    check(pages >= past_pages_ && pages <= done_ / kPageTokens, "whole pages that are computed move");
    std::vector<std::byte*> moved;  // (layers, pages)
    std::vector<BlockCopy> copies;
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int page = 0; page < pages; ++page) {
        moved.push_back(bench_.pages.take());
        check(moved.back() != nullptr, "the test's pool is large enough");
        copies.push_back({moved.back(), place(layer, page), page_bytes(shape_)});
      }
    }
    if (!copies.empty()) {
      // As the wire brings them: late, on a lane of its own. Nothing is under way on the lane of passes now.
      Kernels& wire = bench_.model.kernels().lane(Kernels::Place::wire_in);
      wire.copy(copies);
      if (&wire != &bench_.lane) {
        bench_.lane.follow(wire, wire.mark());
      }
    }
    for (std::byte* page : past_) {
      bench_.pages.give(page);
    }
    past_ = std::move(moved);
    past_pages_ = pages;
    tail_.release_before(pages * kPageTokens);
    write_tables();
  }

  LayerKv view(int layer) const {
    LayerKv kv;
    kv.past.head_pages = table_ + layer * shape_.kv_heads * bench_.max_pages();
    kv.past.page_stride = bench_.max_pages();
    kv.past.tokens = past_pages_ > 0 ? counts() : nullptr;
    kv.tail_position = past_pages_ * kPageTokens;
    kv.tail = tail_.view(layer, kv.tail_position);
    return kv;
  }

  // All KV bits of the tokens computed so far, wherever they lie.
  std::vector<uint16_t> kv_bits() const {
    bench_.lane.wait(bench_.lane.mark());
    std::vector<uint16_t> bits;
    std::vector<bf16> values(page_bytes(shape_) / sizeof(bf16));
    const size_t head_values = head_page_bytes(KvFormat{}, shape_) / sizeof(bf16);
    for (int page = 0; page * kPageTokens < done_; ++page) {
      for (int layer = 0; layer < shape_.layers; ++layer) {
        bench_.device->read(values.data(), place(layer, page), page_bytes(shape_));
        for (int head = 0; head < shape_.kv_heads; ++head) {
          append_bits(values.data() + static_cast<size_t>(head) * head_values,
                      std::min(kPageTokens, done_ - page * kPageTokens), bits);
        }
      }
    }
    return bits;
  }

 private:
  template <typename T>
  static T* take(PagePool& pool) {
    std::byte* block = pool.take();
    check(block != nullptr, "the test's workbench has room for the sequence");
    return reinterpret_cast<T*>(block);
  }
  int* counts() const { return reinterpret_cast<int*>(reinterpret_cast<std::byte*>(table_) + bench_.table_bytes()); }
  std::byte* tail_index() const { return reinterpret_cast<std::byte*>(counts()) + bench_.count_bytes(); }

  // Of all heads of a page.
  std::byte* place(int layer, int page) const {
    return page < past_pages_ ? past_[static_cast<size_t>(layer * past_pages_ + page)]
                              : tail_.set(page) + static_cast<size_t>(layer) * page_bytes(shape_);
  }

  void write_tables() const {
    std::vector<std::byte*> table(bench_.table_bytes() / sizeof(std::byte*), nullptr);
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int head = 0; head < shape_.kv_heads; ++head) {
        for (int page = 0; page < past_pages_; ++page) {
          table[static_cast<size_t>((layer * shape_.kv_heads + head) * bench_.max_pages() + page)] =
              place(layer, page) + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape_);
        }
      }
    }
    const std::vector<int> tokens(static_cast<size_t>(shape_.kv_heads), past_pages_ * kPageTokens);
    bench_.device->write(reinterpret_cast<std::byte*>(table_), table.data(), bench_.table_bytes());
    bench_.device->write(reinterpret_cast<std::byte*>(counts()), tokens.data(), tokens.size() * sizeof(int));
  }

  void append_bits(const bf16* head_page, int tokens, std::vector<uint16_t>& bits) const {
    const bool gpu = test::tested_device() == DeviceKind::cuda;
    const bf16* values = head_page + static_cast<size_t>(kPageTokens * shape_.key_dim());
    for (int token = 0; token < tokens; ++token) {
      for (int d = 0; d < shape_.head_dim; ++d) {
        bits.push_back(head_page[gpu ? cuda::key_index(token, d) : key_index(token, d, shape_)].bits);
        bits.push_back(values[gpu ? cuda::value_index(token, d, shape_.head_dim) : value_index(token, d)].bits);
      }
    }
  }

  Workbench& bench_;
  KvShape shape_;
  std::vector<TokenId> tokens_;
  TokenId* board_;     // the tokens, host memory that lanes reach
  std::byte** table_;  // device memory
  Tail tail_;
  int done_ = 0;
  int past_pages_ = 0;
  std::vector<std::byte*> past_;  // (layers, past_pages_)
};

// Rows of one sequence in a pass.
struct PassMember {
  DrivenSequence* sequence = nullptr;
  int rows = 0;    // its next tokens
  int logits = 0;  // of the last so many of them
  Sampling sampling{};
};

// Of the rows that wanted logits, one member below the other.
struct PassOutput {
  std::vector<float> logits;  // (logit rows, vocabulary)
  std::vector<TokenId> chosen;
  std::vector<uint64_t> hashes;
};

inline PassOutput run_pass(Workbench& bench, std::span<const PassMember> members) {
  const Transformer& model = bench.model;
  Activations& a = bench.activations;
  std::vector<LogitRow> logit_rows;
  PassRows pass{.rows = 0, .layers = bench.shape.layers, .draft = false};
  std::vector<SequenceRows> sequences;  // (layers, members)
  for (const PassMember& member : members) {
    member.sequence->grow(member.rows);
  }
  for (int layer = 0; layer < pass.layers; ++layer) {
    int first_row = 0;
    for (const PassMember& member : members) {
      sequences.push_back({.first_row = first_row,
                           .rows = member.rows,
                           .position = member.sequence->done(),
                           .tokens = member.sequence->board(),
                           .kv = member.sequence->view(layer)});
      first_row += member.rows;
    }
  }
  for (const PassMember& member : members) {
    for (int row = member.rows - member.logits; row < member.rows; ++row) {
      const size_t index = logit_rows.size();
      bench.chosen[index] = -1;
      bench.hashes[index] = 0;
      logit_rows.push_back({.row = pass.rows + row,
                            .position = member.sequence->done() + row + 1,
                            .sampling = member.sampling,
                            .token = bench.chosen + index,
                            .hash = bench.hashes + index});
    }
    pass.rows += member.rows;
    member.sequence->advance(member.rows);
  }
  pass.sequences = sequences;
  pass.logit_rows = logit_rows;

  a.lane->stage(pass);
  model.embed(pass, a);
  for (int layer = 0; layer < pass.layers; ++layer) {
    model.layer(layer, pass, a);
  }
  if (!logit_rows.empty()) {
    model.logits(pass, a);
  }
  a.lane->wait(a.lane->mark());

  PassOutput out;
  out.logits.resize(logit_rows.size() * static_cast<size_t>(model.config().vocab_size));
  bench.device->read(out.logits.data(), reinterpret_cast<const std::byte*>(a.logits),
                     out.logits.size() * sizeof(float));
  out.chosen.assign(bench.chosen, bench.chosen + logit_rows.size());
  out.hashes.assign(bench.hashes, bench.hashes + logit_rows.size());
  return out;
}

// Logits of every position, in chunks.
inline std::vector<float> all_logits(LoadedModel& loaded, const std::vector<TokenId>& tokens, int chunk) {
  Workbench bench(*loaded.model, chunk, 1, static_cast<int>(tokens.size()));
  DrivenSequence sequence(bench, tokens);
  std::vector<float> logits;
  while (sequence.left() > 0) {
    const int rows = std::min(chunk, sequence.left());
    const PassMember member{.sequence = &sequence, .rows = rows, .logits = rows};
    const PassOutput out = run_pass(bench, {&member, 1});
    logits.insert(logits.end(), out.logits.begin(), out.logits.end());
  }
  return logits;
}

}  // namespace vericache
