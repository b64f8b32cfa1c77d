// Pages of full KV to and from the form in which they cross the wire (residual_code.h). A block takes a head page, a
// warp a row at a time.
#include <cuda_runtime.h>

#include <type_traits>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/residual_outliers.cuh"
#include "backend/cuda/rotated_residual.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == kOctets);

// How pages are coded: each its own kernel. Rotated formats and outliers take more registers and shared memory.
enum class Form { lossless, resident, nuq, rotated };

inline Form form_of(ResidualCode code, const KvFormat& format) {
  return code == ResidualCode::lossless ? Form::lossless
         : format.rotated               ? Form::rotated
         : format.code == KvCode::nuq   ? Form::nuq
                                        : Form::resident;
}

template <int kHeadDim>
struct BlockShape {
  static constexpr int kKeyRows = kHeadDim / 4;
  static constexpr int kRows = 2 * kKeyRows;
  static constexpr size_t kHeadPageBytes = size_t{2} * kPageTokens * kHeadDim * 2;
};

__device__ inline const std::byte* resident_part(const KvView& resident, int head, int page, bool keys, int head_dim) {
  const std::byte* packed = resident.head_pages[static_cast<ptrdiff_t>(head) * resident.page_stride + page];
  return keys ? packed : packed + bytes_of(key_pieces(resident.format.key(), head_dim));
}

// What a block has in shared memory: the encoded block, and where that is joined with a packed head page, this and a
// table of the fields of its codes where they are few.
template <int kHeadDim>
struct DecodeMemory {
  static constexpr size_t kBlockBytes =
      (BlockShape<kHeadDim>::kRows * (1 + kRowHalves) * 2 + kResidualUnit - 1) / kResidualUnit * kResidualUnit;
  static constexpr size_t kBehind = 2 * kResidualUnit;  // read by windows that begin in the block
  static constexpr size_t kPackedAt = kBlockBytes + kBehind;
  static constexpr size_t kTableAlignment = 64;  // of the tables: room of a group, so that a code's place is an OR away

  // Exact parts are not brought here.
  __host__ __device__ static constexpr size_t key_bytes(const KvPart& part) {
    return part.exact() ? 0 : key_page_bytes(part, {0, 0, kHeadDim});
  }
  __host__ __device__ static constexpr size_t value_bytes(const KvPart& part) {
    return part.exact() ? 0 : value_page_bytes(part, {0, 0, kHeadDim});
  }
  __host__ __device__ static constexpr size_t table_bytes(const KvPart& part, int groups) {
    return !part.by_token() && part.bits <= 4 ? sizeof(uint32_t) * static_cast<size_t>(groups << part.bits) : 0;
  }
  static constexpr size_t packed_bytes(const KvFormat& format) {
    return key_bytes(format.key()) + value_bytes(format.value());
  }
  // A map of K's outliers, then of V's.
  static constexpr size_t map_bytes(const KvFormat& format) {
    return static_cast<size_t>(outlier_map_bytes(format.key(), kHeadDim) + outlier_map_bytes(format.value(), kHeadDim));
  }
  static constexpr size_t bytes(Form form, const KvFormat& format) {
    switch (form) {
      case Form::lossless:
        return kPackedAt;
      case Form::rotated:
        return kPackedAt + packed_bytes(format) + sizeof(RotatedPart<kHeadDim>);
      case Form::resident:
      case Form::nuq:
        break;
    }
    return kPackedAt + packed_bytes(format) + kTableAlignment + table_bytes(format.key(), kHeadDim) +
           table_bytes(format.value(), kPageTokens) + map_bytes(format);
  }
  // 8-bit keys with 4-bit values, the other way round and all others.
  static constexpr size_t kMostTables =
      kTableAlignment + table_bytes(KvPart(4), kHeadDim) + table_bytes(KvPart(4), kPageTokens);
  static constexpr size_t most_bytes(Form form) {
    return kPackedAt + key_bytes(KvPart(9)) + value_bytes(KvPart(9)) +
           (form == Form::rotated ? sizeof(RotatedPart<kHeadDim>) : kMostTables);
  }
  static_assert(bytes(Form::nuq, {4, 4, KvCode::nuq, false, kMostOutliers}) <= most_bytes(Form::nuq));
};

// All threads of the block; waited for by copies_wait.
__device__ inline void copy_to_shared(std::byte* target, const std::byte* source, size_t bytes) {
  for (size_t at = threadIdx.x * size_t{16}; at < bytes; at += size_t{kThreads} * 16) {
    copy_lane(shared_address(target + at), source + at);
  }
}

