// DraftWarp: the queries of one warp of draft attention, the products of one page with them, the state of their
// softmax. Device code; all lanes of the one warp that owns it call together.
#pragma once

#include "backend/cuda/chunk_math.cuh"
#include "backend/cuda/outlier_steps.cuh"
#include "backend/cuda/page_ring.cuh"
#include "backend/cuda/plane_steps.cuh"
#include "backend/cuda/rotation.cuh"

namespace vericache::cuda {

constexpr int kTileHeads = 8;  // columns of a tensor-core step

// One warp: 8 query heads as the columns of every step, tokens (scores) or dims (sums) as its rows. Lane 4 g + c.
// kChunked: K or V may lie in chunks (chunk_layout.h).
template <int kHeadDim, bool kChunked>
class DraftWarp {
 public:
  static constexpr int kGroups = kHeadDim / 32;
  static constexpr int kLeastStage = kChunked ? 4096 + 2 * kPageTokens : 4096;
  static constexpr int kStageBytes = kHeadDim * 36 > kLeastStage ? kHeadDim * 36 : kLeastStage;
  static_assert(bytes_of(Pieces{1, plane_bytes(4, kHeadDim), kHeadDim * 4}) <= kStageBytes &&
                bytes_of(Pieces{1, plane_bytes(4, kHeadDim), kPageTokens * 4}) <= kStageBytes);
  // The first piece of V, what precedes it and the room of add_outliers() share a stage.
  static constexpr int first_bytes(const Pieces& pieces) { return pieces.bytes + pieces.group_bytes; }
  static_assert(!kChunked ||
                (first_bytes(key_pieces(KvPart(4, KvCode::nuq, kMostOutliers), kHeadDim)) <= kStageBytes &&
                 first_bytes(value_pieces(KvPart(4, KvCode::nuq, kMostOutliers), kHeadDim)) + kWeightBytes <=
                     kStageBytes));
  using Ring = PageRing<4, kStageBytes>;
  static constexpr int kRowFloats = kHeadDim + 4;  // of a head in store(): lanes write to 32 banks
  static constexpr int kStoredFloats = kTileHeads * (kRowFloats + 2);

  __device__ DraftWarp() : lane_(static_cast<int>(threadIdx.x) % 32), g_(lane_ / 4), c_(lane_ % 4) {}

