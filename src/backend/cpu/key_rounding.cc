#include "backend/cpu/key_rounding.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/cpu/simd.h"
#include "backend/rotation.h"

namespace vericache {
namespace {

// The lower half of a symmetric matrix, by rows.
class Lower {
 public:
  explicit Lower(int dims) : values_(static_cast<size_t>(dims) * static_cast<size_t>(dims + 1) / 2) {}
  float* row(int i) { return values_.data() + static_cast<size_t>(i) * static_cast<size_t>(i + 1) / 2; }

 private:
  std::vector<float> values_;
};

// The mean over the queries of one KV head, rotated, and those that `matrix` knows.
void join_queries(const RoundingArgs& args, int kv_head, const bf16* matrix, Lower& mean) {
  const int dims = args.shape.head_dim;
  const int group = args.heads / args.shape.kv_heads;
  const float count = static_cast<float>((args.known + args.rows) * group);
  const float old = static_cast<float>(args.known * group) / count;
  for (int a = 0; a < dims && args.known > 0; ++a) {
    std::transform(matrix + a * dims, matrix + a * dims + a + 1, mean.row(a),
                   [&](bf16 x) { return old * to_float(x); });
  }
  float q[kMaxHeadDim];
  for (int i = 0; i < args.rows * group; ++i) {
    const int row = (args.position + i / group - args.queries.origin) % args.queries.capacity;
    const int head = kv_head * group + i % group;
    const bf16* from = args.queries.q + (static_cast<ptrdiff_t>(row) * args.heads + head) * args.shape.key_dim();
    std::transform(from, from + dims, q, to_float);
    rotate(q, dims);
    for (int a = 0; a < dims; ++a) {
      float* to = mean.row(a);
      const float part = q[a] / count;
      for (int b = 0; b <= a; ++b) {
        to[b] += part * q[b];
      }
    }
  }
}

float trace_of(Lower& c, int dims) {
  float trace = 0;
  for (int i = 0; i < dims; ++i) {
    trace += c.row(i)[i];
  }
  return trace;
}

// In place: column k below the diagonal becomes that of L.
void decompose(Lower& c, int dims) {
  const float damping = kRoundingDamping * trace_of(c, dims) / static_cast<float>(dims);
  for (int i = 0; i < dims; ++i) {
    c.row(i)[i] += damping;
  }
  for (int k = 0; k < dims; ++k) {
    const float pivot = c.row(k)[k];
    for (int i = k + 1; i < dims; ++i) {
      const float share = c.row(i)[k] / pivot;
      for (int j = k + 1; j <= i; ++j) {
        c.row(i)[j] -= share * c.row(j)[k];
      }
    }
    for (int i = k + 1; i < dims; ++i) {
      c.row(i)[k] /= pivot;
    }
  }
}

}  // namespace

void fit_key_rounding(const RoundingArgs& args, ThreadPool& pool) {
  const FlushDenormals flush;
  const int dims = args.shape.head_dim;
  pool.parallel_for(args.shape.kv_heads, [&](int head) {
    Lower c(dims);
    bf16* matrix = args.matrix + static_cast<ptrdiff_t>(head) * dims * dims;
    join_queries(args, head, matrix, c);
    if (const float trace = trace_of(c, dims); !(trace > 0) || !std::isfinite(trace)) {
      if (args.known == 0) {
        std::fill_n(matrix, dims * dims, bf16{});
      }
      return;
    }
    for (int i = 0; i < dims; ++i) {
      std::transform(c.row(i), c.row(i) + i + 1, matrix + i * dims, to_bf16);
    }
    decompose(c, dims);
    for (int i = 0; i < dims; ++i) {
      for (int j = i + 1; j < dims; ++j) {
        matrix[i * dims + j] = to_bf16(c.row(j)[i]);
      }
    }
  });
}

}  // namespace vericache
