// Packing of the CPU backend: full KV into resident formats, page by page or token by token.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include <vector>

#include "backend/cpu/simd.h"
#include "base/threads.h"

namespace vericache {

class Packing {
 public:
  Packing(const QuantOps& ops, ThreadPool& pool, const KvShape& shape);

  void quantize(const QuantizeArgs& args);
  void gather(const GatherArgs& args);
  // As Kernels of the same names; any thread.
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out, const HeadRounding& rounding = {}) const;
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) const;

 private:
  void gather_page(const GatherArgs& args, int head, int page);
  std::byte* scratch_page(int index) const;  // of this thread

  const QuantOps& ops_;
  ThreadPool& pool_;
  KvShape shape_;
  size_t page_stride_ = 0;
  std::vector<std::byte> pages_;  // per thread two bf16 head pages: of gathered tokens, and rotated
  std::byte* first_page_ = nullptr;
};

}  // namespace vericache
