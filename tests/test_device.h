// The device that whole-model tests run on: VERICACHE_TEST_DEVICE names it, cpu (the default), cuda, or simulated: the
// CPU computes, but late and out of turn, as a GPU does; VERICACHE_TEST_SEED then picks the order. Any thread.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/factory.h"
#include "simulated_gpu.h"

namespace vericache::test {

// Device memory that no test comes to the end of.
inline constexpr size_t kPlenty = size_t{1} << 40;

inline std::string_view tested_name() {
  const char* const name = std::getenv("VERICACHE_TEST_DEVICE");
  return name != nullptr ? name : "cpu";
}
inline bool tested_simulated() {
  return tested_name() == "simulated";
}
// What computes.
inline DeviceKind tested_device() {
  return tested_simulated() ? DeviceKind::cpu : device_kind(tested_name());
}

inline std::unique_ptr<Device> make_test_device(size_t budget_bytes = kPlenty) {
  if (tested_simulated()) {
    return std::make_unique<SimulatedDevice>(budget_bytes);
  }
  return make_device(tested_device(), budget_bytes);
}

// options.device is chosen here.
inline std::unique_ptr<Kernels> make_test_kernels(BackendOptions options) {
  options.device = tested_device();
  std::unique_ptr<Kernels> kernels = make_kernels(options);
  if (!tested_simulated()) {
    return kernels;
  }
  const char* const seed = std::getenv("VERICACHE_TEST_SEED");
  return std::make_unique<SimulatedKernels>(std::move(kernels), seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1);
}

// What make_test_kernels can be asked for on this device: a GPU has one instruction class, and no threads to count.
inline std::vector<std::string> tested_isas() {
  return tested_name() == "cpu" ? ::vericache::supported_isas() : std::vector<std::string>{""};
}
inline std::vector<int> tested_threads() {
  return tested_name() == "cpu" ? std::vector<int>{1, 2, 3} : std::vector<int>{2};
}

}  // namespace vericache::test
