// Matrix products: values against float64, and rule 1: a row's bits are the same at every row count and place, with
// both epilogues, in one piece and in slices.
#include "backend/cuda/products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <random>

#include "backend/cuda/device_array.h"

namespace vericache::cuda::test {
namespace {

using Engine = std::mt19937_64;

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

std::vector<bf16> random_rows(int rows, int in, Engine& engine) {
  std::normal_distribution<float> normal;
  std::vector<bf16> values(at(rows, padded_dim(in)), bf16{0});
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < in; ++i) {
      values[at(r, padded_dim(in), i)] = to_bf16(normal(engine));
    }
  }
  return values;
}

std::vector<float> random_floats(size_t count, Engine& engine) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = normal(engine);
  }
  return values;
}

class Lane {
 public:
  Lane() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    product_.emplace(stream_);
  }
  ~Lane() {
    product_.reset();
    cudaStreamDestroy(stream_);
  }
  ProductLane& product() { return *product_; }

 private:
  cudaStream_t stream_ = nullptr;
  std::optional<ProductLane> product_;
};

struct Weight {
  Weight(int out, int in, Engine& engine) : host(random_rows(out, in, engine)), device(host) {
    matrix = {out, in, device.data()};
  }
  std::vector<bf16> host;
  DeviceArray<bf16> device;
  PackedMatrix matrix;
};

struct Input {
  Input(int rows, const PackedMatrix& weight, Engine& engine)
      : x_host(random_rows(rows, weight.in, engine)),
        x(x_host),
        placed(x_host.size()),
        before(random_floats(at(rows, weight.out), engine)),
        y(before.size()) {}
  std::vector<bf16> x_host;
  DeviceArray<bf16> x;
  DeviceArray<bf16> placed;   // rows of x as a pass holds them, from the first on
  std::vector<float> before;  // y, to which `add` adds
  DeviceArray<float> y;
};

