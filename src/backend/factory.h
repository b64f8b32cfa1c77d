// Factory: the kernels of this machine, chosen by name; the only place that names a device's folder.
// Called from the thread that loads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/device.h"
#include "backend/kernels.h"

namespace vericache {

enum class DeviceKind { cpu, cuda };
std::string_view device_kind_name(DeviceKind kind);

// "cpu", "cuda" or "auto": cuda where this build has it and the machine a GPU. UsageError for another name; Error, with
// the reason, for cuda where it cannot be had.
DeviceKind device_kind(std::string_view name);

// Device memory of that kind under a budget.
std::unique_ptr<Device> make_device(DeviceKind kind, size_t budget_bytes);

// Scratch is sized from these at construction.
struct BackendOptions {
  DeviceKind device = DeviceKind::cpu;
  std::string isa;  // instruction class of every matrix product; empty = the best that the processor has
  int threads = 0;  // 0 = one per core
  KvShape shape;
  int heads = 0;
  int max_rows = 0;            // of one pass
  int max_context_tokens = 0;  // of one sequence
  int max_sequences = 0;       // of one pass
};

// UsageError for an unknown isa, Error for one that the processor lacks.
void require_isa(std::string_view isa);
std::unique_ptr<Kernels> make_kernels(const BackendOptions& options);
std::vector<std::string> supported_isas();  // the best comes last
int core_count();

}  // namespace vericache
