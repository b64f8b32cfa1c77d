#include "backend/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/scores.h"
#include "backend/rotation.h"
#include "base/check.h"

namespace vericache {
namespace {

// KV is cut at absolute pages into splits of 1,024 tokens. Each is reduced alone and the splits are folded left to
// right by one formula, whether one thread walks them all or many threads take one each.
constexpr int kSplitPages = 16;
// Rows of a block share a KV page from the L2 cache; chunks of them keep scores, weights and sums in L1.
constexpr int kBlockStackedRows = 128;
constexpr int kChunkRows = 24;
constexpr int kMassPages = 8;  // of one task
constexpr size_t kMaxPartialFloats = size_t{1} << 23;
constexpr int kInlinePages = 4;  // less than that is done before a thread has woken up
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int kSumLanes = 16;  // partial sums of a row, SoftmaxRows::sum

int pages_of(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}
int tokens_of(const KvView& view, int head) {
  return view.tokens == nullptr ? 0 : view.tokens[head];
}
size_t at(int rows, int columns) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns);
}

[[gnu::always_inline]] inline void prefetch(const std::byte* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    prefetch_line(data + i);
  }
}

// Floats of one split's state for `rows` stacked rows: maximum, 16 partial sums, weighted values.
size_t state_floats(int rows, int head_dim) {
  return at(rows, 1 + kSumLanes + head_dim);
}

// In the total, sum holds one value per row.
void start_total(const SoftmaxRows& total, int rows) {
  std::fill_n(total.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(total.sum, rows, 0.0f);
  std::fill_n(total.acc, at(rows, total.head_dim), 0.0f);
}

// Which page of the past page `page` of the walk is.
int past_page(const AttentionBlock& block, int page) {
  return block.chosen == nullptr ? page : block.chosen[page];
}

// Where page `page` of the walk lies; null behind the last.
const std::byte* page_of(const AttentionBlock& block, int page) {
  const LayerKv& kv = block.sequence->kv;
  if (page >= block.pages) {
    return nullptr;
  }
  return page < block.past_pages ? kv.past.head_page(block.head, past_page(block, page))
                                 : kv.tail.head_page(block.head, page - block.past_pages);
}

// How many of the page's tokens each stacked row sees: of the past all that the head holds, of the tail those up to its
// own.
void count_visible(const AttentionBlock& block, int page, int group, std::vector<int>& visible) {
  const LayerKv& kv = block.sequence->kv;
  const int stacked = block.rows * group;
  if (page < block.past_pages) {
    const int held = tokens_of(kv.past, block.head) - past_page(block, page) * kPageTokens;
    std::fill_n(visible.begin(), stacked, std::min(kPageTokens, held));
    return;
  }
  const int first = block.sequence->position + block.first - kv.tail_position - (page - block.past_pages) * kPageTokens;
  for (int r = 0; r < stacked; ++r) {
    visible[static_cast<size_t>(r)] = std::min(kPageTokens, first + r / group + 1);
  }
}

}  // namespace

