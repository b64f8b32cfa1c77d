// Chooses how a product runs at each row count. Every algorithm that cuBLASLt offers is run on random rows; algorithms
// that give all rows the same bits, at different row counts and places, form a bit class. The class is chosen by what
// it covers and by cuBLASLt's own ranking, never by a clock, so that it is the same in every process; within it the
// clock decides.
#include <algorithm>
#include <bit>
#include <span>

#include "backend/cuda/ops.h"
#include "backend/cuda/products.h"
#include "base/error.h"

namespace vericache::cuda {
namespace {

constexpr int kMostRows = 8192;
constexpr int kMostJudgedRows = 2048;
constexpr size_t kMostProofBytes = size_t{256} << 20;  // of x and of y
constexpr size_t kFlushBytes = size_t{128} << 20;      // more than any L2
constexpr int kShift = 3;                              // rows stand at another place of their tiles in the second run
constexpr int kFewRows = 64;                           // a class that covers fewer is refused
constexpr uint64_t kSeed = 0x5eed;

// Costs of a class, in places of cuBLASLt's ranking: a row count that it does not cover, and few rows in which the
// slices take turns.
constexpr int kCostUncovered = 20;
constexpr int kCostInTurn = 40;

constexpr const char* kProof = "the proof that matrix products keep their rows' bits";

// Hashes of rows, by row; 0 = unknown.
struct RowBits {
  std::vector<uint64_t> stored, added;
};

bool agree(std::span<const uint64_t> a, std::span<const uint64_t> b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != 0 && b[i] != 0 && a[i] != b[i]) {
      return false;
    }
  }
  return true;
}
void learn(std::span<uint64_t> known, std::span<const uint64_t> more) {
  for (size_t i = 0; i < known.size(); ++i) {
    known[i] = known[i] != 0 ? known[i] : more[i];
  }
}

struct Candidate {
  ProductChoice choice;
  size_t bucket = 0;
  int cost = 0;
};

struct BitClass {
  RowBits bits;
  std::vector<Candidate> members;
};

// Row counts to choose at. The first `judged` of them choose the class, and are the same whatever max_rows is: two
// processes that differ in it must not differ in bits. The others are served from that class.
struct Buckets {
  std::vector<int> rows;
  size_t judged = 0;
};
Buckets make_buckets(const ProductShape& shape, int max_rows) {
  const size_t row_bytes =
      std::max(static_cast<size_t>(shape.out) * sizeof(float), static_cast<size_t>(shape.in) * sizeof(bf16));
  const int proved = static_cast<int>(std::clamp<size_t>(kMostProofBytes / row_bytes, 1, kMostRows));
  Buckets buckets;
  for (int rows = 1; rows <= std::min(proved, kMostJudgedRows); rows *= 2) {
    buckets.rows.push_back(rows);
  }
  buckets.judged = buckets.rows.size();
  const int most = std::min(proved, max_rows);
  for (int rows = buckets.rows.back() * 2; rows < most; rows *= 2) {
    buckets.rows.push_back(rows);
  }
  if (most > buckets.rows.back()) {
    buckets.rows.push_back(most);
  }
  return buckets;
}

class ProductTuner {
 public:
  ProductTuner(const ProductShape& shape, int max_rows, bool free_choice, ProductLane& lane)
      : shape_(shape),
        free_choice_(free_choice),
        lane_(lane),
        max_rows_(max_rows),
        buckets_(make_buckets(shape, max_rows)),
        rows_(buckets_.rows),
        weight_(weight_count() * sizeof(bf16), kProof),
        x_(x_count() * sizeof(bf16), kProof),
        shifted_x_(x_count() * sizeof(bf16), kProof),
        y_(static_cast<size_t>(most_rows()) * static_cast<size_t>(shape.out) * sizeof(float), kProof),
        hashes_(static_cast<size_t>(most_rows()) * sizeof(uint64_t), kProof),
        flush_(kFlushBytes, kProof) {
    fill_proof_rows(weight_.as<bf16>(), shape.out, shape.in, 0, shape.out, kSeed, lane.stream());
    fill_proof_rows(x_.as<bf16>(), most_rows(), shape.in, 0, most_rows(), kSeed + 1, lane.stream());
    fill_proof_rows(shifted_x_.as<bf16>(), most_rows(), shape.in, kShift, most_rows(), kSeed + 1, lane.stream());
    for (cudaEvent_t& event : events_) {
      check_cuda(cudaEventCreate(&event), "making an event");
    }
  }
  ~ProductTuner() {
    for (cudaEvent_t event : events_) {
      check_cuda(cudaEventDestroy(event), "freeing an event");
    }
  }

