#include "backend/cpu/packing.h"

#include <algorithm>
#include <cstring>

#include "backend/rotation.h"
#include "base/check.h"

namespace vericache {
namespace {

constexpr size_t kLine = 64;

size_t lines(size_t bytes) {
  return (bytes + kLine - 1) / kLine * kLine;
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
                       args.out.head_page(head, page));
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
    quantize_head_page(gathered, count, shape_, args.out.format, target);
  }
}

void Packing::quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                                 std::byte* out) const {
  const FlushDenormals flush;
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
    ops_.of(format.key()).quantize(keys, key_layout(format, shape), tokens, shape.key_dim(), out);
  }
  if (format.value_bits == 16) {
    std::memcpy(out_values, values, value_page_bytes(KvPart{}, shape));
  } else {
    ops_.of(format.value())
        .quantize(reinterpret_cast<const bf16*>(values), value_layout(format, shape), shape.head_dim, tokens,
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
