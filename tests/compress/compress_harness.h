// A layer of random KV, partly staged and partly in the tail, and kernels to compress it with.
// Each test owns its own, on its thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "backend/cpu/cpu_kernels.h"
#include "compress/compressor.h"
#include "kv/kv_memory.h"

namespace vericache::test {

constexpr int kMostTokens = 640;

// One layer's full KV: pages [0, past) stand in scattered blocks, the others too, but are seen as a tail.
class RandomLayer {
 public:
  RandomLayer(const KvShape& shape, int heads, uint64_t seed)
      : shape_(shape),
        heads_(heads),
        random_(seed),
        pages_(kMostTokens / kPageTokens),
        pool_(head_page_bytes(KvFormat{}, shape), pages_ * shape.kv_heads),
        kernels_(make_cpu_kernels(best_isa(), 2,
                                  {.shape = shape, .heads = heads, .max_rows = 64, .max_context_tokens = 2048})) {
    for (int i = 0; i < pages_ * shape.kv_heads; ++i) {
      table_.push_back(pool_.pool.take());
    }
    std::shuffle(table_.begin(), table_.end(), random_);
    for (std::byte* page : table_) {
      auto* values = reinterpret_cast<bf16*>(page);
      for (size_t i = 0; i < pool_.pool.block_bytes() / sizeof(bf16); ++i) {
        values[i] = to_bf16(normal_(random_));
      }
    }
    zero_key_padding();
  }

  FullLayer layer(int past_tokens) {
    past_.assign(static_cast<size_t>(shape_.kv_heads), past_tokens);
    LayerKv kv;
    kv.past = {.format = {}, .head_pages = table_.data(), .page_stride = pages_, .tokens = past_.data()};
    kv.tail = {.format = {},
               .head_pages = table_.data() + past_tokens / kPageTokens,
               .page_stride = pages_,
               .tokens = nullptr};
    kv.tail_position = past_tokens;
    return {shape_, kv};
  }
  std::byte* head_page(int head, int page) const { return table_[static_cast<size_t>(head * pages_ + page)]; }
  float key(int head, int token, int d) const {
    return to_float(values(head, token)[key_index(token % kPageTokens, d, shape_)]);
  }

  // Queries at consecutive positions with the softmax denominators of all the tokens before and at each, in a ring that
  // has room for a few more.
  Attended queries(int rows, int position) {
    position_ = position;
    capacity_ = rows + static_cast<int>(random_() % 4);
    q_.assign(static_cast<size_t>(capacity_ * heads_ * shape_.key_dim()), to_bf16(NAN));
    log_sum_exp_.assign(static_cast<size_t>(capacity_ * heads_), NAN);
    for (int row = 0; row < rows; ++row) {
      for (int head = 0; head < heads_; ++head) {
        for (int d = 0; d < shape_.key_dim(); ++d) {
          q_[query_index(row, head, d)] = d < shape_.head_dim ? to_bf16(normal_(random_)) : bf16{0};
        }
        double sum = 0;
        for (int token = 0; token <= position + row; ++token) {
          sum += std::exp(score(row, head, token));
        }
        log_sum_exp_[row_index(row, head)] = static_cast<float>(std::log(sum));
      }
    }
    return {.heads = heads_,
            .scale = scale(),
            .queries = {q_.data(), log_sum_exp_.data(), capacity_},
            .rows = rows,
            .position = position};
  }
  double score(int row, int head, int token) const {
    double dot = 0;
    for (int d = 0; d < shape_.head_dim; ++d) {
      dot +=
          static_cast<double>(to_float(q_[query_index(row, head, d)])) * key(head * shape_.kv_heads / heads_, token, d);
    }
    return dot * scale();
  }
  // What attention of query `row` (at `position` + row) gives `token`.
  double weight(int row, int head, int token, int position) const {
    return token > position + row ? 0 : std::exp(score(row, head, token) - log_sum_exp_[row_index(row, head)]);
  }

