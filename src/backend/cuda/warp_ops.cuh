// What a warp does that C++ has no words for: tensor-core steps, pairs of bf16, copies into shared memory.
// Device code; all lanes of a warp call together unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace vericache::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// c (16 x 8) += a (16 x 16) b (16 x 8), bf16 in, float out. Lane 4 g + q holds
//   a: a0 row g, a1 row g + 8, columns 2q, 2q + 1; a2, a3 the same rows, columns 2q + 8, 2q + 9
//   b: b0 rows 2q, 2q + 1, b1 rows 2q + 8, 2q + 9 of column g
//   c: c0, c1 row g, c2, c3 row g + 8, columns 2q, 2q + 1
__device__ inline void tensor_step(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A matrix of 8 x 8 values of 16 bits, lane 4 g + q holding row g, columns 2q, 2q + 1: its transpose.
__device__ inline uint32_t transpose_pairs(uint32_t pairs) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pairs));
  return out;
}

// A bit for each lane below this one.
__device__ inline uint32_t lanes_below() {
  uint32_t mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// The value of lane 0, known to the compiler as the same in all lanes.
__device__ inline int uniform(int value) {
  return __shfl_sync(kAllLanes, value, 0);
}

// (word & mask) | bits in one instruction: with two constants the compiler makes two.
__device__ inline uint32_t select_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}
// The bits of `ones` where the mask has ones, else those of `zeros`.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t ones, uint32_t zeros) {
  return (mask & ones) | (~mask & zeros);
}

__device__ inline float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

constexpr uint32_t kBothHalves = 0x00010001u;
constexpr uint32_t kBothSigns = 0x80008000u;  // of two bf16
constexpr uint32_t kBothMagnitudes = ~kBothSigns;

// Two floats rounded to bf16, `first` in the low half.
__device__ inline uint32_t pack_pair(float first, float second) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}
// a b + c of pairs of bf16, rounded once; products and sums alone.
__device__ inline uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return multiply_add_pairs(a, b, kBothSigns);
}
__device__ inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  return multiply_add_pairs(a, 0x3f803f80u, b);
}
__device__ inline float first_of_pair(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ inline float second_of_pair(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VERICACHE_COPY_ENGINE  // before it, all threads copied
#endif

// 16 bytes of each lane.
__device__ inline void copy_lane(uint32_t target, const std::byte* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the youngest `kPending` groups of this lane's copies are there.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#ifdef VERICACHE_COPY_ENGINE
// The copy engine of a multiprocessor writes shared memory and counts the bytes on a barrier of 8 bytes in shared
// memory. One lane calls.
__device__ inline void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Makes barriers that were initialised known to the copy engine.
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// bytes and both addresses: multiples of 16.
__device__ inline void copy_start(uint32_t target, const std::byte* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}
// Waits for the end of the barrier's phase of that parity: the first has parity 0. Any lanes.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

}  // namespace vericache::cuda
