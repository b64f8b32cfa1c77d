// Wire: the link between the host tier and the device. One worker per direction; a fetch brings a pass's full KV layer
// by layer into a ring of staging slots, a store takes finished pages out. Requests come from the engine's thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/kv_view.h"
#include "kv/host_tier.h"
#include "kv/resident.h"

namespace vericache {

struct WireOptions {
  double gbps = 0;  // cap of each direction, GB/s; 0 = none
  int ring_layers = 3;
  int slot_pages = 0;  // pages that a staging slot holds
  int inject_delay_us = 0;
  uint64_t inject_corruption_every = 0;
};

// What a fetch brings of one sequence: pages [0, pages) of every layer.
struct FetchPart {
  const FullKv* full = nullptr;
  const ResidentKv* exact =
      nullptr;  // resident tokens that need not cross (bf16, with positions); null = every token crosses
  int pages = 0;
  int first_staged = 0;  // its first page in the slot
};

// A fetch: all layers of some sequences, in order. Shared between the engine and the wire.
class Fetch {
 public:
  explicit Fetch(std::vector<FetchPart> parts) : parts_(std::move(parts)), corrupt_(parts_.size()) {}
  const std::vector<FetchPart>& parts() const { return parts_; }
  bool corrupt(size_t part) const { return corrupt_[part].load(std::memory_order_acquire); }
  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }  // crossed so far
  double busy_seconds() const {
    return static_cast<double>(busy_us_.load(std::memory_order_relaxed)) * 1e-6;
  }  // on the wire so far

 private:
  friend class Wire;
  std::vector<FetchPart> parts_;
  std::vector<std::atomic<bool>> corrupt_;  // a page of this part failed its checksum
  std::atomic<uint64_t> bytes_ = 0;
  std::atomic<uint64_t> busy_us_ = 0;
  uint64_t first_ticket_ = 0;
};

class Wire {
 public:
  // staging: ring_layers * slot_pages pages of device memory.
  Wire(const KvShape& shape, const WireOptions& options, std::byte* staging);
  ~Wire();
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  // Queues a fetch behind those before it. Resident parts and pages named in it must not change until its layer is
  // released.
  std::shared_ptr<Fetch> fetch(std::vector<FetchPart> parts);
  bool arrived(const Fetch& fetch, int layer) const;
  void wait(const Fetch& fetch, int layer);
  // Staged page of the layer that has arrived and is not released. Head pages lie one after the other.
  std::byte* staged(const Fetch& fetch, int layer, int page) const;
  void release(const Fetch& fetch, int layer);  // in order: the slot may be overwritten

  // Takes whole page sets out to `full`, as its pages from `first` on; they must hold still until full.stored() covers
  // them.
  void store(FullKv& full, int first, std::vector<const std::byte*> page_sets);
  // Blocks until some layer arrives or some store ends after the call of `changes` that gave `seen`.
  uint64_t changes() const { return changes_.load(std::memory_order_acquire); }
  void wait_change(uint64_t seen);
  bool stores_pending(const FullKv& full) const;

  uint64_t bytes_in() const { return bytes_in_.load(std::memory_order_relaxed); }
  uint64_t bytes_out() const { return bytes_out_.load(std::memory_order_relaxed); }
  uint64_t corrupt_blocks() const { return corrupt_blocks_.load(std::memory_order_relaxed); }

 private:
  struct Store {
    FullKv* full;
    int first;
    std::vector<const std::byte*> page_sets;
  };
  void fetch_worker();
  void store_worker();
  void bring_layer(Fetch& fetch, int layer, std::byte* slot);
  size_t join_page(const FetchPart& part, int layer, int page, std::byte* staged) const;
  void note_change();
  void inject_delay();

  KvShape shape_;
  WireOptions options_;
  std::byte* staging_;
  size_t page_bytes_;

  mutable std::mutex mutex_;
  std::condition_variable condition_;
  std::deque<std::shared_ptr<Fetch>> fetches_;
  std::deque<Store> stores_;
  uint64_t next_ticket_ = 0;  // a ticket numbers a layer of a fetch; slot = ticket % ring_layers
  uint64_t arrived_ = 0;      // tickets below have arrived
  uint64_t released_ = 0;     // tickets below are released
  bool closing_ = false;
  std::atomic<uint64_t> changes_ = 0;
  std::atomic<uint64_t> bytes_in_ = 0;
  std::atomic<uint64_t> bytes_out_ = 0;
  std::atomic<uint64_t> corrupt_blocks_ = 0;
  std::atomic<uint64_t> stored_pages_ = 0;
  std::thread fetch_thread_;
  std::thread store_thread_;
};

}  // namespace vericache
