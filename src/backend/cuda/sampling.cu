// Chooses the token of each row of logits as choose() of sampling.h does, and hashes the row: one cluster of blocks a
// row, each block a slice of the vocabulary. What blocks and threads find is joined by integer sums and by maxima over
// total orders, so the choice depends neither on the cut nor on the rows beside.
#include <cfloat>
#include <climits>

#include "backend/cuda/checksum.h"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/ops.h"
#include "backend/cuda/radix_walk.cuh"
#include "backend/philox.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMostBlocks = 132;   // one fills a multiprocessor
constexpr int kLeastSlice = 8192;  // tokens of a block: fewer, and the barriers cost more than they save

struct Pair {
  uint64_t first;
  uint64_t second;
};

struct Reduced {
  Pair warps[kWarps];
  Pair block;
  Pair cluster;
};

struct Shared {
  RadixWalk::Shared walk;
  Reduced best;  // two of them: neighbours may still read the one when the other is written
  Reduced chosen;
};

__device__ Pair shuffle(const Pair& own, int step) {
  return {__shfl_xor_sync(~0u, own.first, step), __shfl_xor_sync(~0u, own.second, step)};
}

// Joins the pairs of all threads of the cluster; every thread returns the result. merge is commutative and associative.
template <typename Merge>
__device__ Pair reduce(const Cluster& cluster, Reduced& shared, Pair own, const Merge& merge) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int step = 16; step > 0; step /= 2) {
    own = merge(own, shuffle(own, step));
  }
  if (lane == 0) {
    shared.warps[warp] = own;
  }
  __syncthreads();
  if (warp == 0) {
    own = shared.warps[lane % kWarps];
    for (int step = kWarps / 2; step > 0; step /= 2) {
      own = merge(own, shuffle(own, step));
    }
    if (lane == 0) {
      shared.block = own;
    }
  }
  cluster.sync();
  if (warp == 0) {
    const int blocks = cluster.size();  // a power of two
    own = cluster.of(lane % blocks, shared.block);
    for (int step = blocks / 2; step > 0; step /= 2) {
      own = merge(own, shuffle(own, step));
    }
    if (lane == 0) {
      shared.cluster = own;
    }
  }
  __syncthreads();
  return shared.cluster;
}

// Larger for what is better: the larger value, and of equal values the lower id.
__device__ uint64_t packed(uint32_t rank_key, TokenId id) {
  return uint64_t{~rank_key} << 32 | ~static_cast<uint32_t>(id);
}
__device__ TokenId id_of(uint64_t packed) {
  return static_cast<TokenId>(~static_cast<uint32_t>(packed));
}
__device__ uint32_t key_of(uint64_t packed) {
  return ~static_cast<uint32_t>(packed >> 32);
}

// Of all threads: the best token, packed (0: nothing is above -inf), and the sum that the hash is made of; where none
// is wanted, the inverted key of the runner-up (0: there is none).
__device__ Pair scan(const Cluster& cluster, const RowSlice& slice, bool hashed, Reduced& shared) {
  float most = -INFINITY;
  float next = -INFINITY;
  int best = -1;
  uint64_t sum = 0;
  each_quad(slice, [&](int quad, const uint4& bits) {
    if (hashed) {
      sum +=
          checksum_share(bits.x | uint64_t{bits.y} << 32, bits.z | uint64_t{bits.w} << 32, static_cast<uint32_t>(quad));
    }
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float logit = __uint_as_float(words[i]);
      if (logit > next && quad * 4 + i < slice.count) {
        if (logit > most) {
          next = most;
          most = logit;
          best = quad * 4 + i;
        } else {
          next = logit;
        }
      }
    }
  });
  const uint64_t own = best < 0 ? 0 : packed(rank_key(most), best);
  if (hashed) {
    return reduce(cluster, shared, {own, sum}, [](const Pair& a, const Pair& b) {
      return Pair{max(a.first, b.first), a.second + b.second};
    });
  }
  const uint64_t second = next > -INFINITY ? ~rank_key(next) : 0;
  return reduce(cluster, shared, {own, second}, [](const Pair& a, const Pair& b) {
    return Pair{max(a.first, b.first), max(max(a.second, b.second), min(a.first, b.first) >> 32)};
  });
}

