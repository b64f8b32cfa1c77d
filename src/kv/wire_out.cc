#include "kv/wire_out.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"
#include "base/trace.h"

namespace vericache {
namespace {

size_t encoded_bytes(const KvShape& shape) {
  return static_cast<size_t>(shape.layers) * WireOut::kBatchPages * residual_bound(shape);
}

}  // namespace

WireOut::WireOut(const KvShape& shape, const WireOptions& options, Device& device, Device& host, Kernels& kernels,
                 StorePort* port)
    : shape_(shape),
      options_(options),
      page_bytes_(page_bytes(shape)),
      lane_(kernels.lane(Kernels::Place::wire_out)),
      port_(port) {
  if (coded()) {
    encoded_ = device.allocate(encoded_bytes(shape), "staging");
    sizes_ =
        device.allocate_array<uint32_t>(size_t{kBatchPages} * static_cast<size_t>(shape.kv_heads), "staging's tables");
    ends_ = host.allocate_array<uint32_t>(static_cast<size_t>(shape.layers) * kBatchPages, "sizes");
  }
}

WireOut::~WireOut() {
  lane_.wait(lane_.mark());
}

size_t WireOut::device_bytes(const KvShape& shape, const WireOptions& options) {
  if (options.code == ResidualCode::plain) {
    return 0;
  }
  const auto aligned = [](size_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  return aligned(encoded_bytes(shape)) +
         aligned(size_t{kBatchPages} * static_cast<size_t>(shape.kv_heads) * sizeof(uint32_t));
}

size_t WireOut::host_bytes(const KvShape& shape) {
  return static_cast<size_t>(shape.layers) * kBatchPages * sizeof(uint32_t) + 4096;
}

// The pass that computed the pages is over: the host has seen its last mark.
void WireOut::store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident) {
  check(first + static_cast<int>(page_sets.size()) <= full.max_pages(),
        "a store fits the room reserved for the sequence");
  stores_.push_back({.full = &full, .first = first, .sets = std::move(page_sets), .resident = resident});
  if (!coded() && !full.in_store()) {
    begin_batch(stores_.back());
  }
  advance();
}

void WireOut::advance() {
  while (!stores_.empty() && advance(stores_.front())) {
    if (stores_.front().done == stores_.front().count()) {
      stores_.pop_front();
    }
  }
}

// false: its next batch is under way, or waits.
bool WireOut::advance(Store& store) {
  if (store.full->in_store() && !port_->reachable()) {
    return false;
  }
  if (store.batch == 0) {
    begin_batch(store);
  }
  if (store.copied == 0) {
    if (!lane_.reached(store.encoded)) {
      return false;
    }
    copy_batch(store);
  }
  if (!lane_.reached(store.copied)) {
    return false;
  }
  if (store.full->in_store()) {
    if (store.job == 0) {
      write_batch(store);
    }
    if (!port_->written(store.job)) {
      return false;
    }
  }
  end_batch(store);
  return true;
}

void WireOut::begin_batch(Store& store) {
  const bool whole = !coded() && !store.full->in_store();
  store.batch = whole ? store.count() : std::min(kBatchPages, store.count() - store.done);
  store.copied = 0;
  store.job = 0;
  if (options_.inject_delay_us > 0) {
    lane_.delay(std::uniform_int_distribution<int>(0, options_.inject_delay_us)(random_));
  }
  store.begun = lane_.mark();
  FullKv& full = *store.full;
  const int first = store.first + store.done;
  for (int i = 0; i < store.batch; ++i) {
    lane_.checksum({.first = store.set(i),
                    .stride = page_bytes_,
                    .bytes = page_bytes_,
                    .count = shape_.layers,
                    .checksum_stride = full.max_pages()},
                   full.checksums(0) + first + i);
  }
  if (coded()) {
    encode_batch(store);
    store.encoded = lane_.mark();
  } else {
    copy_batch(store);
  }
}

void WireOut::encode_batch(Store& store) {
  std::vector<const std::byte*> pages(static_cast<size_t>(store.batch));
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int i = 0; i < store.batch; ++i) {
      pages[static_cast<size_t>(i)] = store.set(i) + static_cast<size_t>(layer) * page_bytes_;
    }
    const auto slot = static_cast<size_t>(layer) * kBatchPages;
    lane_.encode({.shape = shape_,
                  .code = options_.code,
                  .pages = pages,
                  .resident = store.resident != nullptr ? store.resident->layer(layer).view() : KvView{},
                  .first = store.first + store.done,
                  .sizes = sizes_,
                  .out = encoded_ + slot * residual_bound(shape_),
                  .ends = ends_ + slot});
  }
}

