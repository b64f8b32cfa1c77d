// Pages of full KV to and from the form in which they cross the wire (residual_code.h). A block takes a head page, a
// warp a row at a time.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/residual_row.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <int kHeadDim>
struct BlockShape {
  static constexpr int kKeyRows = kHeadDim / 4;
  static constexpr int kRows = 2 * kKeyRows;
  static constexpr size_t kHeadPageBytes = size_t{2} * kPageTokens * kHeadDim * 2;
};

__device__ inline const std::byte* resident_part(const KvView& resident, int head, int page, bool keys, int head_dim) {
  const std::byte* packed = resident.head_pages[static_cast<ptrdiff_t>(head) * resident.page_stride + page];
  return keys ? packed : packed + bytes_of(key_pieces(resident.format.key_bits, head_dim));
}

template <int kHeadDim, bool kLossless>
__device__ uint4 decode_row(const BlockReader& block, uint32_t begin, uint32_t end, const KvView& resident, int head,
                            int page, int row, int lane) {
  if (end - begin == kRowHalves) {
    return read_raw(block, begin, lane);
  }
  if constexpr (kLossless) {
    return read_lossless(block, begin, lane);
  } else {
    const bool keys = row < BlockShape<kHeadDim>::kKeyRows;
    const int bits = keys ? resident.format.key_bits : resident.format.value_bits;
    const std::byte* part = resident_part(resident, head, page, keys, kHeadDim);
    const int own_row = keys ? row : row - BlockShape<kHeadDim>::kKeyRows;
    if (bits == 16) {
      return reinterpret_cast<const uint4*>(part)[own_row * 32 + lane];
    }
    ResidualField fields[kLaneValues];
    read_fields<kHeadDim>(part, keys, bits, own_row, lane, fields);
    return read_coded(block, begin, fields);
  }
}

// Grid (pages, heads).
template <int kHeadDim, bool kLossless>
__global__ void __launch_bounds__(kThreads) decode_kernel(DecodeArgs args) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t page_begin = page == 0 ? 0 : args.ends[page - 1];
  const uint32_t units = args.ends[page] - page_begin;
  const std::byte* in = args.in + page_begin * kResidualUnit;
  const auto* block_ends = reinterpret_cast<const uint32_t*>(in);
  const uint32_t begin = head == 0 ? residual_header_units(args.shape) : min(block_ends[head - 1], units);
  const uint32_t end = max(min(block_ends[head], units), begin);
  // A block that is not there is read as the page's header: bits of no meaning.
  const bool there = end > begin;
  const BlockReader block{reinterpret_cast<const uint32_t*>(there ? in + begin * kResidualUnit : in),
                          there ? (end - begin) * 4 - 1 : 3};
  std::byte* out = args.out + (static_cast<size_t>(page) * gridDim.y + static_cast<size_t>(head)) *
                                  BlockShape<kHeadDim>::kHeadPageBytes;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps) {
    const uint32_t row_begin = row == 0 ? kRows : block.half(static_cast<uint32_t>(row - 1));
    const uint32_t row_end = block.half(static_cast<uint32_t>(row));
    reinterpret_cast<uint4*>(out)[row * 32 + lane] =
        decode_row<kHeadDim, kLossless>(block, row_begin, row_end, args.resident, head, page, row, lane);
  }
}

struct EncodeCall {
  KvShape shape;
  KvView resident;
  int first;
  const std::byte* pages[EncodeArgs::kMostPages];
  uint32_t* sizes;
  std::byte* out;
  uint32_t* ends;
};

// A row of the block's head page. Values, and how they are to be written.
template <int kHeadDim, bool kLossless>
__device__ uint32_t make_row(const EncodeCall& call, int row, uint32_t (&values)[kLaneValues], LaneRow& made) {
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::byte* source = call.pages[page] + static_cast<size_t>(head) * BlockShape<kHeadDim>::kHeadPageBytes;
  unpack_values(reinterpret_cast<const uint4*>(source)[row * 32 + lane], values);
  if constexpr (kLossless) {
    const uint32_t base = choose_base(values);
    code_lossless_row(values, base, made);
    return base;
  } else {
    const bool keys = row < BlockShape<kHeadDim>::kKeyRows;
    const int bits = keys ? call.resident.format.key_bits : call.resident.format.value_bits;
    if (bits == 16) {
      made.halves = 0;
      return 0;
    }
    ResidualField fields[kLaneValues];
    read_fields<kHeadDim>(resident_part(call.resident, head, call.first + page, keys, kHeadDim), keys, bits,
                          keys ? row : row - BlockShape<kHeadDim>::kKeyRows, lane, fields);
    code_row(values, fields, made);
    return 0;
  }
}

// Halves of every row into shared memory. The block's units.
template <int kHeadDim, bool kLossless>
__device__ uint32_t measure_block(const EncodeCall& call, uint32_t* row_halves) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps) {
    uint32_t values[kLaneValues];
    LaneRow made;
    make_row<kHeadDim, kLossless>(call, row, values, made);
    if (threadIdx.x % 32 == 0) {
      row_halves[row] = static_cast<uint32_t>(made.halves);
    }
  }
  __syncthreads();
  uint32_t halves = kRows;
  for (int row = 0; row < kRows; ++row) {
    halves += row_halves[row];
  }
  return residual_units(halves);
}

