// Pages of full KV from the form in which they cross the wire (residual_code.h), and their proof on the way.
#include <type_traits>

#include "backend/cuda/block_copies.cuh"
#include "backend/cuda/head_page_out.cuh"
#include "backend/cuda/residual_forms.cuh"
#include "backend/cuda/residual_outliers.cuh"
#include "backend/cuda/rotated_residual.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = kResidualThreads;
constexpr int kWarps = kResidualWarps;
static_assert(kWarps == kOctets);

// What a block has in shared memory: the encoded block, and where that is joined with a packed head page, this, tables
// of the fields of its codes where they are few, and maps of its outliers, of K and then of V. In bytes from the first;
// exact parts are not brought here.
struct DecodePlan {
  uint32_t key_bytes = 0;
  uint32_t value_bytes = 0;
  uint32_t value_offset = 0;  // of V in a resident head page
  uint32_t values_at = 0;     // K is at kPackedAt
  uint32_t tables_at = 0;     // of a rotated format its RotatedGroups
  uint32_t value_table_at = 0;
  uint32_t maps_at = 0;
  uint32_t value_map_at = 0;
  uint32_t bytes = 0;
};

template <int kHeadDim>
struct DecodeMemory {
  static constexpr uint32_t kBlockBytes =
      (BlockShape<kHeadDim>::kRows * (1 + kRowHalves) * 2 + kResidualUnit - 1) / kResidualUnit * kResidualUnit;
  static constexpr uint32_t kBlockAt = BlockReader::kBefore;
  static constexpr uint32_t kPackedAt = kBlockAt + kBlockBytes + BlockReader::kBehind;
  static constexpr uint32_t kTableAlignment = 64;  // room of a group, so that a code's place is an OR away

  static constexpr uint32_t table_bytes(const KvPart& part, int groups) {
    return part.by_token() || part.bits > 4 ? 0 : static_cast<uint32_t>(sizeof(uint32_t)) * (groups << part.bits);
  }
  static constexpr DecodePlan plan(Form form, const KvFormat& format) {
    DecodePlan plan;
    plan.bytes = kPackedAt;
    if (form == Form::lossless) {
      return plan;
    }
    const KvPart key = format.key();
    const KvPart value = format.value();
    const KvShape shape{0, 0, kHeadDim};
    plan.key_bytes = key.exact() ? 0 : static_cast<uint32_t>(key_page_bytes(key, shape));
    plan.value_bytes = value.exact() ? 0 : static_cast<uint32_t>(value_page_bytes(value, shape));
    plan.value_offset = static_cast<uint32_t>(bytes_of(key_pieces(key, kHeadDim)));
    plan.values_at = kPackedAt + plan.key_bytes;
    plan.tables_at = (plan.values_at + plan.value_bytes + kTableAlignment - 1) / kTableAlignment * kTableAlignment;
    if (form == Form::rotated) {
      // The bases of V are written when the packed K and V have been read, and lie where they lay.
      constexpr auto kBases = static_cast<uint32_t>(sizeof(RotatedBases<kHeadDim>));
      const uint32_t packed = plan.key_bytes + plan.value_bytes;
      plan.tables_at = kPackedAt + (packed > kBases ? packed : kBases);
      plan.bytes = plan.tables_at + static_cast<uint32_t>(sizeof(RotatedGroups<kHeadDim>));
      return plan;
    }
    plan.value_table_at = plan.tables_at + table_bytes(key, kHeadDim);
    plan.maps_at = plan.value_table_at + table_bytes(value, kPageTokens);
    plan.value_map_at = plan.maps_at + static_cast<uint32_t>(outlier_map_bytes(key, kHeadDim));
    plan.bytes = plan.value_map_at + static_cast<uint32_t>(outlier_map_bytes(value, kHeadDim));
    return plan;
  }
};

// Where a group's fields stand in the table, in groups. What the lanes of a warp ask for at once are the groups 8 c +
// i, c = 0 .. 3: bits 0 and 3 changed places, odd c lie in the other half of the banks.
__device__ constexpr int table_place(int group) {
  return (group & ~9) | (group & 1) << 3 | (group >> 3 & 1);
}