  ProductPlan choose();

 private:
  int most_rows() const { return rows_.back(); }
  size_t weight_count() const { return static_cast<size_t>(shape_.out) * static_cast<size_t>(shape_.in); }
  size_t x_count() const { return static_cast<size_t>(most_rows()) * static_cast<size_t>(shape_.in); }

  std::vector<ProductForm> forms(int rows) const;
  size_t choose_class();
  void try_offers(size_t bucket);
  void extend(BitClass& members);
  void admit(const Candidate& candidate);
  RowBits bits_of(const ProductChoice& choice, size_t bucket);
  bool run(const ProductChoice& choice, bool shifted, int rows, Epilogue epilogue);
  void hash(bool shifted, int rows, std::vector<uint64_t>& bits, bool& consistent);
  size_t covered(const BitClass& members) const;
  int cost(const BitClass& members) const;
  double microseconds(const ProductChoice& choice, int rows, double best);

  ProductShape shape_;
  bool free_choice_;
  ProductLane& lane_;
  int max_rows_;
  Buckets buckets_;
  const std::vector<int>& rows_;
  DeviceMemory weight_, x_, shifted_x_, y_, hashes_, flush_;
  cudaEvent_t events_[2] = {};
  std::vector<uint64_t> host_hashes_;
  std::vector<BitClass> classes_;
  int offered_ = 0;
};

std::vector<ProductForm> ProductTuner::forms(int rows) const {
  if (shape_.slices == 1) {
    return {ProductForm::whole};
  }
  if (rows > kMostRowsAtOnce) {
    return {ProductForm::slices_in_turn};
  }
  return {ProductForm::slices_at_once, ProductForm::slices_in_turn};
}

void ProductTuner::try_offers(size_t bucket) {
  const int rows = rows_[bucket];
  for (const ProductForm form : forms(rows)) {
    // Where any bits will do, the clock may as well see all that is offered.
    const int most = rows > 512 ? 8 : free_choice_ ? 64 : 16;
    int rank = 0;
    for (const ProductChoice& choice : offered_products(lane_, shape_, form, rows, most, free_choice_)) {
      const int penalty = form == ProductForm::slices_in_turn && rows <= kFewRows ? kCostInTurn : 0;
      ++offered_;
      admit({choice, bucket, rank++ + penalty});
    }
  }
}

// Puts a candidate into the class that it agrees with; one that disagrees with itself, into none.
void ProductTuner::admit(const Candidate& candidate) {
  if (!product_fits(lane_, shape_, candidate.choice, rows_[candidate.bucket])) {
    return;
  }
  if (free_choice_) {
    if (!run(candidate.choice, false, rows_[candidate.bucket], Epilogue::store)) {
      return;
    }
    classes_.resize(1);
    classes_.front().members.push_back(candidate);
    return;
  }
  const RowBits bits = bits_of(candidate.choice, candidate.bucket);
  if (bits.stored.empty()) {
    return;
  }
  auto found = std::find_if(classes_.begin(), classes_.end(), [&](const BitClass& other) {
    return agree(other.bits.stored, bits.stored) && agree(other.bits.added, bits.added);
  });
  if (found == classes_.end()) {
    classes_.push_back({bits, {}});
    found = classes_.end() - 1;
  }
  learn(found->bits.stored, bits.stored);
  learn(found->bits.added, bits.added);
  found->members.push_back(candidate);
}

