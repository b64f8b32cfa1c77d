#include "backend/cpu/cpu_kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/blocks.h"
#include "backend/cpu/key_rounding.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/products.h"
#include "backend/cpu/residuals.h"
#include "backend/cpu/scores.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/token_scores.h"
#include "base/check.h"
#include "base/error.h"
#include "base/hash.h"
#include "base/threads.h"

namespace vericache {
namespace {

// Values of a row operation: fewer are done before a second thread has joined (1-2 us).
constexpr size_t kForkValues = size_t{16} << 10;

using Clock = std::chrono::steady_clock;
constexpr size_t kMarks = 4096;  // of which the times are known

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
size_t at(int rows, int columns) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns);
}

CpuOps ops_of(Isa isa) {
  CpuOps ops{simd_product(isa), &row_ops(isa), {affine_ops(isa), token_code_ops(isa), nuq_ops(isa)}};
  if (isa == Isa::avx512_bf16) {
    ops.product = avx512_bf16_product();
  } else if (isa == Isa::amx) {
    ops.product = amx_product();
  }
  return ops;
}

class CpuKernels final : public Kernels {
 public:
  CpuKernels(Isa isa, int threads, const KernelLimits& limits)
      : ops_(ops_of(isa)),
        limits_(limits),
        name_(fmt::format("cpu {}, {} thread{}", isa_name(isa), threads, threads == 1 ? "" : "s")),
        pool_(threads),
        products_(ops_.product, pool_),
        attention_(ops_, pool_, limits),
        packing_(ops_.quant, pool_, limits.shape),
        scores_(pool_, limits.max_context_tokens, limits.shape.kv_heads),
        token_scores_(ops_.product, pool_),
        sequence_of_row_(static_cast<size_t>(limits.max_rows)) {
    marks_.fill(Clock::now());
  }

  std::string_view name() const override { return name_; }
  size_t packed_bytes(int out, int in) const override { return products_.packed_bytes(out, in); }
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const override {
    products_.pack_rows(source, first, rows, matrix);
  }
  void fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const override {
    products_.fill_random(matrix, seed, scale);
  }

  // One lane, and an op is done when it returns.
  Mark mark() override;
  bool reached(Mark mark) override {
    (void)mark;
    return true;
  }
  void wait(Mark mark) override { (void)mark; }
  double seconds(Mark from, Mark to) override;
  double time(Mark mark) override;
  void follow(Lane& other, Mark mark) override {
    (void)other;
    (void)mark;
  }
  void upload(std::byte* target, const void* source, size_t bytes) override {
    std::copy_n(static_cast<const std::byte*>(source), bytes, target);
  }

  void stage(const PassRows& pass) override;
  void embed(const PackedMatrix& table, const PassRows& pass, float* out) override;
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    products_.matmul(weight, x, rows, y, epilogue);
  }
  void add_bias(const float* bias, int rows, int dim, float* y) override;
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override;
  void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override;
  void store_qkv(const QkvArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void select_rows(const float* x, const PassRows& pass, int dim, float* out) override;
  void choose(const float* logits, const PassRows& pass, int vocabulary) override;

  void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const PassRows& pass,
                    int layer) override;
  void attention_mass(const MassArgs& args) override;
  void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) override {
    scores_.pool_mass(mass, rows, n, reach, always, scores);
  }
  void choose_best(const BestArgs& args) override { scores_.choose_best(args); }
  void mean_rows(float* values, int rows, int n) override { scores_.mean_rows(values, rows, n); }
  void count_rows(const int* chosen, int count, int rows, int n, int* counts) override {
    scores_.count_rows(chosen, count, rows, n, counts);
  }
  void key_scores(const KeyScoreArgs& args) override { token_scores_.keys(args); }
  void expected_attention(const ExpectedArgs& args) override { token_scores_.expected(args); }
  void fit_rounding(const RoundingArgs& args) override { fit_key_rounding(args, pool_); }
  void quantize(const QuantizeArgs& args) override { packing_.quantize(args); }
  void gather(const GatherArgs& args) override { packing_.gather(args); }
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out) override {
    packing_.quantize_head_page(source, tokens, shape, format, out);
  }
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override {
    packing_.dequantize_head_page(source, shape, format, out);
  }

  void copy(std::span<const BlockCopy> copies) override { copy_blocks(copies, pool_); }
  void encode(const EncodeArgs& args) override { encode_residuals(args); }
  void decode(const DecodeArgs& args) override {
    decode_residuals(args);
    if (args.checksums != nullptr) {
      const size_t bytes = page_bytes(args.shape);
      prove({.first = args.out, .stride = bytes, .bytes = bytes, .count = args.count}, args.checksums, args.mismatches);
    }
  }
  void zero(std::byte* target, size_t bytes) override { std::fill_n(target, bytes, std::byte{0}); }
  void checksum(const BlockRow& blocks, uint64_t* checksums) override { checksum_blocks(blocks, checksums, pool_); }
  void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches) override {
    *mismatches += count_mismatches(blocks, checksums, pool_);
  }

 private:
  // body(row) for every row; one thread where the work is too small to share. A row is computed the same way either
  // way.
  template <typename Body>
  void for_rows(int rows, int values_per_row, const Body& body);
  void list_rows(const PassRows& pass, int layer);
  void store_row(const QkvArgs& args, int row);

  CpuOps ops_;
  KernelLimits limits_;
  std::string name_;
  ThreadPool pool_;
  Products products_;
  Attention attention_;
  Packing packing_;
  Scores scores_;
  TokenScores token_scores_;
  std::vector<const SequenceRows*> sequence_of_row_;
  Mark last_mark_ = 0;
  std::array<Clock::time_point, kMarks> marks_{};
};

