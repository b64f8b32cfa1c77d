#include "backend/factory.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "backend/cpu/cpu_kernels.h"
#include "base/error.h"

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

}  // namespace

void require_isa(std::string_view isa) {
  isa_from(isa);
}

std::unique_ptr<Kernels> make_kernels(const BackendOptions& options) {
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