// False where cuBLASLt refuses after all.
bool ProductTuner::run(const ProductChoice& choice, bool shifted, int rows, Epilogue epilogue) {
  fill_proof_rows(y_.as<float>(), rows, shape_.out, shifted ? kShift : 0, most_rows(), kSeed + 2, lane_.stream());
  return try_product(lane_, shape_, choice, weight_.as<bf16>(), (shifted ? shifted_x_ : x_).as<bf16>(), rows,
                     y_.as<float>(), epilogue) == CUBLAS_STATUS_SUCCESS;
}

// Adds what y's rows hash to, each under the row of x that it came from.
void ProductTuner::hash(bool shifted, int rows, std::vector<uint64_t>& bits, bool& consistent) {
  hash_rows(y_.as<float>(), rows, shape_.out, hashes_.as<uint64_t>(), lane_.stream());
  host_hashes_.resize(static_cast<size_t>(rows));
  check_cuda(cudaMemcpyAsync(host_hashes_.data(), hashes_.as<uint64_t>(), host_hashes_.size() * sizeof(uint64_t),
                             cudaMemcpyDeviceToHost, lane_.stream()),
             "reading hashes");
  check_cuda(cudaStreamSynchronize(lane_.stream()), "a product's proof");
  for (size_t i = 0; i < host_hashes_.size(); ++i) {
    uint64_t& bit = bits[shifted ? (i + kShift) % bits.size() : i];
    consistent = consistent && (bit == 0 || bit == host_hashes_[i]);
    bit = host_hashes_[i];
  }
}

// The most and the fewest rows of the bucket, the latter at other places. Empty if they disagree or do not run.
RowBits ProductTuner::bits_of(const ProductChoice& choice, size_t bucket) {
  const size_t count = static_cast<size_t>(most_rows());
  RowBits bits{std::vector<uint64_t>(count), std::vector<uint64_t>(count)};
  const int rows = rows_[bucket];
  const int least = bucket == 0 ? 1 : rows_[bucket - 1] + 1;
  const int fewer = product_fits(lane_, shape_, choice, least) ? least : rows;
  bool consistent = run(choice, false, rows, Epilogue::store);
  hash(false, rows, bits.stored, consistent);
  consistent = consistent && run(choice, true, fewer, Epilogue::store);
  hash(true, fewer, bits.stored, consistent);
  consistent = consistent && run(choice, true, fewer, Epilogue::add);
  hash(true, fewer, bits.added, consistent);
  return consistent ? bits : RowBits{};
}

// Buckets from the first on in which the class has a member.
size_t ProductTuner::covered(const BitClass& members) const {
  size_t bucket = 0;
  while (bucket < rows_.size() && std::any_of(members.members.begin(), members.members.end(),
                                              [&](const Candidate& c) { return c.bucket == bucket; })) {
    ++bucket;
  }
  return bucket;
}

int ProductTuner::cost(const BitClass& members) const {
  const size_t reach = std::min(covered(members), buckets_.judged);
  int total = static_cast<int>(buckets_.judged - reach) * kCostUncovered;
  for (size_t bucket = 0; bucket < reach; ++bucket) {
    int least = kCostInTurn + kCostUncovered;
    for (const Candidate& candidate : members.members) {
      least = candidate.bucket == bucket ? std::min(least, candidate.cost) : least;
    }
    total += least;
  }
  return total;
}

// Tries the class's algorithms at row counts for which cuBLASLt offered none of them.
void ProductTuner::extend(BitClass& members) {
  std::vector<Candidate> distinct;
  for (const Candidate& candidate : members.members) {
    if (std::none_of(distinct.begin(), distinct.end(),
                     [&](const Candidate& other) { return same_choice(other.choice, candidate.choice); })) {
      distinct.push_back(candidate);
    }
  }
  std::vector<bool> has(buckets_.judged, false);
  for (const Candidate& candidate : members.members) {
    has[candidate.bucket] = true;
  }
  for (size_t bucket = has.size(); bucket-- > 0;) {
    for (size_t i = 0; !has[bucket] && i < distinct.size(); ++i) {
      const ProductChoice& choice = distinct[i].choice;
      if (!product_fits(lane_, shape_, choice, rows_[bucket])) {
        continue;
      }
      ++offered_;
      const RowBits bits = bits_of(choice, bucket);
      if (!bits.stored.empty() && agree(members.bits.stored, bits.stored) && agree(members.bits.added, bits.added)) {
        members.members.push_back({choice, bucket, kCostUncovered - 1});
      }
    }
  }
}

