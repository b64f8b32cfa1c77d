#include "kv/lane_wire.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/check.h"
#include "base/error.h"
#include "base/trace.h"

namespace vericache {
namespace {

constexpr uint64_t kCounters = 4096;
// Encoded layers in the ring at once, at most.
constexpr size_t kCodedSlots = 8;

// Before the pages of a part, in the ring: where each ends.
size_t ends_bytes(int pages) {
  return (static_cast<size_t>(pages) * sizeof(uint32_t) + kResidualUnit - 1) / kResidualUnit * kResidualUnit;
}

// Room for `ring_layers` layers of the expected size, and for any one.
size_t ring_bytes_for(const KvShape& shape, const WireOptions& options) {
  const auto pages = static_cast<size_t>(options.slot_pages);
  const auto expected = static_cast<size_t>(options.coded_share * static_cast<double>(page_bytes(shape)));
  // A part has at least a page: its ends take a unit at most beside the pages'.
  return std::max(static_cast<size_t>(options.ring_layers) * pages * expected, pages * residual_bound(shape)) +
         static_cast<size_t>(options.ring_layers) * pages * kResidualUnit;
}

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
  // Reading from a store and transfers go on beside each other.
  double busy_seconds() const override {
    double seconds = 0;
    for (const auto& [from, to] : transfers_) {
      seconds += in_.seconds(from, to);
    }
    return std::max(seconds, Fetch::busy_seconds());
  }
  bool in_store() const {  // any of it
    return std::any_of(parts_.begin(), parts_.end(),
                       [](const FetchPart& part) { return part.pages > 0 && part.full->in_store(); });
  }
  // Brings what a layer has in a store into `memory`. The reading thread.
  void land(int layer, std::byte* memory) {
    const auto begin = std::chrono::steady_clock::now();
    for (const FetchPart& part : parts_) {
      if (part.pages > 0 && part.full->in_store()) {
        const size_t bytes = part.full->end(layer, part.pages - 1);
        part.full->read(layer, 0, {memory, bytes});  // a store that failed gave anything: the checksums tell
        memory += bytes;
      }
    }
    const auto taken = std::chrono::steady_clock::now() - begin;
    busy_us_.fetch_add(static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(taken).count()),
                       std::memory_order_relaxed);
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
    : Wire(shape, options, options.code == ResidualCode::plain ? options.ring_layers : 1, device),
      in_(kernels.lane(Kernels::Place::wire_in)),
      port_(options.stores ? std::make_unique<StorePort>(shape, options, WireOut::kBatchPages, host, in_) : nullptr),
      out_(shape, options, device, host, kernels, port_.get()),
      slots_(coded() ? kCodedSlots : static_cast<size_t>(options.ring_layers)),
      mismatches_(host.allocate_array<uint32_t>(kCounters, "the wire's counters")) {
  if (coded()) {
    ring_bytes_ = ring_bytes_for(shape, options);
    ring_ = device.allocate(ring_bytes_, "staging");
  }
  if (options.gbps > 0) {
    throw UsageError("--wire-gbps caps an imitated link; a GPU's link is the real one: leave the flag out");
  }
}

LaneWire::~LaneWire() {
  port_ = nullptr;  // its threads end before what they read and write
  in_.wait(in_.mark());
}

size_t LaneWire::device_bytes(const KvShape& shape, const WireOptions& options) {
  if (options.code == ResidualCode::plain) {
    return Staging::bytes(shape, options.ring_layers, options.slot_pages);
  }
  const auto aligned = [](size_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  return Staging::bytes(shape, 1, options.slot_pages) + aligned(ring_bytes_for(shape, options)) +
         WireOut::device_bytes(shape, options);
}

size_t LaneWire::host_bytes(const KvShape& shape, const WireOptions& options) {
  const size_t counters = kCounters * sizeof(uint32_t) + 4096;
  return counters + WireOut::host_bytes(shape) +
         (options.stores ? StorePort::host_bytes(shape, options, WireOut::kBatchPages) : 0);
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

// Has the next layers read that lie in a store.
void LaneWire::land() {
  if (!port_->reachable()) {
    return;
  }
  for (const std::shared_ptr<LaneFetch>& fetch : fetches_) {
    while (port_->next() < fetch->ticket(shape_.layers) && port_->next() < sent_ + StorePort::kLandings) {
      const int layer = static_cast<int>(port_->next() - fetch->ticket(0));
      std::function<void(std::byte*)> read;
      if (fetch->in_store()) {
        read = [fetch, layer](std::byte* memory) { fetch->land(layer, memory); };
      }
      if (!port_->land(std::move(read))) {
        return;
      }
    }
  }
}

// Whether the layer that is sent next is in the host's memory.
bool LaneWire::landed() {
  if (port_ == nullptr) {
    return true;
  }
  land();
  return port_->landed(sent_);
}

// Puts on the wire every layer that has room by then.
void LaneWire::pump() {
  while (sent_ < next_ticket_ && sent_ < released_ + slots_.size() && landed()) {
    LaneFetch& fetch = *fetches_.front();
    const int layer = static_cast<int>(sent_ - fetch.ticket(0));
    if (coded()) {
      size_t bytes = 0;
      for (const FetchPart& part : fetch.parts()) {
        bytes += part.pages > 0 ? ends_bytes(part.pages) + part.full->end(layer, part.pages - 1) : 0;
      }
      Slot placed = slot(sent_);
      if (!place(bytes, placed)) {
        return;
      }
      if (slot(sent_).reader != nullptr) {
        in_.follow(*slot(sent_).reader, slot(sent_).released);  // and with it everything released before
      }
      slot(sent_) = {.begin = placed.begin, .end = placed.end};
    }
    send_layer(fetch, layer);
    ++sent_;
    if (layer + 1 == shape_.layers) {
      fetches_.pop_front();
    }
  }
}

// In the ring, behind the layer that was sent last or at the ring's beginning. false: layers that are still to be
// decoded lie there.
bool LaneWire::place(size_t bytes, Slot& slot_to_be) const {
  const size_t behind = sent_ == 0 ? 0 : slot(sent_ - 1).end;
  slot_to_be.begin = behind + bytes <= ring_bytes_ ? behind : 0;
  slot_to_be.end = slot_to_be.begin + bytes;
  check(slot_to_be.end <= ring_bytes_, "the ring holds any layer of a fetch");
  for (uint64_t ticket = released_; ticket < sent_; ++ticket) {
    if (slot(ticket).begin < slot_to_be.end && slot_to_be.begin < slot(ticket).end) {
      return false;
    }
  }
  return true;
}

void LaneWire::send_layer(LaneFetch& fetch, int layer) {
  Slot& to = slot(fetch.ticket(layer));
  if (coded()) {
    // What was decoded from the same bytes has been read.
    for (uint64_t ticket = sent_ < slots_.size() ? 0 : sent_ - slots_.size() + 1; ticket < released_; ++ticket) {
      const Slot& other = slot(ticket);
      if (other.begin < to.end && to.begin < other.end) {
        in_.follow(*other.reader, other.released);
      }
    }
  } else if (to.reader != nullptr) {
    in_.follow(*to.reader, to.released);
  }
  linger(in_);
  size_t bytes = 0;
  const std::byte* from_store = port_ == nullptr ? nullptr : port_->memory(sent_);
  copies_.clear();
  for (const FetchPart& part : fetch.parts()) {
    if (part.pages == 0) {
      continue;
    }
    const size_t end = part.full->end(layer, part.pages - 1);
    std::byte* target = staged(fetch, layer, part.first_staged);
    if (coded()) {
      target = ring_ + to.begin + bytes;
      copies_.push_back({target, reinterpret_cast<const std::byte*>(part.full->ends(layer)),
                         static_cast<size_t>(part.pages) * sizeof(uint32_t)});
      target += ends_bytes(part.pages);
      bytes += ends_bytes(part.pages);
    }
    if (part.full->in_store()) {
      copies_.push_back({target, from_store, end});
      from_store += end;
    } else {
      part.full->for_each_piece(layer, 0, end, [&](const std::byte* memory, size_t offset, size_t count) {
        copies_.push_back({target + offset, memory, count});
      });
    }
    bytes += end;
  }
  to.begun = in_.mark();
  in_.copy(copies_);
  to.arrived = in_.mark();
  if (port_ != nullptr) {
    port_->sent(sent_, to.arrived);
  }
  fetch.sent(to.begun, to.arrived, bytes);
  bytes_in_.fetch_add(bytes, std::memory_order_relaxed);
}

bool LaneWire::arrived(const Fetch& fetch, int layer) {
  const uint64_t ticket = fetch.ticket(layer);
  return ticket < sent_ && (ticket + slots_.size() < sent_ || in_.reached(slot(ticket).arrived));
}

void LaneWire::wait(const Fetch& fetch, int layer) {
  while (port_ != nullptr && !ready(fetch, layer) && sent_ < released_ + slots_.size()) {
    pump();
    std::this_thread::yield();
  }
  check(ready(fetch, layer), "a layer that is waited for is on the wire");
  in_.wait(slot(fetch.ticket(layer)).arrived);
}

void LaneWire::await(Fetch& fetch, int layer, Kernels& lane) {
  check(ready(fetch, layer), "a lane waits for a layer that is on the wire");
  const Slot& from = slot(fetch.ticket(layer));
  lane.follow(in_, from.arrived);
  const auto& lane_fetch = static_cast<const LaneFetch&>(fetch);
  const std::byte* in = ring_ + from.begin;
  for (size_t i = 0; i < fetch.parts().size(); ++i) {
    const FetchPart& part = fetch.parts()[i];
    if (part.pages == 0) {
      continue;
    }
    std::byte* const pages = staged(fetch, layer, part.first_staged);
    const uint64_t* const checksums = part.full->checksums(layer);
    uint32_t* const mismatches = lane_fetch.mismatches(i);
    if (!coded()) {
      lane.prove({.first = pages, .stride = page_bytes_, .bytes = page_bytes_, .count = part.pages}, checksums,
                 mismatches);
      continue;
    }
    lane.decode({.shape = shape_,
                 .code = options_.code,
                 .in = in + ends_bytes(part.pages),
                 .ends = reinterpret_cast<const uint32_t*>(in),
                 .count = part.pages,
                 .resident = resident_of(part, layer),
                 .out = pages,
                 .checksums = checksums,
                 .mismatches = mismatches});
    in += ends_bytes(part.pages) + part.full->end(layer, part.pages - 1);
  }
  if (coded()) {
    check(fetch.ticket(layer) == released_, "layers are decoded in order");
    let_go(lane);
  }
}

// The layer's bytes on the wire may be overwritten when the lane has come to here.
void LaneWire::let_go(Kernels& lane) {
  linger(lane);
  Slot& from = slot(released_);
  from.released = lane.mark();
  from.reader = &lane;
  ++released_;
  pump();
}

void LaneWire::release(const Fetch& fetch, int layer, Kernels& lane) {
  const uint64_t ticket = fetch.ticket(layer);
  check(ticket == (coded() ? released_ - 1 : released_) && ticket < sent_, "layers are released in order");
  if (!coded()) {
    let_go(lane);
  }
}

void LaneWire::store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident) {
  out_.store(full, first, std::move(page_sets), resident);
}

bool LaneWire::stores_pending(const FullKv& full) {
  out_.advance();
  return out_.pending(full);
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
  out_.advance();
  pump();
  return out_.ended();
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
