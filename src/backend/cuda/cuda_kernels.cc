#include "backend/cuda/cuda_kernels.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/cuda_device.h"
#include "backend/cuda/cuda_lane.h"
#include "backend/cuda/draft_graphs.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/pass_stage.h"
#include "backend/cuda/products.h"
#include "base/check.h"
#include "base/error.h"

namespace vericache::cuda {
namespace {

Limits limits_of(const CudaOptions& options, int max_rows) {
  return {.shape = options.shape,
          .heads = options.heads,
          .max_rows = max_rows,
          .max_sequences = options.max_sequences,
          .max_context_tokens = options.max_context_tokens};
}

// A full pass is what a user waits for, and what arrives over the wire is what it waits for; drafts take the rest.
int priority_of(Kernels::Place place) {
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for the priorities of streams");
  switch (place) {
    case Kernels::Place::pass:
      return greatest;
    case Kernels::Place::wire_in:
    case Kernels::Place::wire_out:
      return std::min(least, greatest + 1);
    case Kernels::Place::draft:
      return least;
  }
  return least;
}

// What a lane needs to run passes; wires have none.
struct PassLane {
  PassLane(const Limits& limits, bool exact, cudaStream_t stream)
      : stage(limits, exact),
        product(stream),
        attention_scratch(exact ? attention_scratch_bytes(limits) : 0, "the partial results of attention"),
        draft_scratch(draft_attention_scratch_bytes(limits), "the partial results of draft attention"),
        draft_counts(draft_attention_counts(limits) * sizeof(int), "the counters of draft attention"),
        proofs((2 + static_cast<size_t>(limits.max_context_tokens / kPageTokens)) * sizeof(PageProof), "proofs") {
    for (const DeviceMemory* counters : {&draft_counts, &proofs}) {
      check_cuda(cudaMemset(counters->as<void>(), 0, counters->bytes()), "zeroing counters");
    }
  }

  size_t device_bytes() const {
    return stage.device_bytes() + product.device_bytes() + attention_scratch.bytes() + draft_scratch.bytes() +
           draft_counts.bytes() + proofs.bytes();
  }

  PassStage stage;
  ProductLane product;
  DeviceMemory attention_scratch;
  DeviceMemory draft_scratch;
  DeviceMemory draft_counts;
  DeviceMemory proofs;
  DraftGraphs graphs;
};

class CudaKernels final : public Kernels {
 public:
  explicit CudaKernels(const CudaOptions& options);

  std::string_view name() const override { return root_->name_; }
  size_t device_bytes() const override {
    return root_->passes_->device_bytes() + root_->draft_->passes_->device_bytes();
  }
  size_t packed_bytes(int out, int in) const override {
    return static_cast<size_t>(out) * static_cast<size_t>(padded_dim(in)) * sizeof(bf16);
  }
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const override;
  void fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const override;
  void tune(std::span<const PackedMatrix> weights) override;
  Kernels& lane(Place place) override;

  Mark mark() override { return lane_.mark(); }
  bool reached(Mark mark) override { return lane_.reached(mark); }
  void wait(Mark mark) override { lane_.wait(mark); }
  double seconds(Mark from, Mark to) override { return lane_.seconds(from, to); }
  double time(Mark mark) override { return lane_.time(mark); }
  void follow(Lane& other, Mark mark) override { lane_.follow(dynamic_cast<CudaKernels&>(other).lane_, mark); }
  void upload(std::byte* target, const void* source, size_t bytes) override { lane_.upload(target, source, bytes); }

  void stage(const PassRows& pass) override { passes().stage.stage(pass, lane_); }
  void replay(const PassRows& pass, const void* state, void (*body)(const void* state)) override;
  void forget_passes() override { passes().graphs.clear(); }

  void embed(const PackedMatrix& table, const PassRows& pass, float* out) override {
    cuda::embed(table, staged(pass), out, stream());
  }
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    const Products& products = place_ == Place::draft ? *root_->draft_products_ : *root_->products_;
    products.multiply(passes().product, weight, x, rows, y, epilogue);
  }
  void add_bias(const float* bias, int rows, int dim, float* y) override {
    cuda::add_bias(bias, rows, dim, y, stream());
  }
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override {
    cuda::rms_norm(x, weight, eps, rows, dim, out, stream());
  }
  void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override {
    cuda::silu_mul(gate_up, rows, dim, out, stream());
  }
  void store_qkv(const QkvArgs& args) override { cuda::store_qkv(args, staged(*args.pass), stream()); }
  void attention(const AttentionArgs& args) override;
  void select_rows(const float* x, const PassRows& pass, int dim, float* out) override {
    cuda::select_rows(x, staged(pass), dim, out, stream());
  }
  void choose(const float* logits, const PassRows& pass, int vocabulary) override {
    cuda::choose(logits, staged(pass), vocabulary, stream());
  }

