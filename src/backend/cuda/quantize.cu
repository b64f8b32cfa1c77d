// Head pages in the formats of resident KV, and the gathering of chosen tokens into pages.
// A block takes one head page through shared memory (page_encoder.cuh, chunk_encoder.cuh).
#include <cuda_runtime.h>

#include "backend/cuda/chunk_encoder.cuh"
#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

template <int kHeadDim>
__device__ void quantize_page(const std::byte* source, int held, KvFormat format, const bf16* rounding,
                              std::byte* out) {
  __shared__ SharedPage<kHeadDim> page;
  constexpr int kPart = kPageTokens * kHeadDim / 8;
  const auto* from = reinterpret_cast<const uint4*>(source);
  copy_part<kHeadDim>(from, &page.keys[0][0][0]);
  copy_part<kHeadDim>(from + kPart, &page.values[0][0][0]);
  encode_page(page, held, format, rounding, out);
}

// Of a head; null of null.
template <int kHeadDim>
__device__ inline const bf16* of_head(const bf16* rounding, int head) {
  return rounding == nullptr ? nullptr : rounding + static_cast<ptrdiff_t>(head) * kHeadDim * kHeadDim;
}

// Full KV by page: past, then tail.
__device__ inline const std::byte* full_page(const LayerKv& full, int head, int page) {
  const int past_pages = full.tail_position / kPageTokens;
  const KvView& view = page < past_pages ? full.past : full.tail;
  return view
      .head_pages[static_cast<ptrdiff_t>(head) * view.page_stride + (page < past_pages ? page : page - past_pages)];
}
__device__ inline std::byte* out_page(const KvView& out, int head, int page) {
  return out.head_pages[static_cast<ptrdiff_t>(head) * out.page_stride + page];
}

// Grid (pages, heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim) quantize_kernel(QuantizeArgs args) {
  const int page = args.first + static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  quantize_page<kHeadDim>(full_page(args.full, head, page), kPageTokens, args.out.format,
                          of_head<kHeadDim>(args.rounding, head), out_page(args.out, head, page));
}

template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    quantize_head_page_kernel(const std::byte* source, int held, KvFormat format, std::byte* out) {
  quantize_page<kHeadDim>(source, held, format, nullptr, out);
}

// Grid (pages of the longest head, heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim) gather_kernel(GatherArgs args) {
  __shared__ SharedPage<kHeadDim> page;
  __shared__ const std::byte* pages[kPageTokens];
  __shared__ int slots[kPageTokens];
  const int head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.x) * kPageTokens;
  const int held = min(kPageTokens, (args.counts == nullptr ? args.count : args.counts[head]) - first);
  if (held <= 0) {
    return;  // the head has no such page
  }
  for (int i = static_cast<int>(threadIdx.x); i < held; i += kHeadDim) {
    const int token = args.chosen[static_cast<ptrdiff_t>(head) * args.stride + first + i];
    pages[i] = full_page(args.full, head, token / kPageTokens);
    slots[i] = token % kPageTokens;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * kHeadDim / 8; i += kHeadDim) {
    const int chunk = i % 4;
    const int token = i / 4 % kPageTokens;
    const int dims = i / 4 / kPageTokens;
    uint4 read = make_uint4(0, 0, 0, 0);
    if (token < held) {
      read = reinterpret_cast<const uint4*>(pages[token] + key_index(slots[token], 32 * dims) * 2)[chunk];
    }
    page.keys[dims][token][chunk] = read;
  }
  auto* values = reinterpret_cast<uint16_t*>(&page.values[0][0][0]);
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * kHeadDim; i += kHeadDim) {
    const int token = i % kPageTokens;
    const int dim = i / kPageTokens;
    uint16_t read = 0;
    if (token < held) {
      const auto* from = reinterpret_cast<const uint16_t*>(pages[token] + kPageTokens * kHeadDim * 2);
      read = from[value_index(slots[token], dim, kHeadDim)];
    }
    values[value_index(token, dim, kHeadDim)] = read;
  }
  encode_page(page, held, args.out.format, of_head<kHeadDim>(args.rounding, head),
              out_page(args.out, head, static_cast<int>(blockIdx.x)));
}

__device__ inline uint32_t round_to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// The bf16 that a code stands for; part: where the packed part begins. affine: the group of `affine_groups`.
__device__ inline uint32_t decode(uint32_t code, const std::byte* part, const KvPart& format, int token, int affine,
                                  int affine_groups) {
  switch (format.code) {
    case KvCode::nuq:
      code = levels_of(part, affine_groups)[code];
      [[fallthrough]];
    case KvCode::affine: {
      const AffineBits group = affine_of(part, affine, affine_groups);
      return round_to_bf16(fmaf(static_cast<float>(code), first_of_pair(group.scale), first_of_pair(group.minimum)));
    }
    case KvCode::int8:
      return round_to_bf16(static_cast<float>(int8_of(code)) *
                           first_of_pair(reinterpret_cast<const uint16_t*>(part)[token]));
    default:
      return plane_value(code, format, base_of(part, token));
  }
}

