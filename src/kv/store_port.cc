#include "kv/store_port.h"

#include <algorithm>
#include <utility>

namespace vericache {
namespace {

size_t landing_bytes(const KvShape& shape, const WireOptions& options) {
  return static_cast<size_t>(options.slot_pages) * stored_page_bound(shape, options.code);
}
size_t layer_bytes(const KvShape& shape, const WireOptions& options, int batch_pages) {
  return static_cast<size_t>(batch_pages) * stored_page_bound(shape, options.code);
}

}  // namespace

StorePort::StorePort(const KvShape& shape, const WireOptions& options, int batch_pages, Device& host, Kernels& in)
    : host_(host),
      in_(in),
      landing_bytes_(landing_bytes(shape, options)),
      layer_bytes_(layer_bytes(shape, options, batch_pages)),
      leaving_bytes_(static_cast<size_t>(shape.layers) * layer_bytes_) {
  for (Landing& landing : landings_) {
    landing.memory = host.allocate(landing_bytes_, "layers from a store");
  }
  leaving_ = host.allocate(leaving_bytes_, "pages for a store");
}

size_t StorePort::host_bytes(const KvShape& shape, const WireOptions& options, int batch_pages) {
  const auto aligned = [](size_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  return kLandings * aligned(landing_bytes(shape, options)) +
         aligned(static_cast<size_t>(shape.layers) * layer_bytes(shape, options, batch_pages));
}

bool StorePort::reachable() {
  reachable_ = reachable_ || (host_.ready(leaving_, leaving_bytes_) >= leaving_bytes_ &&
                              std::all_of(landings_.begin(), landings_.end(), [this](const Landing& landing) {
                                return host_.ready(landing.memory, landing_bytes_) >= landing_bytes_;
                              }));
  return reachable_;
}

bool StorePort::land(std::function<void(std::byte*)> read) {
  Landing& to = landings_[next_ % kLandings];
  to.job = 0;
  if (read) {
    if (to.sent != 0 && !in_.reached(to.sent)) {
      return false;
    }
    to.job = reader_.enqueue([read = std::move(read), memory = to.memory] { read(memory); });
  }
  ++next_;
  return true;
}

bool StorePort::landed(uint64_t ticket) const {
  const uint64_t job = landings_[ticket % kLandings].job;
  return ticket < next_ && (job == 0 || reader_.done(job));
}

}  // namespace vericache
