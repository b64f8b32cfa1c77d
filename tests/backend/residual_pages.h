// What the tests of residual codes share: pages of every kind of values, in memory of the tested device with their
// resident form, and the way there and back.
// Each test owns its own; one thread.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "backend/kv_fixture.h"
#include "backend/residual_code.h"
#include "test_device.h"

namespace vericache::test {

enum class Filling { normal, keyed, zeros, denormals, specials, noise, sparse, count };

inline bf16 random_value(Filling filling, size_t i, Random& random) {
  switch (filling) {
    case Filling::normal:
      return to_bf16(random.normal());
    case Filling::keyed:  // a channel's own spread and offset
      return to_bf16(random.normal(0.1f + static_cast<float>(i % 7)) + 3.0f * static_cast<float>(i % 5));
    case Filling::zeros:
      return {static_cast<uint16_t>(random.below(20) == 0 ? 0x8000 : 0)};
    case Filling::denormals:
      return {static_cast<uint16_t>(random.below(0x100) | random.below(2) << 15)};
    case Filling::specials: {
      constexpr uint16_t kSpecial[] = {0x7f80, 0xff80, 0x7fc0, 0xffff, 0x7f81, 0x7f7f, 0xff7f, 0x0001};
      return random.below(30) == 0 ? bf16{kSpecial[random.below(8)]} : to_bf16(random.normal());
    }
    case Filling::noise:
      return {static_cast<uint16_t>(random.below(0x10000))};
    case Filling::sparse:
      return random.below(40) == 0 ? to_bf16(random.normal(1000.0f)) : to_bf16(random.normal(1e-3f));
    case Filling::count:
      break;
  }
  return {};
}

inline KvFormat format_of(int key_bits, int value_bits) {
  return {.key_bits = key_bits, .value_bits = value_bits};
}

inline KvFormat rotated_of(int key_bits, int value_bits) {
  return {.key_bits = key_bits, .value_bits = value_bits, .code = KvCode::affine, .rotated = true};
}

// Pages of one layer: bf16, in resident form, encoded, and decoded again.
class ResidualPages {
 public:
  ResidualPages(const KvShape& shape, const KvFormat& format, int pages)
      : shape_(shape),
        format_(format),
        pages_(pages),
        device_(make_test_device()),
        kernels_(make_test_kernels({.isa = "portable",
                                    .threads = 1,
                                    .shape = shape,
                                    .heads = shape.kv_heads,
                                    .max_rows = 1,
                                    .max_context_tokens = kPageTokens * pages,
                                    .max_sequences = 1})),
        lane_(kernels_->lane(Kernels::Place::wire_out)),
        host_(device_->make_host_memory(size_t{1} << 20)) {
    const auto count = static_cast<size_t>(pages);
    const auto heads = static_cast<size_t>(shape.kv_heads);
    plain_ = device_->allocate(count * page_bytes(shape), "pages");
    packed_ = device_->allocate(count * heads * head_page_bytes(format, shape), "packed pages");
    coded_ = device_->allocate(count * residual_bound(shape) + kCanary, "encoded pages");
    back_ = device_->allocate(count * page_bytes(shape) + kCanary, "decoded pages");
    sizes_ = device_->allocate_array<uint32_t>(count * heads, "sizes");
    ends_ = host_->allocate_array<uint32_t>(count, "ends");
    checksums_ = host_->allocate_array<uint64_t>(count, "checksums");
    mismatches_ = host_->allocate_array<uint32_t>(1, "mismatches");
    plain_view_ = make_view({}, plain_, page_bytes(shape), head_page_bytes({}, shape));
    packed_view_ = make_view(format, packed_, heads * head_page_bytes(format, shape), head_page_bytes(format, shape));
  }

  void fill(Filling filling, Random& random) {
    values_.resize(static_cast<size_t>(pages_) * page_bytes(shape_) / sizeof(bf16));
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = random_value(filling, i, random);
    }
    device_->write(plain_, values_.data(), values_.size() * sizeof(bf16));
    lane_.quantize({.shape = shape_,
                    .full = {.past = plain_view_, .tail = {}, .tail_position = pages_ * kPageTokens},
                    .first = 0,
                    .count = pages_,
                    .out = packed_view_});
    const size_t bytes = page_bytes(shape_);
    lane_.checksum({.first = plain_, .stride = bytes, .bytes = bytes, .count = pages_}, checksums_);
  }

