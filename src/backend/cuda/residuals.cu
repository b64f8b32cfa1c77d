// Pages of full KV to and from the form in which they cross the wire (residual_code.h). A block takes a head page, a
// warp a row at a time.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/residual_reader.cuh"
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

// How the values of a row are found: by themselves; beside codes of 4 bits or fewer, whose fields are tabulated per
// group and code; beside any codes.
enum class Reading { lossless, by_table, by_value };

template <int kHeadDim>
struct DecodeMemory {
  static constexpr int kGroups = kHeadDim + kPageTokens;  // those of K, then those of V
  static constexpr int kTableStride = 17;                 // words of a group: groups begin in different banks
  static constexpr size_t kBlockBytes =
      (BlockShape<kHeadDim>::kRows * (1 + kRowHalves) * 2 + kResidualUnit - 1) / kResidualUnit * kResidualUnit;
  static constexpr size_t kBehind = 2 * kResidualUnit;  // read by windows that begin in the block
  static constexpr size_t kPackedAt = kBlockBytes + kBehind;

  __host__ __device__ static constexpr size_t packed_bytes(const KvFormat& format) {
    return (format.key_bits == 16 ? 0 : static_cast<size_t>(bytes_of(key_pieces(format.key_bits, kHeadDim)))) +
           (format.value_bits == 16 ? 0 : static_cast<size_t>(bytes_of(value_pieces(format.value_bits, kHeadDim))));
  }
  static size_t bytes(Reading reading, const KvFormat& format) {
    return kPackedAt + (reading == Reading::lossless ? 0 : packed_bytes(format)) +
           (reading == Reading::by_table ? sizeof(uint32_t) * kGroups * kTableStride : 0);
  }
};

// All threads of the block; waited for by copies_wait.
__device__ inline void copy_to_shared(std::byte* target, const std::byte* source, size_t bytes) {
  for (size_t at = threadIdx.x * size_t{16}; at < bytes; at += size_t{kThreads} * 16) {
    copy_lane(shared_address(target + at), source + at);
  }
}

// A thread makes the fields of one group.
template <int kHeadDim>
__device__ void make_table(const KvView& resident, int head, int page, uint32_t* table) {
  const int group = static_cast<int>(threadIdx.x);
  const bool keys = group < kHeadDim;
  const int bits = keys ? resident.format.key_bits : resident.format.value_bits;
  if (group >= DecodeMemory<kHeadDim>::kGroups || bits == 16) {
    return;
  }
  const auto* affine = reinterpret_cast<const uint16_t*>(resident_part(resident, head, page, keys, kHeadDim)) + group -
                       (keys ? 0 : kHeadDim);
  const float scale = __uint_as_float(uint32_t{affine[0]} << 16);
  const float minimum = __uint_as_float(uint32_t{affine[keys ? kHeadDim : kPageTokens]} << 16);
  uint32_t* fields = table + group * DecodeMemory<kHeadDim>::kTableStride;
  for (int code = 0; code < 1 << bits; ++code) {
    fields[code] = pack_field(affine_field(static_cast<uint32_t>(code), scale, minimum));
  }
}