Attention::Attention(const CpuOps& ops, ThreadPool& pool, const KernelLimits& limits)
    : ops_(ops), pool_(pool), limits_(limits) {
  const KvShape& shape = limits.shape;
  check(shape.head_dim % kPanel == 0 && shape.head_dim <= kMaxHeadDim, "head_dim is a multiple of 16, at most 512");
  check(shape.kv_heads > 0 && limits.heads % shape.kv_heads == 0, "query heads are shared evenly by the KV heads");
  const int group = limits.heads / shape.kv_heads;
  stacked_rows_ = std::max(1, kBlockStackedRows / group) * group;
  scratch_.resize(static_cast<size_t>(pool.threads()));
  for (Scratch& s : scratch_) {
    s.q.resize(at(stacked_rows_, shape.key_dim()));
    s.rotated_q.resize(s.q.size());
    s.page.resize(at(kPageTokens, shape.key_dim() + shape.head_dim));
    s.scores.resize(at(kChunkRows, kPageTokens));
    s.weights.resize(at(kChunkRows, kPageTokens));
    s.visible.resize(static_cast<size_t>(stacked_rows_));
    s.log_sum_exp2.resize(static_cast<size_t>(stacked_rows_));
    s.split.resize(state_floats(stacked_rows_, shape.head_dim));
    s.total.resize(state_floats(stacked_rows_, shape.head_dim));
    s.bounds.resize(static_cast<size_t>(pages_of(limits.max_context_tokens)));
    s.ranks.resize(s.bounds.size());
  }
  blocks_.reserve(at(limits.max_rows, shape.kv_heads));
  const int splits = limits.max_context_tokens / (kPageTokens * kSplitPages) + 2;
  partials_.resize(
      std::min(kMaxPartialFloats, state_floats(stacked_rows_, shape.head_dim) * at(4 * pool.threads(), splits)));
}

SoftmaxRows Attention::rows_at(float* floats, int rows) const {
  return {floats, floats + rows, floats + at(rows, 1 + kSumLanes), limits_.shape.head_dim};
}

void Attention::list_sequence(const AttentionArgs& args, const SequenceRows& sequence) {
  const int group = args.heads / args.shape.kv_heads;
  const int most = stacked_rows_ / group;
  const int offset = sequence.position - sequence.kv.tail_position;
  check(offset >= 0, "a sequence's rows stand in its tail");
  const PageChoice& choice = sequence.kv.past.format.choice;
  const bool chooses = args.pass->draft && choice.in_layer(args.layer);
  check(!chooses || sequence.rows == 1, "pages are chosen for one row of a sequence");
  for (int first = 0; first < sequence.rows;) {
    const int tail_page = (offset + first) / kPageTokens;
    const int rows = std::min({most, sequence.rows - first, (tail_page + 1) * kPageTokens - (offset + first)});
    for (int head = 0; head < args.shape.kv_heads; ++head) {
      AttentionBlock block{.sequence = &sequence, .first = first, .rows = rows, .head = head};
      block.past_pages = pages_of(tokens_of(sequence.kv.past, head));
      if (chooses) {
        block.past_pages = choice.pages_of(block.past_pages);
      }
      block.pages = block.past_pages + tail_page + 1;
      block.splits = (block.pages + kSplitPages - 1) / kSplitPages;
      blocks_.push_back(block);
    }
    first += rows;
  }
}

// Blocks that read fewer pages than there are find out which.
void Attention::choose_pages(const AttentionArgs& args) {
  const auto held = [](const AttentionBlock& block) {
    return pages_of(tokens_of(block.sequence->kv.past, block.head));
  };
  size_t count = 0;
  for (const AttentionBlock& block : blocks_) {
    count += block.past_pages < held(block) ? static_cast<size_t>(block.past_pages) : 0;
  }
  if (count == 0) {
    return;
  }
  chosen_.resize(std::max(chosen_.size(), count));
  int* next = chosen_.data();
  for (AttentionBlock& block : blocks_) {
    if (block.past_pages < held(block)) {
      block.chosen = next;
      next += block.past_pages;
    }
  }
  pool_.parallel_for(static_cast<int>(blocks_.size()), [&](int i) {
    if (const AttentionBlock& block = blocks_[static_cast<size_t>(i)]; block.chosen != nullptr) {
      choose_pages_of(args, block);
    }
  });
}

