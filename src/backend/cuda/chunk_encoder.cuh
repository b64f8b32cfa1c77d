// From a bf16 head page in shared memory to codes in chunks (chunk_layout.h), or to what page_encoder.cuh makes.
// Device code; a block of head_dim threads: a warp makes the chunk of 32 channels of K and of 32 dims of V.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/key_rounding.cuh"
#include "backend/cuda/nuq_encoder.cuh"
#include "backend/cuda/page_encoder.cuh"
#include "backend/cuda/rotation.cuh"

namespace vericache::cuda {

// The 16 bits of value i of eight.
__device__ inline uint32_t value_of(const uint4& values, int i) {
  const uint32_t pair = i / 2 == 0 ? values.x : i / 2 == 1 ? values.y : i / 2 == 2 ? values.z : values.w;
  return i % 2 == 0 ? pair & 0xffffu : pair >> 16;
}

__device__ inline uint32_t int8_code(uint32_t value, float inverse_scale) {
  const uint32_t magnitude = value & kMagnitudeBits;
  if (magnitude >> 7 == kSpecialExponent) {
    return 0;
  }
  const int code = __float2int_rn(fminf(__uint_as_float(magnitude << 16) * inverse_scale, 127.0f));
  return static_cast<uint32_t>((value & 0x8000u) != 0 ? -code : code) & 255u;
}

template <int kHeadDim>
struct ChunkEncoder {
  SharedPage<kHeadDim>& page;
  NuqMemory<kHeadDim>& nuq;
  int held;
  KvPart part;
  int warp = static_cast<int>(threadIdx.x) / 32;
  int lane = static_cast<int>(threadIdx.x) % 32;

  // The largest magnitudes of every token over the dims 32 warp .., as bits, into value_ranges.
  __device__ void measure_keys() {
    for (int first = 0; first < kPageTokens; first += 8) {  // 4 lanes share a token
      const int token = first + lane / 4;
      const uint4 values = page.keys[warp][token][lane % 4];
      uint32_t top = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        top = max(top, ranked_magnitude(value_of(values, i), part.code));
      }
      top = max(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = max(top, __shfl_xor_sync(kAllLanes, top, 2));
      if (lane % 4 == 0) {
        page.value_ranges[warp][token].x = __uint_as_float(top);
      }
    }
  }
  __device__ void measure_values() {
    const int pair = lane % 16;
    for (int half = 0; half < 2; ++half) {  // 16 lanes have two tokens each, of every other dim
      const auto* words = reinterpret_cast<const uint32_t*>(page.values[half]);
      uint32_t tops[2] = {0, 0};
      for (int dim = 32 * warp + lane / 16; dim < 32 * warp + 32; dim += 2) {
        const uint32_t word = words[dim * 16 + pair];
        tops[0] = max(tops[0], ranked_magnitude(word & 0xffffu, part.code));
        tops[1] = max(tops[1], ranked_magnitude(word >> 16, part.code));
      }
      tops[0] = max(tops[0], __shfl_xor_sync(kAllLanes, tops[0], 16));
      tops[1] = max(tops[1], __shfl_xor_sync(kAllLanes, tops[1], 16));
      page.value_ranges[warp][32 * half + 2 * pair + lane / 16].x = __uint_as_float(lane < 16 ? tops[0] : tops[1]);
    }
  }

  // The whole block; the measures of all warps are done. What codes are made from goes to value_codes: the base, or the
  // inverse of the scale.
  __device__ void fit_tokens(std::byte* out) {
    for (int token = static_cast<int>(threadIdx.x); token < kPageTokens; token += kHeadDim) {
      uint32_t top = 0;
      for (int i = 0; token < held && i < kHeadDim / 32; ++i) {
        top = max(top, __float_as_uint(page.value_ranges[i][token].x));
      }
      if (part.code == KvCode::int8) {
        const uint32_t scale = int8_scale(top);
        reinterpret_cast<uint16_t*>(out)[token] = static_cast<uint16_t>(scale);
        page.value_codes[token].x = scale == 0 ? 0.0f : 1.0f / __uint_as_float(scale << 16);
      } else {
        out[token] = static_cast<std::byte>(top >> 7);
        page.value_codes[token].x = __uint_as_float(top >> 7);
      }
    }
  }

