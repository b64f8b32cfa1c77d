#include "backend/cpu/cpu_kernels.h"

#include <fmt/format.h>
#include <hwy/targets.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/simd.h"
#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"

namespace vericache {
namespace {

// Work below this is done before a second thread has joined (1-2 us): bytes of weights, or values of a row operation.
constexpr size_t kForkWeightBytes = size_t{48} << 10;
constexpr size_t kForkValues = size_t{16} << 10;

// A block of rows stays in L2 while the panels of a task pass; a block of K keeps four panels in L1.
constexpr int kRowBlock = 192;
constexpr int kPanelBlock = 8;
constexpr int kThickRows = 24;
constexpr int kKBlock = 256;

constexpr std::array<std::string_view, 5> kIsaNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
size_t at(int rows, int columns) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns);
}
size_t panel_values(int in) {
  return at(padded_dim(in), kPanel);
}

CpuOps ops_of(Isa isa) {
  CpuOps ops{simd_product(isa), &row_ops(isa), &quant_ops(isa)};
  if (isa == Isa::avx512_bf16) {
    ops.product = avx512_bf16_product();
  } else if (isa == Isa::amx) {
    ops.product = amx_product();
  }
  return ops;
}

class CpuKernels final : public Kernels {
 public:
  CpuKernels(Isa isa, int threads, const KernelLimits& limits)
      : ops_(ops_of(isa)),
        limits_(limits),
        name_(fmt::format("cpu {}, {} thread{}", isa_name(isa), threads, threads == 1 ? "" : "s")),
        pool_(threads),
        attention_(ops_, pool_, limits),
        edge_(static_cast<size_t>(threads), std::vector<float>(at(kRowBlock, kPanel))),
        sequence_of_row_(static_cast<size_t>(limits.max_rows)) {}

  std::string_view name() const override { return name_; }
  size_t packed_bytes(int out, int in) const override {
    return static_cast<size_t>(ceil_div(out, kPanel)) * panel_values(in) * sizeof(bf16);
  }
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const override;
  void embed(const PackedMatrix& table, std::span<const TokenId> tokens, float* out) override;
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override;
  void add_bias(const float* bias, int rows, int dim, float* y) override;
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override;
  void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override;
  void store_qkv(const QkvArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void attention_mass(const MassArgs& args) override;
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out) override;
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override;
  void parallel(int count, const void* state, void (*body)(const void* state, int i)) override {
    pool_.run(count, state, body);
  }

 private:
  // body(row) for every row; one thread where the work is too small to share. A row is computed the same way either
  // way.
  template <typename Body>
  void for_rows(int rows, int values_per_row, const Body& body);
  void multiply_tile(const PackedMatrix& weight, const bf16* x, int rows, int first_panel, int panels, float* y,
                     bool add);
  void multiply_edge(const PackedMatrix& weight, const bf16* x, int rows, int k, int k_values, float* y,
                     bool accumulate);
  void store_row(const QkvArgs& args, int row);

  CpuOps ops_;
  KernelLimits limits_;
  std::string name_;
  ThreadPool pool_;
  Attention attention_;
  std::vector<std::vector<float>> edge_;  // per thread: (kRowBlock, 16), products of a panel that sticks out of y
  std::vector<const SequenceRows*> sequence_of_row_;
};

void CpuKernels::pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const {
  check(first >= 0 && rows >= 0 && rows <= matrix.out - first, "packed rows lie in the matrix");
  const int pairs = padded_dim(matrix.in) / 2;
  for (int begin = first; begin < first + rows;) {
    const int panel = begin / kPanel;
    const int end = std::min(first + rows, (panel + 1) * kPanel);
    bf16* out = matrix.data + static_cast<size_t>(panel) * panel_values(matrix.in);
    for (int p = 0; p < pairs; ++p) {
      for (int row = begin; row < end; ++row) {
        for (int i = 2 * p; i < std::min(2 * p + 2, matrix.in); ++i) {
          out[at(p * kPanel + row % kPanel, 2) + static_cast<size_t>(i % 2)] =
              source[at(row - first, matrix.in) + static_cast<size_t>(i)];
        }
      }
    }
    begin = end;
  }
}

