// A GPU imitated on the CPU: memory that nobody may address but by its lanes, and lanes that run their ops late and
// beside each other in random order, as far as their marks allow. What fails to wait for a lane is found out, from a
// seed. Used by one thread: lanes move when they are asked how far they are.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "base/check.h"
#include "forwarding_kernels.h"

namespace vericache::test {

// Host memory that is pinned little by little: half of it at first, all of it when it was asked for some times.
class SimulatedHost final : public Device {
 public:
  explicit SimulatedHost(size_t budget_bytes) : Device(budget_bytes), memory_(make_cpu_device(budget_bytes)) {}
  std::string_view name() const override { return "host of a simulated GPU"; }
  bool addressable() const override { return true; }
  std::unique_ptr<Device> make_host_memory(size_t budget_bytes) override { return make_cpu_device(budget_bytes); }
  size_t ready(const std::byte*, size_t bytes) const override { return ++asked_ < 5 ? bytes / 2 : bytes; }
  void write(std::byte* target, const void* source, size_t bytes) override { memory_->write(target, source, bytes); }
  void read(void* target, const std::byte* source, size_t bytes) const override {
    memory_->read(target, source, bytes);
  }

 private:
  std::byte* take(size_t bytes) override { return memory_->allocate(bytes, "the host of a simulated GPU"); }
  std::unique_ptr<Device> memory_;
  mutable int asked_ = 0;
};

class SimulatedDevice final : public Device {
 public:
  explicit SimulatedDevice(size_t budget_bytes) : Device(budget_bytes), memory_(make_cpu_device(budget_bytes)) {}
  std::string_view name() const override { return "simulated GPU"; }
  bool addressable() const override { return false; }
  std::unique_ptr<Device> make_host_memory(size_t budget_bytes) override {
    return std::make_unique<SimulatedHost>(budget_bytes);
  }
  void write(std::byte* target, const void* source, size_t bytes) override { memory_->write(target, source, bytes); }
  void read(void* target, const std::byte* source, size_t bytes) const override {
    memory_->read(target, source, bytes);
  }