// Where a group's fields stand in the table, in groups. What the lanes of a warp ask for at once are the groups 8 c +
// i, c = 0 .. 3: bits 0 and 3 changed places, odd c lie in the other half of the banks.
__device__ inline int table_place(int group) {
  return (group & ~9) | (group & 1) << 3 | (group >> 3 & 1);
}

// The fields of all groups and codes of a part. All threads of the block.
template <int kGroups, typename Part>
__device__ void make_table(const Part& own, const std::byte* part, uint32_t* table) {
  constexpr KvPart kFormat = decltype(own.format)();
  constexpr int kCodes = 1 << kFormat.bits;
  const auto code = threadIdx.x % kCodes;
  for (int group = static_cast<int>(threadIdx.x / kCodes); group < kGroups; group += kThreads / kCodes) {
    table[table_place(group) * kCodes + static_cast<int>(code)] =
        pack_residual_field(kFormat, code, own.affine_group(part, group));
  }
}

// The fields of a lane's codes; of its groups, a multiple of 8 and those behind it.
template <int kBits>
__device__ inline void look_up(const uint32_t* table, int first_group, const uint32_t (&codes)[kLaneValues],
                               uint32_t (&fields)[kLaneValues]) {
  constexpr uint32_t kGroupBytes = 4u << kBits;
  const uint32_t base = shared_address(table) + static_cast<uint32_t>(table_place(first_group)) * kGroupBytes;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const auto behind = static_cast<uint32_t>((i & 6) | (i & 1) << 3) * kGroupBytes;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(fields[i]) : "r"(((codes[i] << 2) | base) + behind));
  }
}

// The rows of K or V.
template <int kHeadDim, bool kKeys, bool kNuq>
__device__ __forceinline__ void decode_part(const BlockReader& block, const KvPart& format, const std::byte* packed,
                                            const std::byte* resident, uint32_t* table, uint32_t* map, uint4* out) {
  constexpr int kRows = BlockShape<kHeadDim>::kKeyRows;  // as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (format.exact()) {
    for (int row = warp; row < kRows; row += kWarps) {
      out[(kFirst + row) * 32 + lane] = reinterpret_cast<const uint4*>(resident)[row * 32 + lane];
    }
    return;
  }
  with_part<kHeadDim, kKeys, kNuq>(format, [&](const auto& own) {
    using Format = std::decay_t<decltype(own.format)>;
    constexpr bool kTable = kTabulated<Format>;
    constexpr bool kOutliers = kApart<Format>;
    if constexpr (kOutliers) {
      map_outliers<kHeadDim, kKeys, kThreads>(packed, own.format, map);
    }
    if constexpr (kTable) {
      make_table<kKeys ? kHeadDim : kPageTokens>(own, packed, table);
      __syncthreads();
    }
    for (int row = warp; row < kRows; row += kWarps) {
      const int block_row = kFirst + row;
      const uint32_t begin =
          block_row == 0 ? BlockShape<kHeadDim>::kRows : block.half(static_cast<uint32_t>(block_row - 1));
      const uint32_t halves = block.half(static_cast<uint32_t>(block_row)) - begin;
      if (halves == kRowHalves) {
        out[block_row * 32 + lane] = read_raw(block, begin, lane);
        continue;
      }
      uint32_t fields[kLaneValues];
      if constexpr (kTable) {
        uint32_t codes[kLaneValues];
        own.read_codes(packed, row, lane, codes);
        constexpr KvPart kFormat = Format();
        look_up<kFormat.bits>(table, own.first_affine_group(row, lane), codes, fields);
      } else {
        if constexpr (kPlane<Format>) {
          constexpr KvPart kFormat = Format();
          // An escape is wider, and so is its row.
          if (halves == (12 - kFormat.bits) * kRowValues / 16) {
            uint32_t codes[kLaneValues];
            uint32_t bases[kLaneValues];
            own.with_codes(packed, row, lane, [&](int i, uint32_t code, const ResidualGroup& group) {
              codes[i] = code;
              bases[i] = group.first;
            });
            out[block_row * 32 + lane] = read_plane_fields<kFormat.bits>(block, begin, lane, codes, bases);
            continue;
          }
        }
        own.with_codes(packed, row, lane, [&](int i, uint32_t code, const ResidualGroup& group) {
          fields[i] = pack_residual_field(own.format, code, group);
        });
      }
      if constexpr (kOutliers) {
        close_fields(outliers_of(map, row, lane), fields);
      }
      out[block_row * 32 + lane] = read_coded(block, begin, halves, fields);
    }
    if constexpr (kOutliers) {
      __syncthreads();
      write_outliers<kHeadDim, kKeys, kThreads>(block, packed, own.format, reinterpret_cast<uint16_t*>(out));
    }
  });
}