template <typename Body>
void CpuKernels::for_rows(int rows, int values_per_row, const Body& body) {
  if (at(rows, values_per_row) < kForkValues) {
    const FlushDenormals flush;
    for (int row = 0; row < rows; ++row) {
      body(row);
    }
    return;
  }
  const int per_task = std::max(1, static_cast<int>(kForkValues / 4) / std::max(1, values_per_row));
  const FlushDenormals flush;
  pool_.parallel_for(ceil_div(rows, per_task), [&](int task) {
    const int end = std::min(rows, (task + 1) * per_task);
    for (int row = task * per_task; row < end; ++row) {
      body(row);
    }
  });
}

void CpuKernels::embed(const PackedMatrix& table, std::span<const TokenId> tokens, float* out) {
  for_rows(static_cast<int>(tokens.size()), table.in, [&](int row) {
    const TokenId token = tokens[static_cast<size_t>(row)];
    check(token >= 0 && token < table.out, "token ids lie in the vocabulary");
    const bf16* values =
        table.data + static_cast<size_t>(token / kPanel) * panel_values(table.in) + at(token % kPanel, 2);
    float* target = out + at(row, table.in);
    for (int i = 0; i < table.in; ++i) {
      target[i] = to_float(values[at(i / 2, 2 * kPanel) + static_cast<size_t>(i % 2)]);
    }
  });
}

void CpuKernels::matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) {
  const bool add = epilogue == Epilogue::add;
  const int panels = ceil_div(weight.out, kPanel);
  const int row_block = std::min(rows, kRowBlock);
  const FlushDenormals flush;
  const auto tile = [&](int first_row, int first_panel, int tile_panels) {
    multiply_tile(weight, x + at(first_row, padded_dim(weight.in)), std::min(row_block, rows - first_row), first_panel,
                  std::min(tile_panels, panels - first_panel), y + at(first_row, weight.out), add);
  };
  if (rows <= 0) {
    return;
  }
  if (pool_.threads() == 1 ||
      packed_bytes(weight.out, weight.in) * static_cast<size_t>(ceil_div(rows, 6)) < kForkWeightBytes) {
    for (int row = 0; row < rows; row += row_block) {
      tile(row, 0, panels);
    }
    return;
  }
  // Few rows: long runs of panels, so that each thread streams its share of the weights. Many rows: tiles of y.
  const int groups = ceil_div(panels, kPanelBlock);
  const int tile_panels = rows > kThickRows ? kPanelBlock : std::max(1, groups / (4 * pool_.threads())) * kPanelBlock;
  const int columns = ceil_div(panels, tile_panels);
  pool_.parallel_for(columns * ceil_div(rows, row_block),
                     [&](int i) { tile(i / columns * row_block, i % columns * tile_panels, tile_panels); });
}

void CpuKernels::multiply_tile(const PackedMatrix& weight, const bf16* x, int rows, int first_panel, int panels,
                               float* y, bool add) {
  const int k = padded_dim(weight.in);
  const int k_block = rows > kThickRows ? kKBlock : k;
  const int full = std::min(panels, weight.out / kPanel - first_panel);
  for (int begin = 0; begin < k; begin += k_block) {
    const int values = std::min(k_block, k - begin);
    const bf16* panel = weight.data + static_cast<size_t>(first_panel) * panel_values(weight.in) + at(begin, kPanel);
    ops_.product(x + begin, static_cast<size_t>(k), rows, panel, panel_values(weight.in), values / 2, full,
                 y + first_panel * kPanel, static_cast<size_t>(weight.out), add || begin > 0, nullptr);
    if (full < panels) {
      multiply_edge(weight, x, rows, begin, values, y, add || begin > 0);
    }
  }
}

void CpuKernels::multiply_edge(const PackedMatrix& weight, const bf16* x, int rows, int k, int k_values, float* y,
                               bool accumulate) {
  float* edge = edge_[static_cast<size_t>(ThreadPool::thread_index())].data();
  const int panel = weight.out / kPanel;
  const int width = weight.out % kPanel;
  float* columns = y + panel * kPanel;
  for (int row = 0; accumulate && row < rows; ++row) {
    std::copy_n(columns + at(row, weight.out), width, edge + at(row, kPanel));
  }
  ops_.product(x + k, static_cast<size_t>(padded_dim(weight.in)), rows,
               weight.data + static_cast<size_t>(panel) * panel_values(weight.in) + at(k, kPanel),
               panel_values(weight.in), k_values / 2, 1, edge, kPanel, accumulate, nullptr);
  for (int row = 0; row < rows; ++row) {
    std::copy_n(edge + at(row, kPanel), width, columns + at(row, weight.out));
  }
}

