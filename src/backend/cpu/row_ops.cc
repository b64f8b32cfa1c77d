// Row operations over Highway: norms, activations, RoPE, and the online softmax of attention. Remainders go through the
// same vector code as whole vectors.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/row_ops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr size_t kLanes = hn::MaxLanes(F32());
constexpr size_t kTokens = kPageTokens;
constexpr float kLog2E = 1.44269504f;

// Heads are multiples of 16 wide, RoPE works on their halves: vectors of at most 8 lanes leave no remainder.
using Half = hn::CappedTag<float, 8>;
constexpr size_t kHalfLanes = hn::MaxLanes(Half());

void add(const float* x, int dim, float* y) {
  const size_t n = static_cast<size_t>(dim);
  for (size_t i = 0; i < n; i += kLanes) {
    store_lanes(hn::Add(load_lanes(y + i, n - i), load_lanes(x + i, n - i)), y + i, n - i);
  }
}

void zero_padding(bf16* row, int dim) {
  for (int i = dim; i < padded_dim(dim); ++i) {
    row[i] = bf16{0};
  }
}

void rms_norm(const float* x, const float* weight, float eps, int dim, bf16* out) {
  const F32 d;
  const size_t n = static_cast<size_t>(dim);
  Floats squares = hn::Zero(d);
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats v = load_lanes(x + i, n - i);
    squares = hn::MulAdd(v, v, squares);
  }
  const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(dim);
  const Floats factor = hn::Set(d, 1.0f / std::sqrt(mean + eps));
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats v = hn::Mul(hn::Mul(load_lanes(x + i, n - i), factor), load_lanes(weight + i, n - i));
    store_lanes(demote_to_bf16(v), out + i, n - i);
  }
  zero_padding(out, dim);
}

void silu_mul(const float* gate, const float* up, int dim, bf16* out) {
  const F32 d;
  const size_t n = static_cast<size_t>(dim);
  const Floats one = hn::Set(d, 1.0f);
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats g = load_lanes(gate + i, n - i);
    // 2^x holds up to 127; beyond, silu is 0 but for 1e-38 of g.
    const Floats power = hn::Min(hn::Mul(g, hn::Set(d, -kLog2E)), hn::Set(d, 127.0f));
    const Floats silu = hn::Div(g, hn::Add(one, exp2(power)));
    store_lanes(demote_to_bf16(hn::Mul(silu, load_lanes(up + i, n - i))), out + i, n - i);
  }
  zero_padding(out, dim);
}

void finish_head(const float* x, const float* bias, const float* norm, float eps, const float* cos, const float* sin,
                 int head_dim, bf16* out) {
  const Half d;
  const size_t n = static_cast<size_t>(head_dim);
  HWY_ALIGN float head[kMaxHeadDim];
  auto squares = hn::Zero(d);
  for (size_t i = 0; i < n; i += kHalfLanes) {
    auto v = hn::LoadU(d, x + i);
    if (bias != nullptr) {
      v = hn::Add(v, hn::LoadU(d, bias + i));
    }
    squares = hn::MulAdd(v, v, squares);
    hn::Store(v, d, head + i);
  }
  if (norm != nullptr) {
    const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(head_dim);
    const auto factor = hn::Set(d, 1.0f / std::sqrt(mean + eps));
    for (size_t i = 0; i < n; i += kHalfLanes) {
      hn::Store(hn::Mul(hn::Mul(hn::Load(d, head + i), factor), hn::LoadU(d, norm + i)), d, head + i);
    }
  }
  const size_t half = n / 2;
  for (size_t i = 0; cos != nullptr && i < half; i += kHalfLanes) {
    const auto left = hn::Load(d, head + i);
    const auto right = hn::LoadU(d, head + half + i);
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    hn::Store(hn::Sub(hn::Mul(left, c), hn::Mul(right, s)), d, head + i);
    hn::StoreU(hn::Add(hn::Mul(right, c), hn::Mul(left, s)), d, head + half + i);
  }
  for (size_t i = 0; i < n; i += kLanes) {
    store_lanes(demote_to_bf16(hn::Load(F32(), head + i)), out + i, n - i);
  }
}