void Attention::choose_pages_of(const AttentionArgs& args, const AttentionBlock& block) {
  const KvShape& shape = args.shape;
  const KvView& past = block.sequence->kv.past;
  const int group = args.heads / shape.kv_heads;
  const bf16* q = args.q + at(block.sequence->first_row * args.heads + block.head * group, shape.key_dim());
  const size_t offset = key_bounds_offset(past.format, shape);
  const int held = pages_of(tokens_of(past, block.head));
  Scratch& s = scratch();
  for (int page = 0; page < held; ++page) {
    const auto* bounds = reinterpret_cast<const bf16*>(past.head_page(block.head, page) + offset);
    s.bounds[static_cast<size_t>(page)] = ops_.rows->bound_page(q, group, shape.key_dim(), bounds);
  }
  choose_best_of_row(s.bounds.data(), held, block.past_pages, s.ranks.data(), block.chosen);
}

bool Attention::place_partials(int group) {
  if (static_cast<int>(blocks_.size()) >= 4 * pool_.threads()) {
    return false;
  }
  int tasks = 0;
  size_t floats = 0;
  for (AttentionBlock& block : blocks_) {
    block.first_task = tasks;
    block.partial = floats;
    tasks += block.splits;
    floats += state_floats(block.rows * group, limits_.shape.head_dim) * static_cast<size_t>(block.splits);
  }
  return floats <= partials_.size() && tasks > static_cast<int>(blocks_.size());
}

void Attention::run(const AttentionArgs& args) {
  check(args.shape == limits_.shape && args.heads == limits_.heads, "attention runs for the shape it was built for");
  blocks_.clear();
  for (const SequenceRows& sequence : args.pass->layer(args.layer)) {
    list_sequence(args, sequence);
  }
  choose_pages(args);
  const int count = static_cast<int>(blocks_.size());
  int pages = 0;
  for (const AttentionBlock& block : blocks_) {
    pages += block.pages;
  }
  if (pool_.threads() == 1 || pages <= kInlinePages) {
    for (const AttentionBlock& block : blocks_) {
      run_block(args, block);
    }
    return;
  }
  const int group = args.heads / args.shape.kv_heads;
  if (!place_partials(group)) {
    // The last blocks of a prompt are the longest: they go first.
    pool_.parallel_for(count, [&](int i) { run_block(args, blocks_[static_cast<size_t>(count - 1 - i)]); });
    return;
  }
  pool_.parallel_for(blocks_.back().first_task + blocks_.back().splits, [&](int task) {
    const auto after = std::upper_bound(blocks_.begin(), blocks_.end(), task,
                                        [](int t, const AttentionBlock& block) { return t < block.first_task; });
    const AttentionBlock& block = *(after - 1);
    const int split = task - block.first_task;
    const int rows = block.rows * group;
    float* floats =
        partials_.data() + block.partial + state_floats(rows, limits_.shape.head_dim) * static_cast<size_t>(split);
    run_split(args, block, split, rows_at(floats, rows));
  });
  for (const AttentionBlock& block : blocks_) {
    fold_block(args, block);
  }
}

// The queries of one row (heads, key_dim) that share a KV head, from `stacked_row` on.
void Attention::gather_q(const bf16* row, int head, int stacked_row, std::vector<bf16>& out) const {
  const KvShape& shape = limits_.shape;
  const int group = limits_.heads / shape.kv_heads;
  std::copy_n(row + at(head * group, shape.key_dim()), at(group, shape.key_dim()),
              out.data() + at(stacked_row, shape.key_dim()));
}

const std::byte* Attention::bf16_page(const KvView& view, int head, int page, const std::byte* next,
                                      const KvShape& shape, bool needs_values) {
  const std::byte* source = view.head_page(head, page);
  if (view.format.exact()) {
    return source;
  }
  const size_t key_bytes = key_page_bytes(view.format.key(), shape);
  bf16* out = scratch().page.data();
  const size_t keys = at(kPageTokens, shape.key_dim());
  if (view.format.key_bits == 16) {
    std::memcpy(out, source, keys * sizeof(bf16));
  } else {
    ops_.quant.of(view.format.key()).dequantize(source, key_layout(view.format, shape), out, next);
  }
  const std::byte* values = source + key_bytes;
  if (!needs_values) {
    return reinterpret_cast<const std::byte*>(out);
  }
  if (view.format.value_bits == 16) {
    std::memcpy(out + keys, values, at(kPageTokens, shape.head_dim) * sizeof(bf16));
  } else {
    ops_.quant.of(view.format.value())
        .dequantize(values, value_layout(view.format, shape), out + keys, next == nullptr ? nullptr : next + key_bytes);
  }
  return reinterpret_cast<const std::byte*>(out);
}

