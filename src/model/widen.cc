#include "model/widen.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "backend/random_fill.h"
#include "base/check.h"
#include "base/error.h"
#include "model/rope.h"

namespace vericache {
namespace {

constexpr std::string_view kPrefix = "widen:";
constexpr std::string_view kForms =
    "write widen:DIR?shape=NAME, NAME one of llama-8b, qwen-14b, qwen-32b and llama-70b, or "
    "widen:DIR?layers=..,hidden=..,heads=..,kv_heads=..,head_dim=..,intermediate=..";

struct NamedShape {
  std::string_view name;
  std::array<int, 6> sizes;  // in the order of kSizes
};
// As published: Llama 3.1 8B and 70B, Qwen3 14B and 32B.
constexpr std::array<NamedShape, 4> kShapes = {{{"llama-8b", {32, 4096, 32, 8, 128, 14336}},
                                                {"qwen-14b", {40, 5120, 40, 8, 128, 17408}},
                                                {"qwen-32b", {64, 5120, 64, 8, 128, 25600}},
                                                {"llama-70b", {80, 8192, 64, 8, 128, 28672}}}};

struct Size {
  std::string_view key;
  int WidenSpec::*field;
  int most;
};
constexpr std::array<Size, 6> kSizes = {{{"layers", &WidenSpec::layers, 1024},
                                         {"hidden", &WidenSpec::hidden_size, 1 << 20},
                                         {"heads", &WidenSpec::heads, 4096},
                                         {"kv_heads", &WidenSpec::kv_heads, 4096},
                                         {"head_dim", &WidenSpec::head_dim, 1024},
                                         {"intermediate", &WidenSpec::intermediate_size, 1 << 20}}};

void set_shape(std::string_view name, WidenSpec& spec) {
  const auto* found =
      std::find_if(kShapes.begin(), kShapes.end(), [&](const NamedShape& shape) { return shape.name == name; });
  if (found == kShapes.end()) {
    throw UsageError("--model: the shape '{}' is unknown; {}", name, kForms);
  }
  for (size_t i = 0; i < kSizes.size(); ++i) {
    spec.*kSizes[i].field = found->sizes[i];
  }
}

void set_size(std::string_view key, std::string_view value, WidenSpec& spec) {
  const auto* found = std::find_if(kSizes.begin(), kSizes.end(), [&](const Size& size) { return size.key == key; });
  if (found == kSizes.end()) {
    throw UsageError("--model: '{}' is no part of a shape; {}", key, kForms);
  }
  int size = 0;
  const auto [rest, failure] = std::from_chars(value.data(), value.data() + value.size(), size);
  if (failure != std::errc{} || rest != value.data() + value.size() || size < 1 || size > found->most) {
    throw UsageError("--model: {}={} is no size; give a number from 1 to {}", key, value, found->most);
  }
  spec.*found->field = size;
}

void require_room(std::string_view key, int wide, int trained) {
  if (wide < trained) {
    throw Error("--model: a shape with {}={} cannot hold the trained model, which has {}; choose a larger shape", key,
                wide, trained);
  }
}

// Pair i of the trained head turns as pair i * factor of the wide one; angles grow with the position, so the rates must
// be equal but for rounding. Yarn's ramp depends on the head size otherwise than through the rates.
void require_equal_rotation(const Rope& rope, int head_dim, int factor) {
  const std::vector<double> trained = rope_inverse_frequencies(rope, head_dim);
  const std::vector<double> wide = rope_inverse_frequencies(rope, head_dim * factor);
  for (size_t i = 0; i < trained.size(); ++i) {
    if (std::abs(wide[i * static_cast<size_t>(factor)] - trained[i]) > 1e-12 * trained[i]) {
      throw Error(
          "--model: the trained model's RoPE scaling depends on the head size, {}: it cannot be widened to heads of "
          "{}; choose head_dim={}",
          head_dim, head_dim * factor, head_dim);
    }
  }
}

// Where a row of a wide matrix comes from.
struct RowOrigin {
  enum Kind { trained, zero, filler };
  Kind kind = filler;
  int tensor = 0;  // of tensors_of(role, ...)
  int row = 0;
  float factor = 1;
};

// Rows of a wide matrix from `first` on that are not as it was filled.
struct RowRun {
  int first = 0;
  std::vector<RowOrigin> rows;
};

RowRun trained_rows(int first, int tensor, int count) {
  RowRun run{first, {}};
  for (int row = 0; row < count; ++row) {
    run.rows.push_back({.kind = RowOrigin::trained, .tensor = tensor, .row = row});
  }
  return run;
}

bool writes_stream(MatrixRole role) {
  return role == MatrixRole::embedding || role == MatrixRole::output || role == MatrixRole::down;
}

// Which rows and columns of wide matrices the trained ones are.
class Placement {
 public:
  Placement(const ModelConfig& trained, const ModelConfig& wide) : trained_(trained), wide_(wide) {}

