// Blocks of memory on the CPU backend: copies, checksums and their proof. Called from the thread that drives the
// engine; spread over the pool.
#pragma once

#include "backend/kernels.h"
#include "base/threads.h"

namespace vericache {

void copy_blocks(std::span<const BlockCopy> copies, ThreadPool& pool);
void checksum_blocks(const BlockRow& blocks, uint64_t* checksums, ThreadPool& pool);
uint32_t count_mismatches(const BlockRow& blocks, const uint64_t* checksums, ThreadPool& pool);

}  // namespace vericache
