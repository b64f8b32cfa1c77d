// Attention of the CPU backend: past pages and tail pages of each sequence, in fixed splits, over the matrix primitive.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include <vector>

#include "backend/cpu/simd.h"
#include "base/threads.h"

namespace vericache {

// What an instruction class computes with.
struct CpuOps {
  PanelProduct product = nullptr;
  const RowOps* rows = nullptr;
  QuantOps quant{};
};

// Rows of one sequence whose positions lie in the same tail page, with the query heads of one KV head stacked: row r
// and head h of the group become stacked row r * group + h. Such rows walk the same pages, so none has to skip what
// another needs.
struct AttentionBlock {
  const SequenceRows* sequence = nullptr;
  int first = 0;  // of the sequence's rows
  int rows = 0;
  int head = 0;           // KV head
  int past_pages = 0;     // that it reads
  int* chosen = nullptr;  // (past_pages): which ones, ascending; null: the first ones, which are all
  int pages = 0;          // past and tail
  int splits = 0;
  int first_task = 0;
  size_t partial = 0;  // where its splits lie in partials_, in floats
};

class Attention {
 public:
  Attention(const CpuOps& ops, ThreadPool& pool, const KernelLimits& limits);

  void run(const AttentionArgs& args);
  void mass(const MassArgs& args);

 private:
  struct Scratch {
    std::vector<bf16> q;              // (stacked rows, key_dim)
    std::vector<bf16> rotated_q;      // the same, for a rotated past
    std::vector<bf16> page;           // a dequantized head page
    std::vector<float> scores;        // (kChunkRows, 64)
    std::vector<bf16> weights;        // (kChunkRows, 64)
    std::vector<int> visible;         // (stacked rows)
    std::vector<float> log_sum_exp2;  // (stacked rows)
    std::vector<float> split;         // SoftmaxRows
    std::vector<float> total;
    std::vector<float> bounds;    // (pages): the most that a page's scores can be
    std::vector<uint64_t> ranks;  // (pages)
  };

  Scratch& scratch() { return scratch_[static_cast<size_t>(ThreadPool::thread_index())]; }
  void list_sequence(const AttentionArgs& args, const SequenceRows& sequence);
  void choose_pages(const AttentionArgs& args);
  void choose_pages_of(const AttentionArgs& args, const AttentionBlock& block);
  bool place_partials(int group);  // false: blocks are many or the space is short, so each is walked by one thread
  void gather_q(const bf16* row, int head, int stacked_row, std::vector<bf16>& out) const;
  void rotate_q(int stacked);  // s.q into s.rotated_q
  void run_split(const AttentionArgs& args, const AttentionBlock& block, int split, const SoftmaxRows& state);
  void run_page(const AttentionArgs& args, const AttentionBlock& block, int page, const SoftmaxRows& state);
  void run_block(const AttentionArgs& args, const AttentionBlock& block);
  void fold_block(const AttentionArgs& args, const AttentionBlock& block);
  void finish(const AttentionArgs& args, const AttentionBlock& block, const SoftmaxRows& total);
  // next: what will be read of the view after it, or null.
  const std::byte* bf16_page(const KvView& view, int head, int page, const std::byte* next, const KvShape& shape,
                             bool needs_values);
  SoftmaxRows rows_at(float* floats, int rows) const;
  void mass_pages(const MassArgs& args, int head, int first_page, int last_page);
  void mass_page(const MassArgs& args, int head, int page, int first_row, int stacked);

  CpuOps ops_;
  ThreadPool& pool_;
  KernelLimits limits_;
  int stacked_rows_ = 0;  // of a block, at most
  std::vector<Scratch> scratch_;
  std::vector<AttentionBlock> blocks_;
  std::vector<int> chosen_;  // pages of the blocks that choose; as long as those of the largest draft step
  std::vector<float> partials_;
};

}  // namespace vericache
