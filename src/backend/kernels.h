// The op list that a backend computes. Rule 1: a row's bits depend on that row alone, never on the rows beside it, on
// threads or on paging. An op is enqueued on its lane; every pointer is device memory unless it says otherwise. Called
// from the thread that drives the engine.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "backend/device.h"
#include "backend/kv_view.h"
#include "backend/residual_code.h"
#include "backend/sampling.h"
#include "base/bf16.h"
#include "base/token.h"

namespace vericache {

// The K dimension of every product runs in steps of 32: rows of activations are padded to it with zeros.
inline int padded_dim(int dim) {
  return (dim + 31) / 32 * 32;
}

// A weight (out, in) in the backend's own layout. CPU: panels of 16 outputs, (ceil(out/16), in_padded/2, 16, 2), zero
// padded. CUDA: (out, in_padded), row-major.
struct PackedMatrix {
  int out = 0;
  int in = 0;
  bf16* data = nullptr;
};

enum class Epilogue { store, add };  // y = x W^T, or y += x W^T

// The last queries of one layer of one sequence with their softmax denominators, a ring: the row of position p lies at
// (p - origin) % capacity.
struct QueryRing {
  bf16* q = nullptr;             // (capacity, heads, key_dim)
  float* log_sum_exp = nullptr;  // (capacity, heads)
  int capacity = 0;
  int origin = 0;  // not behind the first of its rows; the rows of one pass are a ring whose origin is their first
};

// Rows of one sequence at consecutive positions, in one layer. All of them stand in one pass; a pass holds rows of many
// sequences.
struct SequenceRows {
  int first_row = 0;
  int rows = 0;
  int position = 0;           // absolute position of the first row
  TokenId* tokens = nullptr;  // the sequence's tokens by position; host memory that the device reaches
  LayerKv kv{};
  QueryRing queries{};  // capacity 0: nobody wants them
  int token_lag = 0;    // a row at position p feeds the token of position p - token_lag
};

// A row of the pass whose logits choose a token, and where the choice goes: host memory that the device reaches.
struct LogitRow {
  int row = 0;
  int position = 0;  // of the token that is chosen
  Sampling sampling{};
  TokenId* token = nullptr;
  uint64_t* hash = nullptr;  // of the row's logits; null: not wanted
  float* margin = nullptr;   // of the choice (sampling.h); null: not wanted. A row has one of the two at most
};

// What a pass is about, for all its layers. The vectors are the caller's; ops see it after Kernels::stage.
struct PassRows {
  const void* buffers = nullptr;  // names the activations that it works in; what is replayed works in the same
  int rows = 0;
  int layers = 0;
  bool draft = false;  // a draft step: any fast kernel will do, and resident KV may be packed, or read in part
  std::span<const SequenceRows> sequences{};  // (layers, sequences): geometry and tokens the same in every layer
  std::span<const LogitRow> logit_rows{};
  std::span<const SequenceRows> layer(int index) const {
    const size_t count = sequences.size() / static_cast<size_t>(layers);
    return sequences.subspan(static_cast<size_t>(index) * count, count);
  }
};

// cos and sin per absolute position: (positions, head_dim / 2) each, float.
struct RopeTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int positions = 0;
};

// `pass` and `layer` name rows that were staged last.
struct QkvArgs {
  KvShape shape{};
  int heads = 0;
  const float* qkv = nullptr;     // (rows, (heads + 2 kv_heads) * head_dim): q heads, k heads, v heads
  const float* bias = nullptr;    // ((heads + 2 kv_heads) * head_dim) or null
  const float* q_norm = nullptr;  // (head_dim) or null: RMSNorm per head before RoPE (Qwen3)
  const float* k_norm = nullptr;
  float norm_eps = 0;
  RopeTable rope{};  // rotate-half convention: pairs (i, i + head_dim / 2)
  const PassRows* pass = nullptr;
  int layer = 0;
  bf16* q = nullptr;  // (rows, heads, key_dim), zero padded; K and V of each row are written to its tail slot
};

struct AttentionArgs {
  KvShape shape{};
  int heads = 0;
  float scale = 0;
  const bf16* q = nullptr;  // (rows, heads, key_dim)
  const PassRows* pass = nullptr;
  int layer = 0;
  bf16* out = nullptr;           // (rows, padded_dim(heads * head_dim))
  float* log_sum_exp = nullptr;  // (rows, heads) or null: log of the softmax denominator of the scaled scores
};