  // Replaces what a token holds.
  void write(int head, int token, const float* key, const float* value) {
    auto* keys = reinterpret_cast<bf16*>(head_page(head, token / kPageTokens));
    bf16* values = keys + kPageTokens * shape_.key_dim();
    for (int d = 0; d < shape_.head_dim; ++d) {
      keys[key_index(token % kPageTokens, d, shape_)] = to_bf16(key[d]);
      values[value_index(token % kPageTokens, d)] = to_bf16(value[d]);
    }
  }
  // Its notes of one layer: bytes that are no numbers, and an empty report.
  Notes lend_notes(const Compressor& compressor) {
    notes_.assign(compressor.notes_bytes(kMostTokens, shape_), std::byte{0xff});
    report_.assign(static_cast<size_t>(compressor.report_values(shape_)), 0);
    return {.device = notes_.data(), .max_tokens = kMostTokens, .report = report_.data()};
  }
  RopeTable rope(int positions, double theta = 10000) {
    const int half = shape_.head_dim / 2;
    cos_.clear();
    sin_.clear();
    for (int position = 0; position < positions; ++position) {
      for (int i = 0; i < half; ++i) {
        const double angle = position * std::pow(theta, -2.0 * i / shape_.head_dim);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    return {cos_.data(), sin_.data(), positions};
  }
  // As much as it asks for, of bytes that are no numbers.
  void lend_scratch(Compressor& compressor) {
    scratch_.assign(compressor.scratch_bytes(kMostTokens, shape_), std::byte{0xff});
    compressor.set_scratch(scratch_.data());
  }
  std::unique_ptr<Compressor> compressor(std::string_view spec) {
    std::unique_ptr<Compressor> made = make_compressor(spec);
    lend_scratch(*made);
    return made;
  }

  Kernels& kernels() { return *kernels_; }
  const KvShape& shape() const { return shape_; }
  int heads() const { return heads_; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  std::mt19937_64& random() { return random_; }

 private:
  const bf16* values(int head, int token) const {
    return reinterpret_cast<const bf16*>(head_page(head, token / kPageTokens));
  }
  size_t row_index(int row, int head) const {
    return static_cast<size_t>((position_ + row) % capacity_ * heads_ + head);
  }
  size_t query_index(int row, int head, int d) const {
    return row_index(row, head) * static_cast<size_t>(shape_.key_dim()) + static_cast<size_t>(d);
  }
  void zero_key_padding() {
    for (std::byte* page : table_) {
      for (int token = 0; token < kPageTokens; ++token) {
        for (int d = shape_.head_dim; d < shape_.key_dim(); ++d) {
          reinterpret_cast<bf16*>(page)[key_index(token, d, shape_)] = bf16{0};
        }
      }
    }
  }

  KvShape shape_;
  int heads_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  int pages_;
  OwnedPool pool_;
  std::unique_ptr<Kernels> kernels_;
  std::vector<std::byte*> table_;  // (kv_heads, pages)
  std::vector<int> past_;
  int position_ = 0;
  int capacity_ = 1;
  std::vector<bf16> q_;
  std::vector<float> log_sum_exp_;
  std::vector<std::byte> scratch_;
  std::vector<std::byte> notes_;
  std::vector<int> report_;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

struct Resident {
  OwnedPool pool;
  OwnedPool index;
  ResidentLayer layer;
  Resident(const KvFormat& format, const KvShape& shape, int pages = kMostTokens / kPageTokens)
      : Resident(format, shape, pages, pages * shape.kv_heads) {}
  Resident(const KvFormat& format, const KvShape& shape, int pages, int pool_pages)
      : pool(head_page_bytes(format, shape), pool_pages),
        index(ResidentIndex::bytes(shape, pages, kMostTokens, false), 1),
        layer(shape, format, pool.pool, {index.pool.take(), pages, kMostTokens, false}, 0) {}
};

// The tokens that a head keeps, as the device has them.
inline std::vector<int> kept_of(const ResidentLayer& layer, int head) {
  const int* chosen = layer.chosen() + static_cast<ptrdiff_t>(head) * layer.chosen_stride();
  return {chosen, chosen + layer.tokens(head)};
}

}  // namespace vericache::test
