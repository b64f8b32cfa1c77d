// A soak: random setups and random traffic for VERICACHE_SOAK_SECONDS (300), each round from a seed that it prints when
// it fails.
#include <chrono>
#include <cstdlib>

#include "engine/traffic.h"
#include "memory_store.h"

namespace vericache {
namespace {

using test::Reference;
using test::TrafficSetup;
using test::Visitor;

TrafficSetup random_setup(std::mt19937_64& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  constexpr const char* kCompressors[] = {"",
                                          "none",
                                          "kivi:bits=2",
                                          "kivi:bits=4",
                                          "kivi:k=16,v=4",
                                          "kivi:k=6,v=3",
                                          "plane:bits=6",
                                          "plane:bits=8",
                                          "fp8",
                                          "int8",
                                          "quarot:bits=3",
                                          "quest:budget=0.2",
                                          "quest:budget=100,dense=1+kivi:bits=4",
                                          "kvquant:bits=3",
                                          "snapkv:budget=0.3+kvquant:bits=2",
                                          "snapkv:budget=0.2,window=16",
                                          "snapkv:budget=100,kernel=1",
                                          "snapkv:budget=0.4+kivi:bits=4",
                                          "streaming-llm:sinks=4,window=0.3",
                                          "streaming-llm:sinks=0,window=0",
                                          "streaming-llm:window=200+kivi:bits=8",
                                          "h2o:budget=0.3",
                                          "pyramidkv:budget=200",
                                          "expected:budget=0.2,window=20+kivi:bits=4",
                                          "adakv(kvzip:budget=0.2)",
                                          "adakv:alpha=0.9(keydiff:budget=0.3)",
                                          "adakv:alpha=0.7(h2o:budget=150);layers=1-3:none"};
  TrafficSetup setup;
  setup.compressor = kCompressors[random() % std::size(kCompressors)];
  EngineOptions& o = setup.options;
  o.max_model_len = test::kMaxModelLen;
  o.max_sequences = 1 + below(8);
  o.max_horizon = 1 + below(40);
  o.horizon = below(3) == 0 ? EngineOptions::kAdaptive : below(4) == 0 ? 0 : o.max_horizon;
  o.ring_layers = 2 + below(2);
  o.pass_rows = 1 + 2 * o.max_horizon + below(200);
  setup.budget = below(2) == 0 ? 0 : 1 + 0.1 * below(10);
  if (setup.compressor.empty()) {
    o.horizon = 0;
  } else if (setup.compressor == "none" && o.horizon != 0) {
    setup.budget = 0;  // nothing to draft from where the full cache does not fit
  }
  o.host_memory = below(3) == 0 ? size_t{24} << 20 : 0;
  const double gbps = below(3) == 0 ? 0.05 * (1 + below(20)) : 0;
  o.inject_delay_us = below(3) == 0 ? below(1000) : 0;
  if (gbps > 0) {
    test::slow_wire(o, gbps, 500);
  }
  if (below(3) == 0) {
    o.host_memory = size_t{8} << 20;
    o.store_bytes = size_t{64} << 20;
    const uint64_t failing = below(2) == 0 ? static_cast<uint64_t>(150 + below(400)) : 0;
    o.open_store = [failing](size_t block_bytes, int blocks) {
      return std::make_unique<test::MemoryStore>(block_bytes, blocks, failing);
    };
  }
  o.inject_corruption_every = below(4) == 0 ? static_cast<uint64_t>(250 + below(400)) : 0;
  o.wire_form = below(3) == 0 ? WireForm::coded : WireForm::automatic;
  return setup;
}

TEST(TrafficSoak, EveryAnswerIsTheOneGivenAlone) {
  const char* const seconds = std::getenv("VERICACHE_SOAK_SECONDS");
  const auto end =
      std::chrono::steady_clock::now() + std::chrono::seconds(seconds != nullptr ? std::atoi(seconds) : 300);
  const char* const first = std::getenv("VERICACHE_SOAK_SEED");
  uint64_t seed = first != nullptr ? std::strtoull(first, nullptr, 10) : 1;
  Reference reference;
  for (; std::chrono::steady_clock::now() < end; ++seed) {
    std::mt19937_64 random(seed);
    std::vector<Visitor> visitors;
    for (int i = 0; i < 25; ++i) {
      visitors.push_back(test::random_visitor(reference, random, 600));
    }
    test::run_traffic(random_setup(random), visitors);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "VERICACHE_SOAK_SEED=" << seed << " repeats it";
  }
  std::printf("seeds up to %llu\n", static_cast<unsigned long long>(seed - 1));
}

}  // namespace
}  // namespace vericache
