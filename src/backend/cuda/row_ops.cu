// What is done to each row by itself: embedding, norms, activations, RoPE and the way of K and V into the tail, rows
// that want logits, query rings; and random weights. A block or a warp works on one row (or a part of one) in an order
// that depends on the row's width alone.
#include <cuda_bf16.h>

#include <algorithm>

#include "backend/cuda/layout.h"
#include "backend/cuda/ops.h"
#include "backend/philox.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Rows times pieces of a row.
dim3 row_grid(int rows, int values, int values_per_thread) {
  return {static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(values, values_per_thread * kThreads)), 1};
}

__device__ size_t at(int row, int columns) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns);
}

__device__ uint16_t bf16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Two neighbours, the lower address in the lower half.
__device__ uint32_t bf16_pair(float low, float high) {
  return static_cast<uint32_t>(bf16_bits(low)) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}

__device__ float low_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ float high_float(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Every lane gets the same bits: each step adds two numbers that both of their lanes hold.
__device__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Of the whole block, known to every thread; a block has up to 32 warps. `partial` is a float per warp.
__device__ float block_sum(float x, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) {
    partial[warp] = x;
  }
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

// Tokens are written by the op that chose them, in host memory: they are read past the caches that might hold an older
// one.
__device__ int token_of_row(const StagedPass& pass, int row) {
  const SequenceRows& sequence = pass.sequences[pass.sequence_of_row[row]];
  return *static_cast<const volatile TokenId*>(sequence.tokens + sequence.position + row - sequence.first_row);
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

__device__ float rms_factor(float squares, int dim, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
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

// kValues neighbours in one access where their size is that of one.
template <int kValues>
__device__ void load_floats(const float* source, float* v) {
  if constexpr (kValues == 4) {
    const float4 x = *reinterpret_cast<const float4*>(source);
    v[0] = x.x;
    v[1] = x.y;
    v[2] = x.z;
    v[3] = x.w;
  } else if constexpr (kValues == 2) {
    const float2 x = *reinterpret_cast<const float2*>(source);
    v[0] = x.x;
    v[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      v[i] = source[i];
    }
  }
}
template <int kValues>
__device__ void store_bf16s(const float* v, uint16_t* target) {
  if constexpr (kValues == 4) {
    *reinterpret_cast<uint2*>(target) = make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]));
  } else if constexpr (kValues == 2) {
    *reinterpret_cast<uint32_t*>(target) = bf16_pair(v[0], v[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      target[i] = bf16_bits(v[i]);
    }
  }
}

// A warp a head of a row; lane l holds the dims [kValues l, kValues (l + 1)), so that RoPE's partner of a dim is the
// same value of lane l ^ 16: half a head is 16 kValues dims.
constexpr int kHeadsPerBlock = 8;
template <int kValues>
__global__ void __launch_bounds__(kHeadsPerBlock* kWarp) store_qkv_kernel(QkvArgs args, StagedPass pass) {
  constexpr int kHeadDim = kValues * kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(blockIdx.x) * kHeadsPerBlock + static_cast<int>(threadIdx.x) / kWarp;
  const int kv_heads = args.shape.kv_heads;
  const int heads = args.heads + 2 * kv_heads;
  const int row = warp / heads;
  const int head = warp % heads;
  if (row >= pass.rows) {
    return;
  }
  const int dim = lane * kValues;
  float v[kValues];
  load_floats<kValues>(args.qkv + at(warp, kHeadDim) + dim, v);
  if (args.bias != nullptr) {
    float bias[kValues];
    load_floats<kValues>(args.bias + at(head, kHeadDim) + dim, bias);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      v[i] += bias[i];
    }
  }
  const bool is_query = head < args.heads;
  const bool is_value = head >= args.heads + kv_heads;
  const float* norm = is_query ? args.q_norm : is_value ? nullptr : args.k_norm;
  if (norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      squares = __fmaf_rn(v[i], v[i], squares);
    }
    const float factor = rms_factor(warp_sum(squares), kHeadDim, args.norm_eps);
    float weight[kValues];
    load_floats<kValues>(norm + dim, weight);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      v[i] = v[i] * factor * weight[i];
    }
  }
  const SequenceRows& sequence =
      pass.sequences[static_cast<ptrdiff_t>(args.layer) * pass.count + pass.sequence_of_row[row]];
  const int position = sequence.position + row - sequence.first_row;
  if (!is_value) {
    const size_t angle = at(position, kHeadDim / 2) + static_cast<size_t>(dim % (kHeadDim / 2));
    float cos[kValues];
    float sin[kValues];
    load_floats<kValues>(args.rope.cos + angle, cos);
    load_floats<kValues>(args.rope.sin + angle, sin);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float partner = __shfl_xor_sync(kAllLanes, v[i], kWarp / 2);
      const float turned = partner * sin[i];
      v[i] = lane < kWarp / 2 ? v[i] * cos[i] - turned : v[i] * cos[i] + turned;
    }
  }
  if (is_query) {
    store_bf16s<kValues>(v, reinterpret_cast<uint16_t*>(args.q) + at(row * args.heads + head, kHeadDim) + dim);
    return;
  }
  const int kv_head = is_value ? head - args.heads - kv_heads : head - args.heads;
  const int slot = position - sequence.kv.tail_position;
  const KvView& tail = sequence.kv.tail;
  auto* page = reinterpret_cast<uint16_t*>(
      tail.head_pages[static_cast<ptrdiff_t>(kv_head) * tail.page_stride + slot / kPageTokens]);
  const int token = slot % kPageTokens;
  if (is_value) {
    uint16_t* values = page + kPageTokens * kHeadDim;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[value_index(token, dim + i, kHeadDim)] = bf16_bits(v[i]);
    }
  } else if constexpr (32 % kValues == 0) {
    store_bf16s<kValues>(v, page + key_index(token, dim));
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      page[key_index(token, dim + i)] = bf16_bits(v[i]);
    }
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

