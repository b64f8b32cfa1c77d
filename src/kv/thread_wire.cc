#include "kv/thread_wire.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "base/check.h"
#include "base/hash.h"
#include "kv/throttle.h"

namespace vericache {

ThreadWire::ThreadWire(const KvShape& shape, const WireOptions& options, Device& device, Kernels& kernels)
    : Wire(shape, options, options.ring_layers, device),
      kernels_(kernels),
      fetch_thread_([this] { fetch_worker(); }),
      store_thread_([this] { store_worker(); }) {}

ThreadWire::~ThreadWire() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  condition_.notify_all();
  fetch_thread_.join();
  store_thread_.join();
}

std::shared_ptr<Fetch> ThreadWire::fetch(std::vector<FetchPart> parts) {
  for (const FetchPart& part : parts) {
    check(part.first_staged + part.pages <= options_.slot_pages, "a fetch fits a staging slot");
  }
  auto fetch = std::make_shared<Fetch>(std::move(parts), next_ticket_);
  {
    const std::lock_guard lock(mutex_);
    next_ticket_ += static_cast<uint64_t>(shape_.layers);
    fetches_.push_back(fetch);
  }
  condition_.notify_all();
  return fetch;
}

bool ThreadWire::arrived(const Fetch& fetch, int layer) {
  const std::lock_guard lock(mutex_);
  return fetch.ticket(layer) < arrived_;
}

void ThreadWire::wait(const Fetch& fetch, int layer) {
  std::unique_lock lock(mutex_);
  condition_.wait(lock, [&] { return fetch.ticket(layer) < arrived_; });
}

void ThreadWire::await(Fetch& fetch, int layer, Kernels& /*lane*/) {
  wait(fetch, layer);
}

void ThreadWire::release(const Fetch& fetch, int layer, Kernels& /*lane*/) {
  {
    const std::lock_guard lock(mutex_);
    check(fetch.ticket(layer) == released_ && released_ < arrived_, "layers are released in order");
    ++released_;
  }
  condition_.notify_all();
}

void ThreadWire::store(FullKv& full, int first, std::vector<const std::byte*> page_sets, const ResidentKv* resident) {
  check(first + static_cast<int>(page_sets.size()) <= full.max_pages(),
        "a store fits the room reserved for the sequence");
  {
    const std::lock_guard lock(mutex_);
    stores_.push_back({&full, first, std::move(page_sets), resident});
  }
  condition_.notify_all();
}

void ThreadWire::wait_change(uint64_t seen) {
  std::unique_lock lock(mutex_);
  condition_.wait(lock, [&] { return changes_.load() != seen; });
}

bool ThreadWire::stores_pending(const FullKv& full) {
  const std::lock_guard lock(mutex_);
  return std::any_of(stores_.begin(), stores_.end(), [&](const Store& store) { return store.full == &full; });
}

void ThreadWire::note_change() {
  changes_.fetch_add(1);
  condition_.notify_all();
}

