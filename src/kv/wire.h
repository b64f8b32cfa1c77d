// Wire: the link between the host tier and the device. A fetch brings a pass's full KV layer by layer into a ring of
// staging slots, a store takes finished pages out. Called from the engine's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/kernels.h"
#include "backend/kv_view.h"
#include "kv/full_kv.h"
#include "kv/resident.h"

namespace vericache {

class Trace;

// What crosses the wire for the full KV: pages as they are, or what their resident form lacks, coded.
// automatic: coded where the wire is a real one. On a CPU it is imitated, and the coder competes with the decoding.
enum class WireForm { automatic, plain, coded };

struct WireOptions {
  double gbps = 0;  // cap of each direction, GB/s; 0 = none
  ResidualCode code = ResidualCode::plain;
  int ring_layers = 3;
  int slot_pages = 0;        // pages that a layer of a fetch has, all parts, at most
  double coded_share = 1.0;  // of a plain page, that an encoded one is expected to take
  bool stores = false;       // sequences may have their full KV in a store
  int inject_delay_us = 0;
  uint64_t inject_corruption_every = 0;
  Trace* trace = nullptr;
};

// What a fetch brings of one sequence: pages [0, pages) of every layer.
struct FetchPart {
  const FullKv* full = nullptr;
  const ResidentKv* resident = nullptr;  // with ResidualCode::resident: what the pages' residuals are joined with
  int pages = 0;
  int first_staged = 0;  // its first page in the slot
};

// A fetch: all layers of some sequences, in order. Shared between the engine and the wire.
class Fetch {
 public:
  explicit Fetch(std::vector<FetchPart> parts, uint64_t first_ticket)
      : parts_(std::move(parts)), first_ticket_(first_ticket), corrupt_(parts_.size()) {}
  virtual ~Fetch() = default;
  const std::vector<FetchPart>& parts() const { return parts_; }
  uint64_t ticket(int layer) const { return first_ticket_ + static_cast<uint64_t>(layer); }
  // A page of this part failed its checksum. Known for certain once the lane that awaited its layers is through.
  virtual bool corrupt(size_t part) const { return corrupt_[part].load(std::memory_order_acquire); }
  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }  // crossed so far
  virtual double busy_seconds() const {                                      // on the wire so far
    return static_cast<double>(busy_us_.load(std::memory_order_relaxed)) * 1e-6;
  }
  // Its transfers, once it is over.
  virtual void trace(Trace& trace) const;

 protected:
  friend class ThreadWire;
  std::vector<FetchPart> parts_;
  uint64_t first_ticket_;  // a ticket numbers a layer of a fetch
  std::vector<std::atomic<bool>> corrupt_;
  std::atomic<uint64_t> bytes_ = 0;
  std::atomic<uint64_t> busy_us_ = 0;
  std::vector<std::pair<double, double>> spans_;  // of each layer that has arrived, steady clock
};

// A ring of staging slots in device memory, bf16 pages of a layer each, and the tables by which attention finds them.
class Staging {
 public:
  Staging(const KvShape& shape, int slots, int slot_pages, Device& device);
  static size_t bytes(const KvShape& shape, int slots, int slot_pages);

  std::byte* page(uint64_t ticket, int page) const;
  // Pages [first, first + pages) of the ticket's slot.
  KvView view(uint64_t ticket, int first, int pages) const;

 private:
  KvShape shape_;
  int count_;  // of slots
  int slot_pages_;
  std::byte* slots_;   // (slots, slot_pages) pages
  std::byte** table_;  // (slots, kv_heads, slot_pages), device memory
  int* counts_;        // (slot_pages + 1, kv_heads): tokens of so many pages
};

class Wire {
 public:
  virtual ~Wire() = default;

  // Queues a fetch behind those before it. Resident parts and pages named in it must not change until its layer is
  // released.
  virtual std::shared_ptr<Fetch> fetch(std::vector<FetchPart> parts) = 0;
  virtual bool arrived(const Fetch& fetch, int layer) = 0;
  virtual void wait(const Fetch& fetch, int layer) = 0;  // until it has arrived
  // Whether a lane may be given work on the layer: after await() that work finds it in staging, proved.
  virtual bool ready(const Fetch& fetch, int layer) = 0;
  virtual void await(Fetch& fetch, int layer, Kernels& lane) = 0;
  // In order, after the lane's last work on the layer: the slot may be overwritten when that is done.
  virtual void release(const Fetch& fetch, int layer, Kernels& lane) = 0;

  // Staged page of the layer. Head pages lie one after the other.
  std::byte* staged(const Fetch& fetch, int layer, int page) const { return staging_.page(fetch.ticket(layer), page); }
  KvView staged_view(const Fetch& fetch, int layer, const FetchPart& part) const {
    return staging_.view(fetch.ticket(layer), part.first_staged, part.pages);
  }

  // Takes whole page sets out to `full`, as its pages from `first` on; they must hold still until full.stored() covers
  // them, and so must the resident pages of the same tokens.
  virtual void store(FullKv& full, int first, std::vector<const std::byte*> page_sets,
                     const ResidentKv* resident = nullptr) = 0;
  virtual bool stores_pending(const FullKv& full) = 0;
  // Blocks until some layer arrives or some store ends after the call of `changes` that gave `seen`.
  virtual uint64_t changes() = 0;
  virtual void wait_change(uint64_t seen) = 0;

  uint64_t bytes_in() const { return bytes_in_.load(std::memory_order_relaxed); }
  virtual uint64_t bytes_out() const = 0;
  virtual uint64_t corrupt_blocks() { return corrupt_blocks_.load(std::memory_order_relaxed); }

 protected:
  Wire(const KvShape& shape, const WireOptions& options, int slots, Device& device);
  static KvView resident_of(const FetchPart& part, int layer) {
    return part.resident != nullptr ? part.resident->layer(layer).view() : KvView{};
  }

  KvShape shape_;
  WireOptions options_;
  Staging staging_;
  size_t page_bytes_;
  std::atomic<uint64_t> bytes_in_ = 0;
  std::atomic<uint64_t> corrupt_blocks_ = 0;
};

// Device memory that a wire of these options works in.
size_t wire_device_bytes(const KvShape& shape, const WireOptions& options, const Device& device);
// Host memory that the device reaches, likewise.
size_t wire_host_bytes(const KvShape& shape, const WireOptions& options, const Device& device);
// Threads that copy where the device's memory is the host's own; copies by the lanes of the device where it is not.
std::unique_ptr<Wire> make_wire(const KvShape& shape, const WireOptions& options, Device& device, Device& host,
                                Kernels& kernels);

}  // namespace vericache
