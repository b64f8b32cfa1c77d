// What the wire alone costs the draft lane: draft steps of the 8B shape over packed KV, replayed as the engine replays
// them, by themselves and beside copies from pinned host memory at full speed on the wire's lane. In turns; random
// weights and KV. The copies' own share is their bytes a second over those that a copy within device memory writes and
// reads: what they must take of the memory's time.
//   wire_bench [--context 31232] [--batch 4] [--bits 4] [--steps 20] [--repeats 15] [--copy-kib 16384] [--layers 32]
// Takes the weights (14 GB), the packed KV (1.2 GB a sequence at 4 bits and 31,232 tokens) and 3 GB; 1 GiB of host
// memory.
#include <cstdio>
#include <exception>

#include "step_rig.h"

namespace vericache::bench {
namespace {

constexpr size_t kRingBytes = size_t{1} << 30;     // that the wire fills again and again
constexpr size_t kMarkedBytes = size_t{64} << 20;  // between two marks of the wire's lane

// Copies from host memory into device memory, in pieces.
class Wire {
 public:
  Wire(StepRig& rig, size_t piece)
      : lane_(rig.kernels().lane(Kernels::Place::wire_in)),
        piece_(std::min(piece, kMarkedBytes)),
        target_(rig.device().allocate(kRingBytes, "the wire's target")),
        source_(rig.host().allocate(kRingBytes, "the wire's source")) {
    while (rig.host().ready(source_, kRingBytes) < kRingBytes) {
      std::this_thread::yield();
    }
    std::memset(source_, 0x5a, kRingBytes);
  }

  Kernels& lane() { return lane_; }
  void begin() { marks_.assign(1, lane_.mark()); }
  void enqueue(double bytes) {
    for (double marked = 0; marked < bytes; marked += static_cast<double>(kMarkedBytes)) {
      const size_t first = (marks_.size() - 1) * kMarkedBytes % kRingBytes;
      copies_.clear();
      for (size_t at = first; at < first + kMarkedBytes; at += piece_) {
        copies_.push_back({target_ + at, source_ + at, piece_});
      }
      lane_.copy(copies_);
      marks_.push_back(lane_.mark());
    }
  }
  void wait() { lane_.wait(marks_.back()); }
  bool covers(double begin, double end) {
    return lane_.time(marks_.front()) <= begin && lane_.time(marks_.back()) >= end;
  }
  // Of what was enqueued last, in GB, between two moments of the device's clock; all of it was waited for.
  double gigabytes(double begin, double end) {
    double bytes = 0;
    for (size_t i = 1; i < marks_.size(); ++i) {
      const double from = lane_.time(marks_[i - 1]);
      const double to = lane_.time(marks_[i]);
      const double inside = std::max(0.0, std::min(to, end) - std::max(from, begin));
      bytes += static_cast<double>(kMarkedBytes) * inside / std::max(to - from, 1e-9);
    }
    return bytes * 1e-9;
  }