// The sizes of the pages are known: they get their places.
void WireOut::copy_batch(Store& store) {
  FullKv& full = *store.full;
  const int first = store.first + store.done;
  size_t bytes = 0;
  copies_.clear();
  for (int layer = 0; layer < shape_.layers; ++layer) {
    const auto slot = static_cast<size_t>(layer) * kBatchPages;
    uint32_t begin = 0;
    for (int i = 0; i < store.batch; ++i) {
      const std::byte* source = store.set(i) + static_cast<size_t>(layer) * page_bytes_;
      size_t page_size = page_bytes_;
      if (coded()) {
        const uint32_t end = ends_[slot + static_cast<size_t>(i)];
        source = encoded_ + slot * residual_bound(shape_) + begin * kResidualUnit;
        page_size = (end - begin) * kResidualUnit;
        begin = end;
      }
      full.place(layer, first + i, page_size);
      const size_t at = full.begin(layer, first + i);
      const auto copy = [&](std::byte* memory, size_t offset, size_t count) {
        BlockCopy* last = copies_.empty() ? nullptr : &copies_.back();
        const std::byte* from = source + (offset - at);
        if (last != nullptr && last->target + last->bytes == memory && last->source + last->bytes == from) {
          last->bytes += count;
        } else {
          copies_.push_back({memory, from, count});
        }
      };
      if (full.in_store()) {
        copy(port_->leaving(layer) + (at - full.begin(layer, first)), at, page_size);
      } else {
        full.for_each_piece(layer, at, at + page_size, copy);
      }
      bytes += page_size;
    }
  }
  lane_.copy(copies_);
  bytes_ += bytes;
  store.copied = lane_.mark();
}

// What a store does not take is missing when it is read, and computed anew.
void WireOut::write_batch(Store& store) {
  FullKv& full = *store.full;
  const int first = store.first + store.done;
  store.job = port_->write([this, &full, first, last = first + store.batch - 1] {
    for (int layer = 0; layer < shape_.layers; ++layer) {
      const size_t begin = full.begin(layer, first);
      full.write(layer, begin, {port_->leaving(layer), full.end(layer, last) - begin});
    }
  });
}

void WireOut::end_batch(Store& store) {
  corrupt(store);
  if (options_.trace != nullptr) {
    options_.trace->span("wire out", fmt::format("{} pages", store.batch), lane_.time(store.begun),
                         lane_.time(store.copied));
  }
  store.done += store.batch;
  store.batch = 0;
  store.full->set_stored(store.first + store.done);
  ++ended_;
}

// For tests: every n-th page that has left the device has one bit flipped.
void WireOut::corrupt(const Store& store) {
  for (int layer = 0; layer < shape_.layers && options_.inject_corruption_every != 0; ++layer) {
    for (int i = 0; i < store.batch; ++i) {
      if (++stored_pages_ % options_.inject_corruption_every == 0) {
        const int page = store.first + store.done + i;
        const size_t begin = store.full->begin(layer, page);
        const size_t bytes = store.full->end(layer, page) - begin;
        store.full->flip_bit(layer, begin + stored_pages_ % bytes);
      }
    }
  }
}

bool WireOut::pending(const FullKv& full) const {
  return std::any_of(stores_.begin(), stores_.end(), [&](const Store& store) { return store.full == &full; });
}

}  // namespace vericache
