// DiskStore: blocks in one sparse file without a name, so that nothing of it outlives the process.
// As BlockStore says; reads and writes share nothing but the file.
#pragma once

#include <string>

#include "kv/block_store.h"
#include "kv/failure_run.h"

namespace vericache {

class DiskStore final : public BlockStore {
 public:
  DiskStore(const std::string& directory, size_t block_bytes, int blocks);  // Error
  ~DiskStore() override;

  std::string_view name() const override { return name_; }
  bool read(int block, size_t offset, std::span<std::byte> to) override;
  bool write(int block, size_t offset, std::span<const std::byte> from) override;

 private:
  void forget(int block) override;
  off_t position(int block, size_t offset) const {
    return static_cast<off_t>(static_cast<size_t>(block) * block_bytes() + offset);
  }

  std::string name_;
  int file_;
  FailureRun reading_;
  FailureRun writing_;
};

}  // namespace vericache
