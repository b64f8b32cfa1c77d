// What the tests of packed KV share: device memory, and head pages of a GPU at scattered addresses beside their values.
// Each test owns its own; one thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <vector>

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/device_array.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/packed_layout.h"
#include "backend/kv_fixture.h"
#include "backend/nuq_codes.h"

namespace vericache::test {

using cuda::test::DeviceArray;
using cuda::test::finish;

inline bf16* keys_of(std::byte* page) {
  return reinterpret_cast<bf16*>(page);
}
inline bf16* values_of(std::byte* page, int head_dim) {
  return keys_of(page) + static_cast<size_t>(kPageTokens) * static_cast<size_t>(head_dim);
}

// A bf16 head page of a GPU on the host.
class HostPage {
 public:
  explicit HostPage(int head_dim, Random* garbage = nullptr)
      : head_dim_(head_dim), bytes_(static_cast<size_t>(kPageTokens) * static_cast<size_t>(head_dim) * 4) {
    for (size_t i = 0; garbage != nullptr && i < bytes_.size() / 2; ++i) {
      keys_of(bytes_.data())[i] = to_bf16(garbage->normal(100.0f));
    }
  }
  bf16& key(int token, int dim) { return keys_of(bytes_.data())[cuda::key_index(token, dim)]; }
  bf16& value(int token, int dim) {
    return values_of(bytes_.data(), head_dim_)[cuda::value_index(token, dim, head_dim_)];
  }
  std::vector<std::byte>& bytes() { return bytes_; }

