// What is done to each row by itself: embedding, bias, norms, activations, the rows that want logits. A block or a warp
// works on one row (or a part of one) in an order that depends on the row's width alone.
#include <algorithm>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/ops.h"
#include "backend/cuda/row_math.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

// Tokens are written by the op that chose them, in host memory: they are read past the caches that might hold an older
// one.
__device__ int token_of_row(const StagedPass& pass, int row) {
  const SequenceRows& sequence = pass.sequences[pass.sequence_of_row[row]];
  const int position = sequence.position - sequence.token_lag + row - sequence.first_row;
  return *static_cast<const volatile TokenId*>(sequence.tokens + position);
}

template <bool kWide>
__global__ void embed_kernel(const uint16_t* __restrict__ table, int vocabulary, int in, int stride, StagedPass pass,
                             float* __restrict__ out) {
  __shared__ int token;
  const int row = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    token = token_of_row(pass, row);
    if (token < 0 || token >= vocabulary) {
      __trap();  // a bug of the caller, as check() on the host
    }
  }
  __syncthreads();
  const uint16_t* source = table + at(token, stride);
  float* target = out + at(row, in);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if constexpr (kWide) {
    if (index * 8 < in) {
      const uint4 v = reinterpret_cast<const uint4*>(source)[index];
      auto* to = reinterpret_cast<float4*>(target) + static_cast<ptrdiff_t>(index) * 2;
      to[0] = make_float4(low_float(v.x), high_float(v.x), low_float(v.y), high_float(v.y));
      to[1] = make_float4(low_float(v.z), high_float(v.z), low_float(v.w), high_float(v.w));
    }
  } else if (index < in) {
    target[index] = __uint_as_float(static_cast<uint32_t>(source[index]) << 16);
  }
}

template <bool kWide>
__global__ void add_bias_kernel(const float* __restrict__ bias, int dim, float* __restrict__ y) {
  float* target = y + at(static_cast<int>(blockIdx.x), dim);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if constexpr (kWide) {
    if (index * 4 < dim) {
      auto* to = reinterpret_cast<float4*>(target) + index;
      const float4 a = *to;
      const float4 b = reinterpret_cast<const float4*>(bias)[index];
      *to = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    }
  } else if (index < dim) {
    target[index] += bias[index];
  }
}

__device__ void zero_padding(uint16_t* row, int dim, int padded) {
  for (int i = dim + static_cast<int>(threadIdx.x); i < padded; i += static_cast<int>(blockDim.x)) {
    row[i] = 0;
  }
}

// A block a row; dim is a multiple of 4. What a thread has read it keeps, up to kKept quads.
constexpr int kNormThreads = 512;
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(const float* __restrict__ x, const float* __restrict__ weight, float eps, int dim, int padded,
                    uint16_t* __restrict__ out) {
  await_kernels_before();
  constexpr int kKept = 4;
  __shared__ float partial[kNormThreads / kWarp];
  const int row = static_cast<int>(blockIdx.x);
  const auto* source = reinterpret_cast<const float4*>(x + at(row, dim));
  const auto* weights = reinterpret_cast<const float4*>(weight);
  uint16_t* target = out + at(row, padded);
  const int quads = dim / 4;
  const int threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x);
  float4 kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = first + k * threads;
    kept[k] = i < quads ? source[i] : make_float4(0, 0, 0, 0);
  }
  float squares = 0;
  const auto add = [&squares](float4 v) {
    squares = __fmaf_rn(v.x, v.x, squares);
    squares = __fmaf_rn(v.y, v.y, squares);
    squares = __fmaf_rn(v.z, v.z, squares);
    squares = __fmaf_rn(v.w, v.w, squares);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    add(kept[k]);
  }
  for (int i = first + kKept * threads; i < quads; i += threads) {
    add(source[i]);
  }
  const float factor = rms_factor(block_sum(squares, partial), dim, eps);
  const auto store = [&](int i, float4 v) {
    const float4 w = weights[i];
    reinterpret_cast<uint2*>(target)[i] = make_uint2(bf16_pair(v.x * factor * w.x, v.y * factor * w.y),
                                                     bf16_pair(v.z * factor * w.z, v.w * factor * w.w));
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k * threads < quads) {
      store(first + k * threads, kept[k]);
    }
  }
  for (int i = first + kKept * threads; i < quads; i += threads) {
    store(i, source[i]);
  }
  zero_padding(target, dim, padded);
}

// As above for any dim.
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_narrow_kernel(const float* __restrict__ x, const float* __restrict__ weight, float eps, int dim,
                           int padded, uint16_t* __restrict__ out) {
  await_kernels_before();
  __shared__ float partial[kNormThreads / kWarp];
  const int row = static_cast<int>(blockIdx.x);
  const float* source = x + at(row, dim);
  uint16_t* target = out + at(row, padded);
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
    squares = __fmaf_rn(source[i], source[i], squares);
  }
  const float factor = rms_factor(block_sum(squares, partial), dim, eps);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
    target[i] = bf16_bits(source[i] * factor * weight[i]);
  }
  zero_padding(target, dim, padded);
}

// expf of a large number is +inf, and g / inf is the 0 that silu has there.
__device__ float silu(float g) {
  return g / (1.0f + expf(-g));
}

