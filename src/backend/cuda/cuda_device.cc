#include "backend/cuda/cuda_device.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "backend/cuda/ops.h"
#include "base/check.h"
#include "base/error.h"

namespace vericache::cuda {
namespace {

constexpr size_t kPageBytes = 4096;

std::byte* aligned(std::byte* at, size_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  return at + ((alignment - address % alignment) % alignment);
}

// A block of host memory that workers pin while it is in use already.
struct PinnedBlock {
  std::byte* data = nullptr;
  size_t bytes = 0;
  std::byte* mapping = nullptr;  // of mmap; null: the block came from the driver
  size_t mapping_bytes = 0;
  std::vector<bool> pinned;  // (slabs)
  size_t first_unpinned = 0;
  std::atomic<size_t> ready{0};

  size_t slabs() const { return (bytes + kSlabBytes - 1) / kSlabBytes; }
  std::byte* slab(size_t index) const { return data + index * kSlabBytes; }
  size_t slab_bytes(size_t index) const { return std::min(kSlabBytes, bytes - index * kSlabBytes); }
};

class PinnedHost final : public Device {
 public:
  explicit PinnedHost(size_t budget_bytes) : Device(budget_bytes) {
    int same_pointer = 0;
    check_cuda(cudaDeviceGetAttribute(&same_pointer, cudaDevAttrCanUseHostPointerForRegisteredMem, 0),
               "asking how the GPU addresses host memory");
    if (same_pointer == 0) {
      throw Error("this GPU cannot address pinned host memory by the host's pointers; use --device cpu");
    }
  }
  ~PinnedHost() override;

  std::string_view name() const override { return "pinned host memory"; }
  bool addressable() const override { return true; }
  std::unique_ptr<Device> make_host_memory(size_t budget_bytes) override {
    return std::make_unique<PinnedHost>(budget_bytes);
  }
  size_t ready(const std::byte* block, size_t bytes) const override;
  void write(std::byte* target, const void* source, size_t bytes) override { std::memcpy(target, source, bytes); }
  void read(void* target, const std::byte* source, size_t bytes) const override { std::memcpy(target, source, bytes); }

 private:
  struct Slab {
    PinnedBlock* block;
    size_t index;
  };

  std::byte* take(size_t bytes) override;
  std::byte* take_small(PinnedBlock& block);
  std::byte* take_large(PinnedBlock& block);
  void work();

  std::vector<std::unique_ptr<PinnedBlock>> blocks_;  // of the thread that allocates
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Slab> waiting_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

PinnedHost::~PinnedHost() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
  for (const auto& block : blocks_) {
    if (block->mapping == nullptr) {
      check_cuda(cudaFreeHost(block->data), "freeing pinned host memory");
      continue;
    }
    for (size_t i = 0; i < block->slabs(); ++i) {
      if (block->pinned[i]) {
        check_cuda(cudaHostUnregister(block->slab(i)), "unpinning host memory");
      }
    }
    munmap(block->mapping, block->mapping_bytes);
  }
}

std::byte* PinnedHost::take(size_t bytes) {
  auto block = std::make_unique<PinnedBlock>();
  block->bytes = bytes;
  std::byte* data = bytes <= kSlabBytes ? take_small(*block) : take_large(*block);
  if (data != nullptr) {
    blocks_.push_back(std::move(block));
  }
  return data;
}

std::byte* PinnedHost::take_small(PinnedBlock& block) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, block.bytes, cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  std::memset(data, 0, block.bytes);
  block.data = static_cast<std::byte*>(data);
  block.ready = block.bytes;
  return block.data;
}

std::byte* PinnedHost::take_large(PinnedBlock& block) {
  block.mapping_bytes = block.bytes + kSlabBytes;
  void* mapping =
      mmap(nullptr, block.mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return nullptr;
  }
  block.mapping = static_cast<std::byte*>(mapping);
  block.data = aligned(block.mapping, kSlabBytes);
  madvise(block.data, block.bytes, MADV_HUGEPAGE);
  block.pinned.resize(block.slabs(), false);
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < block.slabs(); ++i) {
      waiting_.push_back({&block, i});
    }
  }
  // The pages of several slabs are faulted in at once; the driver pins one slab at a time.
  const unsigned most_workers = std::clamp(std::thread::hardware_concurrency() / 4, 1u, 4u);
  while (workers_.size() < std::min<size_t>(most_workers, block.slabs())) {
    workers_.emplace_back([this] { work(); });
  }
  wake_.notify_all();
  return block.data;
}