// Scaled logits below the best one, as on the CPU.
struct Distance {
  float best;
  float temperature;
  __device__ float operator()(float logit) const { return (best - logit) / temperature; }
};

constexpr float kWeighedDistance = 28;  // beyond it a weight is 0
// The correctly rounded exponential, to stay with the CPU's library to the last bit but for rare cases.
__device__ uint64_t weight(float distance) {
  if (!(distance < kWeighedDistance)) {
    return 0;
  }
  return static_cast<uint64_t>(static_cast<float>(exp(-static_cast<double>(distance))) * 0x1p40f);
}

__device__ uint64_t needed_mass(float top_p, uint64_t total) {
  const auto needed = static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return min(max(needed, uint64_t{1}), total);
}

// Rises with the distance, so bins hold neighbours in rank; spreads the logits of a language model over many of them.
__device__ int bin_of(float distance) {
  constexpr float kPerUnit = 8;
  constexpr int kLast = RadixWalk::kBins - 1;
  return distance * kPerUnit < kLast ? static_cast<int>(distance * kPerUnit) : kLast;
}

// What the filters leave: the tokens that rank up to (last_key, last_id), cut further by the distance to the best.
struct Survivors {
  uint32_t last_key = ~0u;
  TokenId last_id = INT_MAX;
  float distance = INFINITY;
  __device__ bool holds(uint32_t key, TokenId id) const { return key < last_key || (key == last_key && id <= last_id); }
};

// Calls body(id, logit) for this thread's tokens above -inf.
template <typename Body>
__device__ void each_token(const RowSlice& slice, const Body& body) {
  each_value(slice, [&](int id, float logit) {
    if (logit > -INFINITY) {
      body(id, logit);
    }
  });
}

// The n-th lowest id of the tokens with that key.
__device__ TokenId nth_of_equals(RadixWalk& walk, const RowSlice& slice, uint32_t key, uint64_t n) {
  const RadixWalk::Place place = walk.find_key(n, [&](const auto& visit) {
    each_token(slice, [&](TokenId id, float logit) {
      if (rank_key(logit) == key) {
        visit(static_cast<uint32_t>(id), [] { return uint64_t{1}; });
      }
    });
  });
  return static_cast<TokenId>(place.key);
}

__device__ void keep_top_k(RadixWalk& walk, const RowSlice& slice, const Distance& distance, uint64_t k,
                           Survivors& survivors) {
  each_token(slice, [&](TokenId, float logit) { walk.add(bin_of(distance(logit)), 1); });
  if (walk.gather() <= k) {
    return;
  }
  const RadixWalk::Bin bin = walk.find(k);
  const RadixWalk::Place place = walk.find_key(k - bin.before, [&](const auto& visit) {
    each_token(slice, [&](TokenId, float logit) {
      visit(rank_key(logit), [&] { return uint64_t{bin_of(distance(logit)) == bin.index}; });
    });
  });
  survivors.last_key = place.key;
  if (place.needed < place.mass) {
    survivors.last_id = nth_of_equals(walk, slice, place.key, place.needed);
  }
}