// The fields of all groups and codes of a part. All threads of the block, each for one code.
template <int kGroups, typename Part>
__device__ void make_table(const Part& own, const std::byte* part, uint32_t* table) {
  constexpr KvPart kFormat = decltype(own.format)();
  constexpr unsigned kCodes = 1u << kFormat.bits;
  constexpr int kStep = kThreads / kCodes;
  static_assert(table_place(kStep) == kStep, "the groups of a thread change places alike");
  const unsigned code = threadIdx.x % kCodes;
  const auto first = static_cast<int>(threadIdx.x / kCodes);
  uint32_t* const fields = table + static_cast<unsigned>(table_place(first)) * kCodes + code;
  const auto interval = [&](int group) { return interval_of(kFormat, code, own.affine_group(part, group)); };
  const auto put = [&](int step, uint32_t field) {
    if (kGroups % kStep == 0 || step + first < kGroups) {
      fields[step * static_cast<int>(kCodes)] = field;
    }
  };
#pragma unroll
  for (int step = 0; step < kGroups; step += 2 * kStep) {
    // Two groups at once; the other of the last one is itself, where there is none.
    const int next = step + kStep < kGroups ? step + kStep : step;
    uint32_t field;
    uint32_t other;
    pack_intervals(interval(min(step + first, kGroups - 1)), interval(min(next + first, kGroups - 1)), field, other);
    put(step, field);
    if (next != step) {
      put(next, other);
    }
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

// The rows of K or V that a warp takes, kTogether at a time: run(places). They are those of lane_place(), in terms that
// the compiler folds.
template <int kHeadDim, bool kKeys>
struct WarpRows {
  static constexpr int kTogether = kKeys && kHeadDim % 64 != 0 ? 1 : 2;

  template <typename Run>
  __device__ __forceinline__ static void each(int warp, int lane, const Run& run) {
    LanePlace places[kTogether];
    if constexpr (kKeys) {
#pragma unroll 1
      for (int first = 0; first < kHeadDim / 32; first += kTogether) {
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          places[r] = {warp + 8 * (first + r), 8 * warp + lane / 4, 32 * (first + r) + 8 * (lane % 4)};
        }
        run(places);
      }
    } else {
#pragma unroll 1
      for (int octet = warp; octet < kHeadDim / 8; octet += kWarps) {
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          places[r] = {octet + r * (kHeadDim / 8), 32 * r + 8 * (lane % 4), 8 * octet + lane / 4};
        }
        run(places);
      }
    }
  }
};

// What the affine codes of a lane stand for, where they have no table: as interval_of().
template <int kHeadDim, bool kKeys, int kBits>
__device__ __forceinline__ void affine_intervals(const std::byte* part, const LanePlace& at,
                                                 Interval (&intervals)[kLaneValues]) {
  constexpr int kGroups = kKeys ? kHeadDim : kPageTokens;
  constexpr float kMiddle = 1 << (kBits - 1);
  uint32_t steps[kLanePairs];
  read_steps<kHeadDim, kKeys, kBits>(part, at, steps);
  const auto* affine = reinterpret_cast<const uint16_t*>(part) + (kKeys ? at.dim : at.token);
  uint32_t scales[kLanePairs];
  uint32_t minima[kLanePairs];
  read16(reinterpret_cast<const std::byte*>(affine), scales);
  read16(reinterpret_cast<const std::byte*>(affine + kGroups), minima);
  const auto interval = [](float step, float scale, float minimum) {
    return Interval{fmaf(step + (kMiddle - 0.5f), scale, minimum), fmaf(step + (kMiddle + 0.5f), scale, minimum)};
  };
#pragma unroll
  for (int i = 0; i < kLanePairs; ++i) {
    intervals[2 * i] = interval(first_of_pair(steps[i]), first_of_pair(scales[i]), first_of_pair(minima[i]));
    intervals[2 * i + 1] = interval(second_of_pair(steps[i]), second_of_pair(scales[i]), second_of_pair(minima[i]));
  }
}

// What a block knows of the K or V part that it joins its rows with.
struct PartMemory {
  KvPart format;
  const std::byte* packed;    // in shared memory
  const std::byte* resident;  // where it came from
  uint32_t* table;
  uint32_t* map;
};

