// Encoded pages, written and read one value after the other: the oracle of every other way to do it.
// Any thread. Values and rows are host memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "backend/residual_code.h"

namespace vericache {

// Bits one behind the other, the lowest first.
class BitWriter {
 public:
  explicit BitWriter(std::byte* out) : out_(out) {}
  void put(uint32_t bits, int count) {
    waiting_ |= static_cast<uint64_t>(bits) << held_;
    held_ += count;
    for (; held_ >= 8; held_ -= 8, waiting_ >>= 8) {
      *out_++ = static_cast<std::byte>(waiting_ & 0xff);
    }
  }
  // Zeros up to a multiple of `bytes` from `origin`. Where the next bits will stand.
  std::byte* pad(const std::byte* origin, ptrdiff_t bytes) {
    if (held_ > 0) {
      put(0, 8 - held_);
    }
    while ((out_ - origin) % bytes != 0) {
      *out_++ = std::byte{0};
    }
    return out_;
  }

 private:
  std::byte* out_;
  uint64_t waiting_ = 0;
  int held_ = 0;
};

// Reads beyond the end give zeros.
class BitReader {
 public:
  BitReader(const std::byte* begin, const std::byte* end) : at_(begin), end_(end) {}
  uint32_t take(int count) {
    while (held_ < count) {
      waiting_ |= static_cast<uint64_t>(at_ < end_ ? std::to_integer<uint32_t>(*at_++) : 0u) << held_;
      held_ += 8;
    }
    const auto bits = static_cast<uint32_t>(waiting_ & ((uint64_t{1} << count) - 1));
    waiting_ >>= count;
    held_ -= count;
    return bits;
  }