void CpuKernels::add_bias(const float* bias, int rows, int dim, float* y) {
  for_rows(rows, dim, [&](int row) { ops_.rows->add(bias, dim, y + at(row, dim)); });
}

void CpuKernels::rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) {
  for_rows(rows, dim,
           [&](int row) { ops_.rows->rms_norm(x + at(row, dim), weight, eps, dim, out + at(row, padded_dim(dim))); });
}

void CpuKernels::silu_mul(const float* gate_up, int rows, int dim, bf16* out) {
  for_rows(rows, 2 * dim, [&](int row) {
    const float* gate = gate_up + at(row, 2 * dim);
    ops_.rows->silu_mul(gate, gate + dim, dim, out + at(row, padded_dim(dim)));
  });
}

void CpuKernels::store_qkv(const QkvArgs& args) {
  check(args.shape == limits_.shape && args.heads == limits_.heads && args.rows <= limits_.max_rows,
        "store_qkv runs within the limits it was built for");
  std::fill_n(sequence_of_row_.begin(), args.rows, nullptr);
  for (const SequenceRows& sequence : args.sequences) {
    check(sequence.first_row >= 0 && sequence.rows <= args.rows - sequence.first_row,
          "a sequence's rows lie in the pass");
    check(sequence.position >= sequence.kv.tail_position && sequence.position + sequence.rows <= args.rope.positions,
          "a sequence's rows stand in its tail, at positions that RoPE knows");
    std::fill_n(sequence_of_row_.begin() + sequence.first_row, sequence.rows, &sequence);
  }
  for_rows(args.rows, (args.heads + 2 * args.shape.kv_heads) * args.shape.head_dim,
           [&](int row) { store_row(args, row); });
}

// K is written along its panel's pairs, V down its panel's lanes: each token is one lane of K and one half of a pair of
// V.
void CpuKernels::store_row(const QkvArgs& args, int row) {
  const SequenceRows* sequence = sequence_of_row_[static_cast<size_t>(row)];
  check(sequence != nullptr, "every row belongs to a sequence");
  const KvShape& shape = args.shape;
  const int head_dim = shape.head_dim;
  const int kv_heads = shape.kv_heads;
  const int position = sequence->position + row - sequence->first_row;
  const float* qkv = args.qkv + at(row, (args.heads + 2 * kv_heads) * head_dim);
  const float* cos = args.rope.cos + at(position, head_dim / 2);
  const float* sin = args.rope.sin + at(position, head_dim / 2);
  const auto bias = [&](int head) { return args.bias == nullptr ? nullptr : args.bias + at(head, head_dim); };
  for (int head = 0; head < args.heads; ++head) {
    bf16* q = args.q + at(row * args.heads + head, shape.key_dim());
    ops_.rows->finish_head(qkv + at(head, head_dim), bias(head), args.q_norm, args.norm_eps, cos, sin, head_dim, q);
    std::fill(q + head_dim, q + shape.key_dim(), bf16{0});
  }
  if (sequence->keep_kv) {
    return;
  }
  const int slot = (position - sequence->kv.tail_position) % kPageTokens;
  const int page = (position - sequence->kv.tail_position) / kPageTokens;
  bf16 k[kMaxHeadDim + kPanel] = {};
  bf16 v[kMaxHeadDim];
  for (int head = 0; head < kv_heads; ++head) {
    const int k_head = args.heads + head;
    const int v_head = k_head + kv_heads;
    ops_.rows->finish_head(qkv + at(k_head, head_dim), bias(k_head), args.k_norm, args.norm_eps, cos, sin, head_dim, k);
    ops_.rows->finish_head(qkv + at(v_head, head_dim), bias(v_head), nullptr, 0, nullptr, nullptr, head_dim, v);
    auto* keys = reinterpret_cast<bf16*>(sequence->kv.tail.head_page(head, page));
    bf16* values = keys + at(kPageTokens, shape.key_dim());
    for (int d = 0; d < shape.key_dim(); d += 2) {
      std::memcpy(keys + key_index(slot, d, shape), k + d, 2 * sizeof(bf16));
    }
    for (int d = 0; d < head_dim; ++d) {
      values[value_index(slot, d)] = v[d];
    }
  }
}

