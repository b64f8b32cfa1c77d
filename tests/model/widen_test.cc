// Widened models: they compute the trained model's function, on data that is nowhere zero but where the function asks
// for it.
#include "model/widen.h"

#include <array>
#include <cmath>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "model/forward_harness.h"
#include "model/temp_directory.h"

namespace vericache {
namespace {

constexpr int kRows = 256;  // of one pass
constexpr int kTokens = 512;
constexpr const char* kWide = "layers=6,hidden=512,heads=16,kv_heads=4,head_dim=128,intermediate=1024";

std::filesystem::path oracle(const char* name) {
  return std::filesystem::path(VERICACHE_ORACLES) / name;
}
WidenSpec spec_of(const std::string& shape) {
  const std::optional<WidenSpec> spec = parse_widen("widen:models/x?" + shape);
  return spec ? *spec : WidenSpec{};
}

// A model as trained, where shape is empty, or widened; and one sequence of it.
class Driven {
 public:
  Driven(const std::filesystem::path& dir, const std::string& shape, std::vector<TokenId> tokens)
      : device_(test::make_test_device()) {
    const ModelConfig trained = load_config(dir);
    const Checkpoint checkpoint(dir);
    config_ = shape.empty() ? trained : widen_config(trained, spec_of(shape));
    kernels_ = test::make_test_kernels({.isa = {},
                                        .threads = 2,
                                        .shape = {config_.layers, config_.kv_heads, config_.head_dim},
                                        .heads = config_.heads,
                                        .max_rows = kRows,
                                        .max_context_tokens = kTokens,
                                        .max_sequences = 1});
    size_t last = 0;
    const auto progress = [&last](size_t done, size_t total) {
      EXPECT_TRUE(done >= last && done <= total);
      last = done;
    };
    weights_ = shape.empty() ? load_weights(checkpoint, trained, *kernels_, *device_, kTokens, progress)
                             : load_widened(checkpoint, trained, config_, *kernels_, *device_, kTokens, progress);
    EXPECT_EQ(device_->used(), weight_bytes(config_, *kernels_, kTokens));
    EXPECT_EQ(device_->used(), weights_.bytes);
    EXPECT_GT(last, weights_.bytes / 2);
    const LayerWeights& layer = weights_.layers.front();
    kernels_->tune(std::array{layer.qkv, layer.output, layer.gate_up, layer.down, weights_.head});
    model_ = std::make_unique<Transformer>(config_, weights_, *kernels_);
    bench_ = std::make_unique<Workbench>(*model_, kRows, 1, kTokens);
    sequence_ = std::make_unique<DrivenSequence>(*bench_, std::move(tokens));
  }

  const ModelConfig& config() const { return config_; }
  int left() const { return sequence_->left(); }

  // One pass over the next tokens; logits of each, (rows, vocabulary).
  std::vector<float> run(int rows) {
    const PassMember member{.sequence = sequence_.get(), .rows = rows, .logits = rows};
    return run_pass(*bench_, {&member, 1}).logits;
  }
  // The residual stream behind the last layer, (rows, hidden).
  std::vector<float> hidden(int rows) const { return read(bench_->activations.hidden, rows * config_.hidden_size); }
  // Of the last layer, (rows, heads).
  std::vector<float> log_sum_exp(int rows) const { return read(bench_->activations.log_sum_exp, rows * config_.heads); }

  struct HeadSize {
    double mean_square = 0;
    int zeros = 0;
    int count = 0;
    bool finite = true;
  };
  // Of each head's keys and values, (layers, kv_heads, 2).
  std::vector<HeadSize> kv_sizes() const {
    std::vector<HeadSize> sizes(static_cast<size_t>(config_.layers) * static_cast<size_t>(config_.kv_heads) * 2);
    const std::vector<uint16_t> bits = sequence_->kv_bits();  // (pages, layers, kv_heads, tokens, head_dim, 2)
    size_t at = 0;
    for (int page = 0; page * kPageTokens < sequence_->done(); ++page) {
      const int tokens = std::min(kPageTokens, sequence_->done() - page * kPageTokens);
      for (size_t head = 0; head < sizes.size() / 2; ++head) {
        for (int i = 0; i < tokens * config_.head_dim * 2; ++i) {
          HeadSize& size = sizes[2 * head + static_cast<size_t>(i % 2)];
          const float value = to_float({bits[at++]});
          size.mean_square += static_cast<double>(value) * value;
          size.zeros += value == 0 ? 1 : 0;
          size.finite = size.finite && std::isfinite(value);
          ++size.count;
        }
      }
    }
    EXPECT_EQ(at, bits.size());
    for (HeadSize& size : sizes) {
      size.mean_square /= size.count;
    }
    return sizes;
  }

