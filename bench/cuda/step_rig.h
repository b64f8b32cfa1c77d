// StepRig: a model of the 8B shape with random weights, some sequences with random KV behind them, and their next step
// on the pass lane or the draft lane, the same step again and again. Driven by one thread, the benchmark's.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "backend/cuda/cuda_device.h"
#include "backend/cuda/cuda_kernels.h"
#include "model/transformer.h"
#include "model/weights.h"

namespace vericache::bench {

// Llama 3.1 8B but for the vocabulary, which the caller chooses.
inline ModelConfig llama_8b(int layers, int vocabulary) {
  ModelConfig c;
  c.family_name = "llama";
  c.hidden_size = 4096;
  c.intermediate_size = 14336;
  c.layers = layers;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.vocab_size = vocabulary;
  c.max_position = 1 << 17;
  c.rms_norm_eps = 1e-5f;
  c.rope.theta = 500000;
  return c;
}

// Values whose sums stay of one order through all layers.
class RandomWeights final : public WeightSource {
 public:
  explicit RandomWeights(const Kernels& kernels) : kernels_(kernels) {}
  void fill_matrix(MatrixRole, int, PackedMatrix& matrix) override { kernels_.fill_random(matrix, ++seed_, 0.02f); }
  void fill_vector(VectorRole, int, std::span<float> values) override { std::fill(values.begin(), values.end(), 1.0f); }

 private:
  const Kernels& kernels_;
  uint64_t seed_ = 0;
};

// What a rig's memory holds at most.
struct RigSizes {
  int layers = 32;
  int vocabulary = 8192;  // that of the other measurements
  int sequences = 16;
  int context = 31232;  // tokens before the step, of each sequence
  KvFormat format{};    // of them
};

class StepRig {
 public:
  explicit StepRig(const RigSizes& sizes)
      : sizes_(sizes),
        config_(llama_8b(sizes.layers, sizes.vocabulary)),
        shape_{config_.layers, config_.kv_heads, config_.head_dim},
        pages_((sizes.context + kPageTokens - 1) / kPageTokens),
        device_(cuda::make_cuda_device(size_t{1} << 40)),
        host_(device_->make_host_memory(size_t{1} << 40)) {
    kernels_ = make_kernels(true);
    RandomWeights source(*kernels_);
    weights_ = build_weights(source, config_, *kernels_, *device_, pages_ * kPageTokens + kPageTokens, {});
    tune(*kernels_);
    transformer_ = std::make_unique<Transformer>(config_, weights_, *kernels_);
    make_kv();
    board_ = host_->allocate_array<TokenId>(static_cast<size_t>(board_tokens() * sizes.sequences), "a benchmark");
    while (host_->ready(reinterpret_cast<std::byte*>(board_), board_bytes()) < board_bytes()) {
      std::this_thread::yield();
    }
    std::fill_n(board_, board_tokens() * sizes.sequences, TokenId{7});
  }

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  Device& device() { return *device_; }
  Device& host() { return *host_; }
  Kernels& kernels() { return *kernels_; }
  Transformer& transformer() { return *transformer_; }

  // Other kernels over the same weights.
  std::unique_ptr<Kernels> make_kernels(bool exact_products) const {
    return cuda::make_cuda_kernels({.shape = shape_,
                                    .heads = config_.heads,
                                    .max_rows = kRows,
                                    .max_context_tokens = (pages_ + 1) * kPageTokens,
                                    .max_sequences = sizes_.sequences,
                                    .exact_products = exact_products});
  }
  void tune(Kernels& kernels) const {
    const LayerWeights& layer = weights_.layers.front();
    kernels.tune(std::vector<PackedMatrix>{layer.qkv, layer.output, layer.gate_up, layer.down, weights_.head});
  }

  // Bytes that a step of so many sequences reads: every matrix once, and the KV before it.
  double weight_step_bytes() const {
    const LayerWeights& l = weights_.layers.front();
    double values = 0;
    for (const PackedMatrix& m : {l.qkv, l.output, l.gate_up, l.down}) {
      values += static_cast<double>(m.out) * m.in;
    }
    return 2 * (values * config_.layers + static_cast<double>(weights_.head.out) * weights_.head.in);
  }
  double kv_step_bytes(int sequences) const {
    return static_cast<double>(head_page_bytes(sizes_.format, shape_)) * shape_.kv_heads * pages_ * shape_.layers *
           sequences;
  }

  // The next rows of the first `sequences` sequences, kMostRows each at most, whose logits choose.
  class Step {
   public:
    static constexpr int kMostRows = kPageTokens / 2;

    Step(StepRig& rig, const Transformer& model, Kernels& lane, int sequences, bool draft, int rows = 1)
        : model_(model), activations_(model.make_activations(sequences * rows, sequences * rows, rig.device(), lane)) {
      for (int layer = 0; layer < rig.shape_.layers; ++layer) {
        for (int s = 0; s < sequences; ++s) {
          rows_.push_back(rig.rows(layer, s, rows));
        }
      }
      for (int s = 0; s < sequences; ++s) {
        const SequenceRows& of = rows_[static_cast<size_t>(s)];
        for (int i = 0; i < rows; ++i) {
          const int position = of.position + i + 1;
          choices_.push_back({.row = of.first_row + i, .position = position, .token = of.tokens + position});
        }
      }
      pass_ = {.buffers = this,
               .rows = sequences * rows,
               .layers = rig.shape_.layers,
               .draft = draft,
               .sequences = rows_,
               .logit_rows = choices_};
    }
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

    Kernels& lane() const { return *activations_.lane; }
    // Once; a draft is replayed as a graph from the third time on.
    void enqueue() {
      lane().stage(pass_);
      lane().replay_pass(pass_, [&] {
        model_.embed(pass_, activations_);
        for (int layer = 0; layer < pass_.layers; ++layer) {
          model_.layer(layer, pass_, activations_);
        }
        model_.logits(pass_, activations_);
      });
    }

