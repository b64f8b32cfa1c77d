#include "kv/lane_wire.h"

#include <fmt/format.h>

#include <thread>

#include "base/check.h"
#include "base/error.h"
#include "base/trace.h"

namespace vericache {
namespace {

constexpr uint64_t kCounters = 4096;

}  // namespace

class LaneWire::LaneFetch final : public Fetch {
 public:
  LaneFetch(std::vector<FetchPart> parts, uint64_t first_ticket, Kernels& in, uint32_t* counters, uint64_t first)
      : Fetch(std::move(parts), first_ticket), in_(in), counters_(counters), first_(first) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      *mismatches(i) = 0;
    }
  }
  uint32_t* mismatches(size_t part) const { return counters_ + (first_ + part) % kCounters; }
  uint64_t corrupt_blocks() const {
    uint64_t blocks = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      blocks += *static_cast<volatile const uint32_t*>(mismatches(i));
    }
    return blocks;
  }
  bool corrupt(size_t part) const override { return *static_cast<volatile const uint32_t*>(mismatches(part)) != 0; }
  double busy_seconds() const override {
    double seconds = 0;
    for (const auto& [from, to] : transfers_) {
      seconds += in_.seconds(from, to);
    }
    return seconds;
  }
  void trace(Trace& trace) const override {
    for (size_t layer = 0; layer < transfers_.size(); ++layer) {
      trace.span("wire in", fmt::format("layer {}", layer), in_.time(transfers_[layer].first),
                 in_.time(transfers_[layer].second));
    }
  }
  void sent(Mark from, Mark to, size_t bytes) {
    transfers_.emplace_back(from, to);
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
  }

 private:
  Kernels& in_;
  uint32_t* counters_;
  uint64_t first_;
  std::vector<std::pair<Mark, Mark>> transfers_;
};

LaneWire::LaneWire(const KvShape& shape, const WireOptions& options, Device& device, Device& host, Kernels& kernels)
    : Wire(shape, options, device),
      in_(kernels.lane(Kernels::Place::wire_in)),
      out_(kernels.lane(Kernels::Place::wire_out)),
      slots_(static_cast<size_t>(options.ring_layers)),
      mismatches_(host.allocate_array<uint32_t>(kCounters, "the wire's counters")) {
  if (options.gbps > 0) {
    throw UsageError("--wire-gbps caps an imitated link; a GPU's link is the real one: leave the flag out");
  }
}

LaneWire::~LaneWire() {
  in_.wait(in_.mark());
  out_.wait(out_.mark());
}

std::shared_ptr<Fetch> LaneWire::fetch(std::vector<FetchPart> parts) {
  for (const FetchPart& part : parts) {
    check(part.first_staged + part.pages <= options_.slot_pages, "a fetch fits a staging slot");
  }
  const size_t count = parts.size();
  auto fetch = std::make_shared<LaneFetch>(std::move(parts), next_ticket_, in_, mismatches_, next_counter_);
  next_ticket_ += static_cast<uint64_t>(shape_.layers);
  next_counter_ += count;
  fetches_.push_back(fetch);
  corrupt_blocks();  // lets go of those that are over
  uncounted_.push_back(fetch);
  pump();
  return fetch;
}

// Puts on the wire every layer whose slot has been released by then.
void LaneWire::pump() {
  while (sent_ < next_ticket_ && sent_ < released_ + slots_.size()) {
    LaneFetch& fetch = *fetches_.front();
    const int layer = static_cast<int>(sent_ - fetch.ticket(0));
    send_layer(fetch, layer);
    ++sent_;
    if (layer + 1 == shape_.layers) {
      fetches_.pop_front();
    }
  }
}

void LaneWire::send_layer(LaneFetch& fetch, int layer) {
  Slot& to = slot(fetch.ticket(layer));
  if (to.reader != nullptr) {
    in_.follow(*to.reader, to.released);
  }
  linger(in_);
  size_t bytes = 0;
  copies_.clear();
  for (const FetchPart& part : fetch.parts()) {
    for (int page = 0; page < part.pages; ++page) {
      std::byte* target = staged(fetch, layer, part.first_staged + page);
      const std::byte* source = part.full->page(layer, page);
      // Pages of an extent lie together, and so they do in staging.
      if (page > 0 && copies_.back().source + copies_.back().bytes == source) {
        copies_.back().bytes += page_bytes_;
      } else {
        copies_.push_back({target, source, page_bytes_});
      }
      bytes += page_bytes_;
    }
  }
  to.begun = in_.mark();
  in_.copy(copies_);
  to.arrived = in_.mark();
  fetch.sent(to.begun, to.arrived, bytes);
  bytes_in_.fetch_add(bytes, std::memory_order_relaxed);
}

