// Device: memory under a budget. Blocks are taken at start and live as long as the device; nothing is taken later.
// Allocation happens on the thread that builds the engine.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

namespace vericache {

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const = 0;

  // Zeroed, aligned to 4096 bytes. Error, naming `what` and the remedy, when it would exceed the budget.
  std::byte* allocate(size_t bytes, std::string_view what);
  template <typename T>
  T* allocate_array(size_t count, std::string_view what) {
    return reinterpret_cast<T*>(allocate(count * sizeof(T), what));
  }

  size_t budget() const { return budget_; }
  size_t used() const { return used_; }
  size_t available() const { return budget_ - used_; }

 protected:
  explicit Device(size_t budget_bytes) : budget_(budget_bytes) {}

 private:
  virtual std::byte* take(size_t bytes) = 0;  // null when the machine has no more
  size_t budget_;
  size_t used_ = 0;
};

// Device memory imitated by host memory: a budget, so that any machine can run what a small device would.
std::unique_ptr<Device> make_cpu_device(size_t budget_bytes);

}  // namespace vericache