// Attention mass per token: over the ring's last query rows and the query heads that share a KV head, the sum of the
// weights, or the largest of them.
enum class MassOf { sum, largest };
struct MassArgs {
  KvShape shape{};
  int heads = 0;
  float scale = 0;
  QueryRing queries{};
  int rows = 0;           // of the ring, the last one at `position` + rows - 1
  int position = 0;       // of the first of them
  LayerKv kv{};           // full KV: past, then tail
  int tokens = 0;         // of the sequence: [0, tokens)
  float* mass = nullptr;  // (kv_heads, stride): [0, added) are joined with what is there, [added, tokens) written
  int stride = 0;         // at least tokens
  int added = 0;
  MassOf of = MassOf::sum;
};

// How much a token's key tells, per KV head.
enum class KeyMeasure {
  smallness,   // -|k|
  difference,  // -cos(k, the mean of the keys' directions)
};
struct KeyScoreArgs {
  KvShape shape{};
  LayerKv kv{};    // full KV: past, then tail
  int tokens = 0;  // of the sequence: [0, tokens)
  KeyMeasure measure = KeyMeasure::smallness;
  float* scratch = nullptr;  // key_score_floats(tokens, shape)
  float* scores = nullptr;   // (kv_heads, tokens): written
};
// Sums of key directions, one of every piece of the context.
inline constexpr int kKeyPieceTokens = 1024;
inline size_t key_score_floats(int tokens, const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.key_dim()) *
         static_cast<size_t>((tokens + kKeyPieceTokens - 1) / kKeyPieceTokens);
}

// Attention that queries to come will pay, times the length of the value: queries are taken as normally distributed,
// with mean m and covariance C of the ring's last rows before RoPE, turned by R, the mean rotation of the `future`
// positions from `from` on. The score of a token is |v| times the mean, over the query heads that share a KV head, of
// the softmax over tokens [sinks, tokens) of scale (R m) k + scale^2 / 2 k R C R^T k; that of a sink is +inf.
struct ExpectedArgs {
  KvShape shape{};
  int heads = 0;
  float scale = 0;
  QueryRing queries{};
  int rows = 0;      // of the ring
  int position = 0;  // of the first of them
  RopeTable rope{};
  int from = 0;  // positions that the table does not know are left out; the last one stays
  int future = 0;
  LayerKv kv{};    // full KV: past, then tail
  int tokens = 0;  // of the sequence: [0, tokens)
  int sinks = 0;
  std::byte* scratch = nullptr;  // expected_bytes(rows, tokens, shape), aligned to 64
  float* scores = nullptr;       // (kv_heads, tokens): written
};
// Queries of one query head per KV head (mean, then the rows without it, then zeros up to a multiple of 8), as bf16;
// then, per KV head, exponents of all tokens, their maximum and their sum.
inline int expected_rows(int rows) {
  return (1 + rows + 7) / 8 * 8;
}
inline size_t expected_query_bytes(int rows, const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(expected_rows(rows)) *
         static_cast<size_t>(shape.key_dim()) * sizeof(bf16);
}
inline size_t expected_bytes(int rows, int tokens, const KvShape& shape) {
  return expected_query_bytes(rows, shape) +
         static_cast<size_t>(shape.kv_heads) * (static_cast<size_t>(tokens) + 2) * sizeof(float);
}

// Of each row of scores (rows, n) the best, ascending by index. Ties fall to the later index, NaN counts as -inf.
struct BestArgs {
  const float* scores = nullptr;
  int rows = 0;
  int n = 0;
  int count = 0;                // of every row; where counts is given, the most of one
  const int* counts = nullptr;  // (rows), or null
  int* chosen = nullptr;        // (rows, stride)
  int stride = 0;
};

