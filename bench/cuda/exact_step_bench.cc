// What exactness costs a whole decode step of the 8B shape, full bf16 KV: the engine's step, the same with every
// algorithm of cuBLASLt allowed in its products (split-K included), and a step with nothing exact at all, products and
// attention as drafts run them. In turns, device time, random weights and KV.
//   exact_step_bench [--context 31232] [--batch 16] [--rows 1] [--repeats 15] [--layers 32] [--vocabulary 8192]
// --rows: of each sequence, at most 32, as in a verification; drafts have one, and more have no third step.
// Takes 2 bytes x weights (14 GB) and 128 KiB a token and sequence (65 GB at 16 x 31,232).
#include <cstdio>
#include <exception>

#include "step_rig.h"

namespace vericache::bench {
namespace {

// One step on an idle device; the host enqueues all of it while the lane is held, so that only the device is timed.
double step_ms(StepRig::Step& step) {
  constexpr int kHeldMicroseconds = 20000;
  Kernels& lane = step.lane();
  lane.delay(kHeldMicroseconds);
  const Mark begin = lane.mark();
  step.enqueue();
  const Mark end = lane.mark();
  lane.wait(end);
  return lane.seconds(begin, end) * 1e3;
}

void measure(StepRig& rig, const Transformer& free_model, int sequences, int rows, int repeats) {
  StepRig::Step exact(rig, rig.transformer(), rig.kernels(), sequences, false, rows);
  StepRig::Step free_products(rig, free_model, free_model.kernels(), sequences, false, rows);
  StepRig::Step free_all(rig, rig.transformer(), rig.kernels().lane(Kernels::Place::draft), sequences, true);
  std::vector<double> times[3];
  const int kinds = rows == 1 ? 3 : 2;
  for (int i = -3; i < repeats; ++i) {
    StepRig::Step* const steps[] = {&exact, &free_products, &free_all};
    for (int k = 0; k < kinds; ++k) {
      const int which = (k + i + 3) % kinds;  // each of them comes first as often as the others
      const double ms = step_ms(*steps[which]);
      if (i >= 0) {
        times[which].push_back(ms);
      }
    }
  }
  const double bytes = rig.weight_step_bytes() + rig.kv_step_bytes(sequences);
  const double base = median(times[1]);
  const char* const names[] = {"exact", "free choice of products", "nothing exact"};
  std::printf("batch %d, %d rows: %.2f GB of weights and KV a step\n", sequences, sequences * rows, bytes * 1e-9);
  for (int which = 0; which < kinds; ++which) {
    const auto [least, most] = std::minmax_element(times[which].begin(), times[which].end());
    const double ms = median(times[which]);
    std::printf("  %-24s %8.3f ms (%.3f ... %.3f)  %6.0f GB/s  %+6.2f %% beside free choice\n", names[which], ms,
                *least, *most, bytes / ms * 1e-6, (ms / base - 1) * 100);
  }
  const double cost = (median(times[0]) / base - 1) * 100;
  std::printf("  exactness costs %.2f %% of the step (at most 5: %s)\n", cost, cost <= 5 ? "holds" : "FAILS");
}

void run(int argc, char** argv) {
  const int batch = flag(argc, argv, "--batch", 16);
  StepRig rig({.layers = flag(argc, argv, "--layers", 32),
               .vocabulary = flag(argc, argv, "--vocabulary", 8192),
               .sequences = batch,
               .context = flag(argc, argv, "--context", 31232)});
  const std::unique_ptr<Kernels> free_kernels = rig.make_kernels(false);
  rig.tune(*free_kernels);
  const Transformer free_model(rig.config(), rig.weights(), *free_kernels);
  for (const int sequences : {1, 4, 16, 32, 64}) {
    if (sequences <= batch) {
      measure(rig, free_model, sequences, std::clamp(flag(argc, argv, "--rows", 1), 1, StepRig::Step::kMostRows),
              flag(argc, argv, "--repeats", 15));
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace vericache::bench

int main(int argc, char** argv) {
  try {
    vericache::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "exact_step_bench: %s\n", error.what());
    return 1;
  }
}