// Rows whose slot a later row of the pass takes are left out: no two threads write one place.
__global__ void keep_queries_kernel(const uint4* __restrict__ q, const float* __restrict__ log_sum_exp, int heads,
                                    int vectors, StagedPass pass, int layer) {
  const int row = static_cast<int>(blockIdx.x);
  const SequenceRows& sequence = pass.sequences[static_cast<ptrdiff_t>(layer) * pass.count + pass.sequence_of_row[row]];
  const QueryRing& ring = sequence.queries;
  const int place = row - sequence.first_row;
  if (place + ring.capacity < sequence.rows || ring.capacity == 0) {
    return;
  }
  const int slot = (sequence.position + place) % ring.capacity;
  const uint4* source = q + at(row, vectors);
  auto* target = reinterpret_cast<uint4*>(ring.q) + at(slot, vectors);
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += static_cast<int>(blockDim.x)) {
    target[i] = source[i];
  }
  for (int i = static_cast<int>(threadIdx.x); i < heads; i += static_cast<int>(blockDim.x)) {
    ring.log_sum_exp[at(slot, heads) + static_cast<size_t>(i)] = log_sum_exp[at(row, heads) + static_cast<size_t>(i)];
  }
}

// random_value() of backend/random_fill.h: four columns a thread, one block of Philox.
__device__ float random_value(uint32_t word, float scale) {
  return (__uint2float_rn(word) * 0x1p-31f - 1.0f) * scale;
}
__global__ void fill_random_kernel(int out, int in, int quads, uint64_t seed, float scale, uint2* __restrict__ data) {
  const size_t count = at(out, quads);
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const auto row = static_cast<uint32_t>(i / static_cast<size_t>(quads));
    const auto quad = static_cast<uint32_t>(i % static_cast<size_t>(quads));
    uint32_t words[4] = {quad, row, 0, 0};
    philox_rounds(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const int column = static_cast<int>(quad) * 4;
    const float a = column < in ? random_value(words[0], scale) : 0.0f;
    const float b = column + 1 < in ? random_value(words[1], scale) : 0.0f;
    const float c = column + 2 < in ? random_value(words[2], scale) : 0.0f;
    const float d = column + 3 < in ? random_value(words[3], scale) : 0.0f;
    data[i] = make_uint2(bf16_pair(a, b), bf16_pair(c, d));
  }
}