void Attention::run_page(const AttentionArgs& args, const AttentionBlock& block, int page, const SoftmaxRows& state) {
  const KvShape& shape = args.shape;
  const int group = args.heads / shape.kv_heads;
  const int stacked = block.rows * group;
  const bool in_past = page < block.past_pages;
  const KvView& view = in_past ? block.sequence->kv.past : block.sequence->kv.tail;
  Scratch& s = scratch();
  count_visible(block, page, group, s.visible);
  const std::byte* next = page_of(block, page + 1);
  const int index = in_past ? past_page(block, page) : page - block.past_pages;
  const auto* keys = reinterpret_cast<const bf16*>(
      bf16_page(view, block.head, index, page + 1 < block.past_pages ? next : nullptr, shape, true));
  const bf16* values = keys + at(kPageTokens, shape.key_dim());
  const int key_pairs = shape.key_dim() / 2;

  // The next page comes from memory meanwhile: with few rows as the product goes, with many a part per chunk; a
  // quantized page has fetched the next already.
  const bf16* q = view.format.rotated ? s.rotated_q.data() : s.q.data();
  const KvFormat next_format = page + 1 < block.past_pages ? view.format : KvFormat{};
  const bool as_product_goes = stacked <= kChunkRows && view.format.exact() && next_format.exact() && next != nullptr;
  const auto* next_keys = as_product_goes ? reinterpret_cast<const bf16*>(next) : nullptr;
  const bf16* next_values = as_product_goes ? next_keys + at(kPageTokens, shape.key_dim()) : nullptr;
  const size_t bytes_per_row = key_bounds_offset(next_format, shape) / static_cast<size_t>(stacked);

  for (int first = 0; first < stacked; first += kChunkRows) {
    const int rows = std::min(kChunkRows, stacked - first);
    if (next != nullptr && !as_product_goes && (view.format.exact() || next_format.exact())) {
      prefetch(next + static_cast<size_t>(first) * bytes_per_row, static_cast<size_t>(rows) * bytes_per_row);
    }
    const SoftmaxRows chunk{state.max + first, state.sum + at(first, kSumLanes), state.acc + at(first, shape.head_dim),
                            shape.head_dim};
    ops_.product(q + at(first, shape.key_dim()), static_cast<size_t>(shape.key_dim()), rows, keys,
                 at(key_pairs, 2 * kPanel), key_pairs, kPageTokens / kPanel, s.scores.data(), kPageTokens, false,
                 next_keys);
    ops_.rows->softmax_page(s.scores.data(), rows, s.visible.data() + first, args.scale * kLog2E, s.weights.data(),
                            chunk);
    ops_.product(s.weights.data(), kPageTokens, rows, values, at(kPageTokens / 2, 2 * kPanel), kPageTokens / 2,
                 shape.head_dim / kPanel, chunk.acc, static_cast<size_t>(shape.head_dim), true, next_values);
  }
}