  // affine: of the value's channel (K) or token (V). token_code: what fit_tokens left for its token.
  __device__ uint32_t code_of(uint32_t value, const float2& affine, float token_code) const {
    switch (part.code) {
      case KvCode::affine:
        return encode(__uint_as_float(value << 16), affine, static_cast<float>((1 << part.bits) - 1));
      case KvCode::int8:
        return int8_code(value, token_code);
      default:
        return plane_code(value, part, __float_as_uint(token_code));
    }
  }

  template <bool kKeys>
  __device__ RunWords make_run(const Run8& run) const {
    const int g = lane / 4;
    const int c = lane % 4;
    const int token = 32 * run.r + score_token(2 * run.x + run.row, g);  // of K
    const int dim = 32 * warp + 16 * run.r + 8 * run.row + g;            // of V
    const uint4 values = kKeys ? page.keys[warp][token][c] : page.values[run.x][dim][c];
    const int first = kKeys ? 32 * warp + 8 * c : 32 * run.x + 8 * c;
    const NuqPartEncoder<kHeadDim, kKeys> levels{page, nuq, held, part};
    uint32_t code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int of = kKeys ? token : first + i;
      const float2 affine = part.by_token() ? float2{}
                            : kKeys         ? page.key_codes[first + i]
                                            : page.value_codes[first + i];
      code[i] = of >= held                 ? 0
                : part.code == KvCode::nuq ? levels.code(kKeys ? first + i : dim, of)
                                           : code_of(value_of(values, i), affine, page.value_codes[of].x);
    }
    return pack_run(code, part, run);
  }

  // Affine codes of 3 bits: the four runs of r share three words.
  template <bool kKeys>
  __device__ void write_threes(std::byte* chunk) const {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      uint32_t words[3] = {};
#pragma unroll 1
      for (int run = 0; run < 4; ++run) {
        const RunWords own = make_run<kKeys>({warp, r, run / 2, run % 2, lane});
        for (int i = 0; i < 3; ++i) {
          words[i] |= own.three[i];
        }
      }
      for (int i = 0; i < 3; ++i) {
        *reinterpret_cast<uint32_t*>(chunk + three_offset({warp, r, 0, 0, lane}, i)) = words[i];
      }
    }
  }

  // A lane writes every word of its own: of a plane of 2 bits two runs share one, of 1 bit four.
  template <bool kKeys>
  __device__ void write(std::byte* codes_at) const {
    std::byte* chunk = codes_at + warp * chunk_bytes(part.bits);
    if (in_threes(part)) {
      write_threes<kKeys>(chunk);
      return;
    }
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      uint32_t one = 0;
#pragma unroll 1
      for (int x = 0; x < 2; ++x) {
        uint32_t two = 0;
#pragma unroll 1
        for (int row = 0; row < 2; ++row) {
          const Run8 run{warp, r, x, row, lane};
          const RunWords words = make_run<kKeys>(run);
          two |= words.two;
          one |= words.one;
          if ((part.bits & 8) != 0) {
            *reinterpret_cast<uint2*>(chunk + run_offset(run, part.bits, 8)) = make_uint2(words.wide[0], words.wide[1]);
          }
          if ((part.bits & 4) != 0) {
            *reinterpret_cast<uint32_t*>(chunk + run_offset(run, part.bits, 4)) = words.four;
          }
        }
        if ((part.bits & 2) != 0) {
          *reinterpret_cast<uint32_t*>(chunk + run_offset({warp, r, x, 0, lane}, part.bits, 2)) = two;
        }
      }
      if ((part.bits & 1) != 0) {
        *reinterpret_cast<uint32_t*>(chunk + run_offset({warp, r, 0, 0, lane}, part.bits, 1)) = one;
      }
    }
  }
};

