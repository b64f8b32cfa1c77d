// StorePort: layers and pages on their way between a block store and host memory that lanes reach: one thread reads
// layers some way ahead of their transfers, another writes pages that have left the device.
// Called from the engine's thread.
#pragma once

#include <array>
#include <functional>

#include "kv/job_thread.h"
#include "kv/wire.h"

namespace vericache {

class StorePort {
 public:
  static constexpr uint64_t kLandings = 3;  // layers that land at once

  // in: the lane that takes landed layers on. batch_pages: pages of a layer that leave at once.
  StorePort(const KvShape& shape, const WireOptions& options, int batch_pages, Device& host, Kernels& in);
  static size_t host_bytes(const KvShape& shape, const WireOptions& options, int batch_pages);

  // Whether lanes reach all of its memory by now: it may still be being pinned.
  bool reachable();

  // The ticket that lands next; those below have landed or are landing.
  uint64_t next() const { return next_; }
  // Lands it: `read` brings what it has in a store into the memory that it is given; null where it has nothing there.
  // false: the last transfer from that memory is not over.
  bool land(std::function<void(std::byte*)> read);
  bool landed(uint64_t ticket) const;
  const std::byte* memory(uint64_t ticket) const { return landings_[ticket % kLandings].memory; }
  void sent(uint64_t ticket, Mark mark) {
    landings_[ticket % kLandings].sent = mark;
  }  // lane `in`, behind its transfer

  std::byte* leaving(int layer) const { return leaving_ + static_cast<size_t>(layer) * layer_bytes_; }
  uint64_t write(std::function<void()> job) { return writer_.enqueue(std::move(job)); }
  bool written(uint64_t job) const { return writer_.done(job); }

 private:
  struct Landing {
    std::byte* memory = nullptr;  // its parts, one behind the other
    uint64_t job = 0;             // of reading it; 0: nothing of it is in a store
    Mark sent = 0;
  };

  Device& host_;
  Kernels& in_;
  size_t landing_bytes_;
  size_t layer_bytes_;  // of what leaves
  size_t leaving_bytes_;
  std::array<Landing, kLandings> landings_;
  std::byte* leaving_;  // (layers, batch pages)
  bool reachable_ = false;
  uint64_t next_ = 0;
  JobThread reader_;
  JobThread writer_;
};

}  // namespace vericache