   private:
    const Transformer& model_;
    Activations activations_;
    std::vector<SequenceRows> rows_;  // (layers, sequences)
    std::vector<LogitRow> choices_;
    PassRows pass_;
  };

 private:
  static constexpr int kRows = 2048;  // of a pass: exact products are of one bit class up to there

  int board_tokens() const { return pages_ * kPageTokens + kPageTokens; }
  size_t board_bytes() const { return static_cast<size_t>(board_tokens() * sizes_.sequences) * sizeof(TokenId); }
  size_t tables() const { return static_cast<size_t>(shape_.layers) * static_cast<size_t>(sizes_.sequences); }
  size_t heads() const { return static_cast<size_t>(shape_.kv_heads); }

  // Random bf16 in (-1, 1).
  void fill(std::byte* target, size_t bytes, uint64_t seed) const {
    constexpr int kWidth = 4096;
    constexpr size_t kMostRows = size_t{1} << 17;
    if (bytes % (kWidth * sizeof(bf16)) != 0) {
      throw std::logic_error("whole rows are filled");
    }
    for (size_t rows = bytes / (kWidth * sizeof(bf16)); rows > 0;) {
      const size_t count = std::min(rows, kMostRows);
      PackedMatrix matrix{static_cast<int>(count), kWidth, reinterpret_cast<bf16*>(target)};
      kernels_->fill_random(matrix, seed++, 1.0f);
      target += count * kWidth * sizeof(bf16);
      rows -= count;
    }
  }

  // (tables, kv_heads, pages) pointers to head pages that lie one behind the other from `first` on.
  std::byte** make_table(std::byte* first, size_t tables, size_t pages, size_t head_bytes) {
    std::vector<std::byte*> places(tables * heads() * pages);
    for (size_t i = 0; i < places.size(); ++i) {
      places[i] = first + i * head_bytes;
    }
    std::byte* table = device_->allocate(places.size() * sizeof(std::byte*), "page tables");
    device_->write(table, places.data(), places.size() * sizeof(std::byte*));
    return reinterpret_cast<std::byte**>(table);
  }

  void make_kv() {
    const auto pages = static_cast<size_t>(pages_);
    const size_t full = head_page_bytes(KvFormat{}, shape_);
    const size_t head_bytes = head_page_bytes(sizes_.format, shape_);
    const size_t layer_pages = heads() * pages;
    std::byte* tails = device_->allocate(tables() * heads() * full, "tails");
    fill(tails, tables() * heads() * full, 100);
    tail_table_ = make_table(tails, tables(), 1, full);
    std::byte* past = device_->allocate(tables() * layer_pages * head_bytes, "KV");
    past_table_ = make_table(past, tables(), pages, head_bytes);
    const std::vector<int> counts(heads(), pages_ * kPageTokens);
    counts_ = device_->allocate_array<int>(counts.size(), "counts");
    device_->write(reinterpret_cast<std::byte*>(counts_), counts.data(), counts.size() * sizeof(int));
    if (sizes_.format.exact()) {
      fill(past, tables() * layer_pages * head_bytes, 200);
      return;
    }
    // One layer's random pages, packed for every layer of every sequence: the codes differ in nothing but their place.
    std::byte* source = device_->allocate(layer_pages * full, "KV to be packed");
    fill(source, layer_pages * full, 300);
    std::byte** source_table = make_table(source, 1, pages, full);
    for (size_t i = 0; i < tables(); ++i) {
      kernels_->quantize({.shape = shape_,
                          .full = {{.format = {}, .head_pages = source_table, .page_stride = pages_, .tokens = counts_},
                                   {},
                                   pages_ * kPageTokens},
                          .first = 0,
                          .count = pages_,
                          .out = {.format = sizes_.format,
                                  .head_pages = past_table_ + i * layer_pages,
                                  .page_stride = pages_,
                                  .tokens = nullptr}});
    }
    kernels_->wait(kernels_->mark());
  }

  SequenceRows rows(int layer, int sequence, int count) const {
    const size_t table =
        static_cast<size_t>(layer) * static_cast<size_t>(sizes_.sequences) + static_cast<size_t>(sequence);
    const int position = pages_ * kPageTokens + kPageTokens / 2;
    SequenceRows row{.first_row = sequence * count,
                     .rows = count,
                     .position = position,
                     .tokens = board_ + static_cast<ptrdiff_t>(sequence) * board_tokens()};
    row.kv = {{.format = sizes_.format,
               .head_pages = past_table_ + table * heads() * static_cast<size_t>(pages_),
               .page_stride = pages_,
               .tokens = counts_},
              {.format = {}, .head_pages = tail_table_ + table * heads(), .page_stride = 1, .tokens = nullptr},
              pages_ * kPageTokens};
    return row;
  }

  RigSizes sizes_;
  ModelConfig config_;
  KvShape shape_;
  int pages_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Device> host_;
  std::unique_ptr<Kernels> kernels_;
  Weights weights_;
  std::unique_ptr<Transformer> transformer_;
  std::byte** past_table_ = nullptr;  // (layers, sequences, kv_heads, pages)
  std::byte** tail_table_ = nullptr;  // (layers, sequences, kv_heads, 1)
  int* counts_ = nullptr;             // (kv_heads): tokens of every past
  TokenId* board_ = nullptr;          // (sequences, board_tokens)
};

// --name VALUE among the arguments, else the default.
inline int flag(int argc, char** argv, const char* name, int value) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) {
      value = std::stoi(argv[i + 1]);
    }
  }
  return value;
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace vericache::bench
