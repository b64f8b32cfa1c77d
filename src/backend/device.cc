#include "backend/device.h"

#include "base/error.h"

namespace vericache {

std::byte* Device::allocate(size_t bytes, std::string_view what) {
  constexpr size_t kAlignment = 4096;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (rounded < bytes || rounded > available()) {
    throw Error(
        "device memory: {} needs {:.1f} MB, but only {:.1f} of {:.1f} MB are left; raise --device-memory or lower "
        "--max-model-len",
        what, bytes / 1e6, available() / 1e6, budget_ / 1e6);
  }
  if (rounded == 0) {
    return nullptr;  // the resident pages of a compressor that keeps nothing, say
  }
  std::byte* block = take(rounded);
  if (block == nullptr) {
    throw Error("device memory: the machine could not give {:.1f} MB for {}; lower --device-memory", bytes / 1e6, what);
  }
  used_ += rounded;
  return block;
}

}  // namespace vericache