  std::vector<RowRun> rows(MatrixRole role) const {
    switch (role) {
      case MatrixRole::embedding:
      case MatrixRole::head:
        return {trained_rows(0, 0, trained_.vocab_size)};
      case MatrixRole::qkv:
        return qkv_rows();
      case MatrixRole::gate_up:
        return {trained_rows(0, 0, trained_.intermediate_size),
                trained_rows(wide_.intermediate_size, 1, trained_.intermediate_size)};
      case MatrixRole::output:
      case MatrixRole::down:
        return {trained_rows(0, 0, trained_.hidden_size)};
    }
    return {};
  }

  // The wide column of each trained column.
  std::vector<int> columns(MatrixRole role) const {
    if (role != MatrixRole::output) {
      std::vector<int> same(
          static_cast<size_t>(role == MatrixRole::down ? trained_.intermediate_size : trained_.hidden_size));
      for (size_t i = 0; i < same.size(); ++i) {
        same[i] = static_cast<int>(i);
      }
      return same;
    }
    std::vector<int> columns;
    for (int head = 0; head < trained_.heads; ++head) {
      const int wide_head = head / group() * wide_group() + head % group();
      for (int dim = 0; dim < trained_.head_dim; ++dim) {
        columns.push_back(wide_head * wide_.head_dim + dim);
      }
    }
    return columns;
  }

 private:
  int group() const { return trained_.heads / trained_.kv_heads; }
  int wide_group() const { return wide_.heads / wide_.kv_heads; }

  // Of a dimension of a wide query or key; -1: the trained head has none there.
  int trained_dim(int dim) const {
    const int factor = wide_.head_dim / trained_.head_dim;
    const int half = wide_.head_dim / 2;
    return dim % half % factor != 0 ? -1 : dim % half / factor + dim / half * (trained_.head_dim / 2);
  }

  // Values are not rotated: their trained dimensions come first, as columns() has them.
  std::vector<RowRun> qkv_rows() const {
    const int size = trained_.head_dim;
    const float query_factor = std::sqrt(static_cast<float>(wide_.head_dim) / static_cast<float>(size));
    RowRun q{0, {}};
    RowRun k{wide_.heads * wide_.head_dim, {}};
    RowRun v{(wide_.heads + wide_.kv_heads) * wide_.head_dim, {}};
    for (int head = 0; head < trained_.kv_heads * wide_group(); ++head) {
      const int from = head / wide_group() * group() + head % wide_group() % group();
      for (int dim = 0; dim < wide_.head_dim; ++dim) {
        const int t = trained_dim(dim);
        q.rows.push_back(t < 0 ? RowOrigin{.kind = RowOrigin::zero}
                               : RowOrigin{RowOrigin::trained, 0, from * size + t, query_factor});
      }
    }
    for (int head = 0; head < trained_.kv_heads; ++head) {
      for (int dim = 0; dim < wide_.head_dim; ++dim) {
        const int t = trained_dim(dim);
        k.rows.push_back(t < 0 ? RowOrigin{} : RowOrigin{RowOrigin::trained, 1, head * size + t});
        v.rows.push_back(dim >= size ? RowOrigin{} : RowOrigin{RowOrigin::trained, 2, head * size + dim});
      }
    }
    return {q, k, v};
  }

  const ModelConfig& trained_;
  const ModelConfig& wide_;
};

double mean_square(const TensorView& tensor, const NamedTensor& named) {
  std::vector<float> row(static_cast<size_t>(named.columns));
  double sum = 0;
  for (int i = 0; i < named.rows; ++i) {
    read_rows(tensor, i, 1, std::span<float>(row));
    for (const float value : row) {
      sum += static_cast<double>(value) * value;
    }
  }
  return sum / (static_cast<double>(named.rows) * named.columns);
}

// The values of a wide model's weights. Layers behind the trained ones take their norms and the size of their random
// values from the trained ones in turn.
class WideSource final : public WeightSource {
 public:
  WideSource(const Checkpoint& checkpoint, const ModelConfig& trained, const ModelConfig& wide, const Kernels& kernels)
      : checkpoint_(checkpoint),
        trained_(trained),
        placement_(trained, wide),
        kernels_(kernels),
        norm_factor_(std::sqrt(static_cast<double>(trained.hidden_size) / wide.hidden_size)) {}