Mark CpuKernels::mark() {
  marks_[++last_mark_ % kMarks] = Clock::now();
  return last_mark_;
}

double CpuKernels::seconds(Mark from, Mark to) {
  check(from <= to && to <= last_mark_ && last_mark_ - from < kMarks, "the marks are among the last thousands");
  return std::chrono::duration<double>(marks_[to % kMarks] - marks_[from % kMarks]).count();
}

double CpuKernels::time(Mark mark) {
  return std::chrono::duration<double>(marks_[mark % kMarks].time_since_epoch()).count();
}

void CpuKernels::stage(const PassRows& pass) {
  check(pass.rows <= limits_.max_rows, "a pass has no more rows than the kernels were built for");
  check(pass.layers > 0 && pass.sequences.size() % static_cast<size_t>(pass.layers) == 0,
        "every layer of a pass has the same sequences");
}

template <typename Body>
void CpuKernels::for_rows(int rows, int values_per_row, const Body& body) {
  if (at(rows, values_per_row) < kForkValues) {
    const FlushDenormals flush;
    for (int row = 0; row < rows; ++row) {
      body(row);
    }
    return;
  }
  const int per_task = std::max(1, static_cast<int>(kForkValues / 4) / std::max(1, values_per_row));
  const FlushDenormals flush;
  pool_.parallel_for(ceil_div(rows, per_task), [&](int task) {
    const int end = std::min(rows, (task + 1) * per_task);
    for (int row = task * per_task; row < end; ++row) {
      body(row);
    }
  });
}

// Passes of different lanes take turns on this one, so that no list of rows outlives its op.
void CpuKernels::list_rows(const PassRows& pass, int layer) {
  check(pass.rows <= limits_.max_rows, "a pass has no more rows than the kernels were built for");
  std::fill_n(sequence_of_row_.begin(), pass.rows, nullptr);
  for (const SequenceRows& sequence : pass.layer(layer)) {
    check(sequence.first_row >= 0 && sequence.rows <= pass.rows - sequence.first_row,
          "a sequence's rows lie in the pass");
    std::fill_n(sequence_of_row_.begin() + sequence.first_row, sequence.rows, &sequence);
  }
  check(std::find(sequence_of_row_.begin(), sequence_of_row_.begin() + pass.rows, nullptr) ==
            sequence_of_row_.begin() + pass.rows,
        "every row belongs to a sequence");
}

void CpuKernels::embed(const PackedMatrix& table, const PassRows& pass, float* out) {
  list_rows(pass, 0);
  for_rows(pass.rows, table.in, [&](int row) {
    const SequenceRows& sequence = *sequence_of_row_[static_cast<size_t>(row)];
    const TokenId token = sequence.tokens[sequence.position - sequence.token_lag + row - sequence.first_row];
    check(token >= 0 && token < table.out, "token ids lie in the vocabulary");
    products_.unpack_row(table, token, out + at(row, table.in));
  });
}

void CpuKernels::add_bias(const float* bias, int rows, int dim, float* y) {
  for_rows(rows, dim, [&](int row) { ops_.rows->add(bias, dim, y + at(row, dim)); });
}

void CpuKernels::rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) {
  for_rows(rows, dim,
           [&](int row) { ops_.rows->rms_norm(x + at(row, dim), weight, eps, dim, out + at(row, padded_dim(dim))); });
}

void CpuKernels::silu_mul(const float* gate_up, int rows, int dim, bf16* out) {
  for_rows(rows, 2 * dim, [&](int row) {
    const float* gate = gate_up + at(row, 2 * dim);
    ops_.rows->silu_mul(gate, gate + dim, dim, out + at(row, padded_dim(dim)));
  });
}

void CpuKernels::store_qkv(const QkvArgs& args) {
  check(args.shape == limits_.shape && args.heads == limits_.heads, "store_qkv runs for the shape it was built for");
  list_rows(*args.pass, args.layer);
  for (const SequenceRows& sequence : args.pass->layer(args.layer)) {
    check(sequence.position >= sequence.kv.tail_position && sequence.position + sequence.rows <= args.rope.positions,
          "a sequence's rows stand in its tail, at positions that RoPE knows");
  }
  for_rows(args.pass->rows, (args.heads + 2 * args.shape.kv_heads) * args.shape.head_dim,
           [&](int row) { store_row(args, row); });
}