// Grid (pages, heads).
template <int kHeadDim, Reading kReading>
__global__ void __launch_bounds__(kThreads, 4) decode_kernel(DecodeArgs args) {
  using Memory = DecodeMemory<kHeadDim>;
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  constexpr int kKeyRows = BlockShape<kHeadDim>::kKeyRows;
  extern __shared__ uint4 memory[];
  auto* const coded = reinterpret_cast<std::byte*>(memory);
  std::byte* const packed = coded + Memory::kPackedAt;
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const KvFormat format = args.resident.format;
  const size_t packed_key_bytes =
      format.key_bits == 16 ? 0 : static_cast<size_t>(bytes_of(key_pieces(format.key_bits, kHeadDim)));
  auto* const table = reinterpret_cast<uint32_t*>(packed + Memory::packed_bytes(format));
  if constexpr (kReading != Reading::lossless) {
    if (format.key_bits != 16) {
      copy_to_shared(packed, resident_part(args.resident, head, page, true, kHeadDim), packed_key_bytes);
    }
    if (format.value_bits != 16) {
      copy_to_shared(packed + packed_key_bytes, resident_part(args.resident, head, page, false, kHeadDim),
                     Memory::packed_bytes(format) - packed_key_bytes);
    }
  }
  const uint32_t page_begin = page == 0 ? 0 : args.ends[page - 1];
  const uint32_t units = args.ends[page] - page_begin;
  const std::byte* in = args.in + page_begin * kResidualUnit;
  const auto* block_ends = reinterpret_cast<const uint32_t*>(in);
  const uint32_t begin = head == 0 ? residual_header_units(args.shape) : min(block_ends[head - 1], units);
  const uint32_t end = max(min(block_ends[head], units), begin);
  copy_to_shared(coded, in + begin * kResidualUnit, min((end - begin) * kResidualUnit, Memory::kBlockBytes));
  copies_commit();
  if constexpr (kReading == Reading::by_table) {
    make_table<kHeadDim>(args.resident, head, page, table);
  }
  copies_wait<0>();
  __syncthreads();

  const BlockReader block{reinterpret_cast<const uint32_t*>(coded),
                          static_cast<uint32_t>((Memory::kBlockBytes + Memory::kBehind) / 4 - 3)};
  auto* const out =
      reinterpret_cast<uint4*>(args.out + (static_cast<size_t>(page) * gridDim.y + static_cast<size_t>(head)) *
                                              BlockShape<kHeadDim>::kHeadPageBytes);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps) {
    const uint32_t row_begin = row == 0 ? kRows : block.half(static_cast<uint32_t>(row - 1));
    const uint32_t row_end = block.half(static_cast<uint32_t>(row));
    if (row_end - row_begin == kRowHalves) {
      out[row * 32 + lane] = read_raw(block, row_begin, lane);
    } else if constexpr (kReading == Reading::lossless) {
      out[row * 32 + lane] = read_lossless(block, row_begin, lane);
    } else {
      const bool keys = row < kKeyRows;
      const int bits = keys ? format.key_bits : format.value_bits;
      const int own_row = keys ? row : row - kKeyRows;
      if (bits == 16) {
        out[row * 32 + lane] = reinterpret_cast<const uint4*>(
            resident_part(args.resident, head, page, keys, kHeadDim))[own_row * 32 + lane];
        continue;
      }
      const std::byte* part = keys ? packed : packed + packed_key_bytes;
      uint32_t fields[kLaneValues];
      if constexpr (kReading == Reading::by_table) {
        uint32_t codes[kLaneValues];
        read_codes<kHeadDim>(reinterpret_cast<const uint32_t*>(part) + (keys ? kHeadDim : kPageTokens), keys, bits,
                             own_row, lane, codes);
        const uint32_t* own_table =
            table + ((keys ? 0 : kHeadDim) + first_group<kHeadDim>(keys, own_row, lane)) * Memory::kTableStride;
#pragma unroll
        for (int i = 0; i < kLaneValues; ++i) {
          fields[i] = own_table[static_cast<uint32_t>(i * Memory::kTableStride) + codes[i]];
        }
      } else {
        ResidualField open[kLaneValues];
        read_fields<kHeadDim>(part, keys, bits, own_row, lane, open);
#pragma unroll
        for (int i = 0; i < kLaneValues; ++i) {
          fields[i] = pack_field(open[i]);
        }
      }
      out[row * 32 + lane] = read_coded(block, row_begin, fields);
    }
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

template <int kHeadDim, Reading kReading>
void launch_decode(const DecodeArgs& args, cudaStream_t stream) {
  const size_t bytes = DecodeMemory<kHeadDim>::bytes(kReading, args.resident.format);
  static const bool allowed = [] {
    check_cuda(cudaFuncSetAttribute(decode_kernel<kHeadDim, kReading>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(DecodeMemory<kHeadDim>::bytes(
                                        kReading, kReading == Reading::by_table ? KvFormat{4, 4} : KvFormat{8, 8}))),
               "decode");
    return true;
  }();
  (void)allowed;
  const dim3 grid(static_cast<unsigned>(args.count), static_cast<unsigned>(args.shape.kv_heads));
  decode_kernel<kHeadDim, kReading><<<grid, kThreads, bytes, stream>>>(args);
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
  const KvFormat& format = args.resident.format;
  const bool small =
      (format.key_bits <= 4 || format.key_bits == 16) && (format.value_bits <= 4 || format.value_bits == 16);
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kValue;
    if (args.code == ResidualCode::lossless) {
      launch_decode<kHeadDim, Reading::lossless>(args, stream);
    } else if (small) {
      launch_decode<kHeadDim, Reading::by_table>(args, stream);
    } else {
      launch_decode<kHeadDim, Reading::by_value>(args, stream);
    }
  });
  check_cuda(cudaGetLastError(), "decode");
}

}  // namespace vericache::cuda
