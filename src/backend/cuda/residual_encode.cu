// Pages of full KV to the form in which they cross the wire (residual_code.h).
#include <type_traits>

#include "backend/cuda/residual_forms.cuh"
#include "backend/cuda/residual_outliers.cuh"
#include "backend/cuda/rotated_residual.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

struct EncodeCall {
  KvShape shape;
  KvView resident;
  int first;
  const std::byte* pages[EncodeArgs::kMostPages];
  uint32_t* sizes;
  std::byte* out;
  uint32_t* ends;
};

// The bases of K and V of the block's head page, of rotated formats: all its dynamic shared memory.
template <int kHeadDim>
struct RotatedParts {
  RotatedGroups<kHeadDim> groups;
  RotatedBases<kHeadDim> keys;
  RotatedBases<kHeadDim> values;
};
template <int kHeadDim>
__device__ RotatedParts<kHeadDim>& rotated_parts() {
  extern __shared__ uint4 memory[];
  return *reinterpret_cast<RotatedParts<kHeadDim>*>(memory);
}
template <int kHeadDim, Form kForm>
__device__ void make_bases(const EncodeCall& call) {
  if constexpr (kForm == Form::rotated) {
    const int page = call.first + static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const KvFormat format = call.resident.format;
    const std::byte* keys = resident_part(call.resident, head, page, true, kHeadDim);
    const std::byte* values = resident_part(call.resident, head, page, false, kHeadDim);
    RotatedParts<kHeadDim>& parts = rotated_parts<kHeadDim>();
    parts.groups.fill(format, keys, values);
    __syncthreads();
    if (!format.key().exact()) {
      parts.keys.template fill<true>(format.key_bits, keys, parts.groups);
    }
    if (!format.value().exact()) {
      parts.values.template fill<false>(format.value_bits, values, parts.groups);
    }
    __syncthreads();
  }
}
template <int kHeadDim>
__device__ void rotated_fields(bool keys, int part_row, int lane, ResidualField (&fields)[kLaneValues]) {
  const RotatedParts<kHeadDim>& parts = rotated_parts<kHeadDim>();
  const RotatedGroups<kHeadDim>& groups = parts.groups;
  const auto* bases = reinterpret_cast<const uint16_t*>(&(keys ? parts.keys : parts.values).of(part_row, lane));
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int of = keys ? part_row / 8 : lane_place<kHeadDim, false>(part_row, lane).token + i;
    const uint32_t above = keys ? groups.key_above[of] : groups.value_above[of];
    const uint32_t below = keys ? groups.key_below[of] : groups.value_below[of];
    fields[i] = rotated_field(bases[i], {above, below & kMagnitudeBits});
  }
}

// What an encoding block knows of outliers, if there are any.
struct NoMaps {};
template <int kHeadDim, Form kForm>
using Maps = std::conditional_t<kForm == Form::nuq, OutlierMaps<kHeadDim>, NoMaps>;

// Whether a row of the block is a lossless one.
template <int kHeadDim, Form kForm>
__device__ bool coded_alone(const EncodeCall& call, int row) {
  return kForm == Form::lossless ||
         (kForm == Form::rotated &&
          vericache::coded_alone(ResidualCode::resident, call.resident.format, row < BlockShape<kHeadDim>::kKeyRows));
}

// A row of the block's head page. Values, and how they are to be written.
template <int kHeadDim, Form kForm>
__device__ uint32_t make_row(const EncodeCall& call, const Maps<kHeadDim, kForm>& maps, int row,
                             uint32_t (&values)[kLaneValues], LaneRow& made) {
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::byte* source = call.pages[page] + static_cast<size_t>(head) * BlockShape<kHeadDim>::kHeadPageBytes;
  unpack_values(reinterpret_cast<const uint4*>(source)[row * 32 + lane], values);
  if (coded_alone<kHeadDim, kForm>(call, row)) {
    const uint32_t base = choose_base(values);
    code_lossless_row(values, base, made);
    return base;
  }
  if constexpr (kForm != Form::lossless) {
    const bool keys = row < BlockShape<kHeadDim>::kKeyRows;
    const KvPart format = keys ? call.resident.format.key() : call.resident.format.value();
    if (format.exact()) {
      made.halves = 0;
      return 0;
    }
    const int part_row = keys ? row : row - BlockShape<kHeadDim>::kKeyRows;
    ResidualField fields[kLaneValues];
    if constexpr (kForm == Form::rotated) {
      rotated_fields<kHeadDim>(keys, part_row, lane, fields);
    } else {
      const std::byte* part = resident_part(call.resident, head, call.first + page, keys, kHeadDim);
      const LanePlace at =
          keys ? lane_place<kHeadDim, true>(part_row, lane) : lane_place<kHeadDim, false>(part_row, lane);
      const auto read = [&](const auto& own) { own.read_fields(part, at, fields); };
      constexpr bool kNuq = kForm == Form::nuq;
      keys ? with_part<kHeadDim, true, kNuq>(format, read) : with_part<kHeadDim, false, kNuq>(format, read);
      if constexpr (kNuq) {
        close_fields(maps, keys ? 0 : 1, part_row, values, fields);
      }
    }
    code_row(values, fields, made);
  }
  return 0;
}

