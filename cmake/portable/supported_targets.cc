// The one question that the kernels ask of Highway's library: which instruction sets does this processor have. Debian
// ships that library as a shared object alone; portable binaries carry the answer themselves.
#include <hwy/targets.h>

namespace hwy {

int64_t SupportedTargets() {
  const auto all = [](auto... has) { return (... && (has != 0)); };
  const bool sse4 =
      all(__builtin_cpu_supports("sse4.2"), __builtin_cpu_supports("pclmul"), __builtin_cpu_supports("aes"));
  const bool avx2 =
      sse4 && all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi"),
                  __builtin_cpu_supports("bmi2"), __builtin_cpu_supports("f16c"), __builtin_cpu_supports("lzcnt"));
  const bool avx3 = avx2 && all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512vl"),
                                __builtin_cpu_supports("avx512cd"), __builtin_cpu_supports("avx512bw"),
                                __builtin_cpu_supports("avx512dq"));
  return (sse4 ? HWY_SSE4 : 0) | (avx2 ? HWY_AVX2 : 0) | (avx3 ? HWY_AVX3 : 0) | HWY_STATIC_TARGET;
}

}  // namespace hwy
