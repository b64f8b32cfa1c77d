// Rule 1 of the promise, on whole models: KV and logits of a row do not change by a bit, however the work is cut.
#include <algorithm>
#include <map>

#include "model/forward_harness.h"

namespace vericache {
namespace {

constexpr int kRows = 160;  // of one pass at most

// Forwards everything, but sums the K of a product in two halves when a pass has more than four rows: what a split-K
// library does.
class RowCountDependentKernels final : public Kernels {
 public:
  explicit RowCountDependentKernels(Kernels& kernels) : k_(kernels) {}
  std::string_view name() const override { return "broken on purpose"; }
  size_t packed_bytes(int out, int in) const override { return k_.packed_bytes(out, in); }
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const override {
    k_.pack_rows(source, first, rows, matrix);
  }
  void embed(const PackedMatrix& table, std::span<const TokenId> tokens, float* out) override {
    k_.embed(table, tokens, out);
  }
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    if (rows <= 4) {
      k_.matmul(weight, x, rows, y, epilogue);
      return;
    }
    const size_t width = static_cast<size_t>(padded_dim(weight.in));
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(weight.out);
    std::vector<float> sum(y, y + (epilogue == Epilogue::add ? count : 0));
    sum.resize(count);
    for (const bool second : {false, true}) {
      std::vector<bf16> half(x, x + static_cast<size_t>(rows) * width);
      for (size_t i = 0; i < half.size(); ++i) {
        half[i] = (i % width >= width / 2) == second ? half[i] : bf16{0};
      }
      k_.matmul(weight, half.data(), rows, y, Epilogue::store);
      std::transform(sum.begin(), sum.end(), y, sum.begin(), std::plus<float>());
    }
    std::copy(sum.begin(), sum.end(), y);
  }
  void add_bias(const float* bias, int rows, int dim, float* y) override { k_.add_bias(bias, rows, dim, y); }
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override {
    k_.rms_norm(x, weight, eps, rows, dim, out);
  }
  void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override { k_.silu_mul(gate_up, rows, dim, out); }
  void store_qkv(const QkvArgs& args) override { k_.store_qkv(args); }
  void attention(const AttentionArgs& args) override { k_.attention(args); }
  void attention_mass(const MassArgs& args) override { k_.attention_mass(args); }
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out) override {
    k_.quantize_head_page(source, tokens, shape, format, out);
  }
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override {
    k_.dequantize_head_page(source, shape, format, out);
  }
  void parallel(int count, const void* state, void (*body)(const void*, int)) override {
    k_.parallel(count, state, body);
  }

 private:
  Kernels& k_;
};

struct Reference {
  std::vector<TokenId> tokens;
  std::vector<float> logits;  // (tokens, vocabulary)
  std::vector<uint16_t> kv;
};

std::vector<TokenId> random_tokens(std::mt19937& random, int count, int vocabulary) {
  std::vector<TokenId> tokens(static_cast<size_t>(count));
  for (TokenId& token : tokens) {
    token = static_cast<TokenId>(random() % static_cast<unsigned>(vocabulary));
  }
  return tokens;
}

// A pool whose pages come in random order, with finite garbage in them.
struct ShuffledPool {
  std::unique_ptr<Device> device = make_cpu_device(size_t{1} << 40);
  std::unique_ptr<PagePool> pool;
  ShuffledPool(const KvShape& shape, int sets, std::mt19937& random) {
    std::byte* memory = device->allocate(page_set_bytes(shape) * static_cast<size_t>(sets), "test");
    pool = std::make_unique<PagePool>(memory, page_set_bytes(shape), sets);
    std::vector<std::byte*> taken;
    while (std::byte* set = pool->take()) {
      taken.push_back(set);
    }
    std::shuffle(taken.begin(), taken.end(), random);
    for (std::byte* set : taken) {
      pool->give(set);
    }
  }
};

Reference make_reference(LoadedModel& loaded, std::mt19937& random, int tokens) {
  Reference reference;
  reference.tokens = random_tokens(random, tokens, loaded.config.vocab_size);
  ShuffledPool pages(loaded.model->kv_shape(), 8, random);
  DrivenSequence sequence(loaded.model->kv_shape(), *pages.pool, reference.tokens);
  Activations a = loaded.model->make_activations(kRows, kRows, *pages.device);
  DrivenSequence* const one = &sequence;
  while (sequence.left() > 0) {  // one token at a time: plain decoding
    const int rows = 1;
    const std::vector<float> row = run_pass(*loaded.model, a, {&one, 1}, {&rows, 1});
    reference.logits.insert(reference.logits.end(), row.begin(), row.end());
  }
  reference.kv = sequence.kv_bits();
  return reference;
}

