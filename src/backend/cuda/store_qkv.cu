// From the product of a row to attention: bias, q and k norms, RoPE, K and V into the tail's slot, queries into their
// rings. A warp works on one head of a row.
#include <algorithm>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/head_dim.h"
#include "backend/cuda/layout.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/row_math.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

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
  allow_kernel_behind();
  await_kernels_before();
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
  const int slot = (sequence.position + place - ring.origin) % ring.capacity;
  const uint4* source = q + at(row, vectors);
  auto* target = reinterpret_cast<uint4*>(ring.q) + at(slot, vectors);
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += static_cast<int>(blockDim.x)) {
    target[i] = source[i];
  }
  for (int i = static_cast<int>(threadIdx.x); i < heads; i += static_cast<int>(blockDim.x)) {
    ring.log_sum_exp[at(slot, heads) + static_cast<size_t>(i)] = log_sum_exp[at(row, heads) + static_cast<size_t>(i)];
  }
}

}  // namespace

void store_qkv(const QkvArgs& args, const StagedPass& pass, cudaStream_t stream) {
  if (pass.rows == 0) {
    return;
  }
  const int warps = pass.rows * (args.heads + 2 * args.shape.kv_heads);
  const auto grid = static_cast<unsigned>(ceil_div(warps, kHeadsPerBlock));
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    launch_behind(store_qkv_kernel<decltype(dim)::kValue / kWarp>, "store_qkv", grid, kHeadsPerBlock * kWarp, 0, stream,
                  args, pass);
  });
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

}  // namespace vericache::cuda