  // q: (heads of this tile, head_dim). Column g is head g, zero where there is none. rotated: for pages that are.
  __device__ void load_queries(const bf16* q, int heads, bool rotated) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q_[group][i] = 0;
      }
      if (g_ < heads) {
        read16(reinterpret_cast<const std::byte*>(q + g_ * kHeadDim + 32 * group + 8 * c_), q_[group]);
      }
    }
    if (rotated) {
      rotate_queries<kHeadDim>(q_);
    }
    own_q_ = g_ < heads ? reinterpret_cast<const uint16_t*>(q) + g_ * kHeadDim : nullptr;
  }

  // The next page of the ring, of which `visible` tokens count.
  __device__ __forceinline__ void add_page(Ring& ring, const KvPart& keys, const KvPart& values, int visible,
                                           float scale_log2) {
    float scores[4][4] = {};
    if (keys.bits == 16) {
      score_exact(ring, scores);
    } else if (kChunked && chunked(keys)) {
      for_reader(keys, [&]<typename Reader>() { score_chunks<Reader>(ring, keys, scores); });
    } else {
      score_packed(ring, keys.bits, scores);
    }
    uint32_t weights[8];
    weigh(scores, visible, scale_log2, weights);
    if (values.bits == 16) {
      add_exact(ring, weights);
    } else if (kChunked && chunked(values)) {
      for_reader(values, [&]<typename Reader>() { add_chunks<Reader>(ring, values, weights); });
    } else {
      add_packed(ring, values.bits, weights);
    }
  }

  // (8 heads, kRowFloats) weighted sums, then 8 maxima, then 8 sums of weights.
  __device__ void store(float* out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int reach = 4; reach < 32; reach *= 2) {
        sum_[i] += __shfl_xor_sync(kAllLanes, sum_[i], reach);
      }
      if (g_ == 0) {
        out[kTileHeads * kRowFloats + 2 * c_ + i] = top_[i];
        out[kTileHeads * (kRowFloats + 1) + 2 * c_ + i] = sum_[i];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kHeadDim / 16; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[(2 * c_ + i % 2) * kRowFloats + 16 * tile + 8 * (i / 2) + g_] =
            out_[tile][i] + by_middle_[i] + (by_affine_[i % 2] + by_affine_[2 + i % 2]);
      }
    }
  }

 private:
  // scores (tile of 16 tokens): row g of tile 2 u + j is the token 32 u + score_token(2 j, g), row g + 8 that of
  // 2 j + 1.
  __device__ void score_exact(Ring& ring, float (&scores)[4][4]) {
    const int mine = (g_ / 2 * 8 + g_ % 2) * 64 + c_ * 16;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const std::byte* keys = ring.wait() + mine;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const int token = 32 * (tile / 2) + 4 * (tile % 2);
        const uint4 low = read16(keys + token * 64);
        const uint4 high = read16(keys + (token + 2) * 64);
        tensor_step(scores[tile], low.x, high.x, low.y, high.y, q_[group][0], q_[group][1]);
        tensor_step(scores[tile], low.z, high.z, low.w, high.w, q_[group][2], q_[group][3]);
      }
      ring.release();
    }
  }

  // q k = sum q (minimum + scale code): the scales go into q, the minima are a product of their own.
  __device__ void score_packed(Ring& ring, int bits, float (&scores)[4][4]) {
    const std::byte* keys = ring.wait();
    uint32_t scaled[kGroups][4];
    float by_middle[4] = {};
    float by_affine[4] = {};
    if (bits == 2) {
      scale_queries<true>(keys, middle_of(bits), scaled, by_middle, by_affine);
    } else {
      scale_queries<false>(keys, middle_of(bits), scaled, by_middle, by_affine);
    }
    keys += kHeadDim * 4;
    if (bits == 2) {
      score_plane2(keys, lane_, scaled, scores);
    } else {
      if (bits == 8) {
        score_plane4(keys, kHighExponent, lane_, scaled, scores);
        ring.release();
        keys = ring.wait();
      }
      score_plane4(keys, kLowExponent, lane_, scaled, scores);
    }
    ring.release();
    add_to_all(by_middle, by_affine, scores);
  }

  // The queries times the scales of the channels; affine: the scales, then the minima.
  template <bool kTwoBits>
  __device__ void scale_queries(const std::byte* affine, const Middle& middle, uint32_t (&scaled)[kGroups][4],
                                float (&by_middle)[4], float (&by_affine)[4]) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const std::byte* of_lane = affine + (32 * group + 8 * c_) * 2;
      uint32_t scale[4];
      uint32_t minimum[4];
      read16(of_lane, scale);
      read16(of_lane + kHeadDim * 2, minimum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[group][i] = multiply_pairs(q_[group][i], scale[i]);
      }
      correct<kTwoBits>(middle, scale, minimum, scaled[group], q_[group], by_middle, by_affine);
    }
  }

  __device__ static void add_to_all(const float (&by_middle)[4], const float (&by_affine)[4], float (&scores)[4][4]) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[tile][i] += by_middle[i] + (by_affine[i % 2] + by_affine[2 + i % 2]);
      }
    }
  }

  // The part, of whose bits and code the compiler knows.
  template <typename Reader>
  __device__ static KvPart of_reader(const KvPart& part) {
    return KvPart(Reader::kCodeBits, Reader::kCode, part.outliers);
  }

  // What a token is multiplied by comes after the product: rows are tokens.
  template <typename Reader>
  __device__ void score_chunks(Ring& ring, const KvPart& part, float (&scores)[4][4]) {
    const std::byte* keys = ring.wait();
    const typename Reader::Levels levels(levels_of(keys, kHeadDim));
    const std::byte* chunks = keys + group_bytes(of_reader<Reader>(part), kHeadDim, kHeadDim);
    if constexpr (Reader::kByToken) {
      constexpr bool kInt8 = Reader::kCode == KvCode::int8;
      uint32_t scales[2][4];  // (tokens 32 u + 8 (g / 2) .., pairs)
      token_scales<kInt8>(keys, g_ / 2 * 8, scales[0]);
      token_scales<kInt8>(keys, 32 + g_ / 2 * 8, scales[1]);
      score_pieces<Reader>(ring, chunks, levels, q_, scores);
      const int shift = g_ % 2 == 0 ? 16 : 0;
#pragma unroll
      for (int block = 0; block < 8; ++block) {
        const float scale = __uint_as_float(scales[block / 4][block % 4] << shift & 0xffff0000u);
        scores[block / 2][block % 2 * 2] *= scale;
        scores[block / 2][block % 2 * 2 + 1] *= scale;
      }
    } else {
      uint32_t scaled[kGroups][4];
      float by_middle[4] = {};
      float by_affine[4] = {};
      scale_queries<false>(keys, chunk_middle<Reader>(), scaled, by_middle, by_affine);
      if constexpr (Reader::kCode == KvCode::nuq) {
        score_outliers<kHeadDim>(const_cast<std::byte*>(keys), part, own_q_, lane_, scores);
      }
      score_pieces<Reader>(ring, chunks, levels, scaled, scores);
      add_to_all(by_middle, by_affine, scores);
    }
  }

  template <typename Reader>
  __device__ void score_pieces(Ring& ring, const std::byte* chunks, const typename Reader::Levels& levels,
                               const uint32_t (&q)[kGroups][4], float (&scores)[4][4]) {
    constexpr int kOfPiece = piece_chunks(Reader::kCodeBits, kHeadDim);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group > 0 && group % kOfPiece == 0) {
        ring.release();
        chunks = ring.wait();
      }
      const Reader reader(chunks + group % kOfPiece * chunk_bytes(Reader::kCodeBits), lane_, levels);
      uint32_t pairs[2][2][4];
      reader.template tiles<0>(pairs);
      step_tiles(scores[0], scores[1], pairs, q[group], q[group]);
      reader.template tiles<1>(pairs);
      step_tiles(scores[2], scores[3], pairs, q[group], q[group]);
    }
    ring.release();
  }

  // The products of two tiles, each with its own columns: 4 pairs of k values.
  __device__ static void step_tiles(float (&first)[4], float (&second)[4], const uint32_t (&pairs)[2][2][4],
                                    const uint32_t* of_first, const uint32_t* of_second) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      tensor_step(first, pairs[0][0][2 * s], pairs[0][1][2 * s], pairs[0][0][2 * s + 1], pairs[0][1][2 * s + 1],
                  of_first[2 * s], of_first[2 * s + 1]);
      tensor_step(second, pairs[1][0][2 * s], pairs[1][1][2 * s], pairs[1][0][2 * s + 1], pairs[1][1][2 * s + 1],
                  of_second[2 * s], of_second[2 * s + 1]);
    }
  }

  // Scores to weights 2^(score - maximum), as operands of the product with V: weights[4 u + b] of lane (g, c) are head
  // g's of the tokens 32 u + 8 c + 2 b and the one behind. The maximum follows with some slack, so that it seldom
  // moves.
  __device__ void weigh(float (&scores)[4][4], int visible, float scale_log2, uint32_t (&weights)[8]) {
    constexpr float kSlack = 8;
    if (visible < kPageTokens) {
#pragma unroll
      for (int block = 0; block < 8; ++block) {
        if (score_token_of(block) >= visible) {
          scores[block / 2][block % 2 * 2] = scores[block / 2][block % 2 * 2 + 1] = -kInfinity;
        }
      }
    }
    float most[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      most[0] = fmaxf(most[0], scores[block / 2][block % 2 * 2]);
      most[1] = fmaxf(most[1], scores[block / 2][block % 2 * 2 + 1]);
    }
    const bool above = most[0] * scale_log2 > top_[0] + kSlack || most[1] * scale_log2 > top_[1] + kSlack;
    if (__any_sync(kAllLanes, above)) {
      raise_top(most[0] * scale_log2, most[1] * scale_log2);
    }
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const float first = exp2_approx(fmaf(scores[block / 2][block % 2 * 2], scale_log2, -top_[0]));
      const float second = exp2_approx(fmaf(scores[block / 2][block % 2 * 2 + 1], scale_log2, -top_[1]));
      sum_[0] += first;
      sum_[1] += second;
      weights[block] = transpose_pairs(pack_pair(first, second));
    }
  }

  __device__ int score_token_of(int block) const {
    return block / 4 * 32 + g_ / 2 * 8 + block % 4 * 2 + g_ % 2;
  }

  __device__ void raise_top(float first, float second) {
    float most[2] = {first, second};
    float keep[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int reach = 4; reach < 32; reach *= 2) {
        most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], reach));
      }
      most[i] = fmaxf(most[i], top_[i]);
      keep[i] = exp2_approx(top_[i] - most[i]);  // 0 at first
      top_[i] = most[i];
      sum_[i] *= keep[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      by_middle_[i] *= keep[i % 2];
      by_affine_[i] *= keep[i % 2];
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 16; ++tile) {
        out_[tile][i] *= keep[i % 2];
      }
    }
  }

  // Rows g and g + 8 of tile t are the dims 16 t + g and 16 t + g + 8.
  __device__ void add_exact(Ring& ring, const uint32_t (&weights)[8]) {
    constexpr int kTiles = value_piece_dims(kHeadDim) / 16;  // of a piece
    constexpr int kPieces = kHeadDim / 16 / kTiles;          // of 32 tokens
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const std::byte* values = ring.wait() + g_ * 64 + c_ * 16;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 low = read16(values + tile * 16 * 64);
          const uint4 high = read16(values + (tile * 16 + 8) * 64);
          float(&out)[4] = out_[piece * kTiles + tile];
          tensor_step(out, low.x, high.x, low.y, high.y, weights[4 * half], weights[4 * half + 1]);
          tensor_step(out, low.z, high.z, low.w, high.w, weights[4 * half + 2], weights[4 * half + 3]);
        }
        ring.release();
      }
    }
  }

  // sum p v = sum p (minimum + scale code): the scales go into the weights; what the minima add is the same for every
  // dim.
  __device__ void add_packed(Ring& ring, int bits, const uint32_t (&weights)[8]) {
    const std::byte* values = ring.wait();
    uint32_t scaled[8];
    if (bits == 2) {
      scale_weights<true>(values, middle_of(bits), weights, scaled);
    } else {
      scale_weights<false>(values, middle_of(bits), weights, scaled);
    }
    values += kPageTokens * 4;
    if (bits == 2) {
      add_plane2(values, lane_, scaled, out_);
    } else {
      if (bits == 8) {
        add_plane4(values, kHighExponent, lane_, scaled, out_);
        ring.release();
        values = ring.wait();
      }
      add_plane4(values, kLowExponent, lane_, scaled, out_);
    }
    ring.release();
  }

  // The weights times the scales of the tokens; affine: as in scale_queries().
  template <bool kTwoBits>
  __device__ void scale_weights(const std::byte* affine, const Middle& middle, const uint32_t (&weights)[8],
                                uint32_t (&scaled)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::byte* of_lane = affine + (32 * half + 8 * c_) * 2;
      uint32_t scale[4];
      uint32_t minimum[4];
      read16(of_lane, scale);
      read16(of_lane + kPageTokens * 2, minimum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[4 * half + i] = multiply_pairs(weights[4 * half + i], scale[i]);
      }
      correct<kTwoBits>(middle, scale, minimum, scaled + 4 * half, weights + 4 * half, by_middle_, by_affine_);
    }
  }

  template <typename Reader>
  __device__ void add_chunks(Ring& ring, const KvPart& part, const uint32_t (&weights)[8]) {
    const std::byte* values = ring.wait();
    const typename Reader::Levels levels(levels_of(values, kPageTokens));
    const std::byte* chunks = values + group_bytes(of_reader<Reader>(part), kHeadDim, kPageTokens);
    uint32_t scaled[8];
    if constexpr (Reader::kByToken) {
      constexpr bool kInt8 = Reader::kCode == KvCode::int8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t scale[4];
        token_scales<kInt8>(values, 32 * half + 8 * c_, scale);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scaled[4 * half + i] = multiply_pairs(weights[4 * half + i], scale[i]);
        }
      }
      add_pieces<Reader>(ring, chunks, levels, scaled);
    } else {
      scale_weights<false>(values, chunk_middle<Reader>(), weights, scaled);
      if constexpr (Reader::kCode == KvCode::nuq) {
        auto* own = const_cast<std::byte*>(values);
        add_outliers<kHeadDim>(own, part, weights, own + kStageBytes - kWeightBytes, lane_, out_);  // behind the copy
      }
      add_pieces<Reader>(ring, chunks, levels, scaled);
    }
  }

  template <typename Reader>
  __device__ void add_pieces(Ring& ring, const std::byte* chunks, const typename Reader::Levels& levels,
                             const uint32_t (&scaled)[8]) {
    constexpr int kOfPiece = piece_chunks(Reader::kCodeBits, kHeadDim);
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim / 32; ++chunk) {
      if (chunk > 0 && chunk % kOfPiece == 0) {
        ring.release();
        chunks = ring.wait();
      }
      const Reader reader(chunks + chunk % kOfPiece * chunk_bytes(Reader::kCodeBits), lane_, levels);
      uint32_t pairs[2][2][4];
      reader.template tiles<0>(pairs);
      step_tiles(out_[2 * chunk], out_[2 * chunk], pairs, scaled, scaled + 4);
      reader.template tiles<1>(pairs);
      step_tiles(out_[2 * chunk + 1], out_[2 * chunk + 1], pairs, scaled, scaled + 4);
    }
    ring.release();
  }

  int lane_;
  int g_;
  int c_;
  const uint16_t* own_q_ = nullptr;  // of head g as it lies in memory, null if there is none
  uint32_t q_[kGroups][4];           // pairs of the dims 32 i + 8 c .. + 7 of head g
  // Of the heads 2 c and 2 c + 1:
  float top_[2] = {-kInfinity, -kInfinity};
  float sum_[2] = {};  // of this lane's tokens
  float out_[kHeadDim / 16][4] = {};
  float by_middle_[4] = {};  // what every dim gets besides, as correct() says
  float by_affine_[4] = {};
};

}  // namespace vericache::cuda