// Grid (pages, heads): units of every block.
template <int kHeadDim, bool kLossless>
__global__ void __launch_bounds__(kThreads) measure_kernel(EncodeCall call) {
  __shared__ uint32_t row_halves[BlockShape<kHeadDim>::kRows];
  const uint32_t units = measure_block<kHeadDim, kLossless>(call, row_halves);
  if (threadIdx.x == 0) {
    call.sizes[blockIdx.x * gridDim.y + blockIdx.y] = units;
  }
}

// Where the block begins, in units from `out`; writes what the page's header and the host are told by this block.
__device__ inline uint32_t place_block(const EncodeCall& call) {
  const unsigned heads = gridDim.y;
  const uint32_t header = residual_header_units(call.shape);
  uint32_t page_begin = 0;
  for (unsigned i = 0; i < blockIdx.x * heads; ++i) {
    page_begin += call.sizes[i];
  }
  page_begin += blockIdx.x * header;
  uint32_t end = header;
  for (unsigned head = 0; head < blockIdx.y; ++head) {
    end += call.sizes[blockIdx.x * heads + head];
  }
  const uint32_t begin = end;
  end += call.sizes[blockIdx.x * heads + blockIdx.y];
  auto* ends = reinterpret_cast<uint32_t*>(call.out + page_begin * kResidualUnit);
  if (threadIdx.x == 0) {
    ends[blockIdx.y] = end;
    if (blockIdx.y + 1 == heads) {
      for (unsigned head = heads; head < header * 4; ++head) {
        ends[head] = 0;
      }
      call.ends[blockIdx.x] = page_begin + end;
    }
  }
  return page_begin + begin;
}

// Grid (pages, heads).
template <int kHeadDim, bool kLossless>
__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeCall call) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  __shared__ uint32_t row_halves[kRows];
  __shared__ uint32_t row_words[kWarps][kRowValues / 2];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = row_words[threadIdx.x / 32];
  const uint32_t units = measure_block<kHeadDim, kLossless>(call, row_halves);
  auto* out = reinterpret_cast<uint16_t*>(call.out + place_block(call) * kResidualUnit);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps) {
    uint32_t begin = kRows;
    for (int before = 0; before < row; ++before) {
      begin += row_halves[before];
    }
    const uint32_t halves = row_halves[row];
    for (int i = lane; i < kRowValues / 2; i += 32) {
      words[i] = 0;
    }
    __syncwarp();
    uint32_t values[kLaneValues];
    LaneRow made;
    const uint32_t base = make_row<kHeadDim, kLossless>(call, row, values, made);
    if (halves > 0) {
      put_row(made, values, kLossless, base, lane, words);
    }
    __syncwarp();
    for (uint32_t i = static_cast<uint32_t>(lane); i < halves; i += 32) {
      out[begin + i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
    __syncwarp();
    if (lane == 0) {
      out[row] = static_cast<uint16_t>(begin + halves);
    }
    if (row + 1 == kRows) {
      for (uint32_t i = begin + halves + static_cast<uint32_t>(lane); i < units * 8; i += 32) {
        out[i] = 0;
      }
    }
  }
}

}  // namespace

void encode(const EncodeArgs& args, cudaStream_t stream) {
  if (args.pages.empty()) {
    return;
  }
  check(args.pages.size() <= EncodeArgs::kMostPages, "pages of one call");
  EncodeCall call{args.shape, args.resident, args.first, {}, args.sizes, args.out, args.ends};
  for (size_t i = 0; i < args.pages.size(); ++i) {
    call.pages[i] = args.pages[i];
  }
  const dim3 grid(static_cast<unsigned>(args.pages.size()), static_cast<unsigned>(args.shape.kv_heads));
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    if (args.code == ResidualCode::lossless) {
      measure_kernel<kHeadDim, true><<<grid, kThreads, 0, stream>>>(call);
      encode_kernel<kHeadDim, true><<<grid, kThreads, 0, stream>>>(call);
    } else {
      measure_kernel<kHeadDim, false><<<grid, kThreads, 0, stream>>>(call);
      encode_kernel<kHeadDim, false><<<grid, kThreads, 0, stream>>>(call);
    }
  });
  check_cuda(cudaGetLastError(), "encode");
}

void decode(const DecodeArgs& args, cudaStream_t stream) {
  if (args.count == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(args.count), static_cast<unsigned>(args.shape.kv_heads));
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    if (args.code == ResidualCode::lossless) {
      decode_kernel<kHeadDim, true><<<grid, kThreads, 0, stream>>>(args);
    } else {
      decode_kernel<kHeadDim, false><<<grid, kThreads, 0, stream>>>(args);
    }
  });
  check_cuda(cudaGetLastError(), "decode");
}

}  // namespace vericache::cuda