 private:
  const std::byte* at_;
  const std::byte* end_;
  uint64_t waiting_ = 0;
  int held_ = 0;
};

inline constexpr size_t kRawRowBytes = kRowValues * sizeof(uint16_t);
// What a row may take while it is written.
inline constexpr size_t kRowRoom = 2 * kRawRowBytes + 64;

inline size_t finish_row(const std::byte* row, size_t bytes, const uint16_t* values, std::byte* out) {
  if (bytes >= kRawRowBytes) {
    std::memcpy(out, values, kRawRowBytes);
    return kRawRowBytes;
  }
  std::memcpy(out, row, bytes);
  return bytes;
}

// run(i) for the values that escape, in the order in which they stand.
template <typename Run>
void each_escape(const std::array<bool, kRowValues>& escaped, const Run& run) {
  constexpr size_t kOfLane = kLaneValues;
  std::array<size_t, kRowValues / kLaneValues> next{};  // of each lane
  for (size_t round = 0; round < kOfLane; ++round) {
    for (size_t lane = 0; lane < next.size(); ++lane) {
      size_t& i = next[lane];
      while (i < kOfLane && !escaped[lane * kOfLane + i]) {
        ++i;
      }
      if (i < kOfLane) {
        run(lane * kOfLane + i++);
      }
    }
  }
}

// field_of(i): the field of the row's value i. Returns the bytes written, kRawRowBytes at most.
template <typename FieldOf>
size_t encode_row(const uint16_t* values, const FieldOf& field_of, std::byte* out) {
  std::array<std::byte, kRowRoom> row;
  std::array<bool, kRowValues> escaped;
  BitWriter writer(row.data());
  for (int i = 0; i < kRowValues; ++i) {
    const ResidualField field = field_of(i);
    const CodedValue coded = code_value(field, values[i]);
    if (!coded.fits) {
      return finish_row(row.data(), kRawRowBytes, values, out);
    }
    writer.put(coded.bits, field.bits());
    escaped[static_cast<size_t>(i)] = coded.escapes;
  }
  std::byte* end = writer.pad(row.data(), 2);
  each_escape(escaped, [&](size_t i) {
    std::memcpy(end, values + i, sizeof(uint16_t));
    end += sizeof(uint16_t);
  });
  return finish_row(row.data(), static_cast<size_t>(end - row.data()), values, out);
}

template <typename FieldOf>
void decode_row(const std::byte* row, size_t bytes, const FieldOf& field_of, uint16_t* values) {
  if (bytes == kRawRowBytes) {
    std::memcpy(values, row, kRawRowBytes);
    return;
  }
  BitReader reader(row, row + bytes);
  std::array<bool, kRowValues> escaped;
  int bits = 0;
  for (int i = 0; i < kRowValues; ++i) {
    const ResidualField field = field_of(i);
    const uint32_t coded = reader.take(field.bits());
    bits += field.bits();
    escaped[static_cast<size_t>(i)] = residual_escapes(field, coded);
    values[i] = static_cast<uint16_t>(value_of(field, coded));
  }
  const size_t payload = std::min(bytes, static_cast<size_t>((bits + 15) / 16) * 2);
  BitReader rest(row + payload, row + bytes);
  each_escape(escaped, [&](size_t i) { values[i] = static_cast<uint16_t>(rest.take(16)); });
}

// The base that lets most values of a row be, the largest of them.
inline uint32_t lossless_base(const uint16_t* values) {
  std::array<int, 256> count{};
  for (int i = 0; i < kRowValues; ++i) {
    ++count[exponent_of(values[i])];
  }
  uint32_t most = 255;
  while (count[most] == 0) {
    --most;
  }
  uint32_t best = most;
  int best_held = -1;
  for (uint32_t lower = 0; lower < kLosslessBases && lower <= most; ++lower) {
    const uint32_t base = most - lower;
    int held = 0;
    for (uint32_t below = 0; below < kLosslessEscape && below <= base; ++below) {
      held += count[base - below];
    }
    if (held > best_held) {
      best_held = held;
      best = base;
    }
  }
  return best;
}

inline size_t encode_lossless_row(const uint16_t* values, std::byte* out) {
  std::array<std::byte, kRowRoom> row;
  const uint32_t base = lossless_base(values);
  BitWriter writer(row.data());
  writer.put(base, 16);
  for (int i = 0; i < kRowValues; ++i) {
    writer.put(code_lossless(base, values[i]).bits, kLosslessBits);
  }
  for (int i = 0; i < kRowValues; ++i) {
    if (code_lossless(base, values[i]).escapes) {
      writer.put(exponent_of(values[i]), 8);
    }
  }
  const std::byte* end = writer.pad(row.data(), 2);
  return finish_row(row.data(), static_cast<size_t>(end - row.data()), values, out);
}

inline void decode_lossless_row(const std::byte* row, size_t bytes, uint16_t* values) {
  if (bytes == kRawRowBytes) {
    std::memcpy(values, row, kRawRowBytes);
    return;
  }
  constexpr size_t kPayload = 2 + kRowValues * kLosslessBits / 8;
  BitReader reader(row, row + bytes);
  BitReader rest(row + std::min(bytes, kPayload), row + bytes);
  const uint32_t base = reader.take(16);
  for (int i = 0; i < kRowValues; ++i) {
    const uint32_t bits = reader.take(kLosslessBits);
    const uint32_t below = bits >> 8;
    values[i] = static_cast<uint16_t>(lossless_value(bits, below == kLosslessEscape ? rest.take(8) : base - below));
  }
}

// The blocks of a page. field_of(head, keys, i): the field of value i of the K (keys) or V part of a head page, in the
// order in which it lies there; asked for ResidualCode::resident only, and of parts that the format packs.
// Returns the page's units.
template <typename FieldOf>
uint32_t encode_page(const KvShape& shape, ResidualCode code, const KvFormat& format, const std::byte* page,
                     const FieldOf& field_of, std::byte* out) {
  const int rows = residual_rows(shape);
  const int key_rows = residual_key_rows(shape);
  uint32_t units = residual_header_units(shape);
  std::memset(out, 0, units * kResidualUnit);
  for (int head = 0; head < shape.kv_heads; ++head) {
    const std::byte* source = page + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape);
    std::byte* block = out + units * kResidualUnit;
    size_t bytes = static_cast<size_t>(rows) * sizeof(uint16_t);
    for (int row = 0; row < rows; ++row) {
      const bool keys = row < key_rows;
      std::array<uint16_t, kRowValues> values;
      std::memcpy(values.data(), source + static_cast<size_t>(row) * kRawRowBytes, kRawRowBytes);
      if (coded_alone(code, format, keys)) {
        bytes += encode_lossless_row(values.data(), block + bytes);
      } else if (!(keys ? format.key() : format.value()).exact()) {
        const int first = (keys ? row : row - key_rows) * kRowValues;
        bytes += encode_row(
            values.data(), [&](int i) { return field_of(head, keys, first + i); }, block + bytes);
      }
      const auto end = static_cast<uint16_t>(bytes / 2);
      std::memcpy(block + static_cast<size_t>(row) * sizeof(end), &end, sizeof(end));
    }
    const uint32_t block_units = residual_units(static_cast<uint32_t>(bytes / 2));
    std::memset(block + bytes, 0, block_units * kResidualUnit - bytes);
    units += block_units;
    std::memcpy(out + static_cast<size_t>(head) * sizeof(units), &units, sizeof(units));
  }
  return units;
}

