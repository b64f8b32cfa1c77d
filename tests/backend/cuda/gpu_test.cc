// Without a GPU no test of this binary runs, and it says why. GoogleTest would call tests that the environment skips
// passed.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "backend/cuda/cuda_device.h"

namespace vericache::cuda::test {
namespace {

class Gpu final : public ::testing::Environment {
  void SetUp() override {
    if (const std::string reason = why_no_gpu(); !reason.empty()) {
      std::printf("[  SKIPPED ] all tests, no GPU: %s\n", reason.c_str());
      std::exit(EXIT_SUCCESS);
    }
  }
};

// GoogleTest owns it.
const ::testing::Environment* const gpu = ::testing::AddGlobalTestEnvironment(new Gpu);

}  // namespace
}  // namespace vericache::cuda::test
