#include <sys/mman.h>

#include <algorithm>
#include <span>

#include "backend/device.h"

namespace vericache {
namespace {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(size_t budget_bytes) : Device(budget_bytes) {}
  ~CpuDevice() override {
    for (const std::span<std::byte> block : blocks_) {
      munmap(block.data(), block.size());
    }
  }
  std::string_view name() const override { return "cpu"; }
  bool addressable() const override { return true; }
  std::unique_ptr<Device> make_host_memory(size_t budget_bytes) override { return make_cpu_device(budget_bytes); }
  void write(std::byte* target, const void* source, size_t bytes) override {
    std::copy_n(static_cast<const std::byte*>(source), bytes, target);
  }
  void read(void* target, const std::byte* source, size_t bytes) const override {
    std::copy_n(source, bytes, static_cast<std::byte*>(target));
  }

 private:
  std::byte* take(size_t bytes) override {
    void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) {
      return nullptr;
    }
    // Weights are walked with large strides: huge pages save the address translation.
    madvise(block, bytes, MADV_HUGEPAGE);
    blocks_.push_back({static_cast<std::byte*>(block), bytes});
    return blocks_.back().data();
  }

  std::vector<std::span<std::byte>> blocks_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(size_t budget_bytes) {
  return std::make_unique<CpuDevice>(budget_bytes);
}

}  // namespace vericache
