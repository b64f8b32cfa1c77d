// WireOut: whole page sets on their way out of the device, over a lane of its own, to where a sequence's full KV lies.
// Everything is enqueued ahead and ordered by marks. Called from the engine's thread.
#pragma once

#include <deque>
#include <random>
#include <vector>

#include "kv/store_port.h"
#include "kv/wire.h"

namespace vericache {

// Plain pages are copied to their places at once. Pages that are coded are encoded into a block of their own, a few at
// a time; when the host knows their sizes they get their places and are copied there. What goes to a store is copied to
// the port's memory and written by its thread.
class WireOut {
 public:
  // Page sets that are encoded before their sizes are looked at.
  static constexpr int kBatchPages = 4;
  static_assert(kBatchPages <= EncodeArgs::kMostPages);

  // host: what the engine's thread and the device both reach. port: null without a store; its threads end before this.
  WireOut(const KvShape& shape, const WireOptions& options, Device& device, Device& host, Kernels& kernels,
          StorePort* port);
  ~WireOut();
  static size_t device_bytes(const KvShape& shape, const WireOptions& options);
  static size_t host_bytes(const KvShape& shape);
  WireOut(const WireOut&) = delete;
  WireOut& operator=(const WireOut&) = delete;

  // See Wire::store.
  void store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident);
  void advance();  // enqueues what can be, and takes note of what is done
  bool pending(const FullKv& full) const;
  uint64_t ended() const { return ended_; }  // batches so far
  uint64_t bytes() const { return bytes_; }

 private:
  struct Store {
    FullKv* full;
    int first;
    std::vector<const std::byte*> sets;
    const ResidentKv* resident;
    int done = 0;   // page sets that are out
    int batch = 0;  // page sets under way behind them
    Mark begun = 0;
    Mark encoded = 0;
    Mark copied = 0;   // 0: their places are not known yet
    uint64_t job = 0;  // of writing them to a store; 0: not begun
    int count() const { return static_cast<int>(sets.size()); }
    // The i-th page set of the batch.
    const std::byte* set(int i) const { return sets[static_cast<size_t>(done) + static_cast<size_t>(i)]; }
  };
  bool coded() const { return options_.code != ResidualCode::plain; }
  bool advance(Store& store);
  void begin_batch(Store& store);
  void encode_batch(Store& store);
  void copy_batch(Store& store);
  void write_batch(Store& store);
  void end_batch(Store& store);
  void corrupt(const Store& store);

  KvShape shape_;
  WireOptions options_;
  size_t page_bytes_;
  Kernels& lane_;
  StorePort* port_;
  std::deque<Store> stores_;
  std::vector<BlockCopy> copies_;
  std::byte* encoded_ = nullptr;  // (layers, kBatchPages): pages
  uint32_t* sizes_ = nullptr;     // (kBatchPages, kv_heads)
  uint32_t* ends_ = nullptr;      // (layers, kBatchPages): host memory that the device reaches
  uint64_t ended_ = 0;
  uint64_t bytes_ = 0;
  uint64_t stored_pages_ = 0;
  std::minstd_rand random_;
};

}  // namespace vericache
