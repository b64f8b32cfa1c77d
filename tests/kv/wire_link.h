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
#include "simulated_gpu.h"

namespace vericache::test {

constexpr KvShape kShape{.layers = 5, .kv_heads = 2, .head_dim = 32};
constexpr int kMostPages = 16;  // of a sequence

inline double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// A sequence's page sets as the tail has them, and its place in the host tier.
struct Stored {
  std::vector<std::vector<std::byte>> sets;
  FullKv full;
  Stored(const KvShape& shape, PagePool& extents, PagePool& checksums, int pages, std::mt19937_64& random)
      : full(shape, extents, checksums, pages) {
    for (int i = 0; i < pages; ++i) {
      sets.push_back(random_page_set(shape, random));
    }
  }
  int pages() const { return static_cast<int>(sets.size()); }
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
};

// Who carries: threads, where the device's memory is the host's own, or lanes of a (simulated) GPU.
enum class Carrier { threads, lanes };

struct Link {
  KvShape shape;
  std::mt19937_64 random{17};
  std::unique_ptr<Kernels> cpu = make_lane();
  SimulatedGpu gpu;
  std::unique_ptr<Device> device;
  std::unique_ptr<Device> host = make_cpu_device(size_t{1} << 20);
  Kernels& lane;  // that reads what was brought
  OwnedPool extents;
  OwnedPool checksums;
  std::vector<std::unique_ptr<Stored>> sequences;
  std::unique_ptr<Wire> wire;  // ends before what it reads and writes

  explicit Link(Carrier carrier, const WireOptions& options, uint64_t seed = 3)
      : shape(kShape),
        gpu(*cpu, seed),
        device(make_memory(carrier, Staging::bytes(shape, options.ring_layers, options.slot_pages))),
        lane(carrier == Carrier::threads ? *cpu : gpu.kernels()),
        extents(extent_bytes(shape), 16 * shape.layers),
        checksums(FullKv::checksum_bytes(shape, kMostPages), 16),
        wire(make_wire(shape, options, *device, *host, lane)) {}
  static std::unique_ptr<Device> make_memory(Carrier carrier, size_t bytes) {
    if (carrier == Carrier::lanes) {
      return std::make_unique<SimulatedDevice>(bytes);
    }
    return make_cpu_device(bytes);
  }

  Stored& add(int pages) {
    sequences.push_back(std::make_unique<Stored>(shape, extents.pool, checksums.pool, pages, random));
    return *sequences.back();
  }
  void await_stored(const Stored& sequence, int pages) const {
    for (uint64_t seen = wire->changes(); sequence.full.stored() < pages; seen = wire->changes()) {
      wire->wait_change(seen);
    }
  }
  void store(Stored& sequence) {
    wire->store(sequence.full, 0, sequence.pointers(0, sequence.pages()));
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