// K is written along its panel's pairs, V down its panel's lanes: each token is one lane of K and one half of a pair of
// V.
void CpuKernels::store_row(const QkvArgs& args, int row) {
  const SequenceRows* sequence = sequence_of_row_[static_cast<size_t>(row)];
  const KvShape& shape = args.shape;
  const int head_dim = shape.head_dim;
  const int kv_heads = shape.kv_heads;
  const int position = sequence->position + row - sequence->first_row;
  const float* qkv = args.qkv + at(row, (args.heads + 2 * kv_heads) * head_dim);
  const float* cos = args.rope.cos + at(position, head_dim / 2);
  const float* sin = args.rope.sin + at(position, head_dim / 2);
  const auto bias = [&](int head) { return args.bias == nullptr ? nullptr : args.bias + at(head, head_dim); };
  for (int head = 0; head < args.heads; ++head) {
    bf16* q = args.q + at(row * args.heads + head, shape.key_dim());
    ops_.rows->finish_head(qkv + at(head, head_dim), bias(head), args.q_norm, args.norm_eps, cos, sin, head_dim, q);
    std::fill(q + head_dim, q + shape.key_dim(), bf16{0});
  }
  const int slot = (position - sequence->kv.tail_position) % kPageTokens;
  const int page = (position - sequence->kv.tail_position) / kPageTokens;
  bf16 k[kMaxHeadDim + kPanel] = {};
  bf16 v[kMaxHeadDim];
  for (int head = 0; head < kv_heads; ++head) {
    const int k_head = args.heads + head;
    const int v_head = k_head + kv_heads;
    ops_.rows->finish_head(qkv + at(k_head, head_dim), bias(k_head), args.k_norm, args.norm_eps, cos, sin, head_dim, k);
    ops_.rows->finish_head(qkv + at(v_head, head_dim), bias(v_head), nullptr, 0, nullptr, nullptr, head_dim, v);
    auto* keys = reinterpret_cast<bf16*>(sequence->kv.tail.head_page(head, page));
    bf16* values = keys + at(kPageTokens, shape.key_dim());
    for (int d = 0; d < shape.key_dim(); d += 2) {
      std::memcpy(keys + key_index(slot, d, shape), k + d, 2 * sizeof(bf16));
    }
    for (int d = 0; d < head_dim; ++d) {
      values[value_index(slot, d)] = v[d];
    }
  }
}

void CpuKernels::attention(const AttentionArgs& args) {
  const FlushDenormals flush;
  attention_.run(args);
}

void CpuKernels::select_rows(const float* x, const PassRows& pass, int dim, float* out) {
  for (const LogitRow& logit_row : pass.logit_rows) {
    out = std::copy_n(x + at(logit_row.row, dim), dim, out);
  }
}

void CpuKernels::choose(const float* logits, const PassRows& pass, int vocabulary) {
  const FlushDenormals flush;  // on every thread alike: a choice must not depend on where it is made
  pool_.parallel_for(static_cast<int>(pass.logit_rows.size()), [&](int i) {
    const LogitRow& row = pass.logit_rows[static_cast<size_t>(i)];
    const std::span<const float> values(logits + at(i, vocabulary), static_cast<size_t>(vocabulary));
    *row.token = vericache::choose(values, row.sampling, row.position, row.margin);
    if (row.hash != nullptr) {
      *row.hash = hash_bytes(values.data(), values.size_bytes());
    }
  });
}

void CpuKernels::keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape,
                              const PassRows& pass, int layer) {
  const int row_values = heads * shape.key_dim();
  for (const SequenceRows& sequence : pass.layer(layer)) {
    const QueryRing& ring = sequence.queries;
    for (int r = std::max(0, sequence.rows - ring.capacity); r < sequence.rows; ++r) {
      const int row = sequence.first_row + r;
      const int slot = (sequence.position + r - ring.origin) % ring.capacity;
      std::copy_n(q + at(row, row_values), row_values, ring.q + at(slot, row_values));
      std::copy_n(log_sum_exp + at(row, heads), heads, ring.log_sum_exp + at(slot, heads));
    }
  }
}

void CpuKernels::attention_mass(const MassArgs& args) {
  const FlushDenormals flush;
  attention_.mass(args);
}

}  // namespace

std::unique_ptr<Kernels> make_cpu_kernels(Isa isa, int threads, const KernelLimits& limits) {
  if (!isa_supported(isa)) {
    throw Error("this processor has no {}: choose {} or a lower instruction class", isa_name(isa),
                isa_name(best_isa()));
  }
  if (threads < 1) {
    throw Error("threads is {}: give 1 or more", threads);
  }
  if (limits.shape.head_dim < kPanel || limits.shape.head_dim % kPanel != 0 || limits.shape.head_dim > kMaxHeadDim) {
    throw Error("the CPU backend needs a head size that is a multiple of 16 and at most {}, not {}", kMaxHeadDim,
                limits.shape.head_dim);
  }
  if (limits.shape.kv_heads < 1 || limits.heads % limits.shape.kv_heads != 0) {
    throw Error("{} query heads are not shared evenly by {} KV heads", limits.heads, limits.shape.kv_heads);
  }
  return std::make_unique<CpuKernels>(isa, threads, limits);
}

}  // namespace vericache
