// Products of few rows, whose time is that of reading the weight: for drafts, as their sums are not those of full
// passes. A block has 16 rows of the weight, its warps each a part of K, in operands of tensor-core steps as they come
// from memory: k may go in any order that both operands share, so that a lane reads 16 bytes of its row at a time.
// The first loads of the weight are under way before the kernel before this one has ended.
#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/few_rows.h"
#include "backend/cuda/row_math.cuh"
#include "backend/cuda/warp_ops.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kBlockThreads = kWarps * 32;
constexpr int kStepK = 32;   // of a warp: two tensor-core steps
constexpr int kAhead = 4;    // steps whose weights are on their way
constexpr int kTileRows = 8;  // of x
constexpr int kMostTiles = 2;
constexpr int kStride = 20;  // floats of a row of sums: no two lanes write one bank

struct FewRowsArgs {
  const bf16* weight = nullptr;  // (out, in)
  const bf16* x = nullptr;       // (rows, in)
  int rows = 0;
  int out = 0;
  int in = 0;
  void* y = nullptr;  // (rows, out) floats, or of a gated product (rows, out / 2) bf16
};

// What becomes of the sums.
enum class FewRowsEnd { store, add, gate };

// Weights are read once: past the first cache.
__device__ inline uint4 read_weight(const bf16* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

template <int kTiles, FewRowsEnd kEnd>
__global__ void __launch_bounds__(kBlockThreads, kTiles == 1 ? 3 : 2) few_rows_kernel(FewRowsArgs args) {
  constexpr bool kGate = kEnd == FewRowsEnd::gate;
  __shared__ float sums[kWarps][kTiles * kTileRows][kStride];
  allow_kernel_behind();
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4;
  const int q = lane % 4;
  // Of a gated product 8 rows of the gate and those of `up` that they belong to.
  const int first = static_cast<int>(blockIdx.x) * (kGate ? 8 : 16);
  const int steps = args.in / (kWarps * kStepK);
  const int k = warp * steps * kStepK + 8 * q;
  const bf16* upper = args.weight + static_cast<size_t>(first + g) * static_cast<size_t>(args.in) + k;
  const bf16* lower = upper + static_cast<size_t>(kGate ? args.out / 2 : 8) * static_cast<size_t>(args.in);
  uint4 weights[kAhead][2];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < steps) {
      weights[i][0] = read_weight(upper + i * kStepK);
      weights[i][1] = read_weight(lower + i * kStepK);
    }
  }

  await_kernels_before();
  const bf16* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int row = tile * kTileRows + g;
    x[tile] = row < args.rows ? args.x + static_cast<size_t>(row) * static_cast<size_t>(args.in) + k : nullptr;
  }
  float out[kTiles][4] = {};
#pragma unroll 1
  for (int done = 0; done < steps; done += kAhead) {
    uint4 values[kAhead][kTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        values[i][tile] = x[tile] != nullptr && done + i < steps
                              ? *reinterpret_cast<const uint4*>(x[tile] + (done + i) * kStepK)
                              : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (done + i >= steps) {
        break;
      }
      const uint4 a = weights[i][0];
      const uint4 b = weights[i][1];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4& v = values[i][tile];
        tensor_step(out[tile], a.x, b.x, a.y, b.y, v.x, v.y);
        tensor_step(out[tile], a.z, b.z, a.w, b.w, v.z, v.w);
      }
      if (done + i + kAhead < steps) {
        weights[i][0] = read_weight(upper + (done + i + kAhead) * kStepK);
        weights[i][1] = read_weight(lower + (done + i + kAhead) * kStepK);
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float(&of_row)[kTiles * kTileRows][kStride] = sums[warp];
    of_row[tile * kTileRows + 2 * q][g] = out[tile][0];
    of_row[tile * kTileRows + 2 * q + 1][g] = out[tile][1];
    of_row[tile * kTileRows + 2 * q][g + 8] = out[tile][2];
    of_row[tile * kTileRows + 2 * q + 1][g + 8] = out[tile][3];
  }
  __syncthreads();
  const auto sum_of = [&](int row, int column) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) {
      sum += sums[part][row][column];
    }
    return sum;
  };
  constexpr int kColumns = kGate ? 8 : 16;
  const int row = static_cast<int>(threadIdx.x) / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  if (row >= min(args.rows, kTiles * kTileRows)) {
    return;
  }
  if constexpr (kGate) {
    const float value = silu(sum_of(row, column)) * sum_of(row, column + 8);
    static_cast<uint16_t*>(args.y)[static_cast<size_t>(row) * static_cast<size_t>(args.out / 2) + first + column] =
        bf16_bits(value);
  } else {
    float& y = static_cast<float*>(args.y)[static_cast<size_t>(row) * static_cast<size_t>(args.out) + first + column];
    y = kEnd == FewRowsEnd::add ? y + sum_of(row, column) : sum_of(row, column);
  }
}

template <FewRowsEnd kEnd>
void launch(const FewRowsArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(args.out / 16));
  if (args.rows <= kTileRows) {
    launch_behind(few_rows_kernel<1, kEnd>, "a product of few rows", blocks, kBlockThreads, 0, stream, args);
  } else {
    launch_behind(few_rows_kernel<2, kEnd>, "a product of few rows", blocks, kBlockThreads, 0, stream, args);
  }
}

}  // namespace

bool few_rows_fit(const PackedMatrix& weight, int rows) {
  static_assert(kMostTiles * kTileRows * 16 <= kBlockThreads);
  return rows <= kMostTiles * kTileRows && weight.in % (kWarps * kStepK) == 0 && weight.out % 16 == 0;
}

void few_rows_product(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue,
                      cudaStream_t stream) {
  check(few_rows_fit(weight, rows), "a product of few rows has the shape for it");
  const FewRowsArgs args{weight.data, x, rows, weight.out, weight.in, y};
  if (rows > 0) {
    epilogue == Epilogue::add ? launch<FewRowsEnd::add>(args, stream) : launch<FewRowsEnd::store>(args, stream);
  }
}

void few_rows_gate(const PackedMatrix& gate_up, const bf16* x, int rows, bf16* out, cudaStream_t stream) {
  check(few_rows_fit(gate_up, rows), "a product of few rows has the shape for it");
  if (rows > 0) {
    launch<FewRowsEnd::gate>({gate_up.data, x, rows, gate_up.out, gate_up.in, out}, stream);
  }
}

}  // namespace vericache::cuda