__global__ void delay_kernel(uint64_t nanoseconds) {
  uint64_t begin;
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    __nanosleep(1000);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

uint16_t* bits(bf16* values) {
  return reinterpret_cast<uint16_t*>(values);
}

}  // namespace

bool kernels_fit_gpu() {
  cudaFuncAttributes attributes;
  const bool fit = cudaFuncGetAttributes(&attributes, delay_kernel) == cudaSuccess;
  (void)cudaGetLastError();
  return fit;
}

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
    const int threads = std::min(kNormThreads, ceil_div(dim / 4, kWarp) * kWarp);
    rms_norm_kernel<<<grid, threads, 0, stream>>>(x, weight, eps, dim, padded_dim(dim), bits(out));
  } else {
    const int threads = std::min(kNormThreads, ceil_div(dim, kWarp) * kWarp);
    rms_norm_narrow_kernel<<<grid, threads, 0, stream>>>(x, weight, eps, dim, padded_dim(dim), bits(out));
  }
  check_cuda(cudaGetLastError(), "rms_norm");
}

void silu_mul(const float* gate_up, int rows, int dim, bf16* out, cudaStream_t stream) {
  if (rows == 0) {
    return;
  }
  const int padded = padded_dim(dim);
  if (dim % 8 == 0) {
    silu_mul_kernel<true><<<row_grid(rows, padded, 8), kThreads, 0, stream>>>(gate_up, dim, padded, bits(out));
  } else {
    silu_mul_kernel<false><<<row_grid(rows, padded, 1), kThreads, 0, stream>>>(gate_up, dim, padded, bits(out));
  }
  check_cuda(cudaGetLastError(), "silu_mul");
}

void store_qkv(const QkvArgs& args, const StagedPass& pass, cudaStream_t stream) {
  if (pass.rows == 0) {
    return;
  }
  const int warps = pass.rows * (args.heads + 2 * args.shape.kv_heads);
  const auto grid = static_cast<unsigned>(ceil_div(warps, kHeadsPerBlock));
  constexpr int kBlock = kHeadsPerBlock * kWarp;
  switch (args.shape.head_dim) {
    case 32:
      store_qkv_kernel<1><<<grid, kBlock, 0, stream>>>(args, pass);
      break;
    case 64:
      store_qkv_kernel<2><<<grid, kBlock, 0, stream>>>(args, pass);
      break;
    case 96:
      store_qkv_kernel<3><<<grid, kBlock, 0, stream>>>(args, pass);
      break;
    case 128:
      store_qkv_kernel<4><<<grid, kBlock, 0, stream>>>(args, pass);
      break;
    default:
      check(false, "a head has 32, 64, 96 or 128 dimensions on CUDA");
  }
  check_cuda(cudaGetLastError(), "store_qkv");
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

void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const StagedPass& pass,
                  int layer, cudaStream_t stream) {
  if (pass.rows == 0) {
    return;
  }
  const int vectors = heads * shape.key_dim() / 8;
  keep_queries_kernel<<<static_cast<unsigned>(pass.rows), kThreads, 0, stream>>>(
      reinterpret_cast<const uint4*>(q), log_sum_exp, heads, vectors, pass, layer);
  check_cuda(cudaGetLastError(), "keep_queries");
}

void fill_random(PackedMatrix& matrix, uint64_t seed, float scale, cudaStream_t stream) {
  const int quads = padded_dim(matrix.in) / 4;
  const size_t count = static_cast<size_t>(matrix.out) * static_cast<size_t>(quads);
  if (count == 0) {
    return;
  }
  const size_t blocks = std::min<size_t>((count + kThreads - 1) / kThreads, size_t{1} << 16);
  fill_random_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(matrix.out, matrix.in, quads, seed, scale,
                                                                             reinterpret_cast<uint2*>(matrix.data));
  check_cuda(cudaGetLastError(), "fill_random");
}

void delay(int microseconds, cudaStream_t stream) {
  delay_kernel<<<1, 1, 0, stream>>>(static_cast<uint64_t>(microseconds) * 1000);
  check_cuda(cudaGetLastError(), "delay");
}

}  // namespace vericache::cuda
