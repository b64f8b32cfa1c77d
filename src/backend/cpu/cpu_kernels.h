// The CPU backend: every op of kernels.h over AVX2, AVX-512, AVX-512-BF16 or AMX-BF16, one instruction class per
// process. Built once by the factory; called from the thread that drives the engine.
#pragma once

#include <memory>
#include <optional>

#include "backend/kernels.h"

namespace vericache {

// The instruction class of every matrix product, on every row count.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

std::string_view isa_name(Isa isa);
std::optional<Isa> parse_isa(std::string_view name);
bool isa_supported(Isa isa);  // by this processor and kernel
Isa best_isa();

// Scratch is sized from these at construction; nothing allocates later.
struct KernelLimits {
  KvShape shape;
  int heads = 0;
  int max_rows = 0;            // of one pass
  int max_context_tokens = 0;  // of one sequence
};

// Error if the processor lacks `isa`. threads >= 1.
std::unique_ptr<Kernels> make_cpu_kernels(Isa isa, int threads, const KernelLimits& limits);

}  // namespace vericache
