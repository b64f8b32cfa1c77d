// Kernels that pass every op on to others: a test overrides the ops that it wants to behave in another way.
// Called by one thread, the test's.
#pragma once

#include "backend/kernels.h"

namespace vericache::test {

class ForwardingKernels : public Kernels {
 public:
  explicit ForwardingKernels(Kernels& to) : k_(to) {}
  std::string_view name() const override { return k_.name(); }
  size_t packed_bytes(int out, int in) const override { return k_.packed_bytes(out, in); }
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const override {
    k_.pack_rows(source, first, rows, matrix);
  }
  void fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const override {
    k_.fill_random(matrix, seed, scale);
  }
  void tune(std::span<const PackedMatrix> weights) override { k_.tune(weights); }

  Mark mark() override { return k_.mark(); }
  bool reached(Mark mark) override { return k_.reached(mark); }
  void wait(Mark mark) override { k_.wait(mark); }
  double seconds(Mark from, Mark to) override { return k_.seconds(from, to); }
  double time(Mark mark) override { return k_.time(mark); }
  void follow(Lane& other, Mark mark) override { k_.follow(other, mark); }
  void upload(std::byte* target, const void* source, size_t bytes) override { k_.upload(target, source, bytes); }
  void stage(const PassRows& pass) override { k_.stage(pass); }
  void forget_passes() override { k_.forget_passes(); }

  void embed(const PackedMatrix& table, const PassRows& pass, float* out) override { k_.embed(table, pass, out); }
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    k_.matmul(weight, x, rows, y, epilogue);
  }
  void add_bias(const float* bias, int rows, int dim, float* y) override { k_.add_bias(bias, rows, dim, y); }
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override {
    k_.rms_norm(x, weight, eps, rows, dim, out);
  }
  void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override { k_.silu_mul(gate_up, rows, dim, out); }
  void store_qkv(const QkvArgs& args) override { k_.store_qkv(args); }
  void attention(const AttentionArgs& args) override { k_.attention(args); }
  void select_rows(const float* x, const PassRows& pass, int dim, float* out) override {
    k_.select_rows(x, pass, dim, out);
  }
  void choose(const float* logits, const PassRows& pass, int vocabulary) override {
    k_.choose(logits, pass, vocabulary);
  }

  void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const PassRows& pass,
                    int layer) override {
    k_.keep_queries(q, log_sum_exp, heads, shape, pass, layer);
  }
  void attention_mass(const MassArgs& args) override { k_.attention_mass(args); }
  void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) override {
    k_.pool_mass(mass, rows, n, reach, always, scores);
  }
  void choose_best(const BestArgs& args) override { k_.choose_best(args); }
  void mean_rows(float* values, int rows, int n) override { k_.mean_rows(values, rows, n); }
  void count_rows(const int* chosen, int count, int rows, int n, int* counts) override {
    k_.count_rows(chosen, count, rows, n, counts);
  }
  void key_scores(const KeyScoreArgs& args) override { k_.key_scores(args); }
  void expected_attention(const ExpectedArgs& args) override { k_.expected_attention(args); }
  void fit_rounding(const RoundingArgs& args) override { k_.fit_rounding(args); }
  void quantize(const QuantizeArgs& args) override { k_.quantize(args); }
  void gather(const GatherArgs& args) override { k_.gather(args); }
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out) override {
    k_.quantize_head_page(source, tokens, shape, format, out);
  }
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override {
    k_.dequantize_head_page(source, shape, format, out);
  }

  void copy(std::span<const BlockCopy> copies) override { k_.copy(copies); }
  void zero(std::byte* target, size_t bytes) override { k_.zero(target, bytes); }
  void encode(const EncodeArgs& args) override { k_.encode(args); }
  void decode(const DecodeArgs& args) override { k_.decode(args); }
  void delay(int microseconds) override { k_.delay(microseconds); }
  void checksum(const BlockRow& blocks, uint64_t* checksums) override { k_.checksum(blocks, checksums); }
  void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches) override {
    k_.prove(blocks, checksums, mismatches);
  }

 protected:
  Kernels& k_;
};

}  // namespace vericache::test
