// What the backend tests share: random numbers, KV pages at scattered addresses, the instruction classes of this
// machine. Plain values; each test owns its own.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cpu/cpu_kernels.h"
#include "backend/kernels.h"

namespace vericache::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<uint64_t>(n)); }
  int between(int low, int high) { return low + below(high - low + 1); }  // both included
  float normal(float scale = 1.0f) { return scale * normal_(engine_); }
  std::vector<float> floats(size_t n, float scale = 1.0f) {
    std::vector<float> out(n);
    std::generate(out.begin(), out.end(), [&] { return normal(scale); });
    return out;
  }
  std::vector<bf16> bf16s(size_t n, float scale = 1.0f) {
    std::vector<bf16> out(n);
    std::generate(out.begin(), out.end(), [&] { return to_bf16(normal(scale)); });
    return out;
  }
  // Rows of `dim` values, padded with zeros as activations are.
  std::vector<bf16> rows(int rows, int dim, float scale = 1.0f) {
    std::vector<bf16> out(static_cast<size_t>(rows) * static_cast<size_t>(padded_dim(dim)), bf16{0});
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < dim; ++i) {
        out[static_cast<size_t>(r) * static_cast<size_t>(padded_dim(dim)) + static_cast<size_t>(i)] =
            to_bf16(normal(scale));
      }
    }
    return out;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

inline std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (isa_supported(isa)) {
      out.push_back(isa);
    }
  }
  return out;
}

struct Packed {
  PackedMatrix matrix;
  std::vector<std::byte> bytes;
};

inline Packed pack(const Kernels& kernels, const std::vector<bf16>& source, int out, int in) {
  Packed packed;
  packed.bytes.resize(kernels.packed_bytes(out, in) + 64);
  void* at = packed.bytes.data();
  size_t space = packed.bytes.size();
  packed.matrix = {out, in, static_cast<bf16*>(std::align(64, kernels.packed_bytes(out, in), at, space))};
  const int first = out / 3;  // in two pieces, as sharded and fused weights come
  kernels.pack_rows(source.data(), 0, first, packed.matrix);
  kernels.pack_rows(source.data() + static_cast<size_t>(first) * static_cast<size_t>(in), first, out - first,
                    packed.matrix);
  return packed;
}

// Head pages of one layer and one sequence, in slots of one arena in random order. Unwritten slots hold finite garbage.
class Pages {
 public:
  Pages(const KvShape& shape, const KvFormat& format, int pages, Random& random, bool garbage = true)
      : shape_(shape), format_(format), pages_(pages), tokens_(static_cast<size_t>(shape.kv_heads), 0) {
    const size_t bytes = (head_page_bytes(format, shape) + 63) / 64 * 64;
    const size_t count = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(pages);
    arena_.resize(bytes * count + 64);
    auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(arena_.data()) + 63) / 64 * 64);
    for (size_t i = 0; i < count; ++i) {
      pointers_.push_back(base + i * bytes);
    }
    std::shuffle(pointers_.begin(), pointers_.end(), random.engine());
    if (garbage && format.exact()) {
      auto* values = reinterpret_cast<bf16*>(base);
      for (size_t i = 0; i < bytes * count / 2; ++i) {
        values[i] = to_bf16(random.normal(100.0f));
      }
    }
  }

  // Pages [first, last) as a view, all heads full but for a head's last page.
  KvView view(int first = 0) const {
    return {.format = format_, .head_pages = pointers_.data() + first, .page_stride = pages_, .tokens = tokens_.data()};
  }
  std::vector<int>& tokens() { return tokens_; }
  std::byte* head_page(int head, int page) const { return pointers_[static_cast<size_t>(head * pages_ + page)]; }

  void write(int head, int token, const bf16* k, const bf16* v) {
    auto* keys = reinterpret_cast<bf16*>(head_page(head, token / kPageTokens));
    bf16* values = keys + static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape_.key_dim());
    const int slot = token % kPageTokens;
    for (int d = 0; d < shape_.key_dim(); ++d) {
      keys[key_index(slot, d, shape_)] = d < shape_.head_dim ? k[d] : bf16{0};
    }
    for (int d = 0; d < shape_.head_dim; ++d) {
      values[value_index(slot, d)] = v[d];
    }
  }
  bf16 key(int head, int token, int d) const {
    return reinterpret_cast<const bf16*>(
        head_page(head, token / kPageTokens))[key_index(token % kPageTokens, d, shape_)];
  }
  bf16 value(int head, int token, int d) const {
    const auto* keys = reinterpret_cast<const bf16*>(head_page(head, token / kPageTokens));
    return keys[static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape_.key_dim()) +
                value_index(token % kPageTokens, d)];
  }

 private:
  KvShape shape_;
  KvFormat format_;
  int pages_;
  std::vector<int> tokens_;
  std::vector<std::byte> arena_;
  std::vector<std::byte*> pointers_;
};

// One layer of a pass over the rows of these sequences.
inline PassRows one_layer(std::span<const SequenceRows> sequences, std::span<const LogitRow> logit_rows = {}) {
  PassRows pass{.rows = 0, .layers = 1, .draft = false, .sequences = sequences, .logit_rows = logit_rows};
  for (const SequenceRows& sequence : sequences) {
    pass.rows = std::max(pass.rows, sequence.first_row + sequence.rows);
  }
  return pass;
}

inline std::string isa_test_name(const auto& info) {
  return std::string(isa_name(info.param));
}

}  // namespace vericache::test