// Writes the outliers that a draft may read. All threads of the block, behind a barrier.
template <int kHeadDim, bool kKeys>
__device__ void patch_outliers(const std::byte* source, const KvPart& format, std::byte* out) {
  const uint32_t* slots = slots_of(source, kKeys ? kHeadDim : kPageTokens);
  for (int i = static_cast<int>(threadIdx.x); i < outlier_slots(format, kHeadDim); i += kHeadDim) {
    const uint32_t place = slot_place(slots[i]);
    const uint32_t value = slot_value(slots[i]);
    if (place != kFreeSlot && is_finite(value)) {
      const auto dim = static_cast<int>(place) / kPageTokens;
      const auto token = static_cast<int>(place) % kPageTokens;
      reinterpret_cast<uint16_t*>(out)[kKeys ? key_index(token, dim) : value_index(token, dim, kHeadDim)] =
          static_cast<uint16_t>(value);
    }
  }
}

// Grid of one block: thread i of every round writes 8 bf16 of one token (K) or dim (V).
template <int kHeadDim, bool kKeys>
__device__ void dequantize_part(const std::byte* source, const KvPart& format, std::byte* out) {
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * kHeadDim / 8; i += kHeadDim) {
    // As the bf16 page lies: (32 dims, token, 32) or (32 tokens, dim, 32).
    const int first = 8 * (i % 4);
    const int token = kKeys ? i / 4 % kPageTokens : i / 4 / kHeadDim * 32 + first;
    const int dim = kKeys ? i / 4 / kPageTokens * 32 + first : i / 4 % kHeadDim;
    uint32_t values[8];
    if (kKeys) {
      key_codes(source, format, kHeadDim, token, dim, values);
    } else {
      value_codes(source, format, kHeadDim, token, dim, values);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      values[e] = kKeys ? decode(values[e], source, format, token, dim + e, kHeadDim)
                        : decode(values[e], source, format, token + e, token + e, kPageTokens);
    }
    reinterpret_cast<uint4*>(out)[i] = make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16,
                                                  values[4] | values[5] << 16, values[6] | values[7] << 16);
  }
  if (format.code == KvCode::nuq) {
    __syncthreads();
    patch_outliers<kHeadDim, kKeys>(source, format, out);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    dequantize_head_page_kernel(const std::byte* source, KvFormat format, std::byte* out) {
  constexpr int kPart = kPageTokens * kHeadDim / 8;
  const std::byte* values = source + bytes_of(key_pieces(format.key(), kHeadDim));
  if (format.key_bits == 16) {
    copy_part<kHeadDim>(reinterpret_cast<const uint4*>(source), reinterpret_cast<uint4*>(out));
  } else {
    dequantize_part<kHeadDim, true>(source, format.key(), out);
  }
  out += kPart * 16;
  if (format.value_bits == 16) {
    copy_part<kHeadDim>(reinterpret_cast<const uint4*>(values), reinterpret_cast<uint4*>(out));
  } else {
    dequantize_part<kHeadDim, false>(values, format.value(), out);
  }
  if (format.rotated) {
    __syncthreads();
    auto* keys = reinterpret_cast<uint16_t*>(out) - kPart * 8;
    rotate_page<kHeadDim>(keys, keys + kPart * 8);
  }
}

dim3 grid(int pages, int heads) {
  return {static_cast<unsigned>(pages), static_cast<unsigned>(heads), 1};
}

}  // namespace

void quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.count == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    quantize_kernel<kHeadDim><<<grid(args.count, args.shape.kv_heads), kHeadDim, 0, stream>>>(args);
  });
  check_cuda(cudaGetLastError(), "quantize");
}

void gather(const GatherArgs& args, cudaStream_t stream) {
  const int pages = (args.count + kPageTokens - 1) / kPageTokens;
  if (pages == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    gather_kernel<kHeadDim><<<grid(pages, args.shape.kv_heads), kHeadDim, 0, stream>>>(args);
  });
  check_cuda(cudaGetLastError(), "gather");
}

void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                        std::byte* out, cudaStream_t stream) {
  for_head_dim(shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    quantize_head_page_kernel<kHeadDim><<<1, kHeadDim, 0, stream>>>(source, tokens, format, out);
  });
  check_cuda(cudaGetLastError(), "quantize_head_page");
}

void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format, std::byte* out,
                          cudaStream_t stream) {
  for_head_dim(shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    dequantize_head_page_kernel<kHeadDim><<<1, kHeadDim, 0, stream>>>(source, format, out);
  });
  check_cuda(cudaGetLastError(), "dequantize_head_page");
}

}  // namespace vericache::cuda