// Score2 of the lanes from `token` on; those from `visible` on are -inf.
HWY_INLINE Floats masked_scores(const float* scores, size_t token, int visible, Floats scale2) {
  const F32 d;
  const Floats s = hn::Mul(hn::LoadU(d, scores + token), scale2);
  if (visible >= static_cast<int>(token + kLanes)) {
    return s;
  }
  const auto index = hn::Iota(I32(), static_cast<int>(token));
  const auto seen = hn::RebindMask(d, hn::Lt(index, hn::Set(I32(), visible)));
  return hn::IfThenElse(seen, s, hn::Set(d, -std::numeric_limits<float>::infinity()));
}

// Brings a row's sum and acc to a larger maximum. Multiplying by 1 changes nothing, so an unchanged maximum costs
// nothing.
HWY_INLINE void rescale(float factor, float* sum, float* acc, int head_dim) {
  const F32 d;
  const Floats f = hn::Set(d, factor);
  for (size_t i = 0; i < 16; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, sum + i), f), d, sum + i);
  }
  for (size_t i = 0; i < static_cast<size_t>(head_dim); i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, acc + i), f), d, acc + i);
  }
}

HWY_INLINE float exp2_of(float x) {
  return hn::GetLane(exp2(hn::Set(F32(), x)));
}

void softmax_page(const float* scores, int rows, const int* visible, float scale2, bf16* weights,
                  const SoftmaxRows& state) {
  const F32 d;
  constexpr size_t kVectors = kTokens / kLanes;
  const Floats scale = hn::Set(d, scale2);
  for (int r = 0; r < rows; ++r, scores += kTokens, weights += kTokens) {
    Floats s[kVectors];
    Floats top = hn::Set(d, -std::numeric_limits<float>::infinity());
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) {
      s[v] = masked_scores(scores, v * kLanes, visible[r], scale);
      top = hn::Max(top, s[v]);
    }
    const float old_max = state.max[r];
    const float page_max = hn::GetLane(hn::MaxOfLanes(d, top));
    float* sum = state.sum + static_cast<size_t>(r) * 16;
    if (page_max > old_max) {
      rescale(exp2_of(old_max - page_max), sum,
              state.acc + static_cast<size_t>(r) * static_cast<size_t>(state.head_dim), state.head_dim);
      state.max[r] = page_max;
    }
    const Floats max = hn::Set(d, state.max[r]);
    constexpr size_t kPartials = 16 / kLanes;
    Floats page_sum[kPartials];
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) {
      const Words rounded = round_finite_to_bf16(exp2(hn::Sub(s[v], max)));
      hn::StoreU(hn::TruncateTo(U16(), hn::ShiftRight<16>(rounded)), U16(),
                 reinterpret_cast<uint16_t*>(weights + v * kLanes));
      const Floats weight = second_of_pair(rounded);
      page_sum[v % kPartials] = v < kPartials ? weight : hn::Add(page_sum[v % kPartials], weight);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < kPartials; ++i) {
      hn::StoreU(hn::Add(hn::LoadU(d, sum + i * kLanes), page_sum[i]), d, sum + i * kLanes);
    }
  }
}

HWY_INLINE float sum_of_16(const float* p) {
  const F32 d;
  Floats total = hn::LoadU(d, p);
  for (size_t i = kLanes; i < 16; i += kLanes) {
    total = hn::Add(total, hn::LoadU(d, p + i));
  }
  return hn::GetLane(hn::SumOfLanes(d, total));
}