 private:
  std::vector<float> read(const float* from, int count) const {
    std::vector<float> values(static_cast<size_t>(count));
    bench_->device->read(values.data(), reinterpret_cast<const std::byte*>(from), values.size() * sizeof(float));
    return values;
  }

  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Kernels> kernels_;
  Weights weights_;
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<Workbench> bench_;
  std::unique_ptr<DrivenSequence> sequence_;
};

double relative_error(std::span<const float> a, std::span<const float> b) {
  double error = 0;
  double reference = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    reference += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(error / reference);
}

// Records, then a request for tool calls: what the trained model's reference answers, and how surely.
struct RecordsCase {
  std::vector<TokenId> prompt;
  std::vector<TokenId> greedy;  // 64 tokens
  std::vector<double> margins;
};

RecordsCase records_case() {
  std::ifstream file(bundled_model("vericode-5m") / "golden" / "golden.json");
  RecordsCase records;
  for (const nlohmann::json& item : nlohmann::json::parse(file)) {
    if (item["name"] == "calls-6") {
      records = {item["prompt_ids"], item["greedy_ids"], item["margins"]};
    }
  }
  EXPECT_GT(records.prompt.size(), 200u);
  records.greedy.resize(64);
  records.margins.resize(64);
  return records;
}

struct Case {
  const char* name;
  std::filesystem::path dir;
  std::string shape;
};

class Widened : public testing::TestWithParam<Case> {
 protected:
  static std::vector<TokenId> prompt(const ModelConfig& config) {
    std::vector<TokenId> tokens = records_case().prompt;
    tokens.resize(200);
    if (config.vocab_size == 8192) {
      return tokens;
    }
    std::mt19937 random(3);
    for (TokenId& token : tokens) {
      token = static_cast<TokenId>(random() % static_cast<unsigned>(config.vocab_size));
    }
    return tokens;
  }
};
INSTANTIATE_TEST_SUITE_P(
    Models, Widened,
    testing::Values(
        Case{"vericode", bundled_model("vericode-5m"), kWide},
        // Heads as they are, groups of 5 over groups of 2, sizes that are no power of two times the trained ones.
        Case{"llama", oracle("llama-plain"), "layers=4,hidden=208,heads=15,kv_heads=3,head_dim=32,intermediate=272"},
        Case{"mistral", oracle("mistral"), "layers=3,hidden=512,heads=8,kv_heads=4,head_dim=128,intermediate=256"},
        Case{"qwen2_bias", oracle("qwen2-bias"),
             "layers=5,hidden=256,heads=12,kv_heads=3,head_dim=96,intermediate=320"},
        Case{"llama3_rope", oracle("llama3-scaled-tied"),
             "layers=3,hidden=128,heads=6,kv_heads=2,head_dim=128,intermediate=256"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_P(Widened, LogitsAreTheTrainedModels) {
  const std::vector<TokenId> tokens = prompt(load_config(GetParam().dir));
  const int rows = static_cast<int>(tokens.size());
  Driven trained(GetParam().dir, "", tokens);
  Driven wide(GetParam().dir, GetParam().shape, tokens);
  const double error = relative_error(wide.run(rows), trained.run(rows));
  EXPECT_LT(error, 0.02);
  printf("%-12s relative error of logits %.5f\n", GetParam().name, error);

  const std::vector<float> stream = wide.hidden(rows);
  const size_t hidden = static_cast<size_t>(wide.config().hidden_size);
  int stained = 0;
  for (size_t i = 0; i < stream.size(); ++i) {
    stained += i % hidden >= static_cast<size_t>(trained.config().hidden_size) && stream[i] != 0.0f ? 1 : 0;
  }
  EXPECT_EQ(stained, 0) << "channels behind the trained ones stay zero";
}

TEST_P(Widened, EveryHeadOfEveryLayerHoldsKvOfTheTrainedSize) {
  const std::vector<TokenId> tokens = prompt(load_config(GetParam().dir));
  Driven trained(GetParam().dir, "", tokens);
  Driven wide(GetParam().dir, GetParam().shape, tokens);
  trained.run(static_cast<int>(tokens.size()));
  wide.run(static_cast<int>(tokens.size()));
  std::array<double, 2> largest{};  // of keys and of values
  const std::vector<Driven::HeadSize> sizes = trained.kv_sizes();
  for (size_t i = 0; i < sizes.size(); ++i) {
    largest[i % 2] = std::max(largest[i % 2], sizes[i].mean_square);
  }
  const std::vector<Driven::HeadSize> wide_sizes = wide.kv_sizes();
  for (size_t i = 0; i < wide_sizes.size(); ++i) {
    const Driven::HeadSize& size = wide_sizes[i];
    const std::string where = std::string(i % 2 == 0 ? "keys" : "values") + " of head " + std::to_string(i / 2);
    EXPECT_TRUE(size.finite) << where;
    EXPECT_LT(size.zeros, size.count / 100) << where;
    EXPECT_GT(size.mean_square, 1e-4 * largest[i % 2]) << where;
    EXPECT_LT(size.mean_square, 4 * largest[i % 2]) << where;
  }
}

TEST(Widen, GreedyTextIsTheTrainedModels) {
  const RecordsCase records = records_case();
  std::vector<TokenId> tokens = records.prompt;
  tokens.insert(tokens.end(), records.greedy.begin(), records.greedy.end());
  Driven trained(bundled_model("vericode-5m"), "", tokens);
  Driven wide(bundled_model("vericode-5m"), kWide, tokens);
  const size_t vocabulary = static_cast<size_t>(trained.config().vocab_size);
  std::vector<float> expected;
  std::vector<float> got;
  // The prompt in chunks, then token by token as text is written.
  while (trained.left() > 0) {
    const int prompt_left = trained.left() - static_cast<int>(records.greedy.size());
    const int rows = std::clamp(prompt_left, 1, kRows);
    expected = trained.run(rows);
    got = wide.run(rows);
    const size_t next = tokens.size() - static_cast<size_t>(trained.left());
    if (next < records.prompt.size() || next == tokens.size()) {
      continue;
    }
    const std::span<const float> row = std::span(got).last(vocabulary);
    EXPECT_LT(relative_error(row, std::span(expected).last(vocabulary)), 0.05);
    const auto best = static_cast<TokenId>(std::max_element(row.begin(), row.end()) - row.begin());
    EXPECT_TRUE(best == tokens[next] || records.margins[next - records.prompt.size()] < 0.5)
        << "token " << next - records.prompt.size();
  }
  EXPECT_GE(std::count_if(records.margins.begin(), records.margins.end(), [](double m) { return m >= 0.5; }), 56);
}

// The softmax denominator of a query head sums over all that it asks: equal ones see the same attention.
TEST(Widen, QueryHeadsOfATrainedGroupSeeTheTrainedAttention) {
  std::vector<TokenId> tokens = records_case().prompt;
  tokens.resize(200);
  Driven trained(bundled_model("vericode-5m"), "", tokens);
  Driven wide(bundled_model("vericode-5m"), "layers=4,hidden=512,heads=20,kv_heads=4,head_dim=128,intermediate=1024",
              tokens);
  trained.run(200);
  wide.run(200);
  const std::vector<float> expected = trained.log_sum_exp(200);
  const std::vector<float> got = wide.log_sum_exp(200);
  float largest = 0;
  for (size_t row = 0; row < 200; ++row) {
    for (size_t head = 0; head < 10; ++head) {  // of the two trained KV heads
      const size_t from = head / 5 * 2 + head % 5 % 2;
      largest = std::max(largest, std::abs(got[row * 20 + head] - expected[row * 4 + from]));
    }
  }
  EXPECT_LT(largest, 0.2);
  printf("largest difference of a softmax denominator's logarithm %.3f\n", largest);
}

TEST(Widen, ReadsShapes) {
  EXPECT_FALSE(parse_widen("build/models/vericode-26m"));
  EXPECT_FALSE(parse_widen(""));
  const auto sizes = [](const WidenSpec& s) {
    return std::vector{s.layers, s.hidden_size, s.heads, s.kv_heads, s.head_dim, s.intermediate_size};
  };
  EXPECT_EQ(sizes(spec_of("shape=llama-8b")), (std::vector{32, 4096, 32, 8, 128, 14336}));
  EXPECT_EQ(sizes(spec_of("shape=qwen-14b")), (std::vector{40, 5120, 40, 8, 128, 17408}));
  EXPECT_EQ(sizes(spec_of("shape=qwen-32b")), (std::vector{64, 5120, 64, 8, 128, 25600}));
  EXPECT_EQ(sizes(spec_of("shape=llama-70b")), (std::vector{80, 8192, 64, 8, 128, 28672}));
  EXPECT_EQ(sizes(spec_of("shape=llama-8b,layers=9,kv_heads=16")), (std::vector{9, 4096, 32, 16, 128, 14336}));
  EXPECT_EQ(sizes(spec_of("intermediate=1024,layers=6,hidden=512,heads=16,kv_heads=4,head_dim=128")),
            sizes(spec_of(kWide)));
  const std::optional<WidenSpec> odd = parse_widen("widen:a?b/c=d?shape=llama-8b");
  ASSERT_TRUE(odd);
  EXPECT_EQ(odd->model_dir, "a?b/c=d");
  EXPECT_EQ(odd->shape, "shape=llama-8b");
}

TEST(Widen, RefusesWhatIsNoShape) {
  EXPECT_ERROR(parse_widen("widen:models/x"), "names no shape; write widen:DIR?shape=NAME");
  EXPECT_ERROR(parse_widen("widen:?shape=llama-8b"), "names no directory");
  EXPECT_ERROR(spec_of(""), "'' is no part of a shape");
  EXPECT_ERROR(spec_of("shape=llama-9b"), "'llama-9b' is unknown; write widen:DIR?shape=NAME, NAME one of llama-8b");
  EXPECT_ERROR(spec_of("shape"), "the shape '' is unknown");
  EXPECT_ERROR(spec_of("layers=4,shape=llama-8b"), "'shape' is no part of a shape");
  EXPECT_ERROR(spec_of("layers=4"), "does not say hidden");
  EXPECT_ERROR(spec_of("shape=llama-8b,depth=4"), "'depth' is no part of a shape");
  EXPECT_ERROR(spec_of("shape=llama-8b,"), "'' is no part of a shape");
  for (const char* value : {"0", "-4", "four", "4x", "", "1025", "99999999999"}) {
    EXPECT_ERROR(spec_of("shape=llama-8b,layers=" + std::string(value)), "is no size; give a number from 1 to 1024");
  }
  EXPECT_ERROR(spec_of("shape=llama-8b,kv_heads=5"), "32 heads cannot share 5 KV heads evenly");
  EXPECT_ERROR(spec_of("shape=llama-8b,hidden=4097"), "must be even");
  EXPECT_THROW(spec_of("shape=llama-9b"), UsageError);
}

TEST(Widen, RefusesModelsThatAShapeCannotHold) {
  const ModelConfig trained = load_config(bundled_model("vericode-5m"));
  const auto refused = [&](const std::string& change, const ModelConfig& config) {
    return error_of([&] { widen_config(config, spec_of("shape=llama-8b," + change)); });
  };
  EXPECT_EQ(refused("layers=4", trained), "");
  for (const auto& [change, said] : {std::pair("layers=3", "layers=3 cannot hold the trained model, which has 4"),
                                     {"hidden=254", "hidden=254"},
                                     {"kv_heads=1", "kv_heads=1"},
                                     {"heads=8,kv_heads=8", "heads / kv_heads=1"},
                                     {"head_dim=32", "head_dim=32"},
                                     {"intermediate=766", "intermediate=766"},
                                     {"head_dim=96", "head_dim=96 is no multiple of the trained model's 64"}}) {
    EXPECT_NE(refused(change, trained).find(said), std::string::npos) << change << ": " << refused(change, trained);
  }
  EXPECT_NE(refused("head_dim=128", load_config(oracle("qwen3-qknorm"))).find("norms queries and keys"),
            std::string::npos);
  ModelConfig yarn = trained;
  yarn.rope = {.type = RopeType::yarn, .theta = 10000.0, .factor = 16.0, .original_max_position = 256};
  EXPECT_NE(refused("head_dim=128", yarn).find("RoPE scaling depends on the head size"), std::string::npos);
  EXPECT_EQ(refused("head_dim=64", yarn), "");
  ModelConfig linear = trained;
  linear.rope = {.type = RopeType::linear, .theta = 10000.0, .factor = 4.0};
  EXPECT_EQ(refused("head_dim=192", linear), "");

  const ModelConfig wide = widen_config(trained, spec_of(kWide));
  EXPECT_EQ(wide.vocab_size, trained.vocab_size);
  EXPECT_FALSE(wide.tied_embeddings);
  EXPECT_FLOAT_EQ(wide.rms_norm_eps, trained.rms_norm_eps / 2);
}

}  // namespace
}  // namespace vericache