bool LaneWire::arrived(const Fetch& fetch, int layer) {
  const uint64_t ticket = fetch.ticket(layer);
  return ticket < sent_ && (ticket + slots_.size() < sent_ || in_.reached(slot(ticket).arrived));
}

void LaneWire::wait(const Fetch& fetch, int layer) {
  check(ready(fetch, layer), "a layer that is waited for is on the wire");
  in_.wait(slot(fetch.ticket(layer)).arrived);
}

void LaneWire::await(Fetch& fetch, int layer, Kernels& lane) {
  check(ready(fetch, layer), "a lane waits for a layer that is on the wire");
  lane.follow(in_, slot(fetch.ticket(layer)).arrived);
  const auto& lane_fetch = static_cast<const LaneFetch&>(fetch);
  for (size_t i = 0; i < fetch.parts().size(); ++i) {
    const FetchPart& part = fetch.parts()[i];
    if (part.pages > 0) {
      lane.prove({.first = staged(fetch, layer, part.first_staged),
                  .stride = page_bytes_,
                  .bytes = page_bytes_,
                  .count = part.pages},
                 part.full->checksums(layer), lane_fetch.mismatches(i));
    }
  }
}

void LaneWire::release(const Fetch& fetch, int layer, Kernels& lane) {
  check(fetch.ticket(layer) == released_ && released_ < sent_, "layers are released in order");
  linger(lane);
  Slot& from = slot(released_);
  from.released = lane.mark();
  from.reader = &lane;
  ++released_;
  pump();
}

// The pass that computed the pages is over: the host has seen its last mark.
void LaneWire::store(FullKv& full, int first, std::vector<const std::byte*> page_sets) {
  const int count = static_cast<int>(page_sets.size());
  check(first + count <= full.max_pages(), "a store fits the room reserved for the sequence");
  linger(out_);
  copies_.clear();
  const Mark begun = out_.mark();
  for (int i = 0; i < count; ++i) {
    const std::byte* set = page_sets[static_cast<size_t>(i)];
    out_.checksum({.first = set,
                   .stride = page_bytes_,
                   .bytes = page_bytes_,
                   .count = shape_.layers,
                   .checksum_stride = full.max_pages()},
                  full.checksums(0) + first + i);
  }
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int i = 0; i < count; ++i) {
      copies_.push_back({full.page(layer, first + i),
                         page_sets[static_cast<size_t>(i)] + static_cast<size_t>(layer) * page_bytes_, page_bytes_});
    }
  }
  out_.copy(copies_);
  bytes_out_.fetch_add(copies_.size() * page_bytes_, std::memory_order_relaxed);
  stores_.push_back({&full, first, count, begun, out_.mark()});
}

void LaneWire::finish_stores() {
  while (!stores_.empty() && out_.reached(stores_.front().done)) {
    const Store& store = stores_.front();
    corrupt(store);
    if (options_.trace != nullptr) {
      options_.trace->span("wire out", fmt::format("{} pages", store.count), out_.time(store.begun),
                           out_.time(store.done));
    }
    store.full->set_stored(store.first + store.count);
    stores_.pop_front();
    ++changes_;
  }
}

// For tests: every n-th page that has left the device has one bit flipped.
void LaneWire::corrupt(const Store& store) {
  for (int layer = 0; layer < shape_.layers && options_.inject_corruption_every != 0; ++layer) {
    for (int i = 0; i < store.count; ++i) {
      if (++stored_pages_ % options_.inject_corruption_every == 0) {
        store.full->page(layer, store.first + i)[stored_pages_ % page_bytes_] ^= std::byte{1};
      }
    }
  }
}

bool LaneWire::stores_pending(const FullKv& full) {
  finish_stores();
  for (const Store& store : stores_) {
    if (store.full == &full) {
      return true;
    }
  }
  return false;
}

// A fetch that nobody else holds any more is over.
uint64_t LaneWire::corrupt_blocks() {
  std::erase_if(uncounted_, [this](const std::shared_ptr<LaneFetch>& fetch) {
    if (fetch.use_count() > 1) {
      return false;
    }
    corrupt_blocks_.fetch_add(fetch->corrupt_blocks());
    return true;
  });
  uint64_t blocks = corrupt_blocks_.load();
  for (const std::shared_ptr<LaneFetch>& fetch : uncounted_) {
    blocks += fetch->corrupt_blocks();
  }
  return blocks;
}

uint64_t LaneWire::changes() {
  finish_stores();
  return changes_;
}

void LaneWire::wait_change(uint64_t seen) {
  while (changes() == seen) {
    std::this_thread::yield();
  }
}

void LaneWire::linger(Kernels& lane) {
  if (options_.inject_delay_us > 0) {
    lane.delay(std::uniform_int_distribution<int>(0, options_.inject_delay_us)(random_));
  }
}

}  // namespace vericache