// K or V of the page, by the whole block; what the part before it left in shared memory is still being read.
template <int kHeadDim, bool kKeys>
__device__ void encode_chunks(SharedPage<kHeadDim>& page, NuqMemory<kHeadDim>& nuq, int held, const KvPart& part,
                              const bf16* rounding, std::byte* out) {
  ChunkEncoder<kHeadDim> chunks{page, nuq, held, part};
  Encoder<kHeadDim> affine{page, held};
  if (part.by_token()) {
    if (kKeys) {
      chunks.measure_keys();
    } else {
      chunks.measure_values();
    }
    __syncthreads();
    chunks.fit_tokens(out);
    __syncthreads();
  } else if (part.code == KvCode::nuq) {
    NuqPartEncoder<kHeadDim, kKeys>{page, nuq, held, part}.fit_part(out);
  } else if (kKeys) {
    affine.fit_keys(part.bits, out);
    round_keys_by<kHeadDim>(page, part.bits, rounding, out);
  } else {
    affine.measure_values();
    __syncthreads();
    affine.fit_values(part.bits, out);
    __syncthreads();
  }
  chunks.template write<kKeys>(out + group_bytes(part, kHeadDim, kKeys ? kHeadDim : kPageTokens));
}

// K or V of the page in shared memory, rotated where the format says so. All threads of the block; rounding: of the
// head (round_keys), or null. Keys come after values: these may be lost.
template <int kHeadDim>
__device__ void encode_values(SharedPage<kHeadDim>& page, NuqMemory<kHeadDim>& nuq, int held, const KvPart& part,
                              std::byte* out) {
  Encoder<kHeadDim> encoder{page, held};
  if (part.exact()) {
    copy_part<kHeadDim>(&page.values[0][0][0], reinterpret_cast<uint4*>(out));
  } else if (chunked(part)) {
    encode_chunks<kHeadDim, false>(page, nuq, held, part, nullptr, out);
  } else {
    encoder.measure_values();
    __syncthreads();
    encoder.fit_values(part.bits, out);
    __syncthreads();
    encoder.encode_values(part.bits, out + kPageTokens * 4);
  }
}
template <int kHeadDim>
__device__ void encode_keys(SharedPage<kHeadDim>& page, NuqMemory<kHeadDim>& nuq, int held, const KvPart& part,
                            const bf16* rounding, std::byte* out) {
  Encoder<kHeadDim> encoder{page, held};
  if (part.exact()) {
    copy_part<kHeadDim>(&page.keys[0][0][0], reinterpret_cast<uint4*>(out));
  } else if (chunked(part)) {
    encode_chunks<kHeadDim, true>(page, nuq, held, part, rounding, out);
  } else {
    encoder.fit_keys(part.bits, out);
    round_keys_by<kHeadDim>(page, part.bits, rounding, out);
    encoder.encode_keys(part.bits, out + kHeadDim * 4);
  }
}

// The page in shared memory, of which every thread of the block has written its share, in `format` to out.
template <int kHeadDim>
__device__ void encode_page(SharedPage<kHeadDim>& page, int held, KvFormat format, const bf16* rounding,
                            std::byte* out) {
  __shared__ NuqMemory<kHeadDim> nuq;
  std::byte* values = out + bytes_of(key_pieces(format.key(), kHeadDim));
  __syncthreads();
  if (format.choice.bounded) {
    Encoder<kHeadDim>{page, held}.bound_keys(values + bytes_of(value_pieces(format.value(), kHeadDim)));
  }
  if (format.rotated) {
    __syncthreads();  // bounds are those of the keys before
    rotate_page<kHeadDim>(reinterpret_cast<uint16_t*>(page.keys), reinterpret_cast<uint16_t*>(page.values));
    __syncthreads();
  }
  encode_values(page, nuq, held, format.value(), values);
  encode_keys(page, nuq, held, format.key(), format.ldlq() ? rounding : nullptr, out);
}

}  // namespace vericache::cuda