// y of rows [first, first + rows).
std::vector<float> multiply(const Products& products, Lane& lane, const PackedMatrix& weight, Input& input, int first,
                            int rows, Epilogue epilogue) {
  const size_t count = at(rows, weight.out);
  const float* before = input.before.data() + at(first, weight.out);
  std::vector<float> y(before, before + count);
  if (epilogue == Epilogue::store) {
    std::fill(y.begin(), y.end(), std::nanf(""));
  }
  check_cuda(cudaMemcpy(input.y.data(), y.data(), count * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  check_cuda(cudaMemcpy(input.placed.data(), input.x.data() + at(first, padded_dim(weight.in)),
                        at(rows, padded_dim(weight.in)) * sizeof(bf16), cudaMemcpyDeviceToDevice),
             "cudaMemcpy");
  finish();
  products.multiply(lane.product(), weight, input.placed.data(), rows, input.y.data(), epilogue);
  finish();
  check_cuda(cudaMemcpy(y.data(), input.y.data(), count * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return y;
}

// Every row as it comes out of the first pass that it stands in; all later ones must agree.
class RowBits {
 public:
  RowBits(int rows, int out) : out_(out), rows_(static_cast<size_t>(rows)) {}
  void meet(const std::vector<float>& y, int first, int rows, const char* what) {
    for (int r = 0; r < rows; ++r) {
      std::vector<float>& known = rows_[static_cast<size_t>(first + r)];
      const float* row = y.data() + at(r, out_);
      if (known.empty()) {
        known.assign(row, row + out_);
      } else {
        ASSERT_EQ(std::memcmp(known.data(), row, known.size() * sizeof(float)), 0)
            << what << ": row " << first + r << " of a pass of " << rows << " rows from row " << first;
      }
    }
  }

 private:
  int out_;
  std::vector<std::vector<float>> rows_;
};

void expect_row_bits(int out, int in, int max_rows, const std::vector<int>& row_counts) {
  Engine engine(static_cast<uint64_t>(out) * 31 + static_cast<uint64_t>(in));
  Lane lane;
  const Weight weight(out, in, engine);
  Products products(max_rows);
  products.tune({&weight.matrix, 1}, lane.product());
  std::printf("%s", products.report().c_str());
  Input input(max_rows, weight.matrix, engine);
  for (const Epilogue epilogue : {Epilogue::store, Epilogue::add}) {
    RowBits bits(max_rows, out);
    for (const int rows : row_counts) {
      const int first = static_cast<int>(engine() % static_cast<uint64_t>(max_rows - rows + 1));
      bits.meet(multiply(products, lane, weight.matrix, input, first, rows, epilogue), first, rows,
                epilogue == Epilogue::store ? "store" : "add");
      if (::testing::Test::HasFatalFailure()) {
        return;
      }
    }
  }
}

std::vector<int> up_to(int rows) {
  std::vector<int> counts;
  for (int i = rows; i > 0; --i) {
    counts.push_back(i);
  }
  return counts;
}

TEST(CudaProducts, RowsKeepTheirBitsAtEveryRowCount) {
  expect_row_bits(512, 512, 300, up_to(300));
  expect_row_bits(2560, 512, 300, up_to(300));
  expect_row_bits(512, 1280, 300, up_to(300));
}

TEST(CudaProducts, OddWidthsKeepTheirBits) {
  expect_row_bits(331, 96, 70, up_to(70));
  expect_row_bits(1000, 1056, 70, up_to(70));
}

TEST(CudaProducts, DeepAndNarrowKeepsItsBitsInSlices) {
  expect_row_bits(4096, 14336, 600,
                  {600, 1, 2, 3, 5, 8, 16, 17, 31, 64, 65, 128, 200, 255, 256, 257, 300, 511, 512, 513});
}

TEST(CudaProducts, WideKeepsItsBits) {
  expect_row_bits(28672, 4096, 600, {600, 1, 2, 7, 16, 33, 64, 100, 128, 256, 257, 300, 512, 599});
}

TEST(CudaProducts, ManyRowsKeepTheirBits) {
  expect_row_bits(6144, 4096, 2112, {2112, 2049, 2048, 1500, 1025, 1024, 777, 300, 16, 1});
}

void expect_values(int out, int in, int rows, bool free_choice) {
  Engine engine(7);
  Lane lane;
  const Weight weight(out, in, engine);
  Products products(rows, free_choice);
  products.tune({&weight.matrix, 1}, lane.product());
  Input input(rows, weight.matrix, engine);
  for (const Epilogue epilogue : {Epilogue::store, Epilogue::add}) {
    const std::vector<float> y = multiply(products, lane, weight.matrix, input, 0, rows, epilogue);
    double error = 0;
    double norm = 0;
    const int step = 1 + static_cast<int>(at(rows, out) * static_cast<size_t>(in) / 100000000);  // of outputs looked at
    for (int r = 0; r < rows; ++r) {
      for (int o = r % step; o < out; o += step) {
        double expected = epilogue == Epilogue::add ? static_cast<double>(input.before[at(r, out, o)]) : 0.0;
        for (int i = 0; i < in; ++i) {
          expected += static_cast<double>(to_float(input.x_host[at(r, padded_dim(in), i)])) *
                      static_cast<double>(to_float(weight.host[at(o, padded_dim(in), i)]));
        }
        error += std::pow(expected - static_cast<double>(y[at(r, out, o)]), 2);
        norm += std::pow(expected, 2);
      }
    }
    // Tensor cores cut what does not fit an accumulator off, so that a thousand steps drift one way.
    EXPECT_LT(std::sqrt(error / norm), 1e-4) << out << " x " << in;
    EXPECT_FALSE(std::isnan(error));
  }
}

TEST(CudaProducts, ValuesAgreeWithFloat64) {
  expect_values(512, 512, 37, false);
  expect_values(65, 48, 5, false);
  expect_values(331, 1000, 129, false);
  expect_values(512, 16384, 33, false);
  expect_values(4096, 14336, 3, false);
  expect_values(512, 16384, 300, false);
  expect_values(512, 512, 37, true);
}

// More rows than were proved go in several calls.
TEST(CudaProducts, RowsBeyondTheLastBucketGoInSeveralCalls) {
  Engine engine(3);
  Lane lane;
  const Weight weight(512, 256, engine);
  Products narrow(48);
  Products wide(200);
  narrow.tune({&weight.matrix, 1}, lane.product());
  wide.tune({&weight.matrix, 1}, lane.product());
  ASSERT_EQ(narrow.plan(weight.matrix).buckets.back().rows, 64);
  Input input(200, weight.matrix, engine);
  const std::vector<float> a = multiply(narrow, lane, weight.matrix, input, 0, 200, Epilogue::add);
  const std::vector<float> b = multiply(wide, lane, weight.matrix, input, 0, 200, Epilogue::add);
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
}

// Two processes choose by the clock, and for passes of different sizes: their bits agree all the same.
TEST(CudaProducts, TunedTwiceTheBitsAreTheSame) {
  Engine engine(5);
  Lane lane;
  const Weight weight(1024, 8192, engine);
  ASSERT_EQ(product_shape(weight.matrix).slices, 4);
  Input input(130, weight.matrix, engine);
  std::vector<float> first;
  for (int i = 0; i < 3; ++i) {
    Products products(i == 1 ? 700 : 130);
    products.tune({&weight.matrix, 1}, lane.product());
    const std::vector<float> y = multiply(products, lane, weight.matrix, input, 0, 130, Epilogue::add);
    first = first.empty() ? y : first;
    EXPECT_EQ(std::memcmp(first.data(), y.data(), y.size() * sizeof(float)), 0);
  }
}

TEST(CudaProducts, SlicesAreAddedInOrder) {
  Engine engine(11);
  constexpr size_t kCount = 4 * 1001;
  const std::vector<float> slices = random_floats(4 * kCount, engine);
  const std::vector<float> before = random_floats(kCount, engine);
  const DeviceArray<float> device_slices(slices);
  for (const bool add : {false, true}) {
    const DeviceArray<float> y(before);
    add_slices(device_slices.data(), 4, kCount, y.data(), add, nullptr);
    finish();
    const std::vector<float> result = y.read();
    for (size_t i = 0; i < kCount; ++i) {
      float expected = add ? before[i] + slices[i] : slices[i];
      for (size_t s = 1; s < 4; ++s) {
        expected += slices[s * kCount + i];
      }
      ASSERT_EQ(result[i], expected) << i;
    }
  }
}

TEST(CudaProducts, ProofRowsMoveWithTheirShift) {
  constexpr int kRows = 10;
  constexpr int kColumns = 77;
  const DeviceArray<float> plain(at(kRows, kColumns));
  const DeviceArray<float> shifted(at(kRows, kColumns));
  fill_proof_rows(plain.data(), kRows, kColumns, 0, kRows, 9, nullptr);
  fill_proof_rows(shifted.data(), kRows, kColumns, 3, kRows, 9, nullptr);
  const DeviceArray<uint64_t> hashes(kRows);
  const DeviceArray<uint64_t> shifted_hashes(kRows);
  hash_rows(plain.data(), kRows, kColumns, hashes.data(), nullptr);
  hash_rows(shifted.data(), kRows, kColumns, shifted_hashes.data(), nullptr);
  finish();
  const std::vector<float> a = plain.read();
  const std::vector<float> b = shifted.read();
  const std::vector<uint64_t> hash_a = hashes.read();
  const std::vector<uint64_t> hash_b = shifted_hashes.read();
  for (int r = 0; r < kRows; ++r) {
    const int from = (r + 3) % kRows;
    EXPECT_EQ(std::memcmp(&a[at(from, kColumns)], &b[at(r, kColumns)], kColumns * sizeof(float)), 0);
    EXPECT_EQ(hash_a[static_cast<size_t>(from)], hash_b[static_cast<size_t>(r)]);
    EXPECT_NE(hash_a[static_cast<size_t>(from)], hash_b[static_cast<size_t>(from)]);
  }
}

}  // namespace
}  // namespace vericache::cuda::test