void Attention::run_split(const AttentionArgs& args, const AttentionBlock& block, int split, const SoftmaxRows& state) {
  const int stacked = block.rows * (args.heads / args.shape.kv_heads);
  std::fill_n(state.max, stacked, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, at(stacked, kSumLanes), 0.0f);
  std::fill_n(state.acc, at(stacked, args.shape.head_dim), 0.0f);
  const int group = args.heads / args.shape.kv_heads;
  const bf16* q = args.q + at(block.sequence->first_row + block.first, args.heads * args.shape.key_dim());
  for (int r = 0; r < block.rows; ++r) {
    gather_q(q + at(r, args.heads * args.shape.key_dim()), block.head, r * group, scratch().q);
  }
  const int begin = split * kSplitPages;
  const int end = std::min(block.pages, begin + kSplitPages);
  const int past_end = std::clamp(block.past_pages, begin, end);
  const bool rotated = block.sequence->kv.past.format.rotated && begin < past_end;
  if (rotated) {
    rotate_q(stacked);
  }
  for (int page = begin; page < past_end; ++page) {
    run_page(args, block, page, state);
  }
  // Sums of rotated values are turned back before any other joins them.
  for (int r = 0; rotated && r < stacked; ++r) {
    rotate(state.acc + at(r, args.shape.head_dim), args.shape.head_dim);
  }
  for (int page = past_end; page < end; ++page) {
    run_page(args, block, page, state);
  }
}

void Attention::rotate_q(int stacked) {
  const KvShape& shape = limits_.shape;
  Scratch& s = scratch();
  float x[kMaxHeadDim];
  for (int r = 0; r < stacked; ++r) {
    const size_t row = at(r, shape.key_dim());
    std::transform(s.q.data() + row, s.q.data() + row + shape.head_dim, x, to_float);
    rotate(x, shape.head_dim);
    std::transform(x, x + shape.head_dim, s.rotated_q.data() + row, to_bf16);  // the rest stays zero
  }
}

void Attention::run_block(const AttentionArgs& args, const AttentionBlock& block) {
  const int stacked = block.rows * (args.heads / args.shape.kv_heads);
  const SoftmaxRows split = rows_at(scratch().split.data(), stacked);
  const SoftmaxRows total = rows_at(scratch().total.data(), stacked);
  start_total(total, stacked);
  for (int i = 0; i < block.splits; ++i) {
    run_split(args, block, i, split);
    ops_.rows->fold_split(split, stacked, total);
  }
  finish(args, block, total);
}

void Attention::fold_block(const AttentionArgs& args, const AttentionBlock& block) {
  const int stacked = block.rows * (args.heads / args.shape.kv_heads);
  const SoftmaxRows total = rows_at(scratch().total.data(), stacked);
  start_total(total, stacked);
  for (int i = 0; i < block.splits; ++i) {
    float* floats =
        partials_.data() + block.partial + state_floats(stacked, args.shape.head_dim) * static_cast<size_t>(i);
    ops_.rows->fold_split(rows_at(floats, stacked), stacked, total);
  }
  finish(args, block, total);
}

void Attention::finish(const AttentionArgs& args, const AttentionBlock& block, const SoftmaxRows& total) {
  const int group = args.heads / args.shape.kv_heads;
  const int head_dim = args.shape.head_dim;
  const int width = args.heads * head_dim;
  for (int r = 0; r < block.rows; ++r) {
    const int row = block.sequence->first_row + block.first + r;
    bf16* out = args.out + at(row, padded_dim(width));
    for (int h = 0; h < group; ++h) {
      const int stacked = r * group + h;
      const int head = block.head * group + h;
      const float sum = total.sum[stacked];
      ops_.rows->divide(total.acc + at(stacked, head_dim), sum, head_dim, out + at(head, head_dim));
      if (args.log_sum_exp != nullptr) {
        args.log_sum_exp[at(row, args.heads) + static_cast<size_t>(head)] =
            (total.max[stacked] + std::log2(sum)) * kLn2;
      }
    }
    if (block.head == 0) {
      std::fill(out + width, out + padded_dim(width), bf16{0});
    }
  }
}