// Leaves the shortest prefix in rank of the survivors that weighs top_p of them all.
__device__ void keep_nucleus(RadixWalk& walk, const RowSlice& slice, const Distance& distance, float top_p,
                             Survivors& survivors) {
  const Survivors before = survivors;
  const auto mass = [&](TokenId id, float logit) {
    return before.holds(rank_key(logit), id) ? weight(distance(logit)) : 0;
  };
  each_token(slice, [&](TokenId id, float logit) { walk.add(bin_of(distance(logit)), mass(id, logit)); });
  const uint64_t needed = needed_mass(top_p, walk.gather());
  const RadixWalk::Bin bin = walk.find(needed);
  const RadixWalk::Place place = walk.find_key(needed - bin.before, [&](const auto& visit) {
    each_token(slice, [&](TokenId id, float logit) {
      visit(rank_key(logit), [&] { return bin_of(distance(logit)) == bin.index ? mass(id, logit) : 0; });
    });
  });
  // Equal tokens weigh the same.
  const uint64_t one = weight(distance(value_of(place.key)));
  const uint64_t nth = (place.needed + one - 1) / one;
  survivors.last_key = place.key;
  if (nth < place.mass / one) {
    survivors.last_id = nth_of_equals(walk, slice, place.key, nth);
  } else if (place.key != before.last_key) {
    survivors.last_id = INT_MAX;
  }
}

// The noise of four neighbouring tokens.
struct Words {
  uint32_t of[4];
  __device__ uint32_t at(int i) const {  // where i is not known to the compiler, and an array would go to memory
    return i < 2 ? (i == 0 ? of[0] : of[1]) : (i == 2 ? of[2] : of[3]);
  }
};
__device__ Words noise(const Sampling& sampling, int position, int quad) {
  Words words = {{static_cast<uint32_t>(quad), static_cast<uint32_t>(position), 0, 0}};
  philox_rounds(words.of, static_cast<uint32_t>(sampling.seed), static_cast<uint32_t>(sampling.seed >> 32));
  return words;
}

// word -> uniform in (0, 1), 2^-33 or more from both ends -> Gumbel.
__device__ double gumbel(uint32_t word) {
  return -log(-log((word + 0.5) * 0x1p-32));
}
// Upper bounds of gumbel(): of any word, and of a word with that many leading ones.
constexpr float kMostNoise = 22.9f;
__device__ float noise_bound(uint32_t word) {
  return static_cast<float>(__clz(static_cast<int>(~word)) + 1) * 0.69315f;
}

// Rises with the value; both zeros are one.
__device__ uint64_t ordered(double value) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return bits >> 63 != 0 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ double double_of(uint64_t ordered) {
  return __longlong_as_double(static_cast<long long>(ordered >> 63 != 0 ? ordered ^ uint64_t{1} << 63 : ~ordered));
}

// What was chosen, and how far the best of the others stands behind it; +inf if it is `reach` or more. reach 0: not
// asked for.
struct Drawn {
  TokenId token;
  double ahead;
};