// Halves of every row, and maps, into shared memory. The block's units.
template <int kHeadDim, Form kForm>
__device__ uint32_t measure_block(const EncodeCall& call, Maps<kHeadDim, kForm>& maps, uint32_t* row_halves) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  if constexpr (kForm == Form::nuq) {
    const int page = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const std::byte* source = call.pages[page] + static_cast<size_t>(head) * BlockShape<kHeadDim>::kHeadPageBytes;
    const auto part = [&](bool keys) { return resident_part(call.resident, head, call.first + page, keys, kHeadDim); };
    const KvFormat format = call.resident.format;
    map_part<kHeadDim, true, kResidualThreads>(format.key(), part(true), source, maps);
    map_part<kHeadDim, false, kResidualThreads>(format.value(), part(false), source, maps);
  }
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kResidualWarps) {
    uint32_t values[kLaneValues];
    LaneRow made;
    make_row<kHeadDim, kForm>(call, maps, row, values, made);
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
template <int kHeadDim, Form kForm>
__global__ void __launch_bounds__(kResidualThreads) measure_kernel(EncodeCall call) {
  __shared__ uint32_t row_halves[BlockShape<kHeadDim>::kRows];
  __shared__ Maps<kHeadDim, kForm> maps;
  make_bases<kHeadDim, kForm>(call);
  const uint32_t units = measure_block<kHeadDim, kForm>(call, maps, row_halves);
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
template <int kHeadDim, Form kForm>
__global__ void __launch_bounds__(kResidualThreads) encode_kernel(EncodeCall call) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  __shared__ uint32_t row_halves[kRows];
  __shared__ uint32_t row_words[kResidualWarps][kRowValues / 2];
  __shared__ Maps<kHeadDim, kForm> maps;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = row_words[threadIdx.x / 32];
  make_bases<kHeadDim, kForm>(call);
  const uint32_t units = measure_block<kHeadDim, kForm>(call, maps, row_halves);
  auto* out = reinterpret_cast<uint16_t*>(call.out + place_block(call) * kResidualUnit);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kResidualWarps) {
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
    const uint32_t base = make_row<kHeadDim, kForm>(call, maps, row, values, made);
    if (halves > 0) {
      put_row(made, values, coded_alone<kHeadDim, kForm>(call, row), base, lane, words);
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

template <int kHeadDim, Form kForm>
void launch_encode(const EncodeCall& call, const dim3& grid, cudaStream_t stream) {
  constexpr size_t kBytes = kForm == Form::rotated ? sizeof(RotatedParts<kHeadDim>) : 0;
  static const bool allowed = [] {
    allow_shared(measure_kernel<kHeadDim, kForm>, kBytes, "encode");
    allow_shared(encode_kernel<kHeadDim, kForm>, kBytes, "encode");
    return true;
  }();
  (void)allowed;
  measure_kernel<kHeadDim, kForm><<<grid, kResidualThreads, kBytes, stream>>>(call);
  encode_kernel<kHeadDim, kForm><<<grid, kResidualThreads, kBytes, stream>>>(call);
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
    for_form(form_of(args.code, args.resident.format),
             [&](auto form) { launch_encode<decltype(dim)::kValue, decltype(form)::value>(call, grid, stream); });
  });
  check_cuda(cudaGetLastError(), "encode");
}

}  // namespace vericache::cuda