template <int kHeadDim, bool kKeys, bool kNuq>
__device__ __forceinline__ void decode_part(const BlockReader& block, const PartMemory& part,
                                            HeadPageOut<kHeadDim>& out) {
  constexpr int kRows = BlockShape<kHeadDim>::kKeyRows;  // as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  constexpr int kTogether = WarpRows<kHeadDim, kKeys>::kTogether;
  const auto warp = static_cast<int>(threadIdx.x / 32 % kWarps);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  if (part.format.exact()) {
    for (int row = warp; row < kRows; row += kWarps) {
      out.put(kFirst + row, lane, reinterpret_cast<const uint4*>(part.resident)[row * 32 + lane]);
    }
    return;
  }
  with_part<kHeadDim, kKeys, kNuq>(part.format, [&](const auto& own) {
    using Format = std::decay_t<decltype(own.format)>;
    constexpr bool kTable = kTabulated<Format>;
    constexpr bool kOutliers = kApart<Format>;
    if constexpr (kOutliers) {
      map_outliers<kHeadDim, kKeys, kThreads>(part.packed, own.format, part.map);
    }
    if constexpr (kTable) {
      make_table<kKeys ? kHeadDim : kPageTokens>(own, part.packed, part.table);
      __syncthreads();
    }
    WarpRows<kHeadDim, kKeys>::each(warp, lane, [&](const LanePlace(&places)[kTogether]) {
      RowSpan rows[kTogether];
      uint32_t fields[kTogether][kLaneValues];
      uint4 values[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        rows[r] = block.row(kFirst + places[r].row);
      }
      bool read = false;
      if constexpr (kPlane<Format>) {
        constexpr KvPart kFormat = Format();
        read = true;
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          // An escape is wider, and so is its row.
          read = read && rows[r].halves == (12 - kFormat.bits) * kRowValues / 16;
        }
#pragma unroll
        for (int r = 0; r < kTogether && read; ++r) {
          uint32_t codes[kLaneValues];
          uint32_t bases[kLaneValues];
          own.with_codes(part.packed, places[r], [&](int i, uint32_t code, const ResidualGroup& group) {
            codes[i] = code;
            bases[i] = group.first;
          });
          values[r] = read_plane_fields<kFormat.bits>(block, rows[r].begin, lane, codes, bases);
        }
      }
      if (!read) {
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          if constexpr (kTable) {
            uint32_t codes[kLaneValues];
            own.read_codes(part.packed, places[r], codes);
            constexpr KvPart kFormat = Format();
            look_up<kFormat.bits>(part.table, own.first_affine_group(places[r]), codes, fields[r]);
          } else {
            Interval intervals[kLaneValues];
            constexpr KvPart kFormat = Format();
            if constexpr (kFormat.code == KvCode::affine) {
              affine_intervals<kHeadDim, kKeys, kFormat.bits>(part.packed, places[r], intervals);
            } else {
              own.with_codes(part.packed, places[r], [&](int i, uint32_t code, const ResidualGroup& group) {
                if constexpr (kIntervals<Format>) {
                  intervals[i] = interval_of(own.format, code, group);
                } else {
                  fields[r][i] = pack_field(residual_field(own.format, code, group));
                }
              });
            }
#pragma unroll
            for (int i = 0; kIntervals<Format> && i < kLaneValues; i += 2) {
              pack_intervals(intervals[i], intervals[i + 1], fields[r][i], fields[r][i + 1]);
            }
          }
          if constexpr (kOutliers) {
            close_fields(outliers_of(part.map, places[r].row, lane), fields[r]);
          }
        }
        read_coded<OpenEscapes>(block, rows, fields, values);
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        out.put(kFirst + places[r].row, lane, rows[r].raw() ? read_raw(block, rows[r].begin, lane) : values[r]);
      }
    });
    if constexpr (kOutliers) {
      __syncthreads();
      write_outliers<kHeadDim, kKeys, kThreads>(block, part.packed, own.format, out.values());
    }
  });
}