// How rotated keys of a few bits are rounded (KvFormat::ldlq), made from some queries: what a channel loses to its code
// is made up for by the channels that are rounded after it, as far as those queries look at both alike. LDLQ (Chee et
// al. 2023, QuIP, section 3.1) with the second moment of the rotated queries in the place of that of a layer's inputs:
// C + damping = L D L^T, and matrix[i][j] = L[j][i] is what channel i takes on of the error of channel j > i. Below,
// and on the diagonal, lies C, so that more queries can join. Queries that are not finite leave a matrix as it is;
// where none is known, it becomes zero, which rounds to the nearest.
struct RoundingArgs {
  KvShape shape{};
  int heads = 0;
  QueryRing queries{};
  int rows = 0;            // of the ring
  int position = 0;        // of the first of them
  int known = 0;           // rows that the matrix was made from; of 0 it is not read
  bf16* matrix = nullptr;  // (kv_heads, head_dim, head_dim)
};
inline constexpr float kRoundingDamping = 0.1f;       // of the mean of C's diagonal, added to all of it
inline size_t rounding_bytes(const KvShape& shape) {  // of a layer's matrix
  return sizeof(bf16) * static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim) *
         static_cast<size_t>(shape.head_dim);
}

// Pages [first, first + count) of full KV, every KV head, into the same pages of `out` in its format.
struct QuantizeArgs {
  KvShape shape{};
  LayerKv full{};
  int first = 0;
  int count = 0;
  KvView out{};
  const bf16* rounding = nullptr;  // RoundingArgs::matrix, or null: every key to the nearest code
};

// Chosen tokens of full KV, gathered into out's pages in its format; the rest of a head's last page is zero.
struct GatherArgs {
  KvShape shape{};
  LayerKv full{};
  const int* chosen = nullptr;  // (kv_heads, stride): ascending token indices
  int stride = 0;
  int count = 0;                // of every head; where counts is given, the most of one
  const int* counts = nullptr;  // (kv_heads), or null
  KvView out{};
  const bf16* rounding = nullptr;  // as there
};

// Equal blocks of memory, one every `stride` bytes: pages to be proved.
struct BlockRow {
  const std::byte* first = nullptr;
  size_t stride = 0;
  size_t bytes = 0;  // a multiple of 16
  int count = 0;
  int checksum_stride = 1;  // block i's checksum is checksums[i * checksum_stride]
};

struct BlockCopy {
  std::byte* target = nullptr;
  const std::byte* source = nullptr;
  size_t bytes = 0;
};

// Pages of full KV of one layer into the form in which they cross the wire (residual_code.h).
struct EncodeArgs {
  static constexpr int kMostPages = 8;
  KvShape shape{};
  ResidualCode code = ResidualCode::lossless;
  std::span<const std::byte* const> pages{};  // bf16, kMostPages at most; the span itself is host memory
  KvView resident{};                          // the same tokens in resident form, from page `first` on
  int first = 0;
  uint32_t* sizes = nullptr;  // scratch: (pages, kv_heads)
  std::byte* out = nullptr;   // room for residual_bound() a page: they lie one after the other
  uint32_t* ends = nullptr;   // (pages): where each ends, in units from `out`; host memory that the device reaches
};

// The way back: pages [0, count) of one layer.
struct DecodeArgs {
  KvShape shape{};
  ResidualCode code = ResidualCode::lossless;
  const std::byte* in = nullptr;   // encoded pages, one after the other
  const uint32_t* ends = nullptr;  // (count): where each ends, in units from `in`
  int count = 0;
  KvView resident{};
  std::byte* out = nullptr;  // bf16 pages, one after the other
  // Given, every page is proved as prove() does it: (count), and where those that differ are counted.
  const uint64_t* checksums = nullptr;
  uint32_t* mismatches = nullptr;
};

class Kernels : public Lane {
 public:
  virtual std::string_view name() const = 0;  // for logs and `inspect`, e.g. "cpu avx512_bf16, 2 threads"

  virtual size_t device_bytes() const { return 0; }  // that the kernels themselves hold, all lanes

  virtual size_t packed_bytes(int out, int in) const = 0;
  // Packs rows [first, first + rows) of a weight; source (rows, in), host memory. The matrix must be zeroed before its
  // first rows are packed. Complete on return.
  virtual void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const = 0;
  // Every value a function of (seed, its row and column): uniform in (-scale, scale), the same on every backend.
  // Complete on return.
  virtual void fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const = 0;
  // Once, when every weight stands: chooses how each product runs for every row count, and proves that rows keep their
  // bits. weights: one of each shape.
  virtual void tune(std::span<const PackedMatrix> weights) { (void)weights; }

