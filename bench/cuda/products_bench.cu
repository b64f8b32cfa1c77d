// What exactness costs in matrix products: the 8B shape's weights at some row counts, in the one bit class and with
// every algorithm allowed, split-K included. Random data, a cold cache, CUDA graphs of some products over different
// weights.
//   products_bench [ROWS]    row counts up to ROWS (2048)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "backend/cuda/products.h"

namespace vericache::cuda {
namespace {

constexpr size_t kColdBytes = size_t{400} << 20;  // weights that a graph walks through: several times the L2
constexpr int kRepeats = 9;

template <typename T>
class Array {
 public:
  explicit Array(size_t count) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// The median of graphs that walk through all the weights, per product. multiply(weight).
template <typename Multiply>
double microseconds(cudaStream_t stream, const std::vector<PackedMatrix>& weights, const Multiply& multiply) {
  multiply(weights.front());
  check_cuda(cudaStreamSynchronize(stream), "a product");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
  for (const PackedMatrix& weight : weights) {
    multiply(weight);
  }
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&exec, graph, 0), "capture");
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = -2; i < kRepeats; ++i) {
    check_cuda(cudaEventRecord(begin, stream), "event");
    check_cuda(cudaGraphLaunch(exec, stream), "launch");
    check_cuda(cudaEventRecord(end, stream), "event");
    check_cuda(cudaEventSynchronize(end), "event");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 0) {
      times.push_back(milliseconds * 1e3f);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return static_cast<double>(times[kRepeats / 2]) / static_cast<double>(weights.size());
}

struct Weight {
  const char* name;
  int out;
  int in;
  Epilogue epilogue;
};

void measure(const Weight& weight, int max_rows, std::vector<double>& exact_us, std::vector<double>& free_us,
             const std::vector<int>& row_counts) {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  {
    ProductLane lane(stream);
    const size_t values = static_cast<size_t>(weight.out) * static_cast<size_t>(weight.in);
    const size_t copies = std::clamp<size_t>(kColdBytes / (values * sizeof(bf16)), 2, 16);
    const Array<bf16> data(copies * values);
    std::vector<PackedMatrix> weights;
    for (size_t i = 0; i < copies; ++i) {
      weights.push_back({weight.out, weight.in, data.data() + i * values});
      fill_random(weights.back(), i, 0.02f, stream);
    }
    const Array<bf16> x(static_cast<size_t>(max_rows) * static_cast<size_t>(weight.in));
    const Array<float> y(static_cast<size_t>(max_rows) * static_cast<size_t>(weight.out));
    PackedMatrix x_rows{max_rows, weight.in, x.data()};
    fill_random(x_rows, 99, 1.0f, stream);
    check_cuda(
        cudaMemsetAsync(y.data(), 0, static_cast<size_t>(max_rows) * static_cast<size_t>(weight.out) * 4, stream),
        "memset");
    Products exact(max_rows);
    Products free_choice(max_rows, true);
    exact.tune({weights.data(), 1}, lane);
    free_choice.tune({weights.data(), 1}, lane);
    std::printf("tuned: %s", exact.report().c_str());
    std::printf("free:  %s", free_choice.report().c_str());
    for (const int rows : row_counts) {
      const double flops = 2.0 * rows * static_cast<double>(values);
      const auto with = [&](const Products& products) {
        return microseconds(stream, weights, [&](const PackedMatrix& matrix) {
          products.multiply(lane, matrix, x.data(), rows, y.data(), weight.epilogue);
        });
      };
      const double a = with(exact);
      const double b = with(free_choice);
      const double again = with(exact);
      const double bytes =
          static_cast<double>(values) * 2 + static_cast<double>(rows) * (weight.in * 2.0 + weight.out * 4.0);
      std::printf("%-8s %6d x %-6d %5d  %9.1f (%9.1f)  %9.1f  %+6.1f %%  %7.1f  %7.0f\n", weight.name, weight.out,
                  weight.in, rows, a, again, b, (a / b - 1) * 100, flops / a * 1e-6, bytes / a * 1e-3);
      exact_us.push_back(a);
      free_us.push_back(b);
    }
  }
  check_cuda(cudaStreamDestroy(stream), "stream");
}

}  // namespace
}  // namespace vericache::cuda

int main(int argc, char** argv) {
  using namespace vericache;
  using namespace vericache::cuda;
  std::vector<int> row_counts{1, 4, 16, 64, 128, 256, 512, 2048};
  if (argc > 1) {
    std::erase_if(row_counts, [most = std::atoi(argv[1])](int rows) { return rows > std::max(most, 1); });
  }
  const std::vector<cuda::Weight> layer{{"qkv", 6144, 4096, Epilogue::store},
                                        {"output", 4096, 4096, Epilogue::add},
                                        {"gate_up", 28672, 4096, Epilogue::store},
                                        {"down", 4096, 14336, Epilogue::add}};
  std::vector<double> exact_total(row_counts.size(), 0);
  std::vector<double> free_total(row_counts.size(), 0);
  std::printf("%-8s %6s x %-6s %5s  %9s (%9s)  %9s  %8s  %7s  %7s\n", "weight", "out", "in", "rows", "exact us",
              "again", "free us", "cost", "TFLOP/s", "GB/s");
  for (const cuda::Weight& weight : layer) {
    std::vector<double> exact_us;
    std::vector<double> free_us;
    measure(weight, row_counts.back(), exact_us, free_us, row_counts);
    for (size_t i = 0; i < row_counts.size(); ++i) {
      exact_total[i] += exact_us[i];
      free_total[i] += free_us[i];
    }
  }
  std::printf("a layer's products together:\n");
  for (size_t i = 0; i < row_counts.size(); ++i) {
    std::printf("%5d rows  exact %9.1f us  free %9.1f us  cost %+6.1f %%\n", row_counts[i], exact_total[i],
                free_total[i], (exact_total[i] / free_total[i] - 1) * 100);
  }
  return 0;
}
