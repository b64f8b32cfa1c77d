// The op list that a backend computes. Rule 1: a row's bits depend on that row alone, never on the rows beside it, on
// threads or on paging. One instance per engine, called from the thread that drives the engine; the ops spread over
// threads inside.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "backend/kv_view.h"
#include "base/bf16.h"
#include "base/token.h"

namespace vericache {

// The K dimension of every product runs in steps of 32: rows of activations are padded to it with zeros.
inline int padded_dim(int dim) {
  return (dim + 31) / 32 * 32;
}

// A weight (out, in) in the backend's own layout. CPU: panels of 16 outputs, (ceil(out/16), in_padded/2, 16, 2), zero
// padded.
struct PackedMatrix {
  int out = 0;
  int in = 0;
  bf16* data = nullptr;
};

enum class Epilogue { store, add };  // y = x W^T, or y += x W^T

// Rows of one sequence at consecutive positions. All of them stand in one pass; a pass holds rows of many sequences.
struct SequenceRows {
  int first_row = 0;
  int rows = 0;
  int position = 0;  // absolute position of the first row
  LayerKv kv{};
  bool keep_kv = false;  // the rows' tail slots hold verified KV already: a draft must not overwrite it
};

// cos and sin per absolute position: (positions, head_dim / 2) each, float.
struct RopeTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int positions = 0;
};

struct QkvArgs {
  KvShape shape{};
  int heads = 0;
  int rows = 0;
  const float* qkv = nullptr;     // (rows, (heads + 2 kv_heads) * head_dim): q heads, k heads, v heads
  const float* bias = nullptr;    // ((heads + 2 kv_heads) * head_dim) or null
  const float* q_norm = nullptr;  // (head_dim) or null: RMSNorm per head before RoPE (Qwen3)
  const float* k_norm = nullptr;
  float norm_eps = 0;
  RopeTable rope{};                           // rotate-half convention: pairs (i, i + head_dim / 2)
  std::span<const SequenceRows> sequences{};  // K and V of each row are written to its tail slot
  bf16* q = nullptr;                          // (rows, heads, key_dim), zero padded
};

struct AttentionArgs {
  KvShape shape{};
  int heads = 0;
  float scale = 0;
  const bf16* q = nullptr;  // (rows, heads, key_dim)
  std::span<const SequenceRows> sequences{};
  bf16* out = nullptr;           // (rows, padded_dim(heads * head_dim))
  float* log_sum_exp = nullptr;  // (rows, heads) or null: log of the softmax denominator of the scaled scores
};

// Attention mass per token, summed over query rows and over the query heads that share a KV head.
struct MassArgs {
  KvShape shape{};
  int heads = 0;
  float scale = 0;
  const bf16* q = nullptr;             // (rows, heads, key_dim)
  const float* log_sum_exp = nullptr;  // (rows, heads), as attention gave it
  SequenceRows sequence{};             // rows to use; first_row counts in q and log_sum_exp
  int tokens = 0;                      // of the sequence: [0, tokens)
  float* mass = nullptr;               // (kv_heads, tokens): added to, so that several calls can vote
};

class Kernels {
 public:
  virtual ~Kernels() = default;
  virtual std::string_view name() const = 0;  // for logs and `inspect`, e.g. "cpu avx512_bf16, 2 threads"

  virtual size_t packed_bytes(int out, int in) const = 0;
  // Packs rows [first, first + rows) of a weight; source (rows, in). The matrix must be zeroed before its first rows
  // are packed.
  virtual void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const = 0;

  virtual void embed(const PackedMatrix& table, std::span<const TokenId> tokens, float* out) = 0;  // out (tokens, in)
  // x (rows, padded_dim(in)) bf16; y (rows, out) float; products accumulate over K in one order for every row count.
  virtual void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) = 0;
  virtual void add_bias(const float* bias, int rows, int dim, float* y) = 0;  // y (rows, dim)
  // out (rows, padded_dim(dim)); out = x / sqrt(mean(x^2) + eps) * weight.
  virtual void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) = 0;
  virtual void silu_mul(const float* gate_up, int rows, int dim,
                        bf16* out) = 0;  // gate_up (rows, 2 dim), out (rows, padded_dim(dim))
  virtual void store_qkv(const QkvArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;

  // For compressors. Sources are bf16 head pages, in the layout of kv_view.h.
  virtual void attention_mass(const MassArgs& args) = 0;
  // tokens < 64: the rest of the page counts as absent (its codes are zero). A page of 16 bits is copied.
  virtual void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                                  std::byte* out) = 0;
  virtual void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                                    std::byte* out) = 0;
  // Runs body(i) for i in [0, count) on the backend's threads; for compressors' per-head work.
  virtual void parallel(int count, const void* state, void (*body)(const void* state, int i)) = 0;

  template <typename Body>
  void parallel_for(int count, const Body& body) {
    parallel(count, &body, [](const void* state, int i) { (*static_cast<const Body*>(state))(i); });
  }
};

// Copies one token of one head, K and V, between bf16 head pages.
inline void copy_token(const std::byte* source, int source_token, std::byte* target, int target_token,
                       const KvShape& shape) {
  const auto* from = reinterpret_cast<const bf16*>(source);
  auto* to = reinterpret_cast<bf16*>(target);
  for (int d = 0; d < shape.key_dim(); d += 2) {
    std::memcpy(to + key_index(target_token, d, shape), from + key_index(source_token, d, shape), 2 * sizeof(bf16));
  }
  const size_t values = static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape.key_dim());
  for (int d = 0; d < shape.head_dim; ++d) {
    to[values + value_index(target_token, d)] = from[values + value_index(source_token, d)];
  }
}

}  // namespace vericache