// resident_part(head, keys): the part of the resident head page, where it is stored as it was. Whatever stands in `in`,
// nothing outside it is read and `page` alone is written.
template <typename FieldOf, typename ResidentPart>
void decode_page(const KvShape& shape, ResidualCode code, const KvFormat& format, const std::byte* in,
                 uint32_t in_units, const FieldOf& field_of, const ResidentPart& resident_part, std::byte* page) {
  const int rows = residual_rows(shape);
  const int key_rows = residual_key_rows(shape);
  uint32_t begin = residual_header_units(shape);
  for (int head = 0; head < shape.kv_heads; ++head) {
    std::byte* target = page + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape);
    uint32_t end = 0;
    if (begin <= in_units && in_units >= residual_header_units(shape)) {
      std::memcpy(&end, in + static_cast<size_t>(head) * sizeof(end), sizeof(end));
    }
    end = std::min(end, in_units);
    const std::byte* block = in + std::min(begin, in_units) * kResidualUnit;
    const size_t block_bytes = end > begin ? (end - begin) * kResidualUnit : 0;
    size_t row_begin = static_cast<size_t>(rows) * sizeof(uint16_t);
    for (int row = 0; row < rows; ++row) {
      const bool keys = row < key_rows;
      std::array<uint16_t, kRowValues> values{};
      uint16_t halves = 0;
      if (static_cast<size_t>(row + 1) * sizeof(halves) <= block_bytes) {
        std::memcpy(&halves, block + static_cast<size_t>(row) * sizeof(halves), sizeof(halves));
      }
      const size_t row_end = std::min(static_cast<size_t>(halves) * 2, block_bytes);
      const std::byte* source = block + std::min(row_begin, row_end);
      const size_t bytes = row_end - std::min(row_begin, row_end);
      const int first = (keys ? row : row - key_rows) * kRowValues;
      if (coded_alone(code, format, keys)) {
        decode_lossless_row(source, bytes, values.data());
      } else if (!(keys ? format.key() : format.value()).exact()) {
        decode_row(
            source, bytes, [&](int i) { return field_of(head, keys, first + i); }, values.data());
      } else {
        std::memcpy(values.data(), resident_part(head, keys) + static_cast<size_t>(first) * sizeof(uint16_t),
                    kRawRowBytes);
      }
      std::memcpy(target + static_cast<size_t>(row) * kRawRowBytes, values.data(), kRawRowBytes);
      row_begin = static_cast<size_t>(halves) * 2;
    }
    begin = end;
  }
}

}  // namespace vericache
