#include "backend/cpu/packing.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "backend/rotation.h"
#include "base/check.h"

namespace vericache {
namespace {

constexpr size_t kLine = 64;

size_t lines(size_t bytes) {
  return (bytes + kLine - 1) / kLine * kLine;
}

HeadRounding of_head(const bf16* rounding, const KvShape& shape, int head) {
  return rounding == nullptr ? HeadRounding{}
                             : HeadRounding{rounding + head * shape.head_dim * shape.head_dim, shape.head_dim};
}

const std::byte* full_page(const LayerKv& full, int head, int page) {
  const int past_pages = full.tail_position / kPageTokens;
  return page < past_pages ? full.past.head_page(head, page) : full.tail.head_page(head, page - past_pages);
}

// Every token's key and value in place, rounded to bf16 as it is stored.
void rotate_page(std::byte* page, const KvShape& shape) {
  auto* keys = reinterpret_cast<bf16*>(page);
  bf16* values = keys + kPageTokens * shape.key_dim();
  float x[kMaxHeadDim];
  const auto rotate_at = [&](bf16* part, const auto& index) {
    for (int d = 0; d < shape.head_dim; ++d) {
      x[d] = to_float(part[index(d)]);
    }
    rotate(x, shape.head_dim);
    for (int d = 0; d < shape.head_dim; ++d) {
      part[index(d)] = to_bf16(x[d]);
    }
  };
  for (int token = 0; token < kPageTokens; ++token) {
    rotate_at(keys, [&](int d) { return key_index(token, d, shape); });
    rotate_at(values, [&](int d) { return value_index(token, d); });
  }
}

// Of a pair of channels over the keys [first, end) of a bf16 page: smallest and largest, each of both channels.
struct PairBounds {
  uint16_t low[2];
  uint16_t high[2];
};
PairBounds bound_pair(const bf16* keys, const KvShape& shape, int pair, int first, int end) {
  constexpr int kRow = 2 * kPanel;  // 16 tokens of the pair
  int16_t low[kRow];
  int16_t high[kRow];
  std::fill_n(low, kRow, std::numeric_limits<int16_t>::max());
  std::fill_n(high, kRow, std::numeric_limits<int16_t>::min());
  for (int token = first; token < end; token += kPanel) {
    const bf16* row = keys + key_index(token, 2 * pair, shape);
    const int held = 2 * std::min(kPanel, end - token);
    for (int i = 0; i < held; ++i) {
      const int16_t rising = rising_bits(row[i].bits);
      low[i] = std::min(low[i], rising);
      high[i] = std::max(high[i], rising);
    }
  }
  for (int i = 2; i < kRow; ++i) {
    low[i % 2] = std::min(low[i % 2], low[i]);
    high[i % 2] = std::max(high[i % 2], high[i]);
  }
  return {{bits_of_rising(low[0]), bits_of_rising(low[1])}, {bits_of_rising(high[0]), bits_of_rising(high[1])}};
}

// Of the first `tokens` keys of a bf16 page, as kv_view.h says; zeros if there are none.
void write_key_bounds(const bf16* keys, int tokens, const KvShape& shape, std::byte* out) {
  static_assert(kBoundTokens % kPanel == 0);
  auto* bounds = reinterpret_cast<uint16_t*>(out);
  const int dim = shape.key_dim();
  if (tokens == 0) {
    std::memset(out, 0, key_bounds_bytes(shape));
    return;
  }
  for (int run = 0; run < kBoundRuns; ++run, bounds += 2 * dim) {
    const int first = run * kBoundTokens;
    if (first >= tokens) {
      std::copy_n(bounds - 2 * dim, 2 * dim, bounds);
      continue;
    }
    for (int pair = 0; pair < dim / 2; ++pair) {
      const PairBounds of_pair = bound_pair(keys, shape, pair, first, std::min(tokens, first + kBoundTokens));
      std::copy_n(of_pair.low, 2, bounds + 2 * pair);
      std::copy_n(of_pair.high, 2, bounds + dim + 2 * pair);
    }
  }
}

}  // namespace

Packing::Packing(const QuantOps& ops, ThreadPool& pool, const KvShape& shape)
    : ops_(ops),
      pool_(pool),
      shape_(shape),
      page_stride_(lines(head_page_bytes(KvFormat{}, shape))),
      pages_(2 * page_stride_ * static_cast<size_t>(pool.threads()) + kLine) {
  first_page_ = pages_.data() + (kLine - reinterpret_cast<uintptr_t>(pages_.data()) % kLine) % kLine;
}

std::byte* Packing::scratch_page(int index) const {
  return first_page_ + static_cast<size_t>(2 * ThreadPool::thread_index() + index) * page_stride_;
}

void Packing::quantize(const QuantizeArgs& args) {
  const FlushDenormals flush;
  const int heads = args.shape.kv_heads;
  pool_.parallel_for(args.count * heads, [&](int i) {
    const int head = i % heads;
    const int page = args.first + i / heads;
    quantize_head_page(full_page(args.full, head, page), kPageTokens, args.shape, args.out.format,
                       args.out.head_page(head, page), of_head(args.rounding, args.shape, head));
  });
}

void Packing::gather(const GatherArgs& args) {
  check(args.shape == shape_, "gather runs for the shape it was built for");
  const FlushDenormals flush;
  const int pages = (args.count + kPageTokens - 1) / kPageTokens;
  pool_.parallel_for(pages * shape_.kv_heads, [&](int i) { gather_page(args, i / pages, i % pages); });
}

void Packing::gather_page(const GatherArgs& args, int head, int page) {
  const int first = page * kPageTokens;
  const int count = std::min(kPageTokens, (args.counts == nullptr ? args.count : args.counts[head]) - first);
  if (count <= 0) {
    return;
  }
  const int* chosen = args.chosen + static_cast<ptrdiff_t>(head) * args.stride + first;
  std::byte* target = args.out.head_page(head, page);
  const bool exact = args.out.format.exact();
  std::byte* gathered = exact ? target : scratch_page(0);
  if (count < kPageTokens) {
    std::memset(gathered, 0, head_page_bytes(KvFormat{}, shape_));
  }
  for (int i = 0; i < count; ++i) {
    copy_token(full_page(args.full, head, chosen[i] / kPageTokens), chosen[i] % kPageTokens, gathered, i, shape_);
  }
  if (!exact) {
    quantize_head_page(gathered, count, shape_, args.out.format, target, of_head(args.rounding, shape_, head));
  } else if (args.out.format.choice.bounded) {
    write_key_bounds(reinterpret_cast<const bf16*>(target), count, shape_,
                     target + key_bounds_offset(args.out.format, shape_));
  }
}

void Packing::quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                                 std::byte* out, const HeadRounding& rounding) const {
  const FlushDenormals flush;
  if (format.choice.bounded) {
    write_key_bounds(reinterpret_cast<const bf16*>(source), tokens, shape, out + key_bounds_offset(format, shape));
  }
  if (format.rotated) {
    const size_t bytes = head_page_bytes(KvFormat{}, shape);
    check(bytes <= page_stride_, "head pages are rotated for the shape that the backend was built for");
    std::memcpy(scratch_page(1), source, bytes);
    source = scratch_page(1);
    rotate_page(scratch_page(1), shape);
  }
  const auto* keys = reinterpret_cast<const bf16*>(source);
  const std::byte* values = source + key_page_bytes(KvPart{}, shape);
  std::byte* out_values = out + key_page_bytes(format.key(), shape);
  if (format.key_bits == 16) {
    std::memcpy(out, source, key_page_bytes(KvPart{}, shape));
  } else {
    ops_.of(format.key())
        .quantize(keys, key_layout(format, shape), tokens, shape.key_dim(), format.ldlq() ? rounding : HeadRounding{},
                  out);
  }
  if (format.value_bits == 16) {
    std::memcpy(out_values, values, value_page_bytes(KvPart{}, shape));
  } else {
    ops_.of(format.value())
        .quantize(reinterpret_cast<const bf16*>(values), value_layout(format, shape), shape.head_dim, tokens, {},
                  out_values);
  }
}

void Packing::dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                                   std::byte* out) const {
  const FlushDenormals flush;
  std::byte* values = out + key_page_bytes(KvPart{}, shape);
  const std::byte* source_values = source + key_page_bytes(format.key(), shape);
  if (format.key_bits == 16) {
    std::memcpy(out, source, key_page_bytes(KvPart{}, shape));
  } else {
    ops_.of(format.key()).dequantize(source, key_layout(format, shape), reinterpret_cast<bf16*>(out), nullptr);
  }
  if (format.value_bits == 16) {
    std::memcpy(values, source_values, value_page_bytes(KvPart{}, shape));
  } else {
    ops_.of(format.value())
        .dequantize(source_values, value_layout(format, shape), reinterpret_cast<bf16*>(values), nullptr);
  }
  if (format.rotated) {
    rotate_page(out, shape);
  }
}

}  // namespace vericache