  void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const PassRows& pass,
                    int layer) override {
    cuda::keep_queries(q, log_sum_exp, heads, shape, staged(pass), layer, stream());
  }
  void attention_mass(const MassArgs& args) override { cuda::attention_mass(args, stream()); }
  void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) override {
    cuda::pool_mass(mass, rows, n, reach, always, scores, stream());
  }
  void choose_best(const BestArgs& args) override { cuda::choose_best(args, stream()); }
  void mean_rows(float* values, int rows, int n) override { cuda::mean_rows(values, rows, n, stream()); }
  void count_rows(const int* chosen, int count, int rows, int n, int* counts) override {
    cuda::count_rows(chosen, count, rows, n, counts, stream());
  }
  void key_scores(const KeyScoreArgs& args) override { cuda::key_scores(args, stream()); }
  void expected_attention(const ExpectedArgs& args) override { cuda::expected_attention(args, stream()); }
  void fit_rounding(const RoundingArgs& args) override { cuda::fit_rounding(args, stream()); }
  void quantize(const QuantizeArgs& args) override { cuda::quantize(args, stream()); }
  void gather(const GatherArgs& args) override { cuda::gather(args, stream()); }
  void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                          std::byte* out) override {
    cuda::quantize_head_page(source, tokens, shape, format, out, stream());
  }
  void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override {
    cuda::dequantize_head_page(source, shape, format, out, stream());
  }

  void copy(std::span<const BlockCopy> copies) override;
  void zero(std::byte* target, size_t bytes) override {
    check_cuda(cudaMemsetAsync(target, 0, bytes, stream()), "zeroing memory");
  }
  void delay(int microseconds) override { cuda::delay(microseconds, stream()); }
  void encode(const EncodeArgs& args) override { cuda::encode(args, stream()); }
  void decode(const DecodeArgs& args) override {
    PageProof* proofs = nullptr;
    if (args.checksums != nullptr) {
      proofs = passes().proofs.as<PageProof>();
      check(static_cast<size_t>(args.count) < passes().proofs.bytes() / sizeof(PageProof),
            "pages that are proved are those of one sequence");
    }
    cuda::decode(args, proofs, stream());
  }
  void checksum(const BlockRow& blocks, uint64_t* checksums) override { cuda::checksum(blocks, checksums, stream()); }
  void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches) override {
    cuda::prove(blocks, checksums, mismatches, passes().proofs.as<PageProof>()->counters, stream());
  }

 private:
  CudaKernels(CudaKernels& root, const CudaOptions& options, Place place);

  cudaStream_t stream() const { return lane_.stream(); }
  PassLane& passes() {
    check(passes_ != nullptr, "passes run on the lanes of passes and of drafts");
    return *passes_;
  }
  const StagedPass& staged(const PassRows& pass) {
    const StagedPass& staged = passes().stage.pass();
    check(staged.rows == pass.rows && staged.draft == pass.draft, "the pass that was staged last is the one that runs");
    return staged;
  }

  Place place_;
  CudaKernels* root_;  // the lane of full passes, which owns the others and what all lanes share
  std::shared_ptr<DeviceClock> clock_;
  CudaLane lane_;
  std::unique_ptr<PassLane> passes_;

  // Of copy().
  std::vector<void*> targets_;
  std::vector<const void*> sources_;
  std::vector<size_t> sizes_;

  // Of the root.
  std::string name_;
  bool graphs_ = true;
  std::unique_ptr<Products> products_;
  std::unique_ptr<Products> draft_products_;  // drafts may sum in any order
  std::unique_ptr<CudaKernels> draft_, wire_in_, wire_out_;
};

size_t largest_upload(const CudaOptions& options, Kernels::Place place) {
  switch (place) {
    case Kernels::Place::pass:
      return PassStage::most_bytes(limits_of(options, options.max_rows), true);
    case Kernels::Place::draft:
      return PassStage::most_bytes(limits_of(options, options.max_sequences), false);
    default:
      return 0;
  }
}

CudaKernels::CudaKernels(const CudaOptions& options)
    : place_(Place::pass),
      root_(this),
      clock_(std::make_shared<DeviceClock>()),
      lane_(priority_of(Place::pass), largest_upload(options, Place::pass), clock_),
      name_("cuda " + gpu_name()),
      graphs_(options.graphs) {
  passes_ = std::make_unique<PassLane>(limits_of(options, options.max_rows), true, lane_.stream());
  products_ = std::make_unique<Products>(options.max_rows, !options.exact_products);
  draft_products_ = std::make_unique<Products>(options.max_sequences, true);
  draft_.reset(new CudaKernels(*this, options, Place::draft));
  wire_in_.reset(new CudaKernels(*this, options, Place::wire_in));
  wire_out_.reset(new CudaKernels(*this, options, Place::wire_out));
}

CudaKernels::CudaKernels(CudaKernels& root, const CudaOptions& options, Place place)
    : place_(place),
      root_(&root),
      clock_(root.clock_),
      lane_(priority_of(place), largest_upload(options, place), clock_) {
  if (place == Place::draft) {
    passes_ = std::make_unique<PassLane>(limits_of(options, options.max_sequences), false, lane_.stream());
  }
}