 private:
  std::byte* take(size_t bytes) override { return memory_->allocate(bytes, "the simulated GPU"); }
  std::unique_ptr<Device> memory_;
};

class SimulatedGpu {
 public:
  // `cpu` computes; it outlives the GPU.
  SimulatedGpu(Kernels& cpu, uint64_t seed) : random_(seed), seconds_per_byte_(seed % 2 == 0 ? 0 : 2e-8) {
    for (std::unique_ptr<SimulatedLane>& lane : lanes_) {
      lane = std::make_unique<SimulatedLane>(cpu, *this);
    }
  }
  Kernels& kernels() { return lane(Kernels::Place::pass); }
  Kernels& lane(Kernels::Place place) { return *lanes_[static_cast<size_t>(place)]; }
  void finish() {
    while (run_one()) {
    }
    check(idle(), "no lane waits for ever");
  }
  bool idle() const {
    return std::all_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->idle(); });
  }

 private:
  // The sequences and logit rows of a pass as they were when it was staged.
  struct Staged {
    PassRows pass;
    std::vector<SequenceRows> sequences;
    std::vector<LogitRow> logit_rows;
  };
  using Op = std::function<void(Kernels& cpu, const PassRows& pass)>;

  class SimulatedLane final : public ForwardingKernels {
   public:
    SimulatedLane(Kernels& cpu, SimulatedGpu& gpu) : ForwardingKernels(cpu), gpu_(gpu) {}
    Kernels& lane(Place place) override { return gpu_.lane(place); }

    Mark mark() override {
      Item item;
      item.is_mark = true;
      queue_.push_back(std::move(item));
      return ++enqueued_;
    }
    bool reached(Mark mark) override {
      check(mark <= enqueued_, "a mark of this lane");
      gpu_.run_some();
      return mark <= done_;
    }
    void wait(Mark mark) override {
      while (mark > done_) {
        check(gpu_.run_one(), "no lane waits for ever");
      }
    }
    double seconds(Mark from, Mark to) override {
      check(from <= to, "time goes forward");
      return time(to) - time(from);
    }
    double time(Mark mark) override {
      check(mark > 0 && mark <= done_, "the time of a mark is known when it was reached");
      return times_[mark - 1];
    }
    void follow(Lane& other, Mark mark) override {
      Item item;
      item.after = dynamic_cast<SimulatedLane*>(&other);
      check(item.after != nullptr, "lanes of one GPU follow each other");
      item.mark = mark;
      check(mark <= item.after->enqueued_, "a lane follows what is enqueued");
      queue_.push_back(std::move(item));
    }
    void upload(std::byte* target, const void* source, size_t bytes) override {
      const auto* from = static_cast<const std::byte*>(source);
      push([target, copy = std::vector<std::byte>(from, from + bytes)](Kernels&, const PassRows&) {
        std::copy(copy.begin(), copy.end(), target);
      });
    }
    void stage(const PassRows& pass) override {
      staged_ = std::make_shared<Staged>();
      staged_->sequences.assign(pass.sequences.begin(), pass.sequences.end());
      staged_->logit_rows.assign(pass.logit_rows.begin(), pass.logit_rows.end());
      staged_->pass = pass;
      staged_->pass.sequences = staged_->sequences;
      staged_->pass.logit_rows = staged_->logit_rows;
      push([](Kernels& cpu, const PassRows& rows) { cpu.stage(rows); });
    }
    // As a graph does: what was enqueued for the first pass of a shape is enqueued again, over the rows staged now.
    void replay(const PassRows& pass, const void* state, void (*body)(const void* state)) override {
      const auto shape = std::tuple(pass.rows, pass.sequences.size(), pass.logit_rows.size(), pass.draft);
      auto graph = graphs_.find(shape);
      if (graph == graphs_.end()) {
        recording_ = &graphs_[shape];
        body(state);
        recording_ = nullptr;
        graph = graphs_.find(shape);
      }
      for (const Op& op : graph->second) {
        push(op);
      }
    }
    void forget_passes() override { graphs_.clear(); }

    void embed(const PackedMatrix& table, const PassRows&, float* out) override {
      push([=](Kernels& cpu, const PassRows& pass) { cpu.embed(table, pass, out); });
    }
    void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.matmul(weight, x, rows, y, epilogue); });
    }
    void add_bias(const float* bias, int rows, int dim, float* y) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.add_bias(bias, rows, dim, y); });
    }
    void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.rms_norm(x, weight, eps, rows, dim, out); });
    }
    void silu_mul(const float* gate_up, int rows, int dim, bf16* out) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.silu_mul(gate_up, rows, dim, out); });
    }
    void store_qkv(const QkvArgs& args) override {
      push([args](Kernels& cpu, const PassRows& pass) {
        QkvArgs placed = args;
        placed.pass = &pass;
        cpu.store_qkv(placed);
      });
    }
    void attention(const AttentionArgs& args) override {
      push([args](Kernels& cpu, const PassRows& pass) {
        AttentionArgs placed = args;
        placed.pass = &pass;
        cpu.attention(placed);
      });
    }
    void select_rows(const float* x, const PassRows&, int dim, float* out) override {
      push([=](Kernels& cpu, const PassRows& pass) { cpu.select_rows(x, pass, dim, out); });
    }
    void choose(const float* logits, const PassRows&, int vocabulary) override {
      push([=](Kernels& cpu, const PassRows& pass) { cpu.choose(logits, pass, vocabulary); });
    }

    void keep_queries(const bf16* q, const float* log_sum_exp, int heads, const KvShape& shape, const PassRows&,
                      int layer) override {
      push([=](Kernels& cpu, const PassRows& pass) { cpu.keep_queries(q, log_sum_exp, heads, shape, pass, layer); });
    }
    void attention_mass(const MassArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.attention_mass(args); });
    }
    void pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.pool_mass(mass, rows, n, reach, always, scores); });
    }
    void choose_best(const BestArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.choose_best(args); });
    }
    void mean_rows(float* values, int rows, int n) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.mean_rows(values, rows, n); });
    }
    void count_rows(const int* chosen, int count, int rows, int n, int* counts) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.count_rows(chosen, count, rows, n, counts); });
    }
    void key_scores(const KeyScoreArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.key_scores(args); });
    }
    void expected_attention(const ExpectedArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.expected_attention(args); });
    }
    void fit_rounding(const RoundingArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.fit_rounding(args); });
    }
    void quantize(const QuantizeArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.quantize(args); });
    }
    void gather(const GatherArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.gather(args); });
    }
    void quantize_head_page(const std::byte* source, int tokens, const KvShape& shape, const KvFormat& format,
                            std::byte* out) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.quantize_head_page(source, tokens, shape, format, out); });
    }
    void dequantize_head_page(const std::byte* source, const KvShape& shape, const KvFormat& format,
                              std::byte* out) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.dequantize_head_page(source, shape, format, out); });
    }

    void copy(std::span<const BlockCopy> copies) override {
      for (const BlockCopy& one : copies) {
        push([this, one](Kernels& cpu, const PassRows&) {
          cpu.copy({&one, 1});
          gpu_.seconds_ += gpu_.seconds_per_byte_ * static_cast<double>(one.bytes);
        });
      }
    }
    void zero(std::byte* target, size_t bytes) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.zero(target, bytes); });
    }
    void encode(const EncodeArgs& args) override {
      push([args, pages = std::vector<const std::byte*>(args.pages.begin(), args.pages.end())](Kernels& cpu,
                                                                                               const PassRows&) {
        EncodeArgs placed = args;
        placed.pages = pages;
        cpu.encode(placed);
      });
    }
    void decode(const DecodeArgs& args) override {
      push([args](Kernels& cpu, const PassRows&) { cpu.decode(args); });
    }
    void delay(int microseconds) override {
      Item item;
      item.idle_turns = microseconds / 10;
      queue_.push_back(std::move(item));
    }
    void checksum(const BlockRow& blocks, uint64_t* checksums) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.checksum(blocks, checksums); });
    }
    void prove(const BlockRow& blocks, const uint64_t* checksums, uint32_t* mismatches) override {
      push([=](Kernels& cpu, const PassRows&) { cpu.prove(blocks, checksums, mismatches); });
    }

    bool idle() const { return queue_.empty(); }
    // Does the first thing in the queue; false: it cannot be done yet.
    bool advance() {
      if (queue_.empty() || (queue_.front().after != nullptr && queue_.front().after->done_ < queue_.front().mark)) {
        return false;
      }
      if (queue_.front().idle_turns > 0) {
        --queue_.front().idle_turns;
        return true;
      }
      const Item item = std::move(queue_.front());
      queue_.pop_front();
      gpu_.seconds_ += 1e-5;
      if (item.is_mark) {
        ++done_;
        times_.push_back(gpu_.seconds_);
      }
      if (item.op) {
        static const PassRows nothing_staged;
        item.op(k_, item.staged != nullptr ? item.staged->pass : nothing_staged);
      }
      return true;
    }

   private:
    struct Item {
      Op op;
      std::shared_ptr<const Staged> staged;
      const SimulatedLane* after = nullptr;
      Mark mark = 0;
      int idle_turns = 0;
      bool is_mark = false;
    };
    void push(Op op) {
      if (recording_ != nullptr) {
        recording_->push_back(std::move(op));
      } else {
        Item item;
        item.op = std::move(op);
        item.staged = staged_;
        queue_.push_back(std::move(item));
      }
    }

    SimulatedGpu& gpu_;
    std::deque<Item> queue_;
    std::shared_ptr<Staged> staged_;
    std::map<std::tuple<int, size_t, size_t, bool>, std::vector<Op>> graphs_;
    std::vector<Op>* recording_ = nullptr;
    Mark enqueued_ = 0;
    Mark done_ = 0;
    std::vector<double> times_;  // of the marks that were reached
  };

  // A lane gets far ahead of the others, then another does.
  bool run_one() {
    if (random_() % 64 == 0) {
      favourite_ = random_() % lanes_.size();
    }
    const size_t first = random_() % 8 != 0 ? favourite_ : random_() % lanes_.size();
    for (size_t i = 0; i < lanes_.size(); ++i) {
      if (lanes_[(first + i) % lanes_.size()]->advance()) {
        return true;
      }
    }
    return false;
  }
  void run_some() {
    for (uint64_t ops = random_() % 4 == 0 ? random_() % 200 : 0; ops > 0 && run_one(); --ops) {
    }
  }

  std::mt19937_64 random_;
  size_t favourite_ = 0;
  double seconds_ = 0;       // an op takes 10 us, a copy longer:
  double seconds_per_byte_;  // so that it is worth while to draft meanwhile, with every other seed
  std::array<std::unique_ptr<SimulatedLane>, 4> lanes_;
};

// A simulated GPU with the kernels that compute for it, as a backend is made.
struct OwnedGpu {
  std::unique_ptr<Kernels> cpu;
  SimulatedGpu gpu;
  OwnedGpu(std::unique_ptr<Kernels> kernels, uint64_t seed) : cpu(std::move(kernels)), gpu(*cpu, seed) {}
};
class SimulatedKernels final : private OwnedGpu, public ForwardingKernels {
 public:
  SimulatedKernels(std::unique_ptr<Kernels> cpu, uint64_t seed)
      : OwnedGpu(std::move(cpu), seed), ForwardingKernels(gpu.kernels()) {}
  Kernels& lane(Place place) override { return gpu.lane(place); }
  bool idle() const { return gpu.idle(); }
};

}  // namespace vericache::test