// Grid (pages, heads).
template <int kHeadDim, Form kForm>
__global__ void __launch_bounds__(kThreads, kForm == Form::rotated ? 3 : 4) decode_kernel(DecodeArgs args) {
  using Memory = DecodeMemory<kHeadDim>;
  extern __shared__ uint4 memory[];
  auto* const coded = reinterpret_cast<std::byte*>(memory);
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const KvFormat format = args.resident.format;
  // Sizes of parts with outliers take many instructions, which every block of the other forms would wait for.
  __builtin_assume((format.code == KvCode::nuq) == (kForm == Form::nuq));
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  std::byte* const packed_keys = coded + Memory::kPackedAt;
  std::byte* const packed_values = packed_keys + Memory::key_bytes(format.key());
  if constexpr (kForm != Form::lossless) {
    keys = resident_part(args.resident, head, page, true, kHeadDim);
    values = resident_part(args.resident, head, page, false, kHeadDim);
    copy_to_shared(packed_keys, keys, Memory::key_bytes(format.key()));
    copy_to_shared(packed_values, values, Memory::value_bytes(format.value()));
  }
  const uint32_t page_begin = page == 0 ? 0 : args.ends[page - 1];
  const uint32_t units = args.ends[page] - page_begin;
  const std::byte* in = args.in + page_begin * kResidualUnit;
  const auto* block_ends = reinterpret_cast<const uint32_t*>(in);
  const uint32_t begin = head == 0 ? residual_header_units(args.shape) : min(block_ends[head - 1], units);
  const uint32_t end = max(min(block_ends[head], units), begin);
  copy_to_shared(coded, in + begin * kResidualUnit, min((end - begin) * kResidualUnit, Memory::kBlockBytes));
  copies_commit();
  copies_wait<0>();
  __syncthreads();

  const BlockReader block{reinterpret_cast<const uint32_t*>(coded),
                          static_cast<uint32_t>((Memory::kBlockBytes + Memory::kBehind) / 4 - 3)};
  auto* const out =
      reinterpret_cast<uint4*>(args.out + (static_cast<size_t>(page) * gridDim.y + static_cast<size_t>(head)) *
                                              BlockShape<kHeadDim>::kHeadPageBytes);
  if constexpr (kForm == Form::lossless) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int row = static_cast<int>(threadIdx.x) / 32; row < BlockShape<kHeadDim>::kRows; row += kWarps) {
      const uint32_t row_begin = row == 0 ? BlockShape<kHeadDim>::kRows : block.half(static_cast<uint32_t>(row - 1));
      const bool raw = block.half(static_cast<uint32_t>(row)) - row_begin == kRowHalves;
      out[row * 32 + lane] = raw ? read_raw(block, row_begin, lane) : read_lossless(block, row_begin, lane);
    }
  } else if constexpr (kForm == Form::rotated) {
    auto* const shared = reinterpret_cast<RotatedPart<kHeadDim>*>(packed_values + Memory::value_bytes(format.value()));
    decode_rotated<kHeadDim, true>(block, format.key(), packed_keys, shared, out);
    decode_rotated<kHeadDim, false>(block, format.value(), packed_values, shared, out);
  } else {
    const auto behind = reinterpret_cast<uintptr_t>(packed_values + Memory::value_bytes(format.value()));
    auto* const table = reinterpret_cast<uint32_t*>((behind + Memory::kTableAlignment - 1) / Memory::kTableAlignment *
                                                    Memory::kTableAlignment);
    uint32_t* const value_table = table + Memory::table_bytes(format.key(), kHeadDim) / sizeof(uint32_t);
    uint32_t* const key_map = value_table + Memory::table_bytes(format.value(), kPageTokens) / sizeof(uint32_t);
    uint32_t* const value_map = key_map + outlier_map_bytes(format.key(), kHeadDim) / sizeof(uint32_t);
    constexpr bool kNuq = kForm == Form::nuq;
    decode_part<kHeadDim, true, kNuq>(block, format.key(), packed_keys, keys, table, key_map, out);
    decode_part<kHeadDim, false, kNuq>(block, format.value(), packed_values, values, value_table, value_map, out);
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

// The bases of K and V of the block's head page, of rotated formats: all its dynamic shared memory.
template <int kHeadDim>
__device__ RotatedPart<kHeadDim>* rotated_parts() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<RotatedPart<kHeadDim>*>(memory);
}
template <int kHeadDim, Form kForm>
__device__ void make_bases(const EncodeCall& call) {
  if constexpr (kForm == Form::rotated) {
    const int page = call.first + static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const KvFormat format = call.resident.format;
    if (!format.key().exact()) {
      rotated_parts<kHeadDim>()[0].template fill<true>(format.key(),
                                                       resident_part(call.resident, head, page, true, kHeadDim));
    }
    if (!format.value().exact()) {
      rotated_parts<kHeadDim>()[1].template fill<false>(format.value(),
                                                        resident_part(call.resident, head, page, false, kHeadDim));
    }
    __syncthreads();
  }
}
template <int kHeadDim>
__device__ void rotated_fields(bool keys, int part_row, int lane, ResidualField (&fields)[kLaneValues]) {
  float base[kLaneValues];
  float reach[kLaneValues];
  if (keys) {
    rotated_parts<kHeadDim>()[0].template read<true>(part_row, lane, base, reach);
  } else {
    rotated_parts<kHeadDim>()[1].template read<false>(part_row, lane, base, reach);
  }
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    fields[i] = rotated_field(base[i], reach[i]);
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
      const auto read = [&](const auto& own) { own.read_fields(part, part_row, lane, fields); };
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
    map_part<kHeadDim, true, kThreads>(format.key(), part(true), source, maps);
    map_part<kHeadDim, false, kThreads>(format.value(), part(false), source, maps);
  }
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps) {
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
__global__ void __launch_bounds__(kThreads) measure_kernel(EncodeCall call) {
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
__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeCall call) {
  constexpr int kRows = BlockShape<kHeadDim>::kRows;
  __shared__ uint32_t row_halves[kRows];
  __shared__ uint32_t row_words[kWarps][kRowValues / 2];
  __shared__ Maps<kHeadDim, kForm> maps;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = row_words[threadIdx.x / 32];
  make_bases<kHeadDim, kForm>(call);
  const uint32_t units = measure_block<kHeadDim, kForm>(call, maps, row_halves);
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

// run(a value whose type tells the form)
template <Form kForm>
struct FixedForm {
  static constexpr Form kValue = kForm;
};
template <typename Run>
void for_form(Form form, const Run& run) {
  switch (form) {
    case Form::lossless:
      return run(FixedForm<Form::lossless>());
    case Form::resident:
      return run(FixedForm<Form::resident>());
    case Form::nuq:
      return run(FixedForm<Form::nuq>());
    case Form::rotated:
      return run(FixedForm<Form::rotated>());
  }
}

template <typename Kernel>
void allow_shared(Kernel* kernel, size_t bytes, const char* what) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), what);
}

