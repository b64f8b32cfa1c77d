// Device: memory under a budget, and lanes of work. Blocks are taken at start and live as long as the device; nothing
// is taken later. Allocation happens on the thread that builds the engine.
#pragma once

#include <cstddef>
#include <cstdint>
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

  // The CPU can read and write what lies here.
  virtual bool addressable() const = 0;
  // Host memory that lanes copy from and to at the link's speed, and that ops may read and write in place: pinned pages
  // of a GPU's host. A device of its own, with its own budget. Large blocks are pinned in the background: `ready` says
  // how many bytes of a block can be used by now.
  virtual std::unique_ptr<Device> make_host_memory(size_t budget_bytes) = 0;
  virtual size_t ready(const std::byte* block, size_t bytes) const {
    (void)block;
    return bytes;
  }
  // Copies that are complete on return; for loading.
  virtual void write(std::byte* target, const void* source, size_t bytes) = 0;
  virtual void read(void* target, const std::byte* source, size_t bytes) const = 0;

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

// A point in the work of a lane: everything enqueued before it. The first is 1; 0 is reached from the start.
using Mark = uint64_t;

// Lane: a stream of device work. What is enqueued runs in order, and beside what other lanes do. On a CPU an op is done
// when it returns. Called from the engine's thread.
class Lane {
 public:
  virtual ~Lane() = default;
  virtual Mark mark() = 0;
  virtual bool reached(Mark mark) = 0;
  virtual void wait(Mark mark) = 0;  // the caller waits
  // Between two marks that were reached, as the device's clock saw it. Only the last thousands of marks are known.
  virtual double seconds(Mark from, Mark to) = 0;
  // When a mark was reached, in seconds since a zero that all lanes of a backend share; for traces.
  virtual double time(Mark mark) = 0;
  // What is enqueued here from now on waits for a mark of the other lane.
  virtual void follow(Lane& other, Mark mark) = 0;
  // The source may be reused on return.
  virtual void upload(std::byte* target, const void* source, size_t bytes) = 0;
};

// Device memory imitated by host memory: a budget, so that any machine can run what a small device would.
std::unique_ptr<Device> make_cpu_device(size_t budget_bytes);

}  // namespace vericache