  void fill_matrix(MatrixRole role, int layer, PackedMatrix& matrix) override {
    const bool idle = layer >= trained_.layers;
    if (writes_stream(role) && idle) {
      return;
    }
    const std::vector<NamedTensor> named = tensors_of(role, layer % trained_.layers, trained_);
    std::vector<const TensorView*> tensors;
    tensors.reserve(named.size());
    for (const NamedTensor& n : named) {
      tensors.push_back(&checkpoint_.find(n.name, std::array<int64_t, 2>{n.rows, n.columns}));
    }
    const size_t width = static_cast<size_t>(matrix.in);
    filler_.assign(width + kFillerOffsets, bf16{0});
    if (!writes_stream(role)) {
      fill_random(role, layer, named, tensors, matrix);
    }
    if (!idle) {
      const std::vector<int> columns = placement_.columns(role);
      for (const RowRun& run : placement_.rows(role)) {
        pack_in_pieces(kernels_, run.first, static_cast<int>(run.rows.size()), matrix,
                       [&](int first, int count, std::span<bf16> out) {
                         for (int row = first; row < first + count; ++row, out = out.subspan(width)) {
                           write_row(run.rows[static_cast<size_t>(row)], run.first + row, tensors, columns,
                                     out.first(width));
                         }
                       });
      }
    }
    for (const NamedTensor& n : named) {
      checkpoint_.release(n.name);
    }
  }

  void fill_vector(VectorRole role, int layer, std::span<float> values) override {
    switch (role) {
      case VectorRole::attention_norm:
      case VectorRole::mlp_norm:
      case VectorRole::final_norm:
        return fill_norm(role, layer % trained_.layers, values);
      case VectorRole::qkv_bias:
        return fill_bias(role, MatrixRole::qkv, layer, values);
      case VectorRole::output_bias:
        return fill_bias(role, MatrixRole::output, layer, values);
      case VectorRole::gate_up_bias:
        return fill_bias(role, MatrixRole::gate_up, layer, values);
      case VectorRole::down_bias:
        return fill_bias(role, MatrixRole::down, layer, values);
      case VectorRole::q_norm:
      case VectorRole::k_norm:
        check(false, "models with q/k norms are not widened");
    }
  }

 private:
  // A row of filler is a stretch of one random row: drawing every one anew would take most of the loading time.
  static constexpr size_t kFillerOffsets = 8192;

  // Half the size of the smallest trained values beside them: a quantizer that scales over a head's values, trained and
  // random, finds the trained range.
  void fill_random(MatrixRole role, int layer, std::span<const NamedTensor> named,
                   std::span<const TensorView* const> tensors, PackedMatrix& matrix) {
    double least = mean_square(*tensors[0], named[0]);
    for (size_t i = 1; i < tensors.size(); ++i) {
      least = std::min(least, mean_square(*tensors[i], named[i]));
    }
    const float scale = static_cast<float>(std::sqrt(3 * least) / 2);  // uniform in (-s, s) has mean square s^2 / 3
    const uint64_t seed = static_cast<uint64_t>(layer) * 8 + static_cast<uint64_t>(role);
    kernels_.fill_random(matrix, seed, scale);
    for (size_t i = 0; i < filler_.size(); ++i) {
      filler_[i] = random_value(seed, matrix.out, static_cast<int>(i), scale);  // a row that the matrix does not have
    }
  }

  void write_row(const RowOrigin& origin, int wide_row, std::span<const TensorView* const> tensors,
                 std::span<const int> columns, std::span<bf16> out) {
    if (origin.kind == RowOrigin::zero) {
      std::fill(out.begin(), out.end(), bf16{0});
      return;
    }
    const size_t offset = static_cast<size_t>(wide_row) * 97 % kFillerOffsets;
    std::copy_n(filler_.begin() + static_cast<ptrdiff_t>(offset), out.size(), out.begin());
    if (origin.kind == RowOrigin::trained) {
      trained_row_.resize(columns.size());
      read_rows(*tensors[static_cast<size_t>(origin.tensor)], origin.row, 1, std::span<float>(trained_row_));
      for (size_t i = 0; i < columns.size(); ++i) {
        out[static_cast<size_t>(columns[i])] = to_bf16(trained_row_[i] * origin.factor);
      }
    }
  }

  // Channels behind the trained ones are zero before the norm: any weight will do.
  void fill_norm(VectorRole role, int layer, std::span<float> values) {
    std::fill(values.begin(), values.end(), 1.0f);
    read_vector(tensors_of(role, layer, trained_)[0], values);
    for (float& value : values) {
      value = static_cast<float>(value * norm_factor_);
    }
  }

