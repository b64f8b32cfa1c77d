#include "backend/factory.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "backend/cpu/cpu_kernels.h"
#include "base/error.h"
#ifdef VERICACHE_CUDA
#include "backend/cuda/cuda_device.h"
#include "backend/cuda/cuda_kernels.h"
#endif

namespace vericache {
namespace {

Isa isa_from(std::string_view name) {
  if (name.empty()) {
    return best_isa();
  }
  const std::optional<Isa> isa = parse_isa(name);
  if (!isa) {
    throw UsageError("isa '{}' is unknown: portable, avx2, avx512, avx512_bf16 or amx", name);
  }
  if (!isa_supported(*isa)) {
    throw Error("isa {}: this processor lacks it; leave the choice open, {} is its best", name, isa_name(best_isa()));
  }
  return *isa;
}

#ifdef VERICACHE_CUDA
std::string why_no_cuda() {
  return cuda::why_no_gpu();
}
std::unique_ptr<Device> make_cuda_device(size_t budget_bytes) {
  return cuda::make_cuda_device(budget_bytes);
}
std::unique_ptr<Kernels> make_cuda_kernels(const BackendOptions& options) {
  return cuda::make_cuda_kernels({.shape = options.shape,
                                  .heads = options.heads,
                                  .max_rows = options.max_rows,
                                  .max_context_tokens = options.max_context_tokens,
                                  .max_sequences = options.max_sequences});
}
#else
std::string why_no_cuda() {
  return "this build has the CPU alone; configure with `cmake --preset cuda`, which needs nvcc";
}
std::unique_ptr<Device> make_cuda_device(size_t) {
  throw Error("device cuda: {}", why_no_cuda());
}
std::unique_ptr<Kernels> make_cuda_kernels(const BackendOptions&) {
  throw Error("device cuda: {}", why_no_cuda());
}
#endif

}  // namespace

std::string_view device_kind_name(DeviceKind kind) {
  return kind == DeviceKind::cuda ? "cuda" : "cpu";
}

DeviceKind device_kind(std::string_view name) {
  if (name == "cpu") {
    return DeviceKind::cpu;
  }
  if (name != "cuda" && name != "auto") {
    throw UsageError("device '{}' is unknown: cpu, cuda or auto", name);
  }
  const std::string reason = why_no_cuda();
  if (name == "cuda" && !reason.empty()) {
    throw Error("device cuda: {}; or use --device cpu", reason);
  }
  return reason.empty() ? DeviceKind::cuda : DeviceKind::cpu;
}

std::unique_ptr<Device> make_device(DeviceKind kind, size_t budget_bytes) {
  return kind == DeviceKind::cuda ? make_cuda_device(budget_bytes) : make_cpu_device(budget_bytes);
}

void require_isa(std::string_view isa) {
  isa_from(isa);
}

std::unique_ptr<Kernels> make_kernels(const BackendOptions& options) {
  if (options.device == DeviceKind::cuda) {
    return make_cuda_kernels(options);
  }
  return make_cpu_kernels(isa_from(options.isa), options.threads > 0 ? options.threads : core_count(),
                          {.shape = options.shape,
                           .heads = options.heads,
                           .max_rows = options.max_rows,
                           .max_context_tokens = options.max_context_tokens});
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (isa_supported(isa)) {
      names.emplace_back(isa_name(isa));
    }
  }
  return names;
}

int core_count() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace vericache