 private:
  Kernels& lane_;
  size_t piece_;
  std::byte* target_;
  std::byte* source_;
  std::vector<BlockCopy> copies_;
  std::vector<Mark> marks_;  // one before the first copy, then one behind every kMarkedBytes
};

struct Window {
  double begin = 0;  // of the device's clock
  double end = 0;
  double seconds() const { return end - begin; }
};

// Some steps by themselves, or in a wire's company: it is busy before the first of them, is given more than it can
// bring with each of them, so that neither lane waits for the host, and is busy after the last.
Window run_steps(StepRig::Step& step, int steps, Wire* wire, double step_seconds) {
  constexpr double kMostWireRate = 56e9;  // bytes a second
  const double bytes = 1.1 * kMostWireRate * step_seconds;
  Kernels& lane = step.lane();
  if (wire != nullptr) {
    wire->begin();
    wire->enqueue(static_cast<double>(kRingBytes));
    lane.delay(3000);  // the first copies are under way
  }
  const Mark begin = lane.mark();
  for (int i = 0; i < steps; ++i) {
    step.enqueue();
    if (wire != nullptr) {
      wire->enqueue(bytes);
    }
  }
  const Mark end = lane.mark();
  if (wire != nullptr) {
    wire->enqueue(bytes * steps / 4);
    wire->wait();
  }
  lane.wait(end);
  const Window window{lane.time(begin), lane.time(end)};
  if (wire != nullptr && !wire->covers(window.begin, window.end)) {
    throw std::runtime_error("the copies ended before the steps did: give fewer steps");
  }
  return window;
}

// Bytes read and written a second by copies within device memory, GB/s.
double memory_gbps(StepRig& rig, int repeats) {
  constexpr size_t kBytes = size_t{1} << 30;
  std::byte* from = rig.device().allocate(kBytes, "a copy's source");
  std::byte* to = rig.device().allocate(kBytes, "a copy's target");
  Kernels& lane = rig.kernels();
  std::vector<double> rates;
  for (int i = -2; i < repeats; ++i) {
    constexpr int kCopies = 8;
    const Mark begin = lane.mark();
    for (int k = 0; k < kCopies; ++k) {
      const BlockCopy copy{to, from, kBytes};
      lane.copy({&copy, 1});
    }
    const Mark end = lane.mark();
    lane.wait(end);
    if (i >= 0) {
      rates.push_back(2.0 * kCopies * static_cast<double>(kBytes) / lane.seconds(begin, end) * 1e-9);
    }
  }
  return median(rates);
}

void run(int argc, char** argv) {
  const int batch = flag(argc, argv, "--batch", 4);
  const int bits = flag(argc, argv, "--bits", 4);
  const int steps = flag(argc, argv, "--steps", 20);
  const int repeats = flag(argc, argv, "--repeats", 15);
  StepRig rig({.layers = flag(argc, argv, "--layers", 32),
               .vocabulary = flag(argc, argv, "--vocabulary", 8192),
               .sequences = batch,
               .context = flag(argc, argv, "--context", 31232),
               .format = {bits, bits}});
  StepRig::Step step(rig, rig.transformer(), rig.kernels().lane(Kernels::Place::draft), batch, true);
  Wire wire(rig, static_cast<size_t>(flag(argc, argv, "--copy-kib", 16384)) << 10);
  const double memory = memory_gbps(rig, repeats);
  run_steps(step, 5, nullptr, 0);  // loads kernels, captures the graph
  const double estimate = run_steps(step, steps, nullptr, 0).seconds() / steps;
  std::vector<double> alone;
  std::vector<double> beside;
  std::vector<double> slowdowns;
  std::vector<double> rates;
  for (int i = -1; i < repeats; ++i) {
    const double quiet = run_steps(step, steps, nullptr, 0).seconds() / steps;
    const Window window = run_steps(step, steps, &wire, estimate);
    if (i >= 0) {
      alone.push_back(quiet);
      beside.push_back(window.seconds() / steps);
      rates.push_back(wire.gigabytes(window.begin, window.end) / window.seconds());
      slowdowns.push_back((beside.back() / quiet - 1) * 100);
    }
  }
  const auto [least, most] = std::minmax_element(slowdowns.begin(), slowdowns.end());
  const double step_bytes = rig.weight_step_bytes() + rig.kv_step_bytes(batch);
  const double share = median(rates) / memory * 100;
  const double slowdown = median(slowdowns);
  std::printf("draft step, batch %d, %d bits, %.2f GB: alone %.3f ms (%.0f GB/s), beside the wire %.3f ms\n", batch,
              bits, step_bytes * 1e-9, median(alone) * 1e3, step_bytes / median(alone) * 1e-9, median(beside) * 1e3);
  std::printf("wire %.1f GB/s of pieces of %d KiB; device memory %.0f GB/s: a share of %.2f %%\n", median(rates),
              flag(argc, argv, "--copy-kib", 16384), memory, share);
  std::printf("slowdown %.2f %% (%.2f ... %.2f over %d pairs); beyond the share %.2f %% (at most 5: %s)\n", slowdown,
              *least, *most, repeats, slowdown - share, slowdown <= share + 5 ? "holds" : "FAILS");
}

}  // namespace
}  // namespace vericache::bench

int main(int argc, char** argv) {
  try {
    vericache::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wire_bench: %s\n", error.what());
    return 1;
  }
}
