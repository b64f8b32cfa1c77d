// The launchers of the CUDA backend, one family a .cu file. They enqueue on a stream, allocate nothing and never wait.
// Called by CudaKernels alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "backend/kernels.h"

namespace vericache::cuda {

// Fails with the place and CUDA's own words: a device failure is not an answer.
void check_cuda(cudaError_t status, const char* what);
// Lets a kernel have so much dynamic shared memory; from CUDA sources.
template <typename Kernel>
void allow_shared(Kernel* kernel, size_t bytes, const char* what) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), what);
}

// What of the staged pass a kernel reads, in the lane's device memory, at the same addresses for every pass of a lane.
struct StagedPass {
  int rows = 0;
  int count = 0;  // sequences
  bool draft = false;
  const SequenceRows* sequences = nullptr;  // (layers, count)
  const int* sequence_of_row = nullptr;     // (rows)
  const LogitRow* logit_rows = nullptr;     // (logit_count)
  int logit_count = 0;
  const SequenceRows* layer(int index) const { return sequences + static_cast<ptrdiff_t>(index) * count; }
};

// What scratch is sized from; as KernelLimits of the CPU.
struct Limits {
  KvShape shape{};
  int heads = 0;
  int max_rows = 0;
  int max_sequences = 0;
  int max_context_tokens = 0;
};

// lane_ops.cu
// Whether this build holds kernels that the current GPU can run.
bool kernels_fit_gpu();
// source: pinned host memory.
void upload(std::byte* target, const std::byte* source, size_t bytes, cudaStream_t stream);
void delay(int microseconds, cudaStream_t stream);

// random_fill.cu
void fill_random(PackedMatrix& matrix, uint64_t seed, float scale, cudaStream_t stream);

// row_ops.cu
void embed(const PackedMatrix& table, const StagedPass& pass, float* out, cudaStream_t stream);
void add_bias(const float* bias, int rows, int dim, float* y, cudaStream_t stream);
void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out, cudaStream_t stream);
void silu_mul(const float* gate_up, int rows, int dim, bf16* out, cudaStream_t stream);
void select_rows(const float* x, const StagedPass& pass, int dim, float* out, cudaStream_t stream);

// store_qkv.cu
void store_qkv(const QkvArgs& args, const StagedPass& pass, cudaStream_t stream);
void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const StagedPass& pass,
                  int layer, cudaStream_t stream);

// attention.cu: full KV, exact: the same bits for a row whatever stands beside it.
// A unit of work: some stacked rows (row * group + head of the group) of one sequence; see plan_attention.
struct AttentionTile {
  int sequence = 0;
  int first = 0;    // stacked row of the sequence
  int rows = 0;     // stacked rows
  int split = -1;   // the one split that it reduces, into partials; -1: all of them, one after the other
  int partial = 0;  // where the states of its rows lie, in rows of scratch: (splits if it is cut, rows)
  int round = 0;    // scratch is used anew in each
};
struct AttentionPlan {
  std::vector<AttentionTile> tiles;    // of each KV head, by round and then by class
  std::vector<AttentionTile> combine;  // one for all splits of a tile, by round
};
// Reads positions and lengths of layer 0 of the pass, which every layer shares.
void plan_attention(const PassRows& pass, const Limits& limits, AttentionPlan& plan);
size_t attention_scratch_bytes(const Limits& limits);
size_t max_attention_tiles(const Limits& limits);  // entries of plan.tiles, or of plan.combine, at most
void attention(const AttentionArgs& args, const StagedPass& pass, const AttentionPlan& plan,
               const AttentionTile* device_tiles, const AttentionTile* device_combine, float* scratch,
               cudaStream_t stream);

// page_choice.cu: of each sequence and KV head the pages of past that its query wants, as PageChoice says.
struct PageChoiceArgs {
  KvShape shape{};
  int heads = 0;
  const bf16* q = nullptr;  // (rows, heads, head_dim)
  const SequenceRows* sequences = nullptr;
  int count = 0;  // of them
  KvFormat format{};
  float* scores = nullptr;      // (sequences, kv_heads, stride): scratch, aligned to 16
  std::byte** pages = nullptr;  // (sequences, kv_heads, stride): those chosen, in the order of the view
  int* tokens = nullptr;        // (sequences, kv_heads): that they hold
  int stride = 0;               // a multiple of 4, not less than the pages of any head
};
void choose_pages(const PageChoiceArgs& args, cudaStream_t stream);

// draft_attention.cu: resident KV as stored (bf16 or packed, per-head lengths), then the bf16 tail, one row a sequence.
// The launch depends on rows, on `longest_tokens` (of past and tail together, rounded up by the caller) and, where
// pages are chosen, on `read_tokens` (the same of what is read) alone, so that it can be captured.
size_t draft_attention_scratch_bytes(const Limits& limits);
size_t draft_attention_counts(const Limits& limits);  // counters, zero before the first launch and behind each
void draft_attention(const AttentionArgs& args, const KvFormat& format, const StagedPass& pass, int longest_tokens,
                     int read_tokens, float* scratch, int* counts, cudaStream_t stream);

// key_rounding.cu
void fit_rounding(const RoundingArgs& args, cudaStream_t stream);

// quantize.cu
void quantize(const QuantizeArgs& args, cudaStream_t stream);
void gather(const GatherArgs& args, cudaStream_t stream);
void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                        std::byte* out, cudaStream_t stream);
void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format, std::byte* out,
                          cudaStream_t stream);

// residual_encode.cu
void encode(const EncodeArgs& args, cudaStream_t stream);

// What is known so far of a page that is proved: device memory, one for each page of a call and one before them, zero
// before the first call, a row of them for each stream.
struct PageProof {
  unsigned long long sum = 0;
  uint32_t counters[2] = {};  // of a page: its blocks that are done, and none; of the one before them: those of prove()
};
// residual_decode.cu. proofs: needed where args.checksums are given.
void decode(const DecodeArgs& args, PageProof* proofs, cudaStream_t stream);

// attention_mass.cu
void attention_mass(const MassArgs& args, cudaStream_t stream);

// scores.cu
void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores, cudaStream_t stream);
void choose_best(const BestArgs& args, cudaStream_t stream);
void mean_rows(float* values, int rows, int n, cudaStream_t stream);
void count_rows(const int* chosen, int count, int rows, int n, int* counts, cudaStream_t stream);

// key_scores.cu
void key_scores(const KeyScoreArgs& args, cudaStream_t stream);

// expected_attention.cu
void expected_attention(const ExpectedArgs& args, cudaStream_t stream);

// sampling.cu
void choose(const float* logits, const StagedPass& pass, int vocabulary, cudaStream_t stream);

// checksum.cu. counters: two words of device memory, zero before the first call, a pair for each stream.
void checksum(const BlockRow& blocks, uint64_t* checksums, cudaStream_t stream);
void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches, uint32_t* counters,
           cudaStream_t stream);

}  // namespace vericache::cuda
