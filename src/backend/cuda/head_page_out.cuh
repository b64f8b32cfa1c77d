// Where a block of threads writes the bf16 rows of a head page, and how they are proved on the way.
// Device code.
#pragma once

#include "backend/cuda/checksum.h"
#include "backend/cuda/mismatches.cuh"
#include "backend/cuda/residual_forms.cuh"

namespace vericache::cuda {

// Where a block's rows go, and their share in the page's checksum.
template <int kHeadDim>
class HeadPageOut {
 public:
  static constexpr int kVectors = BlockShape<kHeadDim>::kHeadPageBytes / sizeof(uint4);

  __device__ HeadPageOut(const DecodeArgs& args, int page, int head)
      : first_(static_cast<uint32_t>(head * kVectors)),
        vectors_(reinterpret_cast<uint4*>(args.out) + static_cast<size_t>(page) * gridDim.y * kVectors + first_),
        proves_(args.checksums != nullptr) {}

  // row: of the block.
  __device__ void put(int row, int lane, const uint4& v) {
    const int at = row * 32 + lane;
    vectors_[at] = v;
    if (proves_) {
      sum_ += checksum_share(v.x | uint64_t{v.y} << 32, v.z | uint64_t{v.w} << 32, first_ + static_cast<uint32_t>(at));
    }
  }
  __device__ uint16_t* values() const { return reinterpret_cast<uint16_t*>(vectors_); }
  __device__ bool proves() const { return proves_; }
  __device__ uint64_t sum() const { return sum_; }  // of this thread's rows

 private:
  uint32_t first_;
  uint4* vectors_;
  bool proves_;
  uint64_t sum_ = 0;
};

// The block's rows have been put: its share joins those of the page's other heads, and the last of them compares. All
// threads of the block.
template <int kHeadDim>
__device__ void prove_block(const DecodeArgs& args, int page, const HeadPageOut<kHeadDim>& out, PageProof* proofs) {
  __shared__ unsigned long long block_sum;
  if (threadIdx.x == 0) {
    block_sum = 0;
  }
  __syncthreads();
  const uint64_t sum = sum_of_lanes(out.sum());
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&block_sum, static_cast<unsigned long long>(sum));
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  PageProof& proof = proofs[1 + page];
  atomicAdd(&proof.sum, block_sum);
  __threadfence();
  if (atomicAdd(&proof.counters[0], 1u) + 1 < gridDim.y) {
    return;
  }
  __threadfence();
  const uint64_t whole =
      finish_checksum(atomicExch(&proof.sum, 0ull), gridDim.y * BlockShape<kHeadDim>::kHeadPageBytes);
  proof.counters[0] = 0;
  count_mismatch(whole != args.checksums[page], static_cast<unsigned>(args.count), args.mismatches, proofs->counters);
}

}  // namespace vericache::cuda
