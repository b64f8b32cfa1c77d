// LaneWire: the wire of a device with lanes of its own. Everything is enqueued ahead and ordered by marks; the host
// never touches what crosses. Called from the engine's thread.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "kv/wire_out.h"

namespace vericache {

// Plain pages are copied into staging slots. Encoded ones are copied into a ring of bytes; the lane that awaits a layer
// decodes it into staging, so that one slot is enough and the ring's bytes are free again. The way out is WireOut's.
// What lies in a store comes and goes through a StorePort.
class LaneWire final : public Wire {
 public:
  // host: what the engine's thread and the device both reach.
  LaneWire(const KvShape& shape, const WireOptions& options, Device& device, Device& host, Kernels& kernels);
  ~LaneWire() override;
  static size_t device_bytes(const KvShape& shape, const WireOptions& options);
  static size_t host_bytes(const KvShape& shape, const WireOptions& options);
  LaneWire(const LaneWire&) = delete;
  LaneWire& operator=(const LaneWire&) = delete;

  std::shared_ptr<Fetch> fetch(std::vector<FetchPart> parts) override;
  bool arrived(const Fetch& fetch, int layer) override;
  void wait(const Fetch& fetch, int layer) override;
  bool ready(const Fetch& fetch, int layer) override { return fetch.ticket(layer) < sent_; }
  void await(Fetch& fetch, int layer, Kernels& lane) override;
  void release(const Fetch& fetch, int layer, Kernels& lane) override;

  void store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident) override;
  bool stores_pending(const FullKv& full) override;
  uint64_t changes() override;
  void wait_change(uint64_t seen) override;
  uint64_t bytes_out() const override { return out_.bytes(); }
  uint64_t corrupt_blocks() override;

 private:
  // Layers that a fetch has on the wire, and what came of their pages.
  class LaneFetch;
  // A layer on its way.
  struct Slot {
    size_t begin = 0;  // of its bytes in the ring
    size_t end = 0;
    Mark begun = 0;    // of its transfer, wire lane
    Mark arrived = 0;  // wire lane
    Mark released = 0;
    Kernels* reader = nullptr;  // the lane that released it
  };
  bool coded() const { return options_.code != ResidualCode::plain; }
  void pump();
  void land();
  bool landed();
  bool place(size_t bytes, Slot& slot) const;
  void send_layer(LaneFetch& fetch, int layer);
  void let_go(Kernels& lane);
  void linger(Kernels& lane);
  Slot& slot(uint64_t ticket) { return slots_[ticket % slots_.size()]; }
  const Slot& slot(uint64_t ticket) const { return slots_[ticket % slots_.size()]; }

  Kernels& in_;
  std::unique_ptr<StorePort> port_;  // null without a store
  WireOut out_;
  std::vector<Slot> slots_;
  std::deque<std::shared_ptr<LaneFetch>> fetches_;     // not wholly sent
  std::vector<std::shared_ptr<LaneFetch>> uncounted_;  // whose mismatches corrupt_blocks_ lacks
  std::vector<BlockCopy> copies_;
  std::byte* ring_ = nullptr;  // encoded layers that have come in, or come
  size_t ring_bytes_ = 0;
  uint32_t* mismatches_;  // a ring of counters, one a part of a fetch; host memory that the device reaches
  uint64_t next_counter_ = 0;
  uint64_t next_ticket_ = 0;
  uint64_t sent_ = 0;      // tickets below are on the wire or across
  uint64_t released_ = 0;  // tickets below are released
  std::minstd_rand random_;
};

}  // namespace vericache