// Median of some runs with a cold cache, in which nothing waits for the host.
double ProductTuner::microseconds(const ProductChoice& choice, int rows, double best) {
  const bool cold = rows < 512;
  std::vector<float> times;
  const size_t repeats = rows < 1024 ? 7 : 3;
  while (times.size() < repeats) {
    if (cold) {
      check_cuda(cudaMemsetAsync(flush_.as<void>(), static_cast<int>(times.size()), kFlushBytes, lane_.stream()),
                 "flushing the cache");
    }
    check_cuda(cudaEventRecord(events_[0], lane_.stream()), "timing a product");
    run_product(lane_, shape_, choice, weight_.as<bf16>(), x_.as<bf16>(), rows, y_.as<float>(), Epilogue::store);
    check_cuda(cudaEventRecord(events_[1], lane_.stream()), "timing a product");
    check_cuda(cudaEventSynchronize(events_[1]), "timing a product");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]), "timing a product");
    times.push_back(milliseconds * 1e3f);
    if (times.size() == 2 && times.back() > 2 * best) {
      break;  // the first run may have loaded the kernel
    }
  }
  std::nth_element(times.begin(), times.begin() + static_cast<ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// The class that serves the most at the least cost.
size_t ProductTuner::choose_class() {
  for (size_t bucket = buckets_.judged; bucket-- > 0;) {
    try_offers(bucket);
  }
  if (std::none_of(classes_.begin(), classes_.end(), [&](const auto& c) { return covered(c) == buckets_.judged; })) {
    for (BitClass& members : classes_) {
      extend(members);
    }
  }
  const int sure = std::min(kFewRows, rows_[buckets_.judged - 1]);
  size_t best = classes_.size();
  for (size_t i = 0; i < classes_.size(); ++i) {
    const size_t buckets = covered(classes_[i]);
    if (buckets > 0 && rows_[buckets - 1] >= sure &&
        (best == classes_.size() || cost(classes_[i]) < cost(classes_[best]))) {
      best = i;
    }
  }
  if (best == classes_.size()) {
    throw Error(
        "products of a {} x {} weight: of cuBLASLt's algorithms none gives a row the same bits at 1 to {} rows, and "
        "nothing could be verified; use another version of CUDA, or --device cpu",
        shape_.out, shape_.in, sure);
  }
  return best;
}

ProductPlan ProductTuner::choose() {
  const size_t best = choose_class();
  for (size_t bucket = buckets_.judged; bucket < rows_.size(); ++bucket) {
    try_offers(bucket);
  }
  const std::vector<Candidate>& members = classes_[best].members;
  ProductPlan plan{.shape = shape_, .buckets = {}, .offered = offered_, .admitted = 0, .bucket_of_rows = {}};
  plan.admitted = static_cast<int>(members.size());
  const size_t buckets = covered(classes_[best]);
  for (size_t bucket = 0; bucket < buckets && (bucket == 0 || rows_[bucket - 1] < max_rows_); ++bucket) {
    ProductBucket chosen{rows_[bucket], {}, 1e30};
    for (const Candidate& candidate : members) {
      if (candidate.bucket == bucket) {
        const double us = microseconds(candidate.choice, chosen.rows, chosen.microseconds);
        chosen = us < chosen.microseconds ? ProductBucket{chosen.rows, candidate.choice, us} : chosen;
      }
    }
    plan.buckets.push_back(chosen);
  }
  plan.bucket_of_rows.assign(static_cast<size_t>(plan.buckets.back().rows) + 1, -1);
  return plan;
}

}  // namespace

ProductPlan tune_product(const ProductShape& shape, int max_rows, bool free_choice, ProductLane& lane) {
  ProductShape used = shape;
  used.slices = free_choice ? 1 : shape.slices;
  lane.grow_scratch(product_scratch_bytes(used, kMostRowsAtOnce));
  return ProductTuner(used, max_rows, free_choice, lane).choose();
}

}  // namespace vericache::cuda