__device__ Drawn gumbel_max(const Cluster& cluster, const RowSlice& slice, TokenId best, const Distance& distance,
                            const Survivors& survivors, const Sampling& sampling, int position, float reach,
                            Reduced& shared, Reduced& shared_again) {
  const double temperature = sampling.temperature;
  const double base = distance.best / temperature;
  double best_value = base + gumbel(noise(sampling, position, best / 4).at(best % 4));
  // A token's value is below base - distance + bound. One whose bound is not within `slack` of the best value so far is
  // out, whatever was rounded on the way: floats up to 100 to 1e-5, doubles of the size of base to 1e-15 of it.
  const float slack = static_cast<float>(1e-4 + fabs(base) * 1e-9);
  auto lead = static_cast<float>(best_value - base) - reach;
  double second_value = -INFINITY;
  each_quad(slice, [&](int quad, const uint4& bits) {
    const float logits[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                             __uint_as_float(bits.w)};
    unsigned hopeful = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float logit = logits[i];
      const TokenId id = quad * 4 + i;
      const float far = distance(logit);
      if (logit > -INFINITY && id < slice.count && lead + far <= kMostNoise + slack && far <= survivors.distance &&
          survivors.holds(rank_key(logit), id)) {
        hopeful |= 1u << i;
      }
    }
    if (hopeful == 0) {
      return;
    }
    const Words words = noise(sampling, position, quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((hopeful >> i & 1) == 0 || !(lead + distance(logits[i]) <= noise_bound(words.of[i]) + slack)) {
        continue;
      }
      const double value = logits[i] / temperature + gumbel(words.of[i]);
      const TokenId id = quad * 4 + i;
      if (value > best_value || (value == best_value && id < best)) {
        best = id;
        second_value = best_value;
        best_value = value;
        lead = static_cast<float>(best_value - base) - reach;
      } else if (id != best) {
        second_value = fmax(second_value, value);
      }
    }
  });
  const Pair own = {ordered(best_value), ~static_cast<uint32_t>(best)};
  const Pair all = reduce(cluster, shared, own, [](const Pair& a, const Pair& b) {
    return a.first > b.first || (a.first == b.first && a.second > b.second) ? a : b;
  });
  const TokenId chosen = id_of(all.second);
  if (reach == 0) {
    return {chosen, INFINITY};
  }
  const Pair others = {ordered(best == chosen ? second_value : best_value), 0};
  const Pair second = reduce(cluster, shared_again, others, [](const Pair& a, const Pair& b) {
    return Pair{max(a.first, b.first), 0};
  });
  return {chosen, double_of(all.first) - double_of(second.first)};
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const float* logits, const LogitRow* rows, int vocabulary) {
  __shared__ Shared shared;
  const Cluster cluster;
  const LogitRow& row = rows[cluster.index()];
  const Sampling& sampling = row.sampling;
  const RowSlice slice(cluster, logits + static_cast<size_t>(cluster.index()) * static_cast<size_t>(vocabulary),
                       vocabulary);
  const Pair scanned = scan(cluster, slice, row.hash != nullptr, shared.best);
  TokenId token = scanned.first == 0 ? 0 : id_of(scanned.first);
  const float most = scanned.first == 0 ? -INFINITY : value_of(key_of(scanned.first));
  float margin = 0;
  if (isfinite(most)) {
    const auto second = static_cast<uint32_t>(scanned.second);
    margin = second == 0 ? kMostMargin : fminf(most - value_of(~second), kMostMargin);
  }
  // Greedy at denormal temperatures, as the CPU.
  if (sampling.temperature >= FLT_MIN && isfinite(most)) {
    const Distance distance{most, sampling.temperature};
    Survivors survivors;
    RadixWalk walk(cluster, shared.walk);
    if (sampling.top_k > 0 && sampling.top_k < vocabulary) {
      keep_top_k(walk, slice, distance, static_cast<uint64_t>(sampling.top_k), survivors);
    }
    if (sampling.top_p < 1) {
      keep_nucleus(walk, slice, distance, sampling.top_p, survivors);
    }
    if (sampling.min_p > 0) {
      survivors.distance = static_cast<float>(-log(static_cast<double>(sampling.min_p)));
    }
    const float reach = row.margin != nullptr ? kMostMargin / sampling.temperature : 0;
    const Drawn drawn = gumbel_max(cluster, slice, token, distance, survivors, sampling, row.position, reach,
                                   shared.chosen, shared.best);
    token = drawn.token;
    margin = static_cast<float>(fmin(drawn.ahead * sampling.temperature, static_cast<double>(kMostMargin)));
  }
  if (cluster.rank() == 0 && threadIdx.x == 0) {
    *row.token = token;
    if (row.hash != nullptr) {
      *row.hash = finish_checksum(scanned.second, static_cast<uint64_t>(vocabulary) * sizeof(float));
    }
    if (row.margin != nullptr) {
      *row.margin = margin;
    }
  }
  cluster.sync();
}

}  // namespace

void choose(const float* logits, const StagedPass& pass, int vocabulary, cudaStream_t stream) {
  check(vocabulary > 0 && vocabulary <= 1 << 24, "a row of logits has 1 to 2^24 tokens");
  if (pass.logit_count == 0) {
    return;
  }
  const int blocks = cluster_blocks(pass.logit_count, kMostBlocks, vocabulary, kLeastSlice);
  launch_clusters(choose_kernel, "choose", pass.logit_count, blocks, kThreads, stream, logits, pass.logit_rows,
                  vocabulary);
}

}  // namespace vericache::cuda
