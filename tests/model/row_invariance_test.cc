// Rule 1 of the promise, on whole models: KV and logits of a row do not change by a bit, however the work is cut.
#include <algorithm>
#include <bit>
#include <cstdlib>

#include "forwarding_kernels.h"
#include "model/forward_harness.h"

namespace vericache {
namespace {

constexpr int kRows = 160;  // of one pass at most
constexpr int kSequences = 6;
constexpr int kTokens = 700;

// Forwards everything, but sums the K of a product in two halves when a pass has more than four rows: what a split-K
// library does. On memory that the CPU addresses.
class RowCountDependentKernels final : public test::ForwardingKernels {
 public:
  using ForwardingKernels::ForwardingKernels;
  std::string_view name() const override { return "broken on purpose"; }
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
};

// A sequence decoded alone, one token at a time.
struct Reference {
  std::vector<TokenId> tokens;
  Sampling sampling;
  std::vector<float> logits;     // (tokens, vocabulary)
  std::vector<TokenId> chosen;   // (tokens): what they choose
  std::vector<uint64_t> hashes;  // (tokens)
  std::vector<uint16_t> kv;
};

int below(std::mt19937& random, int n) {
  return static_cast<int>(random() % static_cast<unsigned>(n));
}

Reference make_reference(Workbench& bench, std::mt19937& random, int tokens) {
  Reference reference;
  for (int i = 0; i < tokens; ++i) {
    reference.tokens.push_back(below(random, bench.model.config().vocab_size));
  }
  reference.sampling = {.temperature = 0.4f * static_cast<float>(below(random, 3)), .seed = random()};
  bench.shuffle(random);
  DrivenSequence sequence(bench, reference.tokens);
  while (sequence.left() > 0) {
    const PassMember one{.sequence = &sequence, .rows = 1, .logits = 1, .sampling = reference.sampling};
    const PassOutput out = run_pass(bench, {&one, 1});
    reference.logits.insert(reference.logits.end(), out.logits.begin(), out.logits.end());
    reference.chosen.push_back(out.chosen.front());
    reference.hashes.push_back(out.hashes.front());
  }
  reference.kv = sequence.kv_bits();
  return reference;
}

// A page border, its neighbours, and lengths that attention cuts into several pieces.
std::vector<Reference> make_references(Workbench& bench, std::mt19937& random) {
  std::vector<Reference> references;
  for (const int tokens : {1, 63, 64, 130, 250, kTokens}) {
    references.push_back(make_reference(bench, random, tokens));
  }
  return references;
}

struct Driven {
  const Reference* of = nullptr;
  std::unique_ptr<DrivenSequence> sequence;
  int largest_chunk = 0;  // now; a prompt's chunks, a verification's rows, plain decoding
};

// Some of the sequences, in any order, with as many rows as it happens; what is computed moves out of the tails now and
// then. Logits are wanted of all rows, of the last ones, of one, or of none.
std::vector<PassMember> draw_pass(std::vector<Driven>& all, std::mt19937& random) {
  std::shuffle(all.begin(), all.end(), random);
  std::vector<PassMember> members;
  int rows_left = kRows;
  for (Driven& driven : all) {
    if (driven.largest_chunk == 0 || below(random, 8) == 0) {
      driven.largest_chunk = std::vector<int>{1, 3, 17, 64, 100, kRows}[random() % 6];
    }
    DrivenSequence& sequence = *driven.sequence;
    const int rows = std::min({1 + below(random, driven.largest_chunk), sequence.left(), rows_left});
    if (rows == 0 || (!members.empty() && below(random, 4) == 0)) {
      continue;
    }
    if (below(random, 3) == 0) {
      const int waiting = sequence.done() / kPageTokens - sequence.past_pages();
      sequence.move_past(sequence.past_pages() + below(random, waiting + 1));
    }
    const int logits = below(random, 2) == 0 ? rows : below(random, 2) == 0 ? 1 : below(random, rows + 1);
    members.push_back({.sequence = &sequence, .rows = rows, .logits = logits, .sampling = driven.of->sampling});
    rows_left -= rows;
  }
  return members;
}

// Of the logits that a pass gave for tokens [first, first + rows), and of what they chose.
int64_t differing_logits(const Reference& expected, int first, int rows, size_t vocabulary, const PassOutput& out,
                         size_t row) {
  int64_t differing = 0;
  for (size_t token = static_cast<size_t>(first); token < static_cast<size_t>(first + rows); ++token, ++row) {
    const float* ours = out.logits.data() + row * vocabulary;
    const float* theirs = expected.logits.data() + token * vocabulary;
    for (size_t v = 0; v < vocabulary; ++v) {
      differing += std::bit_cast<uint32_t>(ours[v]) != std::bit_cast<uint32_t>(theirs[v]) ? 1 : 0;
    }
    differing += out.chosen[row] != expected.chosen[token] ? 1 : 0;
    differing += out.hashes[row] != expected.hashes[token] ? 1 : 0;
  }
  return differing;
}

// One random case: some of the references together, cut at random; returns how many values differ.
int64_t differing_values(Workbench& bench, std::span<const Reference> references, std::mt19937& random) {
  bench.shuffle(random);
  std::vector<Driven> all(static_cast<size_t>(1 + below(random, kSequences)));
  for (Driven& driven : all) {
    driven.of = &references[random() % references.size()];
    driven.sequence = std::make_unique<DrivenSequence>(bench, driven.of->tokens);
  }
  const size_t vocabulary = static_cast<size_t>(bench.model.config().vocab_size);
  int64_t differing = 0;
  for (std::vector<PassMember> members = draw_pass(all, random); !members.empty(); members = draw_pass(all, random)) {
    const PassOutput out = run_pass(bench, members);
    size_t row = 0;
    for (const PassMember& member : members) {
      const auto driven =
          std::find_if(all.begin(), all.end(), [&](const Driven& d) { return d.sequence.get() == member.sequence; });
      differing +=
          differing_logits(*driven->of, member.sequence->done() - member.logits, member.logits, vocabulary, out, row);
      row += static_cast<size_t>(member.logits);
    }
  }
  for (const Driven& driven : all) {
    const std::vector<uint16_t> bits = driven.sequence->kv_bits();
    check(bits.size() == driven.of->kv.size(), "every sequence was driven to its end");
    for (size_t b = 0; b < bits.size(); ++b) {
      differing += bits[b] != driven.of->kv[b] ? 1 : 0;
    }
  }
  return differing;
}

// VERICACHE_TEST_CASES asks for more than the 540.
int wanted_cases() {
  const char* const cases = std::getenv("VERICACHE_TEST_CASES");
  return std::max(540, cases != nullptr ? std::atoi(cases) : 0);
}

TEST(RowInvariance, FiveHundredRandomCasesHaveNoDifferingBit) {
  std::mt19937 random(1);
  const std::vector<const char*> families{"llama-plain", "qwen3-qknorm", "qwen2-bias"};
  const std::vector<std::string> isas = test::tested_isas();
  const std::vector<int> thread_counts = test::tested_threads();
  const int setups = static_cast<int>(families.size() * isas.size() * thread_counts.size());
  const int cases_each = (wanted_cases() + setups - 1) / setups;
  int cases = 0;
  for (const char* name : families) {
    const std::filesystem::path dir = std::filesystem::path(VERICACHE_ORACLES) / name;
    for (const std::string& isa : isas) {
      std::vector<Reference> references;
      for (const int threads : thread_counts) {
        LoadedModel loaded(dir, {.threads = threads, .isa = isa, .max_rows = kRows, .max_sequences = kSequences});
        Workbench bench(*loaded.model, kRows, kSequences, kTokens);
        if (references.empty()) {
          references = make_references(bench, random);
        }
        for (int i = 0; i < cases_each; ++i, ++cases) {
          ASSERT_EQ(differing_values(bench, references, random), 0)
              << name << " " << loaded.kernels->name() << " case " << i;
        }
      }
    }
  }
  EXPECT_GE(cases, 500);
  EXPECT_GE(cases, wanted_cases());
}

TEST(RowInvariance, IsSeenToFailWhenASumDependsOnTheRowCount) {
  if (!test::make_test_device()->addressable()) {
    GTEST_SKIP() << "the broken kernels compute where the CPU addresses memory";
  }
  std::mt19937 random(2);
  LoadedModel loaded(std::filesystem::path(VERICACHE_ORACLES) / "llama-plain", {.max_rows = kRows});
  Workbench whole(*loaded.model, kRows, kSequences, kTokens);
  const std::vector<Reference> references{make_reference(whole, random, 130)};
  RowCountDependentKernels broken(*loaded.kernels);
  const Transformer model(loaded.config, loaded.weights, broken);
  Workbench bench(model, kRows, kSequences, kTokens);
  int64_t differing = 0;
  for (int i = 0; i < 10; ++i) {
    differing += differing_values(bench, references, random);
  }
  EXPECT_GT(differing, 1000);
}

}  // namespace
}  // namespace vericache