void fold_split(const SoftmaxRows& split, int rows, const SoftmaxRows& total) {
  const F32 d;
  const size_t n = static_cast<size_t>(total.head_dim);
  for (int r = 0; r < rows; ++r) {
    const float max = split.max[r] > total.max[r] ? split.max[r] : total.max[r];
    const float a = exp2_of(total.max[r] - max);
    const float b = exp2_of(split.max[r] - max);
    total.max[r] = max;
    total.sum[r] = total.sum[r] * a + sum_of_16(split.sum + static_cast<size_t>(r) * 16) * b;
    const float* from = split.acc + static_cast<size_t>(r) * n;
    float* to = total.acc + static_cast<size_t>(r) * n;
    for (size_t i = 0; i < n; i += kLanes) {
      const Floats scaled = hn::Mul(hn::LoadU(d, to + i), hn::Set(d, a));
      hn::StoreU(hn::MulAdd(hn::LoadU(d, from + i), hn::Set(d, b), scaled), d, to + i);
    }
  }
}

void divide(const float* acc, float sum, int dim, bf16* out) {
  const F32 d;
  const size_t n = static_cast<size_t>(dim);
  for (size_t i = 0; i < n; i += kLanes) {
    // + 0 turns -0 into 0: a sum of products that are all zero has the sign of its history.
    const Floats v = hn::Add(hn::Div(hn::LoadU(d, acc + i), hn::Set(d, sum)), hn::Zero(d));
    store_lanes(demote_to_bf16(v), out + i, n - i);
  }
}

template <bool kLargest>
void join_mass(const float* scores, int rows, const int* visible, float scale2, const float* log_sum_exp2,
               float* mass) {
  const F32 d;
  for (int r = 0; r < rows; ++r, scores += kTokens) {
    for (size_t t = 0; t < kTokens; t += kLanes) {
      const Floats s = masked_scores(scores, t, visible[r], hn::Set(d, scale2));
      const Floats weight = exp2(hn::Sub(s, hn::Set(d, log_sum_exp2[r])));
      const Floats held = hn::LoadU(d, mass + t);
      hn::StoreU(kLargest ? hn::Max(held, weight) : hn::Add(held, weight), d, mass + t);
    }
  }
}

float bound_score(const bf16* q, int dim, const bf16* lows, const bf16* highs) {
  const F32 d;
  const U32 du;
  const auto pairs = [&](const bf16* at) { return hn::LoadU(du, reinterpret_cast<const uint32_t*>(at)); };
  const auto larger = [](Floats x, Floats low, Floats high) { return hn::Max(hn::Mul(x, low), hn::Mul(x, high)); };
  Floats sums[2] = {hn::Zero(d), hn::Zero(d)};
  for (int i = 0; i < dim; i += 2 * static_cast<int>(kLanes)) {
    const Words x = pairs(q + i);
    const Words low = pairs(lows + i);
    const Words high = pairs(highs + i);
    sums[0] = hn::Add(sums[0], larger(first_of_pair(x), first_of_pair(low), first_of_pair(high)));
    sums[1] = hn::Add(sums[1], larger(second_of_pair(x), second_of_pair(low), second_of_pair(high)));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(sums[0], sums[1])));
}

float bound_page(const bf16* q, int rows, int dim, const bf16* bounds) {
  float sum = 0;
  for (int r = 0; r < rows; ++r, q += dim) {
    float most = -std::numeric_limits<float>::infinity();
    for (int run = 0; run < kBoundRuns; ++run) {
      const bf16* lows = bounds + static_cast<ptrdiff_t>(2 * run) * dim;
      most = std::max(most, bound_score(q, dim, lows, lows + dim));
    }
    sum += most;
  }
  return sum;
}

void larger(const float* x, int dim, float* y) {
  for (int i = 0; i < dim; ++i) {
    y[i] = x[i] > y[i] ? x[i] : y[i];
  }
}

}  // namespace

const RowOps& row_table() {
  static constexpr RowOps kOps{add,    rms_norm,         silu_mul,        finish_head, softmax_page, fold_split,
                               divide, join_mass<false>, join_mass<true>, larger,      bound_page};
  return kOps;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

const RowOps& row_ops(Isa isa) {
  VERICACHE_FOR_ISA(isa, row_table);
}

}  // namespace vericache
#endif
