#include "kv/wire.h"

#include <fmt/format.h>

#include "base/trace.h"
#include "kv/lane_wire.h"
#include "kv/thread_wire.h"

namespace vericache {

void Fetch::trace(Trace& trace) const {
  for (size_t layer = 0; layer < spans_.size(); ++layer) {
    trace.span("wire in", fmt::format("layer {}", layer), spans_[layer].first, spans_[layer].second);
  }
}

size_t Staging::bytes(const KvShape& shape, int slots, int slot_pages) {
  const auto aligned = [](size_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  const size_t pages = static_cast<size_t>(slots) * static_cast<size_t>(slot_pages);
  const size_t heads = static_cast<size_t>(shape.kv_heads);
  return aligned(pages * page_bytes(shape)) + aligned(pages * heads * sizeof(std::byte*)) +
         aligned(static_cast<size_t>(slot_pages + 1) * heads * sizeof(int));
}

Staging::Staging(const KvShape& shape, int slots, int slot_pages, Device& device)
    : shape_(shape), count_(slots), slot_pages_(slot_pages) {
  const size_t pages = static_cast<size_t>(slots) * static_cast<size_t>(slot_pages_);
  const size_t heads = static_cast<size_t>(shape.kv_heads);
  slots_ = device.allocate(pages * page_bytes(shape), "staging");
  table_ = device.allocate_array<std::byte*>(pages * heads, "staging's tables");
  counts_ = device.allocate_array<int>(static_cast<size_t>(slot_pages_ + 1) * heads, "staging's tables");

  std::vector<std::byte*> table;
  for (uint64_t slot = 0; slot < static_cast<uint64_t>(count_); ++slot) {
    for (size_t head = 0; head < heads; ++head) {
      for (int i = 0; i < slot_pages_; ++i) {
        table.push_back(page(slot, i) + head * head_page_bytes(KvFormat{}, shape));
      }
    }
  }
  std::vector<int> counts;
  for (int pages = 0; pages <= slot_pages_; ++pages) {
    counts.insert(counts.end(), heads, pages * kPageTokens);
  }
  device.write(reinterpret_cast<std::byte*>(table_), table.data(), table.size() * sizeof(std::byte*));
  device.write(reinterpret_cast<std::byte*>(counts_), counts.data(), counts.size() * sizeof(int));
}

std::byte* Staging::page(uint64_t ticket, int page) const {
  const uint64_t slot = ticket % static_cast<uint64_t>(count_);
  return slots_ + (slot * static_cast<uint64_t>(slot_pages_) + static_cast<uint64_t>(page)) * page_bytes(shape_);
}

KvView Staging::view(uint64_t ticket, int first, int pages) const {
  const uint64_t slot = ticket % static_cast<uint64_t>(count_);
  KvView view;
  view.head_pages = table_ + slot * static_cast<uint64_t>(shape_.kv_heads) * static_cast<uint64_t>(slot_pages_) + first;
  view.page_stride = slot_pages_;
  view.tokens = counts_ + static_cast<ptrdiff_t>(pages) * shape_.kv_heads;
  return view;
}

Wire::Wire(const KvShape& shape, const WireOptions& options, int slots, Device& device)
    : shape_(shape),
      options_(options),
      staging_(shape, slots, options.slot_pages, device),
      page_bytes_(page_bytes(shape)) {}

size_t wire_device_bytes(const KvShape& shape, const WireOptions& options, const Device& device) {
  return device.addressable() ? Staging::bytes(shape, options.ring_layers, options.slot_pages)
                              : LaneWire::device_bytes(shape, options);
}
size_t wire_host_bytes(const KvShape& shape, const WireOptions& options, const Device& device) {
  return device.addressable() ? 0 : LaneWire::host_bytes(shape, options);
}

std::unique_ptr<Wire> make_wire(const KvShape& shape, const WireOptions& options, Device& device, Device& host,
                                Kernels& kernels) {
  if (device.addressable()) {
    return std::make_unique<ThreadWire>(shape, options, device, kernels);
  }
  return std::make_unique<LaneWire>(shape, options, device, host, kernels);
}

}  // namespace vericache