template <int kHeadDim, Form kForm>
void launch_encode(const EncodeCall& call, const dim3& grid, cudaStream_t stream) {
  constexpr size_t kBytes = kForm == Form::rotated ? 2 * sizeof(RotatedPart<kHeadDim>) : 0;
  static const bool allowed = [] {
    allow_shared(measure_kernel<kHeadDim, kForm>, kBytes, "encode");
    allow_shared(encode_kernel<kHeadDim, kForm>, kBytes, "encode");
    return true;
  }();
  (void)allowed;
  measure_kernel<kHeadDim, kForm><<<grid, kThreads, kBytes, stream>>>(call);
  encode_kernel<kHeadDim, kForm><<<grid, kThreads, kBytes, stream>>>(call);
}

template <int kHeadDim, Form kForm>
void launch_decode(const DecodeArgs& args, cudaStream_t stream) {
  using Memory = DecodeMemory<kHeadDim>;
  static const bool allowed = [] {
    allow_shared(decode_kernel<kHeadDim, kForm>, Memory::most_bytes(kForm), "decode");
    return true;
  }();
  (void)allowed;
  const dim3 grid(static_cast<unsigned>(args.count), static_cast<unsigned>(args.shape.kv_heads));
  const size_t bytes = Memory::bytes(kForm, args.resident.format);
  decode_kernel<kHeadDim, kForm><<<grid, kThreads, bytes, stream>>>(args);
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
             [&](auto form) { launch_encode<decltype(dim)::kValue, decltype(form)::kValue>(call, grid, stream); });
  });
  check_cuda(cudaGetLastError(), "encode");
}

void decode(const DecodeArgs& args, cudaStream_t stream) {
  if (args.count == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    for_form(form_of(args.code, args.resident.format),
             [&](auto form) { launch_decode<decltype(dim)::kValue, decltype(form)::kValue>(args, stream); });
  });
  check_cuda(cudaGetLastError(), "decode");
}

}  // namespace vericache::cuda