void ThreadWire::inject_delay() {
  if (options_.inject_delay_us > 0) {
    thread_local std::minstd_rand random(
        static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
    std::this_thread::sleep_for(
        std::chrono::microseconds(std::uniform_int_distribution<int>(0, options_.inject_delay_us)(random)));
  }
}

void ThreadWire::fetch_worker() {
  Throttle throttle(options_.gbps);
  std::unique_lock lock(mutex_);
  for (;;) {
    condition_.wait(lock, [&] { return closing_ || !fetches_.empty(); });
    if (closing_) {
      return;
    }
    const std::shared_ptr<Fetch> fetch = fetches_.front();
    fetches_.pop_front();
    for (int layer = 0; layer < shape_.layers; ++layer) {
      const uint64_t ticket = fetch->ticket(layer);
      condition_.wait(lock,
                      [&] { return closing_ || ticket < released_ + static_cast<uint64_t>(options_.ring_layers); });
      if (closing_) {
        return;
      }
      lock.unlock();
      inject_delay();
      const auto begin = std::chrono::steady_clock::now();
      throttle.begin();
      const uint64_t before = fetch->bytes();
      bring_layer(*fetch, layer);
      throttle.spend(fetch->bytes() - before);
      fetch->busy_us_.fetch_add(
          static_cast<uint64_t>(
              std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count()),
          std::memory_order_relaxed);
      const auto seconds = [](std::chrono::steady_clock::time_point at) {
        return std::chrono::duration<double>(at.time_since_epoch()).count();
      };
      fetch->spans_.emplace_back(seconds(begin), seconds(std::chrono::steady_clock::now()));
      lock.lock();
      arrived_ = ticket + 1;
      note_change();
    }
  }
}

void ThreadWire::bring_layer(Fetch& fetch, int layer) {
  for (size_t i = 0; i < fetch.parts_.size(); ++i) {
    const FetchPart& part = fetch.parts_[i];
    if (part.pages == 0) {
      continue;
    }
    std::byte* target = staged(fetch, layer, part.first_staged);
    bring_part(part, layer, target);
    for (int page = 0; page < part.pages; ++page) {
      // The checksum is that of the full page: it proves the transfer and the join together.
      if (hash_bytes(target + static_cast<size_t>(page) * page_bytes_, page_bytes_) !=
          part.full->checksum(layer, page)) {
        fetch.corrupt_[i].store(true, std::memory_order_release);
        corrupt_blocks_.fetch_add(1);
      }
    }
    const size_t bytes = part.full->end(layer, part.pages - 1);
    fetch.bytes_.fetch_add(bytes, std::memory_order_relaxed);
    bytes_in_.fetch_add(bytes, std::memory_order_relaxed);
  }
}

// full = join(resident, residual).
void ThreadWire::bring_part(const FetchPart& part, int layer, std::byte* staged) {
  const size_t bytes = part.full->end(layer, part.pages - 1);
  const bool coded = part.full->code() != ResidualCode::plain;
  incoming_.resize(coded ? bytes : 0);
  std::byte* target = coded ? incoming_.data() : staged;
  part.full->read(layer, 0, {target, bytes});  // a store that failed gave anything: the checksums tell
  if (coded) {
    kernels_.decode({.shape = shape_,
                     .code = part.full->code(),
                     .in = incoming_.data(),
                     .ends = part.full->ends(layer),
                     .count = part.pages,
                     .resident = resident_of(part, layer),
                     .out = staged});
  }
}

void ThreadWire::store_worker() {
  Throttle throttle(options_.gbps);
  std::unique_lock lock(mutex_);
  for (;;) {
    condition_.wait(lock, [&] { return closing_ || !stores_.empty(); });
    if (closing_) {
      return;
    }
    const Store& store = stores_.front();  // stays in the queue until done: stores_pending sees it
    const int count = static_cast<int>(store.page_sets.size());
    lock.unlock();
    inject_delay();
    for (int layer = 0; layer < shape_.layers; ++layer) {
      throttle.begin();
      const size_t bytes = take_layer(store, layer);
      bytes_out_.fetch_add(bytes, std::memory_order_relaxed);
      throttle.spend(bytes);
    }
    lock.lock();
    store.full->set_stored(store.first + count);
    stores_.pop_front();
    note_change();
  }
}

// Returns the bytes that went out.
size_t ThreadWire::take_layer(const Store& store, int layer) {
  FullKv& full = *store.full;
  size_t taken = 0;
  for (int i = 0; i < static_cast<int>(store.page_sets.size()); ++i) {
    const int page = store.first + i;
    const std::byte* source = store.page_sets[static_cast<size_t>(i)] + static_cast<size_t>(layer) * page_bytes_;
    full.checksum(layer, page) = hash_bytes(source, page_bytes_);
    if (full.code() == ResidualCode::plain) {
      full.place(layer, page, page_bytes_);
    } else {
      encode_page(store, layer, i);
      source = outgoing_.data();
    }
    const size_t begin = full.begin(layer, page);
    const size_t end = full.end(layer, page);
    full.write(layer, begin, {source, end - begin});
    taken += end - begin;
    const uint64_t number = stored_pages_.fetch_add(1) + 1;
    if (options_.inject_corruption_every != 0 && number % options_.inject_corruption_every == 0) {
      full.flip_bit(layer, begin + number % (end - begin));
    }
  }
  return taken;
}

void ThreadWire::encode_page(const Store& store, int layer, int index) {
  const std::byte* page = store.page_sets[static_cast<size_t>(index)] + static_cast<size_t>(layer) * page_bytes_;
  outgoing_.resize(residual_bound(shape_));
  uint32_t units = 0;
  kernels_.encode({.shape = shape_,
                   .code = store.full->code(),
                   .pages = {&page, 1},
                   .resident = store.resident != nullptr ? store.resident->layer(layer).view() : KvView{},
                   .first = store.first + index,
                   .sizes = nullptr,
                   .out = outgoing_.data(),
                   .ends = &units});
  store.full->place(layer, store.first + index, units * kResidualUnit);
}

}  // namespace vericache