void Attention::mass(const MassArgs& args) {
  check(args.shape == limits_.shape && args.heads == limits_.heads, "attention runs for the shape it was built for");
  check(args.rows <= args.queries.capacity && args.position >= args.queries.origin,
        "the queries that vote stand in their ring");
  check(args.tokens <= args.stride && args.added <= args.tokens, "the mass of a head has room");
  const int pages = pages_of(args.tokens);
  const int tasks = (pages + kMassPages - 1) / kMassPages;
  pool_.parallel_for(tasks * args.shape.kv_heads, [&](int i) {
    const int first = i % tasks * kMassPages;
    mass_pages(args, i / tasks, first, std::min(pages, first + kMassPages));
  });
}

void Attention::mass_pages(const MassArgs& args, int head, int first_page, int last_page) {
  const int group = args.heads / args.shape.kv_heads;
  const int most = stacked_rows_ / group;
  Scratch& s = scratch();
  float* mass = args.mass + at(head, args.stride);
  const int end = std::min(args.tokens, last_page * kPageTokens);
  std::fill(mass + std::clamp(args.added, first_page * kPageTokens, end), mass + end, 0.0f);
  for (int first = 0; first < args.rows; first += most) {
    const int rows = std::min(most, args.rows - first);
    for (int r = 0; r < rows; ++r) {
      const int slot = (args.position + first + r - args.queries.origin) % args.queries.capacity;
      gather_q(args.queries.q + at(slot, args.heads * args.shape.key_dim()), head, r * group, s.q);
      const float* log_sum_exp = args.queries.log_sum_exp + at(slot, args.heads) + at(head, group);
      for (int h = 0; h < group; ++h) {
        const int row = r * group + h;
        s.log_sum_exp2[static_cast<size_t>(row)] = log_sum_exp[h] * kLog2E;
      }
    }
    for (int page = first_page; page < last_page; ++page) {
      mass_page(args, head, page, first, rows * group);
    }
  }
}

void Attention::mass_page(const MassArgs& args, int head, int page, int first_row, int stacked) {
  const KvShape& shape = args.shape;
  const LayerKv& kv = args.kv;
  const int group = args.heads / shape.kv_heads;
  const int past_pages = pages_of(tokens_of(kv.past, head));
  const bool in_past = page < past_pages;
  const int index = in_past ? page : page - past_pages;
  const bool followed = in_past && page + 1 < past_pages;
  const auto* keys = reinterpret_cast<const bf16*>(bf16_page(
      in_past ? kv.past : kv.tail, head, index, followed ? kv.past.head_page(head, page + 1) : nullptr, shape, false));
  const int held = std::min(kPageTokens, args.tokens - page * kPageTokens);
  // Slots of a full past are positions: a query before its end does not see behind itself.
  const bool causal = !in_past || tokens_of(kv.past, head) == kv.tail_position;
  const int begin = in_past ? page * kPageTokens : kv.tail_position + index * kPageTokens;
  const int offset = args.position + first_row - begin;
  const int key_pairs = shape.key_dim() / 2;
  Scratch& s = scratch();
  for (int r = 0; r < stacked; ++r) {
    s.visible[static_cast<size_t>(r)] = causal ? std::clamp(offset + r / group + 1, 0, held) : held;
  }
  float mass[kPageTokens] = {};
  for (int first = 0; first < stacked; first += kChunkRows) {
    const int rows = std::min(kChunkRows, stacked - first);
    ops_.product(s.q.data() + at(first, shape.key_dim()), static_cast<size_t>(shape.key_dim()), rows, keys,
                 at(key_pairs, 2 * kPanel), key_pairs, kPageTokens / kPanel, s.scores.data(), kPageTokens, false,
                 nullptr);
    const auto weigh = args.of == MassOf::largest ? ops_.rows->largest_page : ops_.rows->mass_page;
    weigh(s.scores.data(), rows, s.visible.data() + first, args.scale * kLog2E, s.log_sum_exp2.data() + first, mass);
  }
  const auto join = args.of == MassOf::largest ? ops_.rows->larger : ops_.rows->add;
  join(mass, held, args.mass + at(head, args.stride) + at(page, kPageTokens));
}

}  // namespace vericache
