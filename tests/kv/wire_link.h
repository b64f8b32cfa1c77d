// Link: a wire with its host tier and the lane that reads what it brings, and sequences to send over it.
// Each test owns its own, on its thread.
#pragma once

#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kv/wire.h"
#include "kv_memory.h"
#include "memory_store.h"
#include "simulated_gpu.h"

namespace vericache::test {

constexpr KvShape kShape{.layers = 5, .kv_heads = 2, .head_dim = 32};
constexpr int kMostPages = 16;  // of a sequence

inline double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// A sequence's page sets as the tail has them, with their resident form where the code asks for one, and its place in
// the host tier.
struct Stored {
  static constexpr KvFormat kResident{.key_bits = 4, .value_bits = 8};
  std::vector<std::vector<std::byte>> sets;
  FullKv full;
  std::unique_ptr<OwnedPool> resident_pages;
  std::unique_ptr<ResidentKv> resident;
  // extents: a pool or a store.
  Stored(const KvShape& shape, ResidualCode code, auto& extents, PagePool& records, int pages, Kernels& cpu,
         std::mt19937_64& random)
      : full(shape, code, extents, records, pages) {
    for (int i = 0; i < pages; ++i) {
      sets.push_back(random_page_set(shape, random));
    }
    if (code == ResidualCode::resident) {
      resident_pages = std::make_unique<OwnedPool>(head_page_bytes(kResident, shape),
                                                   std::max(1, pages) * shape.layers * shape.kv_heads);
      resident = std::make_unique<ResidentKv>(shape, kResident, resident_pages->pool,
                                              ResidentIndex{.memory = nullptr, .max_pages = std::max(1, pages)});
      for (int layer = 0; layer < shape.layers; ++layer) {
        quantize(shape, layer, cpu);
      }
    }
  }
  int pages() const { return static_cast<int>(sets.size()); }
  FetchPart part(int count, int first_staged = 0) const {
    return {.full = &full, .resident = resident.get(), .pages = count, .first_staged = first_staged};
  }
  // What crosses for so many of its pages.
  size_t bytes(int count) const {
    size_t sum = 0;
    for (int layer = 0; layer < kShape.layers && count > 0; ++layer) {
      sum += full.end(layer, count - 1);
    }
    return sum;
  }
  std::vector<const std::byte*> pointers(int first, int last) const {
    std::vector<const std::byte*> out;
    for (int i = first; i < last; ++i) {
      out.push_back(sets[static_cast<size_t>(i)].data());
    }
    return out;
  }
  const std::byte* page(const KvShape& shape, int layer, int page) const {
    return sets[static_cast<size_t>(page)].data() + static_cast<size_t>(layer) * page_bytes(shape);
  }

 private:
  void quantize(const KvShape& shape, int layer, Kernels& cpu) {
    ResidentLayer& to = resident->layer(layer);
    for (int head = 0; head < shape.kv_heads; ++head) {
      check(to.resize(head, pages() * kPageTokens), "room for the resident form");
      for (int i = 0; i < pages(); ++i) {
        cpu.quantize_head_page(page(shape, layer, i) + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape),
                               kPageTokens, shape, kResident, to.head_page(head, i));
      }
    }
  }
};

// Who carries: threads, where the device's memory is the host's own, or lanes of a (simulated) GPU.
enum class Carrier { threads, lanes };

struct Link {
  KvShape shape;
  std::mt19937_64 random{17};
  std::unique_ptr<Kernels> cpu = make_lane();
  SimulatedGpu gpu;
  ResidualCode code;
  std::unique_ptr<Device> device;
  std::unique_ptr<Device> host = make_cpu_device(size_t{32} << 20);
  Kernels& lane;  // that reads what was brought
  OwnedPool extents;
  OwnedPool records;
  std::unique_ptr<MemoryStore> store_of_others;  // of every other sequence, where the options say so
  std::vector<std::unique_ptr<Stored>> sequences;
  std::unique_ptr<Wire> wire;  // ends before what it reads and writes

  explicit Link(Carrier carrier, const WireOptions& options, uint64_t seed = 3)
      : shape(kShape),
        gpu(*cpu, seed),
        code(options.code),
        device(make_memory(carrier, size_t{64} << 20)),
        lane(carrier == Carrier::threads ? *cpu : gpu.kernels()),
        extents(extent_bytes(shape), 16 * shape.layers),
        records(FullKv::record_bytes(shape, kMostPages), 16),
        store_of_others(options.stores ? std::make_unique<MemoryStore>(extent_bytes(shape), 16 * shape.layers)
                                       : nullptr),
        wire(make_wire(shape, options, *device, *host, lane)) {}
  static std::unique_ptr<Device> make_memory(Carrier carrier, size_t bytes) {
    if (carrier == Carrier::lanes) {
      return std::make_unique<SimulatedDevice>(bytes);
    }
    return make_cpu_device(bytes);
  }

  Stored& add(int pages) {
    const bool elsewhere = store_of_others != nullptr && sequences.size() % 2 == 0;
    sequences.push_back(elsewhere
                            ? std::make_unique<Stored>(shape, code, *store_of_others, records.pool, pages, *cpu, random)
                            : std::make_unique<Stored>(shape, code, extents.pool, records.pool, pages, *cpu, random));
    return *sequences.back();
  }
  void await_stored(const Stored& sequence, int pages) const {
    for (uint64_t seen = wire->changes(); sequence.full.stored() < pages; seen = wire->changes()) {
      wire->wait_change(seen);
    }
  }
  // Pages [first, last), without waiting.
  void store(Stored& sequence, int first, int last) const {
    wire->store(sequence.full, first, sequence.pointers(first, last), sequence.resident.get());
  }
  void store(Stored& sequence) {
    store(sequence, 0, sequence.pages());
    await_stored(sequence, sequence.pages());
  }
  // Returns when the lane has the layer at hand, proved.
  void await(Fetch& fetch, int layer) {
    wire->wait(fetch, layer);
    wire->await(fetch, layer, lane);
    lane.wait(lane.mark());
  }
  bool staged_equals(const Fetch& fetch, size_t part, const Stored& sequence, int layer) const {
    const FetchPart& p = fetch.parts()[part];
    for (int page = 0; page < p.pages; ++page) {
      if (std::memcmp(wire->staged(fetch, layer, p.first_staged + page), sequence.page(shape, layer, page),
                      page_bytes(shape)) != 0) {
        return false;
      }
    }
    return true;
  }
  // Takes all layers in; true if all parts came as they were stored.
  bool consume(Fetch& fetch, const std::vector<const Stored*>& of) {
    bool equal = true;
    for (int layer = 0; layer < shape.layers; ++layer) {
      await(fetch, layer);
      for (size_t part = 0; part < of.size(); ++part) {
        equal = staged_equals(fetch, part, *of[part], layer) && equal;
      }
      wire->release(fetch, layer, lane);
    }
    return equal;
  }
};

}  // namespace vericache::test