void PinnedHost::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
    if (stop_) {
      return;
    }
    const auto [block, index] = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    // Leaves contents alone, unlike a touch by hand: the block is in use. Where the kernel does not know it, pinning
    // faults the pages in.
    (void)madvise(block->slab(index), block->slab_bytes(index), MADV_POPULATE_WRITE);
    check_cuda(cudaHostRegister(block->slab(index), block->slab_bytes(index),
                                cudaHostRegisterPortable | cudaHostRegisterMapped),
               "pinning host memory (a smaller --host-memory may help)");
    lock.lock();
    block->pinned[index] = true;
    while (block->first_unpinned < block->pinned.size() && block->pinned[block->first_unpinned]) {
      ++block->first_unpinned;
    }
    block->ready.store(std::min(block->bytes, block->first_unpinned * kSlabBytes), std::memory_order_release);
  }
}

size_t PinnedHost::ready(const std::byte* block, size_t bytes) const {
  const auto found =
      std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& other) { return other->data == block; });
  check(found != blocks_.end(), "readiness is asked of a block of this memory");
  return std::min(bytes, (*found)->ready.load(std::memory_order_acquire));
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(size_t budget_bytes) : Device(budget_bytes), name_("cuda " + gpu_name()) {}
  ~CudaDevice() override {
    for (void* block : blocks_) {
      check_cuda(cudaFree(block), "freeing device memory");
    }
  }

  std::string_view name() const override { return name_; }
  bool addressable() const override { return false; }
  std::unique_ptr<Device> make_host_memory(size_t budget_bytes) override {
    return std::make_unique<PinnedHost>(budget_bytes);
  }
  // Lanes do not wait for the default stream, and a copy from pageable memory may return before it is done.
  void write(std::byte* target, const void* source, size_t bytes) override {
    check_cuda(cudaMemcpy(target, source, bytes, cudaMemcpyHostToDevice), "writing device memory");
    check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "writing device memory");
  }
  void read(void* target, const std::byte* source, size_t bytes) const override {
    check_cuda(cudaMemcpy(target, source, bytes, cudaMemcpyDeviceToHost), "reading device memory");
  }

 private:
  std::byte* allocate_once(size_t bytes) {
    void* block = nullptr;
    if (cudaMalloc(&block, bytes) != cudaSuccess) {
      (void)cudaGetLastError();
      return nullptr;
    }
    blocks_.push_back(block);
    return static_cast<std::byte*>(block);
  }

  std::byte* take(size_t bytes) override {
    std::byte* block = allocate_once(bytes);
    if (block != nullptr && aligned(block, kPageBytes) != block) {  // a small one
      blocks_.pop_back();
      check_cuda(cudaFree(block), "freeing device memory");
      block = allocate_once(bytes + kPageBytes);
    }
    if (block == nullptr) {
      return nullptr;
    }
    block = aligned(block, kPageBytes);
    check_cuda(cudaMemset(block, 0, bytes), "zeroing device memory");
    check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "zeroing device memory");
    return block;
  }

  std::string name_;
  std::vector<void*> blocks_;
};

}  // namespace

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) [[unlikely]] {
    check(false, fmt::format("{}: {} ({})", what, cudaGetErrorString(status), cudaGetErrorName(status)));
  }
}

std::string why_no_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
      return "the machine has no NVIDIA driver";
    }
    return fmt::format("the CUDA driver says: {}", cudaGetErrorString(status));
  }
  if (count == 0) {
    return "the machine has no GPU";
  }
  if (!kernels_fit_gpu()) {
    return fmt::format("this build holds no kernels for a {}; build for its architecture", gpu_name());
  }
  return "";
}

std::string gpu_name() {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, 0), "asking for the GPU's properties");
  return properties.name;
}

std::unique_ptr<Device> make_cuda_device(size_t budget_bytes) {
  if (const std::string reason = why_no_gpu(); !reason.empty()) {
    throw Error("no CUDA device: {}", reason);
  }
  return std::make_unique<CudaDevice>(budget_bytes);
}

}  // namespace vericache::cuda