  // The lanes of this backend. A CPU has one.
  enum class Place { pass, draft, wire_in, wire_out };
  virtual Kernels& lane(Place place) {
    (void)place;
    return *this;
  }

  // Makes a pass known to the ops that follow on this lane. The vectors must live until the last op of the pass is
  // enqueued.
  virtual void stage(const PassRows& pass) = 0;
  // Runs body, which enqueues ops for the pass that was staged last. Called again for a pass of the same shape, the
  // same ops are run without calling it, on the same buffers: forget_passes() when those are others from now on.
  virtual void replay(const PassRows& pass, const void* state, void (*body)(const void* state)) {
    (void)pass;
    body(state);
  }
  virtual void forget_passes() {}
  template <typename Body>
  void replay_pass(const PassRows& pass, const Body& body) {
    replay(pass, &body, [](const void* state) { (*static_cast<const Body*>(state))(); });
  }

  virtual void embed(const PackedMatrix& table, const PassRows& pass, float* out) = 0;  // out (rows, in)
  // x (rows, padded_dim(in)) bf16; y (rows, out) float; products accumulate over K in one order for every row count.
  virtual void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) = 0;
  virtual void add_bias(const float* bias, int rows, int dim, float* y) = 0;  // y (rows, dim)
  // out (rows, padded_dim(dim)); out = x / sqrt(mean(x^2) + eps) * weight.
  virtual void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) = 0;
  virtual void silu_mul(const float* gate_up, int rows, int dim,
                        bf16* out) = 0;  // gate_up (rows, 2 dim), out (rows, padded_dim(dim))
  virtual void store_qkv(const QkvArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  // out (logit rows, dim): the rows that pass.logit_rows name.
  virtual void select_rows(const float* x, const PassRows& pass, int dim, float* out) = 0;
  // Chooses and hashes as pass.logit_rows say; logits (logit rows, vocabulary). The choice is choose() of sampling.h.
  virtual void choose(const float* logits, const PassRows& pass, int vocabulary) = 0;

  // For compressors.
  // Writes the queries of the pass's rows into the rings of their sequences.
  virtual void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape,
                            const PassRows& pass, int layer) = 0;
  virtual void attention_mass(const MassArgs& args) = 0;
  // scores (rows, n): each value becomes the mean of its neighbours up to `reach` away, those outside counting as zero;
  // the last `always` become +inf. scores and mass do not overlap.
  virtual void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) = 0;
  virtual void choose_best(const BestArgs& args) = 0;
  // Each row of values (rows, n) becomes the mean of all rows.
  virtual void mean_rows(float* values, int rows, int n) = 0;
  // chosen (count), ascending indices into (rows, n) as one: how many of them lie in each row. counts (rows) may be
  // host memory that the device reaches.
  virtual void count_rows(const int* chosen, int count, int rows, int n, int* counts) = 0;
  virtual void key_scores(const KeyScoreArgs& args) = 0;
  virtual void expected_attention(const ExpectedArgs& args) = 0;
  virtual void fit_rounding(const RoundingArgs& args) = 0;
  virtual void quantize(const QuantizeArgs& args) = 0;
  virtual void gather(const GatherArgs& args) = 0;
  // One bf16 head page of full KV. tokens < 64: the rest of the page counts as absent (its codes are zero). A page of
  // 16 bits is copied. Where the format chooses pages, bounds follow.
  virtual void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                                  std::byte* out) = 0;
  virtual void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                                    std::byte* out) = 0;

  // For the wire: between device memory and host memory that it reaches, or within one of them.
  virtual void copy(std::span<const BlockCopy> copies) = 0;
  virtual void zero(std::byte* target, size_t bytes) = 0;
  // On an addressable device any thread may call these two, and they are done on return.
  virtual void encode(const EncodeArgs& args) = 0;
  virtual void decode(const DecodeArgs& args) = 0;
  // For tests: the lane does nothing for so long, so that work that fails to wait for it is found out.
  virtual void delay(int microseconds) { (void)microseconds; }
  // One checksum per block; checksums is host memory that the device reaches.
  virtual void checksum(const BlockRow& blocks, uint64_t* checksums) = 0;
  // Adds the number of blocks whose checksum is another to *mismatches: host memory that the device reaches.
  virtual void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches) = 0;
};

}  // namespace vericache