 private:
  int head_dim_;
  std::vector<std::byte> bytes_;
};

// The value of a packed or bf16 head page, as its layout says, unrounded.
inline double affine_value(const std::byte* part, int bits, int planes_at, int count, int affine,
                           cuda::CodePlace place) {
  const auto word_of = [&](int plane, int plane_bytes) {
    uint32_t word = 0;
    std::memcpy(&word, part + planes_at + plane * plane_bytes + place.word * 4, sizeof(word));
    return word >> place.shift & (bits == 2 ? 3u : 15u);
  };
  uint32_t code = word_of(0, 0);
  if (bits == 8) {
    code = code << 4 | word_of(1, count);
  }
  bf16 scale;
  bf16 minimum;
  std::memcpy(&scale, part + affine * 2, sizeof(scale));
  std::memcpy(&minimum, part + planes_at / 2 + affine * 2, sizeof(minimum));
  return double{to_float(minimum)} + static_cast<double>(code) * double{to_float(scale)};
}
// The value of the outlier that stands in a packed part, if one does there. groups: of the part.
inline bool find_outlier(const std::byte* part, const KvPart& format, int head_dim, int groups, int token, int dim,
                         uint32_t& value) {
  const auto* slots = reinterpret_cast<const std::byte*>(cuda::slots_of(part, groups));
  for (int i = 0; format.code == KvCode::nuq && i < outlier_slots(format, head_dim); ++i) {
    const uint32_t slot = cuda::word_at(slots + 4 * i);
    if (slot_place(slot) == outlier_place(dim, token)) {
      value = slot_value(slot);
      return true;
    }
  }
  return false;
}
// The value of a code, unrounded but for planes and fp8, whose codes are bits; `group` of `groups`.
inline double decoded(uint32_t code, const std::byte* part, const KvPart& format, int token, int group, int groups) {
  if (format.code == KvCode::nuq) {
    const cuda::AffineBits affine = cuda::affine_of(part, group, groups);
    return double{float_of_bits(affine.minimum << 16)} +
           cuda::levels_of(part, groups)[code] * double{float_of_bits(affine.scale << 16)};
  }
  if (format.code == KvCode::affine) {
    const cuda::AffineBits affine = cuda::affine_of(part, group, groups);
    return double{float_of_bits(affine.minimum << 16)} +
           static_cast<double>(code) * double{float_of_bits(affine.scale << 16)};
  }
  if (format.code == KvCode::int8) {
    bf16 scale;
    std::memcpy(&scale, part + token * 2, sizeof(scale));
    return static_cast<double>(int8_of(code)) * double{to_float(scale)};
  }
  return double{float_of_bits(plane_value(code, format, cuda::base_of(part, token)) << 16)};
}
inline double key_of(const std::byte* page, const KvFormat& format, int head_dim, int token, int dim) {
  const KvPart part = format.key();
  if (part.exact()) {
    bf16 value;
    std::memcpy(&value, page + cuda::key_index(token, dim) * 2, sizeof(value));
    return double{to_float(value)};
  }
  if (!cuda::chunked(part)) {
    return affine_value(page, part.bits, head_dim * 4, cuda::plane_bytes(part.bits, head_dim), dim,
                        cuda::key_place(token, dim, part.bits == 2 ? 2 : 4));
  }
  uint32_t outlier = 0;
  if (find_outlier(page, part, head_dim, head_dim, token, dim, outlier)) {
    return double{float_of_bits(outlier << 16)};
  }
  uint32_t code[8];
  cuda::key_codes(page, part, head_dim, token, dim / 8 * 8, code);
  return decoded(code[dim % 8], page, part, token, dim, head_dim);
}
inline double value_of(const std::byte* page, const KvFormat& format, int head_dim, int token, int dim) {
  const std::byte* at = page + cuda::bytes_of(cuda::key_pieces(format.key(), head_dim));
  const KvPart part = format.value();
  if (part.exact()) {
    bf16 value;
    std::memcpy(&value, at + cuda::value_index(token, dim, head_dim) * 2, sizeof(value));
    return double{to_float(value)};
  }
  if (!cuda::chunked(part)) {
    return affine_value(at, part.bits, kPageTokens * 4, cuda::plane_bytes(part.bits, head_dim), token,
                        cuda::value_place(token, dim, part.bits == 2 ? 2 : 4));
  }
  uint32_t outlier = 0;
  if (find_outlier(at, part, head_dim, kPageTokens, token, dim, outlier)) {
    return double{float_of_bits(outlier << 16)};
  }
  uint32_t code[8];
  cuda::value_codes(at, part, head_dim, token / 8 * 8, dim, code);
  return decoded(code[token % 8], at, part, token, token, kPageTokens);
}

// Formats whose codes are read with something of their own token.
constexpr KvFormat kByToken[] = {{6, 6, KvCode::plane}, {7, 7, KvCode::plane},  {8, 8, KvCode::plane},
                                 {9, 9, KvCode::plane}, {16, 8, KvCode::plane}, {6, 9, KvCode::plane},
                                 {8, 8, KvCode::fp8},   {8, 8, KvCode::int8}};
// Non-uniform codes, with few and many outliers and none.
constexpr KvFormat kNuq[] = {{2, 2, KvCode::nuq, false, 10},  {3, 3, KvCode::nuq, false, 10},
                             {4, 4, KvCode::nuq, false, 10},  {4, 4, KvCode::nuq, false, 30},
                             {3, 2, KvCode::nuq, false, 0},   {16, 4, KvCode::nuq, false, 1},
                             {2, 16, KvCode::nuq, false, 30}, {4, 3, KvCode::nuq, false, 17}};
// Affine codes of rotated keys and values.
constexpr KvFormat kRotated[] = {{4, 4, KvCode::affine, true},
                                 {3, 3, KvCode::affine, true},
                                 {16, 2, KvCode::affine, true},
                                 {8, 6, KvCode::affine, true}};

// Head pages (kv_heads, pages) of one format in device memory, in random order, with their table.
class DevicePages {
 public:
  DevicePages(const KvShape& shape, const KvFormat& format, int pages, Random& random)
      : shape_(shape),
        format_(format),
        pages_(pages),
        page_bytes_(head_page_bytes(format, shape)),
        arena_(page_bytes_ * static_cast<size_t>(shape.kv_heads * pages)),
        table_(static_cast<size_t>(shape.kv_heads * pages)),
        tokens_(static_cast<size_t>(shape.kv_heads)) {
    for (int i = 0; i < shape.kv_heads * pages; ++i) {
      places_.push_back(arena_.data() + static_cast<size_t>(i) * page_bytes_);
    }
    std::shuffle(places_.begin(), places_.end(), random.engine());
    table_.write(places_);
    hold(std::vector<int>(static_cast<size_t>(shape.kv_heads), 0));
  }
  void hold(const std::vector<int>& tokens) { tokens_.write(tokens); }
  KvView view(int first = 0) const {
    return {.format = format_, .head_pages = table_.data() + first, .page_stride = pages_, .tokens = tokens_.data()};
  }
  int pages() const { return pages_; }  // of a head, in the table
  std::byte* place(int head, int page) const { return places_[static_cast<size_t>(head * pages_ + page)]; }
  void write(int head, int page, const std::vector<std::byte>& bytes) {
    cuda::check_cuda(cudaMemcpy(place(head, page), bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "upload");
  }
  // Every head page, in the order of the table.
  std::vector<std::vector<std::byte>> read() const {
    const std::vector<std::byte> all = arena_.read();
    std::vector<std::vector<std::byte>> out;
    for (const std::byte* at : places_) {
      const auto first = all.begin() + (at - arena_.data());
      out.emplace_back(first, first + static_cast<ptrdiff_t>(page_bytes_));
    }
    return out;
  }

 private:
  KvShape shape_;
  KvFormat format_;
  int pages_;
  size_t page_bytes_;
  DeviceArray<std::byte> arena_;
  DeviceArray<std::byte*> table_;
  DeviceArray<int> tokens_;
  std::vector<std::byte*> places_;
};

}  // namespace vericache::test
