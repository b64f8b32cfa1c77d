// LaneWire: the wire of a device with lanes of its own. Everything is enqueued ahead and ordered by marks; the host
// never touches what crosses. Called from the engine's thread.
#pragma once

#include <deque>
#include <random>

#include "kv/wire.h"

namespace vericache {

class LaneWire final : public Wire {
 public:
  // host: what the engine's thread and the device both reach.
  LaneWire(const KvShape& shape, const WireOptions& options, Device& device, Device& host, Kernels& kernels);
  ~LaneWire() override;
  LaneWire(const LaneWire&) = delete;
  LaneWire& operator=(const LaneWire&) = delete;

  std::shared_ptr<Fetch> fetch(std::vector<FetchPart> parts) override;
  bool arrived(const Fetch& fetch, int layer) override;
  void wait(const Fetch& fetch, int layer) override;
  bool ready(const Fetch& fetch, int layer) override { return fetch.ticket(layer) < sent_; }
  void await(Fetch& fetch, int layer, Kernels& lane) override;
  void release(const Fetch& fetch, int layer, Kernels& lane) override;

  void store(FullKv& full, int first, std::vector<const std::byte*> page_sets) override;
  bool stores_pending(const FullKv& full) override;
  uint64_t changes() override;
  void wait_change(uint64_t seen) override;
  uint64_t corrupt_blocks() override;

 private:
  // Layers that a fetch has on the wire, and what came of their pages.
  class LaneFetch;
  struct Slot {
    Mark begun = 0;    // of its last transfer, wire lane
    Mark arrived = 0;  // wire lane
    Mark released = 0;
    Kernels* reader = nullptr;  // the lane that released it
  };
  struct Store {
    FullKv* full;
    int first;
    int count;
    Mark begun;
    Mark done;
  };
  void pump();
  void send_layer(LaneFetch& fetch, int layer);
  void finish_stores();
  void corrupt(const Store& store);
  void linger(Kernels& lane);
  Slot& slot(uint64_t ticket) { return slots_[ticket % slots_.size()]; }

  Kernels& in_;
  Kernels& out_;
  std::vector<Slot> slots_;
  std::deque<std::shared_ptr<LaneFetch>> fetches_;     // not wholly sent
  std::vector<std::shared_ptr<LaneFetch>> uncounted_;  // whose mismatches corrupt_blocks_ lacks
  std::deque<Store> stores_;
  std::vector<BlockCopy> copies_;
  uint32_t* mismatches_;  // a ring of counters, one a part of a fetch; host memory that the device reaches
  uint64_t next_counter_ = 0;
  uint64_t next_ticket_ = 0;
  uint64_t sent_ = 0;      // tickets below are on the wire or across
  uint64_t released_ = 0;  // tickets below are released
  uint64_t stored_pages_ = 0;
  uint64_t changes_ = 0;
  std::minstd_rand random_;
};

}  // namespace vericache
