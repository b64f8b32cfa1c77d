// ThreadWire: the wire where device memory is imitated by host memory: one worker per direction copies, codes, checks
// and keeps to the bandwidth. Called from the engine's thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "kv/wire.h"

namespace vericache {

class ThreadWire final : public Wire {
 public:
  ThreadWire(const KvShape& shape, const WireOptions& options, Device& device, Kernels& kernels);
  ~ThreadWire() override;
  ThreadWire(const ThreadWire&) = delete;
  ThreadWire& operator=(const ThreadWire&) = delete;

  std::shared_ptr<Fetch> fetch(std::vector<FetchPart> parts) override;
  bool arrived(const Fetch& fetch, int layer) override;
  void wait(const Fetch& fetch, int layer) override;
  bool ready(const Fetch& fetch, int layer) override { return arrived(fetch, layer); }
  void await(Fetch& fetch, int layer, Kernels& lane) override;
  void release(const Fetch& fetch, int layer, Kernels& lane) override;

  void store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident) override;
  bool stores_pending(const FullKv& full) override;
  uint64_t changes() override { return changes_.load(std::memory_order_acquire); }
  void wait_change(uint64_t seen) override;
  uint64_t bytes_out() const override { return bytes_out_.load(std::memory_order_relaxed); }

 private:
  struct Store {
    FullKv* full;
    int first;
    std::vector<const std::byte*> page_sets;
    const ResidentKv* resident;
  };
  void fetch_worker();
  void store_worker();
  void bring_layer(Fetch& fetch, int layer);
  void bring_part(const FetchPart& part, int layer, std::byte* staged);
  size_t take_layer(const Store& store, int layer);
  void encode_page(const Store& store, int layer, int index);
  void note_change();
  void inject_delay();

  Kernels& kernels_;
  std::vector<std::byte> incoming_;  // encoded pages of a part; the fetching thread's
  std::vector<std::byte> outgoing_;  // an encoded page; the storing thread's
  mutable std::mutex mutex_;
  std::condition_variable condition_;
  std::deque<std::shared_ptr<Fetch>> fetches_;
  std::deque<Store> stores_;
  uint64_t next_ticket_ = 0;
  uint64_t arrived_ = 0;   // tickets below have arrived
  uint64_t released_ = 0;  // tickets below are released
  bool closing_ = false;
  std::atomic<uint64_t> changes_ = 0;
  std::atomic<uint64_t> bytes_out_ = 0;
  std::atomic<uint64_t> stored_pages_ = 0;
  std::thread fetch_thread_;
  std::thread store_thread_;
};

}  // namespace vericache