  // The encoded pages; empty if more was written than the bound.
  std::vector<std::byte> encode(ResidualCode code) {
    const size_t bound = static_cast<size_t>(pages_) * residual_bound(shape_);
    std::vector<std::byte> canary(bound + kCanary, std::byte{0x5a});
    device_->write(coded_, canary.data(), canary.size());
    std::vector<const std::byte*> pages;
    for (int page = 0; page < pages_; ++page) {
      pages.push_back(plain_ + static_cast<size_t>(page) * page_bytes(shape_));
    }
    lane_.encode({.shape = shape_,
                  .code = code,
                  .pages = pages,
                  .resident = packed_view_,
                  .first = 0,
                  .sizes = sizes_,
                  .out = coded_,
                  .ends = ends_});
    lane_.wait(lane_.mark());
    const size_t bytes = ends_[pages_ - 1] * kResidualUnit;
    std::vector<std::byte> coded(bound + kCanary);
    device_->read(coded.data(), coded_, coded.size());
    if (bytes > bound || !std::all_of(coded.begin() + static_cast<ptrdiff_t>(bytes), coded.end(),
                                      [](std::byte b) { return b == std::byte{0x5a}; })) {
      return {};
    }
    coded.resize(bytes);
    return coded;
  }
  // What any bytes decode to; empty if anything behind the pages was written. Proved on the way: mismatches().
  std::vector<bf16> decode(ResidualCode code, const std::vector<std::byte>& coded) {
    device_->write(coded_, coded.data(), coded.size());
    const size_t bytes = static_cast<size_t>(pages_) * page_bytes(shape_);
    std::vector<std::byte> back(bytes + kCanary, std::byte{0x5a});
    device_->write(back_, back.data(), back.size());
    *mismatches_ = 0;
    kernels_->decode({.shape = shape_,
                      .code = code,
                      .in = coded_,
                      .ends = ends_,
                      .count = pages_,
                      .resident = packed_view_,
                      .out = back_,
                      .checksums = checksums_,
                      .mismatches = mismatches_});
    kernels_->wait(kernels_->mark());
    device_->read(back.data(), back_, back.size());
    if (!std::all_of(back.begin() + static_cast<ptrdiff_t>(bytes), back.end(),
                     [](std::byte b) { return b == std::byte{0x5a}; })) {
      return {};
    }
    std::vector<bf16> values(bytes / sizeof(bf16));
    std::memcpy(values.data(), back.data(), bytes);
    return values;
  }
  const std::vector<bf16>& values() const { return values_; }
  // Pages that decode() made other than they were.
  uint32_t mismatches() const { return *static_cast<volatile const uint32_t*>(mismatches_); }
  int pages_unlike(const std::vector<bf16>& others) const {
    const size_t page = page_bytes(shape_) / sizeof(bf16);
    int unlike = 0;
    for (size_t first = 0; first < values_.size(); first += page) {
      unlike += std::memcmp(&values_[first], &others[first], page * sizeof(bf16)) != 0 ? 1 : 0;
    }
    return unlike;
  }
  std::vector<std::byte> packed() const {
    std::vector<std::byte> bytes(static_cast<size_t>(pages_ * shape_.kv_heads) * head_page_bytes(format_, shape_));
    device_->read(bytes.data(), packed_, bytes.size());
    return bytes;
  }
  const uint32_t* ends() const { return ends_; }

 private:
  static constexpr size_t kCanary = 4096;

  KvView make_view(const KvFormat& format, std::byte* first, size_t page_stride, size_t head_stride) {
    std::vector<std::byte*> table;
    for (int head = 0; head < shape_.kv_heads; ++head) {
      for (int page = 0; page < pages_; ++page) {
        table.push_back(first + static_cast<size_t>(page) * page_stride + static_cast<size_t>(head) * head_stride);
      }
    }
    const std::vector<int> tokens(static_cast<size_t>(shape_.kv_heads), pages_ * kPageTokens);
    auto* device_table = device_->allocate_array<std::byte*>(table.size(), "a table");
    auto* device_tokens = device_->allocate_array<int>(tokens.size(), "counts");
    device_->write(reinterpret_cast<std::byte*>(device_table), table.data(), table.size() * sizeof(std::byte*));
    device_->write(reinterpret_cast<std::byte*>(device_tokens), tokens.data(), tokens.size() * sizeof(int));
    return {.format = format, .head_pages = device_table, .page_stride = pages_, .tokens = device_tokens};
  }

  KvShape shape_;
  KvFormat format_;
  int pages_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Kernels> kernels_;
  Kernels& lane_;
  std::unique_ptr<Device> host_;
  std::byte* plain_;
  std::byte* packed_;
  std::byte* coded_;
  std::byte* back_;
  uint32_t* sizes_;
  uint32_t* ends_;
  uint64_t* checksums_;
  uint32_t* mismatches_;
  KvView plain_view_;
  KvView packed_view_;
  std::vector<bf16> values_;
};

}  // namespace vericache::test