void CpuKernels::attention(const AttentionArgs& args) {
  const FlushDenormals flush;
  attention_.run(args);
}

void CpuKernels::attention_mass(const MassArgs& args) {
  const FlushDenormals flush;
  attention_.mass(args);
}

void CpuKernels::quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                                    std::byte* out) {
  const FlushDenormals flush;
  const int key_panels = kPageTokens / kPanel;
  const int value_panels = shape.head_dim / kPanel;
  const auto* keys = reinterpret_cast<const bf16*>(source);
  const bf16* values = keys + at(kPageTokens, shape.key_dim());
  std::byte* out_values = out + key_page_bytes(format.key_bits, shape);
  if (format.key_bits == 16) {
    std::memcpy(out, keys, key_page_bytes(16, shape));
  } else {
    ops_.quant->quantize(keys, format.key_bits, key_panels, shape.key_dim() / 2, tokens, shape.key_dim(), out);
  }
  if (format.value_bits == 16) {
    std::memcpy(out_values, values, value_page_bytes(16, shape));
  } else {
    ops_.quant->quantize(values, format.value_bits, value_panels, kPageTokens / 2, shape.head_dim, tokens, out_values);
  }
}

void CpuKernels::dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                                      std::byte* out) {
  const FlushDenormals flush;
  auto* keys = reinterpret_cast<bf16*>(out);
  bf16* values = keys + at(kPageTokens, shape.key_dim());
  const std::byte* source_values = source + key_page_bytes(format.key_bits, shape);
  if (format.key_bits == 16) {
    std::memcpy(keys, source, key_page_bytes(16, shape));
  } else {
    ops_.quant->dequantize(source, format.key_bits, kPageTokens / kPanel, shape.key_dim() / 2, keys, nullptr);
  }
  if (format.value_bits == 16) {
    std::memcpy(values, source_values, value_page_bytes(16, shape));
  } else {
    ops_.quant->dequantize(source_values, format.value_bits, shape.head_dim / kPanel, kPageTokens / 2, values, nullptr);
  }
}

}  // namespace

std::string_view isa_name(Isa isa) {
  return kIsaNames[static_cast<size_t>(isa)];
}

std::optional<Isa> parse_isa(std::string_view name) {
  const auto found = std::find(kIsaNames.begin(), kIsaNames.end(), name);
  return found == kIsaNames.end() ? std::nullopt : std::optional(static_cast<Isa>(found - kIsaNames.begin()));
}

bool isa_supported(Isa isa) {
  const int64_t targets = hwy::SupportedTargets();
  const bool avx512 = (targets & HWY_AVX3) != 0;
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return (targets & HWY_AVX2) != 0;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") != 0;
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("amx-tile") != 0 && __builtin_cpu_supports("amx-bf16") != 0 &&
             amx_permitted();
  }
  return false;
}

Isa best_isa() {
  for (const Isa isa : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
    if (isa_supported(isa)) {
      return isa;
    }
  }
  return Isa::portable;
}

std::unique_ptr<Kernels> make_cpu_kernels(Isa isa, int threads, const KernelLimits& limits) {
  if (!isa_supported(isa)) {
    throw Error("this processor has no {}: choose {} or a lower instruction class", isa_name(isa),
                isa_name(best_isa()));
  }
  if (threads < 1) {
    throw Error("threads is {}: give 1 or more", threads);
  }
  if (limits.shape.head_dim < kPanel || limits.shape.head_dim % kPanel != 0 || limits.shape.head_dim > kMaxHeadDim) {
    throw Error("the CPU backend needs a head size that is a multiple of 16 and at most {}, not {}", kMaxHeadDim,
                limits.shape.head_dim);
  }
  if (limits.shape.kv_heads < 1 || limits.heads % limits.shape.kv_heads != 0) {
    throw Error("{} query heads are not shared evenly by {} KV heads", limits.heads, limits.shape.kv_heads);
  }
  return std::make_unique<CpuKernels>(isa, threads, limits);
}

}  // namespace vericache