template <bool kWide>
__global__ void silu_mul_kernel(const float* __restrict__ gate_up, int dim, int padded, uint16_t* __restrict__ out) {
  await_kernels_before();
  const int row = static_cast<int>(blockIdx.x);
  const float* gate = gate_up + at(row, 2 * dim);
  const float* up = gate + dim;
  uint16_t* target = out + at(row, padded);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if constexpr (kWide) {
    if (index * 8 < dim) {
      const auto* g = reinterpret_cast<const float4*>(gate) + static_cast<ptrdiff_t>(index) * 2;
      const auto* u = reinterpret_cast<const float4*>(up) + static_cast<ptrdiff_t>(index) * 2;
      const float4 g0 = g[0];
      const float4 g1 = g[1];
      const float4 u0 = u[0];
      const float4 u1 = u[1];
      reinterpret_cast<uint4*>(target)[index] =
          make_uint4(bf16_pair(silu(g0.x) * u0.x, silu(g0.y) * u0.y), bf16_pair(silu(g0.z) * u0.z, silu(g0.w) * u0.w),
                     bf16_pair(silu(g1.x) * u1.x, silu(g1.y) * u1.y), bf16_pair(silu(g1.z) * u1.z, silu(g1.w) * u1.w));
    } else if (index * 8 < padded) {
      reinterpret_cast<uint4*>(target)[index] = make_uint4(0, 0, 0, 0);
    }
  } else if (index < padded) {
    target[index] = index < dim ? bf16_bits(silu(gate[index]) * up[index]) : uint16_t{0};
  }
}

template <bool kWide>
__global__ void select_rows_kernel(const float* __restrict__ x, const LogitRow* __restrict__ logit_rows, int dim,
                                   float* __restrict__ out) {
  const int row = static_cast<int>(blockIdx.x);
  const float* source = x + at(logit_rows[row].row, dim);
  float* target = out + at(row, dim);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if constexpr (kWide) {
    if (index * 4 < dim) {
      reinterpret_cast<float4*>(target)[index] = reinterpret_cast<const float4*>(source)[index];
    }
  } else if (index < dim) {
    target[index] = source[index];
  }
}

}  // namespace

void embed(const PackedMatrix& table, const StagedPass& pass, float* out, cudaStream_t stream) {
  const auto* values = reinterpret_cast<const uint16_t*>(table.data);
  const int stride = padded_dim(table.in);
  if (pass.rows == 0) {
    return;
  }
  if (table.in % 8 == 0) {
    embed_kernel<true>
        <<<row_grid(pass.rows, table.in, 8), kThreads, 0, stream>>>(values, table.out, table.in, stride, pass, out);
  } else {
    embed_kernel<false>
        <<<row_grid(pass.rows, table.in, 1), kThreads, 0, stream>>>(values, table.out, table.in, stride, pass, out);
  }
  check_cuda(cudaGetLastError(), "embed");
}

void add_bias(const float* bias, int rows, int dim, float* y, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  if (dim % 4 == 0) {
    add_bias_kernel<true><<<row_grid(rows, dim, 4), kThreads, 0, stream>>>(bias, dim, y);
  } else {
    add_bias_kernel<false><<<row_grid(rows, dim, 1), kThreads, 0, stream>>>(bias, dim, y);
  }
  check_cuda(cudaGetLastError(), "add_bias");
}

void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  const auto grid = static_cast<unsigned>(rows);
  if (dim % 4 == 0) {
    const auto threads = static_cast<unsigned>(std::min(kNormThreads, ceil_div(dim / 4, kWarp) * kWarp));
    launch_behind(rms_norm_kernel, "rms_norm", grid, threads, 0, stream, x, weight, eps, dim, padded_dim(dim),
                  bits(out));
  } else {
    const auto threads = static_cast<unsigned>(std::min(kNormThreads, ceil_div(dim, kWarp) * kWarp));
    launch_behind(rms_norm_narrow_kernel, "rms_norm", grid, threads, 0, stream, x, weight, eps, dim, padded_dim(dim),
                  bits(out));
  }
}

void silu_mul(const float* gate_up, int rows, int dim, bf16* out, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  const int padded = padded_dim(dim);
  if (dim % 8 == 0) {
    launch_behind(silu_mul_kernel<true>, "silu_mul", row_grid(rows, padded, 8), kThreads, 0, stream, gate_up, dim,
                  padded, bits(out));
  } else {
    launch_behind(silu_mul_kernel<false>, "silu_mul", row_grid(rows, padded, 1), kThreads, 0, stream, gate_up, dim,
                  padded, bits(out));
  }
}

void select_rows(const float* x, const StagedPass& pass, int dim, float* out, cudaStream_t stream) {
  if (pass.logit_count == 0) {
    return;
  }
  if (dim % 4 == 0) {
    select_rows_kernel<true><<<row_grid(pass.logit_count, dim, 4), kThreads, 0, stream>>>(x, pass.logit_rows, dim, out);
  } else {
    select_rows_kernel<false>
        <<<row_grid(pass.logit_count, dim, 1), kThreads, 0, stream>>>(x, pass.logit_rows, dim, out);
  }
  check_cuda(cudaGetLastError(), "select_rows");
}

}  // namespace vericache::cuda
