// Rule 1 of the promise, on whole models: KV and logits of a row do not change by a bit, however the work is cut.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>

#include "forwarding_kernels.h"
#include "jittered_kernels.h"
#include "model/forward_harness.h"

namespace vericache {
namespace {

// Sizes of a random case. Most are of small passes, where rows are few and mixes many; some of passes as long as a
// prompt's, with prompts that are longer than one of them.
struct Scale {
  int rows = 0;  // of one pass at most
  int sequences = 0;
  int tokens = 0;  // of the longest sequence
};
constexpr Scale kSmall{.rows = 160, .sequences = 6, .tokens = 700};
constexpr Scale kLarge{.rows = 2048, .sequences = 4, .tokens = 2200};

// Forwards everything, but sums the K of a product in two halves when a pass has more than so many rows: what a split-K
// library does. On memory that the CPU addresses.
class RowCountDependentKernels final : public test::ForwardingKernels {
 public:
  RowCountDependentKernels(Kernels& to, int rows) : ForwardingKernels(to), rows_(rows) {}
  std::string_view name() const override { return "broken on purpose"; }
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    if (rows <= rows_) {
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

 private:
  int rows_;
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

// Of small cases: a page border, its neighbours, and lengths that attention cuts into several pieces. The last one is
// of large cases, in which the others keep it company.
std::vector<Reference> make_references(Workbench& small, Workbench& large, std::mt19937& random) {
  std::vector<Reference> references;
  for (const int tokens : {1, 63, 64, 130, 250, kSmall.tokens}) {
    references.push_back(make_reference(small, random, tokens));
  }
  references.push_back(make_reference(large, random, kLarge.tokens));
  return references;
}

struct Driven {
  const Reference* of = nullptr;
  std::unique_ptr<DrivenSequence> sequence;
  int largest_chunk = 0;  // now; a prompt's chunks, a verification's rows, plain decoding
};

// A prompt's chunks, a verification's rows, plain decoding; of a sequence of a large case, chunks that fill its passes.
int draw_chunk(const Workbench& bench, const DrivenSequence& sequence, std::mt19937& random) {
  if (bench.max_rows > kSmall.rows && sequence.length() > kSmall.tokens) {
    return std::array{300, 700, 1025, bench.max_rows, bench.max_rows}[random() % 5];
  }
  return std::array{1, 3, 17, 64, 100, kSmall.rows}[random() % 6];
}

// Some of the sequences, in any order, with as many rows as it happens; what is computed moves out of the tails now and
// then. Logits are wanted of all rows, of the last ones, of one, or of none.
std::vector<PassMember> draw_pass(const Workbench& bench, std::vector<Driven>& all, std::mt19937& random) {
  std::shuffle(all.begin(), all.end(), random);
  std::vector<PassMember> members;
  int rows_left = bench.max_rows;
  for (Driven& driven : all) {
    DrivenSequence& sequence = *driven.sequence;
    if (driven.largest_chunk == 0 || below(random, 8) == 0) {
      driven.largest_chunk = draw_chunk(bench, sequence, random);
    }
    const int wanted = below(random, 4) == 0 ? driven.largest_chunk : 1 + below(random, driven.largest_chunk);
    const int rows = std::min({wanted, sequence.left(), rows_left});
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

// What a random case came to.
struct Outcome {
  int64_t differing = 0;  // values
  int most_rows = 0;      // of a pass
};

// Some of the references together, cut at random. A large case has the long one, the last, among them.
Outcome run_case(Workbench& bench, std::span<const Reference> references, std::mt19937& random) {
  bench.shuffle(random);
  const bool large = bench.max_rows > kSmall.rows;
  const size_t short_ones = std::max<size_t>(1, references.size() - 1);
  std::vector<Driven> all(static_cast<size_t>(1 + below(random, large ? kLarge.sequences : kSmall.sequences)));
  for (Driven& driven : all) {
    driven.of = large && &driven == &all.front() ? &references.back() : &references[random() % short_ones];
    driven.sequence = std::make_unique<DrivenSequence>(bench, driven.of->tokens);
  }
  const size_t vocabulary = static_cast<size_t>(bench.model.config().vocab_size);
  Outcome outcome;
  for (std::vector<PassMember> members = draw_pass(bench, all, random); !members.empty();
       members = draw_pass(bench, all, random)) {
    const PassOutput out = run_pass(bench, members);
    size_t row = 0;
    int rows = 0;
    for (const PassMember& member : members) {
      const auto driven =
          std::find_if(all.begin(), all.end(), [&](const Driven& d) { return d.sequence.get() == member.sequence; });
      outcome.differing +=
          differing_logits(*driven->of, member.sequence->done() - member.logits, member.logits, vocabulary, out, row);
      row += static_cast<size_t>(member.logits);
      rows += member.rows;
    }
    outcome.most_rows = std::max(outcome.most_rows, rows);
  }
  for (const Driven& driven : all) {
    const std::vector<uint16_t> bits = driven.sequence->kv_bits();
    check(bits.size() == driven.of->kv.size(), "every sequence was driven to its end");
    for (size_t b = 0; b < bits.size(); ++b) {
      outcome.differing += bits[b] != driven.of->kv[b] ? 1 : 0;
    }
  }
  return outcome;
}

// VERICACHE_TEST_CASES asks for more than the 540.
int wanted_cases() {
  const char* const cases = std::getenv("VERICACHE_TEST_CASES");
  return std::max(540, cases != nullptr ? std::atoi(cases) : 0);
}

// One case in so many is large: a GPU has the time for more of them.
int large_every() {
  return test::tested_device() == DeviceKind::cuda ? 6 : 15;
}

TEST(RowInvariance, FiveHundredRandomCasesHaveNoDifferingBit) {
  std::mt19937 random(1);
  const std::vector<const char*> families{"llama-plain", "qwen3-qknorm", "qwen2-bias"};
  const std::vector<std::string> isas = test::tested_isas();
  const std::vector<int> thread_counts = test::tested_threads();
  const int setups = static_cast<int>(families.size() * isas.size() * thread_counts.size());
  const int cases_each = (wanted_cases() + setups - 1) / setups;
  int cases = 0;
  int most_rows = 0;
  int64_t disturbances = 0;
  const bool lanes = !test::make_test_device()->addressable();
  for (const char* name : families) {
    const std::filesystem::path dir = std::filesystem::path(VERICACHE_ORACLES) / name;
    for (const std::string& isa : isas) {
      std::vector<Reference> references;
      for (const int threads : thread_counts) {
        LoadedModel loaded(
            dir, {.threads = threads, .isa = isa, .max_rows = kLarge.rows, .max_sequences = kSmall.sequences});
        if (references.empty()) {
          Workbench small(*loaded.model, kSmall.rows, 1, kSmall.tokens);
          Workbench large(*loaded.model, 1, 1, kLarge.tokens);
          references = make_references(small, large, random);
        }
        // Where lanes run beside each other they come late and meet others; the references did not.
        std::unique_ptr<test::JitteredKernels> jittered;
        if (lanes) {
          jittered = std::make_unique<test::JitteredKernels>(*loaded.kernels, loaded.weights.layers.front().gate_up,
                                                             *loaded.memory, random());
        }
        const Transformer model(loaded.config, loaded.weights, lanes ? *jittered : *loaded.kernels);
        Workbench small(model, kSmall.rows, kSmall.sequences, kSmall.tokens);
        Workbench large(model, kLarge.rows, kLarge.sequences, kLarge.tokens);
        for (int i = 1; i <= cases_each; ++i, ++cases) {
          const bool is_large = i % large_every() == 0;
          const Outcome outcome = run_case(is_large ? large : small, references, random);
          ASSERT_EQ(outcome.differing, 0) << name << " " << loaded.kernels->name() << " case " << i;
          most_rows = std::max(most_rows, outcome.most_rows);
        }
        disturbances += lanes ? jittered->disturbances() : 0;
      }
    }
  }
  EXPECT_GE(cases, 500);
  EXPECT_GE(cases, wanted_cases());
  EXPECT_EQ(most_rows, kLarge.rows);
  EXPECT_TRUE(!lanes || disturbances > cases) << disturbances;
}

// Of some cases against kernels that are broken for passes of more than so many rows.
int64_t differing_when_broken(const Scale& scale, int tokens, int rows_that_are_whole, int cases) {
  std::mt19937 random(2);
  LoadedModel loaded(std::filesystem::path(VERICACHE_ORACLES) / "llama-plain", {.max_rows = scale.rows});
  Workbench whole(*loaded.model, 1, 1, scale.tokens);
  const std::vector<Reference> references{make_reference(whole, random, tokens)};
  RowCountDependentKernels broken(*loaded.kernels, rows_that_are_whole);
  const Transformer model(loaded.config, loaded.weights, broken);
  Workbench bench(model, scale.rows, scale.sequences, scale.tokens);
  int64_t differing = 0;
  for (int i = 0; i < cases; ++i) {
    differing += run_case(bench, references, random).differing;
  }
  return differing;
}

TEST(RowInvariance, IsSeenToFailWhenASumDependsOnTheRowCount) {
  if (!test::make_test_device()->addressable()) {
    GTEST_SKIP() << "the broken kernels compute where the CPU addresses memory";
  }
  EXPECT_GT(differing_when_broken(kSmall, 130, 4, 10), 1000);
}

// What no pass of 1,024 rows would show.
TEST(RowInvariance, IsSeenToFailWhenASumChangesAboveAThousandRows) {
  if (!test::make_test_device()->addressable()) {
    GTEST_SKIP() << "the broken kernels compute where the CPU addresses memory";
  }
  EXPECT_GT(differing_when_broken(kLarge, kLarge.tokens, 1024, 2), 1000);
  EXPECT_EQ(differing_when_broken(kSmall, 130, 1024, 2), 0);
}

}  // namespace
}  // namespace vericache