// Grid (pages, heads). proofs: null where nothing is proved.
template <int kHeadDim, Form kForm>
__global__ void __launch_bounds__(kThreads, 4) decode_kernel(DecodeArgs args, DecodePlan plan, PageProof* proofs) {
  using Memory = DecodeMemory<kHeadDim>;
  extern __shared__ __align__(128) std::byte memory[];
  std::byte* const coded = memory + Memory::kBlockAt;
  const int page = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const KvFormat format = args.resident.format;
  __shared__ uint64_t barriers[BlockCopies<kThreads>::kMost];
  BlockCopies<kThreads> copies(barriers);
  const std::byte* packed = nullptr;
  std::byte* const keys = memory + Memory::kPackedAt;
  std::byte* const values = memory + plan.values_at;
  if constexpr (kForm != Form::lossless) {
    packed = resident_page(args.resident, head, page);
    copies.start<0>(keys, packed, plan.key_bytes);
    copies.start<1>(values, packed + plan.value_offset, plan.value_bytes);
  }
  const uint32_t page_begin = page == 0 ? 0 : args.ends[page - 1];
  const uint32_t units = args.ends[page] - page_begin;
  const std::byte* in = args.in + page_begin * kResidualUnit;
  const auto* block_ends = reinterpret_cast<const uint32_t*>(in);
  const uint32_t begin = head == 0 ? residual_header_units(args.shape) : min(block_ends[head - 1], units);
  const uint32_t end = max(min(block_ends[head], units), begin);
  copies.start<2>(coded, in + begin * kResidualUnit,
                  min((end - begin) * static_cast<uint32_t>(kResidualUnit), Memory::kBlockBytes));
  if (threadIdx.x == 0) {
    BlockReader::begin(coded, BlockShape<kHeadDim>::kRows);
  }
  if constexpr (kForm == Form::rotated) {
    reinterpret_cast<RotatedGroups<kHeadDim>*>(memory + plan.tables_at)
        ->fill(format, packed, packed + plan.value_offset);
  }
  copies.finish();

  const BlockReader block{coded, Memory::kBlockBytes / 2};
  HeadPageOut<kHeadDim> out(args, page, head);
  if constexpr (kForm == Form::lossless) {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    for (auto row = static_cast<int>(threadIdx.x / 32); row < BlockShape<kHeadDim>::kRows; row += kWarps) {
      out.put(row, lane, read_alone(block, block.row(row), lane));
    }
  } else if constexpr (kForm == Form::rotated) {
    const auto& groups = *reinterpret_cast<const RotatedGroups<kHeadDim>*>(memory + plan.tables_at);
    auto& bases = *reinterpret_cast<RotatedBases<kHeadDim>*>(keys);
    const auto put = [&](int row, int lane, const uint4& vector) { out.put(row, lane, vector); };
    decode_rotated<kHeadDim, true>(block, format.key(), keys, groups, bases, put);
    decode_rotated<kHeadDim, false>(block, format.value(), values, groups, bases, put);
  } else {
    const auto words = [&](uint32_t at) { return reinterpret_cast<uint32_t*>(memory + at); };
    constexpr bool kNuq = kForm == Form::nuq;
    decode_part<kHeadDim, true, kNuq>(block, {format.key(), keys, packed, words(plan.tables_at), words(plan.maps_at)},
                                      out);
    decode_part<kHeadDim, false, kNuq>(
        block,
        {format.value(), values, packed + plan.value_offset, words(plan.value_table_at), words(plan.value_map_at)},
        out);
  }
  if (out.proves()) {
    prove_block<kHeadDim>(args, page, out, proofs);
  }
}

template <int kHeadDim, Form kForm>
void launch_decode(const DecodeArgs& args, PageProof* proofs, cudaStream_t stream) {
  static const uint32_t most = [] {
    int device = 0;
    int bytes = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "decode");
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, decode_kernel<kHeadDim, kForm>), "decode");
    bytes -= static_cast<int>(attributes.sharedSizeBytes);
    allow_shared(decode_kernel<kHeadDim, kForm>, static_cast<size_t>(bytes), "decode");
    return static_cast<uint32_t>(bytes);
  }();
  const dim3 grid(static_cast<unsigned>(args.count), static_cast<unsigned>(args.shape.kv_heads));
  const DecodePlan plan = DecodeMemory<kHeadDim>::plan(kForm, args.resident.format);
  check(plan.bytes <= most, "a block that is decoded fits into shared memory");
  decode_kernel<kHeadDim, kForm><<<grid, kThreads, plan.bytes, stream>>>(args, plan, proofs);
}

}  // namespace

void decode(const DecodeArgs& args, PageProof* proofs, cudaStream_t stream) {
  if (args.count == 0) {
    return;
  }
  DecodeArgs call = args;
  const Form form = form_of(args.code, args.resident.format);
  // Outliers are written over what rows gave: such pages are proved when they are whole.
  const bool proved_behind = form == Form::nuq && args.checksums != nullptr;
  if (proved_behind) {
    call.checksums = nullptr;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    for_form(form,
             [&](auto which) { launch_decode<decltype(dim)::kValue, decltype(which)::value>(call, proofs, stream); });
  });
  check_cuda(cudaGetLastError(), "decode");
  if (proved_behind) {
    const size_t bytes = page_bytes(args.shape);
    prove({.first = args.out, .stride = bytes, .bytes = bytes, .count = args.count}, args.checksums, args.mismatches,
          proofs->counters, stream);
  }
}

}  // namespace vericache::cuda