// One random case: some of the references together, cut at random; returns how many values differ.
int64_t differing_values(const Transformer& model, Activations& a, std::span<const Reference> references,
                         std::mt19937& random) {
  const KvShape shape = model.kv_shape();
  ShuffledPool pages(shape, 40, random);
  std::vector<std::unique_ptr<DrivenSequence>> sequences;
  std::vector<const Reference*> of;
  const int count = 1 + static_cast<int>(random() % 4);
  for (int i = 0; i < count; ++i) {
    of.push_back(&references[random() % references.size()]);
    sequences.push_back(std::make_unique<DrivenSequence>(shape, *pages.pool, of.back()->tokens));
  }
  const size_t vocabulary = static_cast<size_t>(model.config().vocab_size);
  const int largest_chunk = std::vector<int>{1, 3, 17, 64, 100}[random() % 5];
  int64_t differing = 0;
  for (;;) {
    std::vector<DrivenSequence*> members;
    std::vector<const Reference*> expected;
    std::vector<int> rows;
    int rows_left = kRows;
    for (int i = 0; i < count; ++i) {
      DrivenSequence& sequence = *sequences[static_cast<size_t>(i)];
      const int chunk =
          std::min({1 + static_cast<int>(random() % static_cast<unsigned>(largest_chunk)), sequence.left(), rows_left});
      if (chunk > 0 && (members.empty() || random() % 4 != 0)) {
        if (random() % 3 == 0) {
          const int past = sequence.done() / kPageTokens;
          sequence.move_past(pages.device->allocate(page_set_bytes(shape) * static_cast<size_t>(past) + 1, "past"),
                             past);
        }
        members.push_back(&sequence);
        expected.push_back(of[static_cast<size_t>(i)]);
        rows.push_back(chunk);
        rows_left -= chunk;
      }
    }
    if (members.empty()) {
      break;
    }
    std::vector<int> begin;
    for (const DrivenSequence* member : members) {
      begin.push_back(member->done());
    }
    const std::vector<float> logits = run_pass(model, a, members, rows);
    size_t row = 0;
    for (size_t m = 0; m < members.size(); ++m) {
      for (int i = 0; i < rows[m]; ++i, ++row) {
        const float* ours = logits.data() + row * vocabulary;
        const float* theirs = expected[m]->logits.data() + static_cast<size_t>(begin[m] + i) * vocabulary;
        for (size_t v = 0; v < vocabulary; ++v) {
          differing += std::bit_cast<uint32_t>(ours[v]) != std::bit_cast<uint32_t>(theirs[v]) ? 1 : 0;
        }
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    const std::vector<uint16_t> bits = sequences[static_cast<size_t>(i)]->kv_bits();
    for (size_t b = 0; b < bits.size(); ++b) {
      differing += bits[b] != of[static_cast<size_t>(i)]->kv[b] ? 1 : 0;
    }
  }
  return differing;
}

TEST(RowInvariance, FiveHundredRandomCasesHaveNoDifferingBit) {
  std::mt19937 random(1);
  std::vector<Isa> isas{Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};
  std::erase_if(isas, [](Isa isa) { return !isa_supported(isa); });
  const int cases_each = 540 / 9 / static_cast<int>(isas.size());  // three families, three thread counts
  int cases = 0;
  for (const char* name : {"llama-plain", "qwen3-qknorm", "qwen2-bias"}) {
    for (const Isa isa : isas) {
      const std::filesystem::path dir = std::filesystem::path(VERICACHE_ORACLES) / name;
      LoadedModel alone(dir, 1, isa, kRows);
      std::vector<Reference> references;
      for (const int tokens : {1, 63, 64, 130, 250}) {
        references.push_back(make_reference(alone, random, tokens));
      }
      for (const int threads : {1, 2, 3}) {
        LoadedModel loaded(dir, threads, isa, kRows);
        std::unique_ptr<Device> device = make_cpu_device(size_t{1} << 40);
        Activations a = loaded.model->make_activations(kRows, kRows, *device);
        for (int i = 0; i < cases_each; ++i, ++cases) {
          ASSERT_EQ(differing_values(*loaded.model, a, references, random), 0)
              << name << " " << isa_name(isa) << " threads " << threads << " case " << i;
        }
      }
    }
  }
  EXPECT_GE(cases, 500);
}

TEST(RowInvariance, IsSeenToFailWhenASumDependsOnTheRowCount) {
  std::mt19937 random(2);
  LoadedModel loaded(std::filesystem::path(VERICACHE_ORACLES) / "llama-plain", 2, best_isa(), kRows);
  const std::vector<Reference> references{make_reference(loaded, random, 130)};
  RowCountDependentKernels broken(*loaded.kernels);
  const Transformer model(loaded.config, loaded.weights, broken);
  std::unique_ptr<Device> device = make_cpu_device(size_t{1} << 40);
  Activations a = model.make_activations(kRows, kRows, *device);
  int64_t differing = 0;
  for (int i = 0; i < 10; ++i) {
    differing += differing_values(model, a, references, random);
  }
  EXPECT_GT(differing, 1000);
}

}  // namespace
}  // namespace vericache