Kernels& CudaKernels::lane(Place place) {
  switch (place) {
    case Place::pass:
      return *root_;
    case Place::draft:
      return *root_->draft_;
    case Place::wire_in:
      return *root_->wire_in_;
    case Place::wire_out:
      return *root_->wire_out_;
  }
  return *root_;
}

void CudaKernels::pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const {
  check(first >= 0 && rows >= 0 && rows <= matrix.out - first, "packed rows lie in the matrix");
  if (rows == 0) {
    return;
  }
  const size_t width = static_cast<size_t>(matrix.in) * sizeof(bf16);
  const size_t pitch = static_cast<size_t>(padded_dim(matrix.in)) * sizeof(bf16);
  std::byte* target = reinterpret_cast<std::byte*>(matrix.data) + static_cast<size_t>(first) * pitch;
  check_cuda(cudaMemcpy2D(target, pitch, source, width, width, static_cast<size_t>(rows), cudaMemcpyHostToDevice),
             "loading a weight");
  check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "loading a weight");
}

void CudaKernels::fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const {
  cuda::fill_random(matrix, seed, scale, stream());
  check_cuda(cudaStreamSynchronize(stream()), "filling a weight");
}

void CudaKernels::tune(std::span<const PackedMatrix> weights) {
  if (root_ != this) {
    root_->tune(weights);
    return;
  }
  products_->tune(weights, passes_->product);
  passes_->product.grow_scratch(products_->scratch_bytes());
  draft_products_->tune(weights, draft_->passes_->product);
  draft_->passes_->product.grow_scratch(draft_products_->scratch_bytes());
}

void CudaKernels::replay(const PassRows& pass, const void* state, void (*body)(const void* state)) {
  const StagedPass& staged = this->staged(pass);
  if (!pass.draft || !root_->graphs_) {
    body(state);
    return;
  }
  const PassStage& stage = passes_->stage;
  passes_->graphs.run({.rows = staged.rows,
                       .sequences = staged.count,
                       .logit_rows = staged.logit_count,
                       .layers = pass.layers,
                       .longest_tokens = stage.longest_tokens(),
                       .read_tokens = stage.read_tokens(),
                       .buffers = pass.buffers,
                       .format = stage.format()},
                      stream(), state, body);
}

void CudaKernels::attention(const AttentionArgs& args) {
  const StagedPass& pass = staged(*args.pass);
  const PassStage& stage = passes_->stage;
  if (pass.draft) {
    cuda::draft_attention(args, stage.format(), pass, stage.longest_tokens(), stage.read_tokens(),
                          passes_->draft_scratch.as<float>(), passes_->draft_counts.as<int>(), stream());
  } else {
    cuda::attention(args, pass, stage.plan(), stage.tiles(), stage.combine(), passes_->attention_scratch.as<float>(),
                    stream());
  }
}

void CudaKernels::copy(std::span<const BlockCopy> copies) {
  constexpr size_t kFew = 2;
  targets_.clear();
  sources_.clear();
  sizes_.clear();
  const auto to_border = [](const std::byte* at) { return kSlabBytes - reinterpret_cast<uintptr_t>(at) % kSlabBytes; };
  for (BlockCopy block : copies) {
    while (block.bytes > 0) {
      const size_t bytes = std::min({block.bytes, to_border(block.target), to_border(block.source)});
      targets_.push_back(block.target);
      sources_.push_back(block.source);
      sizes_.push_back(bytes);
      block = {block.target + bytes, block.source + bytes, block.bytes - bytes};
    }
  }
  if (sizes_.size() <= kFew) {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      check_cuda(cudaMemcpyAsync(targets_[i], sources_[i], sizes_[i], cudaMemcpyDefault, stream()), "copying a block");
    }
    return;
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;  // the copy engines, not blocks that drafts want
  size_t first = 0;
  check_cuda(cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(), sizes_.size(), &attributes, &first,
                                  1, stream()),
             "copying blocks");
}

}  // namespace

std::unique_ptr<Kernels> make_cuda_kernels(const CudaOptions& options) {
  if (const std::string reason = why_no_gpu(); !reason.empty()) {
    throw Error("no CUDA device: {}", reason);
  }
  const int head_dim = options.shape.head_dim;
  if (head_dim != 32 && head_dim != 64 && head_dim != 96 && head_dim != 128) {
    throw Error("the CUDA backend takes heads of 32, 64, 96 or 128 dimensions, not {}; use --device cpu", head_dim);
  }
  const int kv_heads = options.shape.kv_heads;
  if (kv_heads < 1 || options.heads % kv_heads != 0 || options.heads / kv_heads > 16) {
    throw Error("{} query heads are not shared evenly, and by 16 at most, by {} KV heads; use --device cpu",
                options.heads, kv_heads);
  }
  check(options.max_rows > 0 && options.max_sequences > 0 && options.max_context_tokens > 0 && options.shape.layers > 0,
        "the CUDA backend is told the size of its passes");
  return std::make_unique<CudaKernels>(options);
}

}  // namespace vericache::cuda
