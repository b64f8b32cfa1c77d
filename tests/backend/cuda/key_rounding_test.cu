// LDLQ on a GPU: the matrix is the CPU's but for rounding, and so are nearly all codes; what queries see of the error
// is as little.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backend/cuda/packed_fixture.h"
#include "backend/rounding_case.h"

namespace vericache::test {
namespace {

// A case whose queries lie in device memory.
struct OnDevice {
  explicit OnDevice(RoundingCase& of) : queries(of.queries), matrix(rounding_bytes(of.shape) / sizeof(bf16)) {}
  RoundingArgs args(RoundingCase& of) {
    RoundingArgs args = of.args(matrix.data());
    args.queries.q = queries.data();
    return args;
  }
  DeviceArray<bf16> queries;
  DeviceArray<bf16> matrix;
};

double difference(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  double sum = 0;
  double size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += std::pow(to_float(a[i]) - to_float(b[i]), 2);
    size += std::pow(to_float(b[i]), 2);
  }
  return std::sqrt(sum / size);
}

std::unique_ptr<Kernels> cpu_kernels(const KvShape& shape, int heads) {
  return make_cpu_kernels(best_isa(), 2, {.shape = shape, .heads = heads, .max_rows = 64, .max_context_tokens = 10000});
}

TEST(CudaKeyRounding, TheMatrixIsTheCpus) {
  Random random(130);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 3, head_dim};
    const int group = random.between(1, 4);
    RoundingCase of(shape, 3 * group, random.between(head_dim, 3 * head_dim), random);
    std::vector<bf16> wanted(rounding_bytes(shape) / sizeof(bf16));
    cpu_kernels(shape, of.heads)->fit_rounding(of.args(wanted.data()));
    OnDevice whole(of);
    cuda::fit_rounding(whole.args(of), nullptr);
    finish();
    EXPECT_LT(difference(whole.matrix.read(), wanted), 3e-3) << head_dim << " dims";
    OnDevice parts(of);
    for (const auto& [first, rows] : {std::pair{0, 5}, {5, of.rows - 5}}) {
      RoundingArgs args = parts.args(of);
      args.position += first;
      args.rows = rows;
      args.known = first;
      cuda::fit_rounding(args, nullptr);
    }
    finish();
    EXPECT_LT(difference(parts.matrix.read(), wanted), 1e-2) << head_dim << " dims";
  }
}

TEST(CudaKeyRounding, QueriesThatAreNotFiniteChangeNothing) {
  Random random(131);
  const KvShape shape{1, 1, 64};
  RoundingCase good(shape, 2, 70, random);
  RoundingCase bad = good;
  bad.queries[static_cast<size_t>(bad.place(9)) * 2 * 64 + 7] = to_bf16(std::numeric_limits<float>::infinity());
  OnDevice first(bad);
  cuda::fit_rounding(first.args(bad), nullptr);
  finish();
  for (const bf16 x : first.matrix.read()) {
    ASSERT_EQ(x.bits, 0);
  }
  OnDevice second(good);
  cuda::fit_rounding(second.args(good), nullptr);
  finish();
  const std::vector<bf16> before = second.matrix.read();
  second.queries.write(bad.queries);
  RoundingArgs more = second.args(bad);
  more.known = 70;
  cuda::fit_rounding(more, nullptr);
  finish();
  EXPECT_EQ(difference(second.matrix.read(), before), 0);
}

TEST(CudaKeyRounding, CodesAreNearlyAllTheCpusAndQueriesSeeAsLittle) {
  Random random(132);
  for (const int bits : {2, 3, 4}) {
    for (const int head_dim : {32, 64, 96, 128}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, " << head_dim << " dims");
      const int pages = 3;
      const KvShape shape{1, 2, head_dim};
      const KvFormat format{bits, 3, KvCode::affine, true};
      const auto cpu = cpu_kernels(shape, 4);
      RoundingCase of(shape, 4, 2 * head_dim, random);
      std::vector<bf16> matrix(rounding_bytes(shape) / sizeof(bf16));
      cpu->fit_rounding(of.args(matrix.data()));
      const DeviceArray<bf16> same_matrix(matrix);

      Pages source(shape, {}, pages, random, false);
      DevicePages device_source(shape, {}, pages, random);
      std::fill(source.tokens().begin(), source.tokens().end(), pages * kPageTokens);
      device_source.hold({pages * kPageTokens, pages * kPageTokens});
      for (int head = 0; head < 2; ++head) {
        for (int page = 0; page < pages; ++page) {
          HostPage copy(head_dim);
          for (int t = 0; t < kPageTokens; ++t) {
            const std::vector<bf16> k = random.bf16s(static_cast<size_t>(head_dim));
            const std::vector<bf16> v = random.bf16s(static_cast<size_t>(head_dim));
            source.write(head, page * kPageTokens + t, k.data(), v.data());
            for (int d = 0; d < head_dim; ++d) {
              copy.key(t, d) = k[static_cast<size_t>(d)];
              copy.value(t, d) = v[static_cast<size_t>(d)];
            }
          }
          device_source.write(head, page, copy.bytes());
        }
      }
      Pages wanted(shape, format, pages, random, false);
      cpu->quantize({.shape = shape,
                     .full = {source.view(), source.view(), pages * kPageTokens},
                     .first = 0,
                     .count = pages,
                     .out = wanted.view(),
                     .rounding = matrix.data()});
      DevicePages made(shape, format, pages, random);
      cuda::quantize({.shape = shape,
                      .full = {device_source.view(), device_source.view(), pages * kPageTokens},
                      .first = 0,
                      .count = pages,
                      .out = made.view(),
                      .rounding = same_matrix.data()},
                     nullptr);
      finish();

      int same = 0;
      double seen[2] = {};  // of the CPU's pages, and of these
      for (int head = 0; head < 2; ++head) {
        for (int page = 0; page < pages; ++page) {
          Pages of_cpu(shape, {}, 1, random, false);
          cpu->dequantize_head_page(wanted.head_page(head, page), shape, format, of_cpu.head_page(0, 0));
          HostPage of_gpu(head_dim);
          const DeviceArray<std::byte> back(of_gpu.bytes().size());
          cuda::dequantize_head_page(made.place(head, page), shape, format, back.data(), nullptr);
          finish();
          of_gpu.bytes() = back.read();
          for (int t = 0; t < kPageTokens; ++t) {
            const auto error = [&](bf16 read, int d) {
              return to_float(source.key(head, page * kPageTokens + t, d)) - to_float(read);
            };
            seen[0] += of.seen(head, [&](int d) { return error(of_cpu.key(0, t, d), d); });
            seen[1] += of.seen(head, [&](int d) { return error(of_gpu.key(t, d), d); });
            bool all = true;
            for (int d = 0; d < head_dim; ++d) {
              ASSERT_EQ(of_gpu.value(t, d).bits, of_cpu.value(0, t, d).bits) << "values are rounded as ever";
              all = all && of_gpu.key(t, d) == of_cpu.key(0, t, d);
            }
            same += all ? 1 : 0;
          }
        }
      }
      // One code that another rounding changes changes those behind it.
      EXPECT_GT(same, 2 * pages * kPageTokens / 3) << "tokens whose codes are all the same";
      EXPECT_NEAR(seen[1], seen[0], 0.03 * seen[0]);
    }
  }
}

}  // namespace
}  // namespace vericache::test