  // Only trained rows have a bias.
  void fill_bias(VectorRole role, MatrixRole of, int layer, std::span<float> values) {
    if (layer >= trained_.layers) {
      return;
    }
    std::vector<std::vector<float>> biases;
    for (const NamedTensor& named : tensors_of(role, layer, trained_)) {
      biases.emplace_back(static_cast<size_t>(named.rows));
      read_vector(named, biases.back());
    }
    for (const RowRun& run : placement_.rows(of)) {
      for (size_t i = 0; i < run.rows.size(); ++i) {
        const RowOrigin& origin = run.rows[i];
        if (origin.kind == RowOrigin::trained) {
          values[static_cast<size_t>(run.first) + i] =
              biases[static_cast<size_t>(origin.tensor)][static_cast<size_t>(origin.row)] * origin.factor;
        }
      }
    }
  }

  void read_vector(const NamedTensor& named, std::span<float> out) const {
    const TensorView& tensor = checkpoint_.find(named.name, std::array<int64_t, 1>{named.rows});
    read_rows(tensor, 0, named.rows, out.first(static_cast<size_t>(named.rows)));
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& trained_;
  Placement placement_;
  const Kernels& kernels_;
  double norm_factor_;
  std::vector<bf16> filler_;
  std::vector<float> trained_row_;
};

}  // namespace

std::optional<WidenSpec> parse_widen(std::string_view model_flag) {
  if (!model_flag.starts_with(kPrefix)) {
    return std::nullopt;
  }
  const std::string_view rest = model_flag.substr(kPrefix.size());
  const size_t mark = rest.rfind('?');
  if (mark == std::string_view::npos || mark == 0) {
    throw UsageError("--model '{}' names no {}; {}", model_flag, mark == 0 ? "directory" : "shape", kForms);
  }
  WidenSpec spec;
  spec.model_dir = rest.substr(0, mark);
  spec.shape = rest.substr(mark + 1);
  const std::string_view shape = spec.shape;
  for (size_t begin = 0; begin <= shape.size();) {
    const std::string_view item = shape.substr(begin, shape.find(',', begin) - begin);
    const std::string_view key = item.substr(0, item.find('='));
    const std::string_view value = item.substr(std::min(item.size(), key.size() + 1));
    if (begin == 0 && key == "shape") {
      set_shape(value, spec);
    } else {
      set_size(key, value, spec);
    }
    begin += item.size() + 1;
  }
  for (const Size& size : kSizes) {
    if (spec.*size.field == 0) {
      throw UsageError("--model '{}' does not say {}; {}", model_flag, size.key, kForms);
    }
  }
  if (spec.heads % spec.kv_heads != 0) {
    throw UsageError("--model: {} heads cannot share {} KV heads evenly; correct kv_heads", spec.heads, spec.kv_heads);
  }
  if (spec.hidden_size % 2 != 0 || spec.intermediate_size % 2 != 0) {
    throw UsageError("--model: hidden={} and intermediate={} must be even", spec.hidden_size, spec.intermediate_size);
  }
  return spec;
}

ModelConfig widen_config(const ModelConfig& trained, const WidenSpec& spec) {
  if (trained.qk_norm) {
    throw Error(
        "--model: {} norms queries and keys over the whole head, which random dimensions would change: it cannot be "
        "widened; choose a model without q/k norms",
        trained.family_name);
  }
  require_room("layers", spec.layers, trained.layers);
  require_room("hidden", spec.hidden_size, trained.hidden_size);
  require_room("kv_heads", spec.kv_heads, trained.kv_heads);
  require_room("heads / kv_heads", spec.heads / spec.kv_heads, trained.heads / trained.kv_heads);
  require_room("head_dim", spec.head_dim, trained.head_dim);
  require_room("intermediate", spec.intermediate_size, trained.intermediate_size);
  if (spec.head_dim % trained.head_dim != 0) {
    throw Error("--model: head_dim={} is no multiple of the trained model's {}: its RoPE pairs would have no place",
                spec.head_dim, trained.head_dim);
  }
  require_equal_rotation(trained.rope, trained.head_dim, spec.head_dim / trained.head_dim);
  ModelConfig wide = trained;
  wide.layers = spec.layers;
  wide.hidden_size = spec.hidden_size;
  wide.heads = spec.heads;
  wide.kv_heads = spec.kv_heads;
  wide.head_dim = spec.head_dim;
  wide.intermediate_size = spec.intermediate_size;
  wide.rms_norm_eps =
      static_cast<float>(static_cast<double>(trained.rms_norm_eps) * trained.hidden_size / spec.hidden_size);
  wide.tied_embeddings = false;
  return wide;
}

Weights load_widened(const Checkpoint& checkpoint, const ModelConfig& trained, const ModelConfig& wide,
                     const Kernels& kernels, Device& device, int max_positions,
                     const std::function<void(size_t, size_t)>& progress) {
  WideSource source(checkpoint, trained, wide, kernels);
  return build_weights(source, wide, kernels, device, max_positions, progress);
}

}  // namespace vericache
