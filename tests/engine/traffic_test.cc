#include "engine/traffic.h"
#include "memory_store.h"

namespace vericache {
namespace {

using test::random_visitor;
using test::Reference;
using test::run_traffic;
using test::TrafficSetup;
using test::Visitor;

EngineOptions options_of(int horizon, int sequences, int pass_rows) {
  EngineOptions options;
  options.horizon = horizon;
  options.max_horizon = 24;
  options.max_model_len = test::kMaxModelLen;
  options.max_sequences = sequences;
  options.pass_rows = pass_rows;
  return options;
}

// The same requests for every setup: their answers alone are computed once.
const std::vector<Visitor>& visitors() {
  static const std::vector<Visitor> visitors = [] {
    std::mt19937_64 random(2024);
    Reference reference;
    std::vector<Visitor> out;
    for (int i = 0; i < 60; ++i) {
      out.push_back(random_visitor(reference, random, 1200));
    }
    return out;
  }();
  return visitors;
}

TEST(Traffic, QuantizedWithAnAdaptiveHorizon) {
  const EngineStats stats =
      run_traffic({.compressor = "kivi:bits=4", .options = options_of(EngineOptions::kAdaptive, 6, 200)}, visitors());
  EXPECT_GT(stats.speculation.accepted, 0);
  EXPECT_GT(stats.wire_in_bytes_decode, 0u);
}

TEST(Traffic, DroppedAndQuantizedInALittleMemory) {
  TrafficSetup setup{.compressor = "snapkv:budget=0.3+kivi:bits=4", .options = options_of(8, 5, 130), .budget = 1.3};
  setup.options.host_memory = size_t{24} << 20;
  run_traffic(setup, visitors());
}

// Budgets that move from head to head at every look, beside layers that keep all, in a memory that is reserved to the
// page; and sums over queries that corruption takes back.
TEST(Traffic, HeadsAndLayersThatDifferInALittleMemory) {
  TrafficSetup setup{
      .compressor = "adakv:alpha=0.9(h2o:budget=0.3);layers=1-2:none", .options = options_of(8, 5, 130), .budget = 1.2};
  setup.options.inject_corruption_every = 401;
  run_traffic(setup, visitors());
}

// Replays between prompts and drafts, cut anew by corruption, whose rows stand in tails that share a little memory.
TEST(Traffic, ReplaysInALittleMemory) {
  TrafficSetup setup{
      .compressor = "adakv(kvzip:budget=0.3);layers=1:h2o:budget=0.3", .options = options_of(8, 5, 130), .budget = 1.2};
  setup.options.inject_corruption_every = 401;
  const EngineStats stats = run_traffic(setup, visitors());
  EXPECT_GT(stats.replayed_tokens, 0);
  EXPECT_GT(stats.recomputed_tokens, 0);
}

TEST(Traffic, TheFullCacheOnTheDevice) {
  const EngineStats stats = run_traffic({.compressor = "none", .options = options_of(16, 4, 96)}, visitors());
  EXPECT_TRUE(stats.full_on_device);
}

TEST(Traffic, TheFullCacheStreamed) {
  TrafficSetup setup{.compressor = "", .options = options_of(0, 3, 256), .budget = 1};
  setup.options.ring_layers = 2;
  const EngineStats stats = run_traffic(setup, visitors());
  EXPECT_FALSE(stats.full_on_device);
  EXPECT_GT(stats.wire_in_bytes, 0u);
}

TEST(Traffic, ASlowWireAndDelays) {
  TrafficSetup setup{.compressor = "kivi:k=8,v=4", .options = options_of(12, 4, 256)};
  setup.options.inject_delay_us = 200;
  test::slow_wire(setup.options, 0.5, 500);
  run_traffic(setup, visitors());
}

TEST(Traffic, BlocksThatComeBackBroken) {
  TrafficSetup setup{.compressor = "streaming-llm:sinks=4,window=0.4", .options = options_of(6, 4, 256)};
  setup.options.inject_corruption_every = 301;
  setup.options.inject_delay_us = 100;
  const EngineStats stats = run_traffic(setup, visitors());
  EXPECT_GT(stats.corrupt_blocks, 0);
  EXPECT_GT(stats.recomputed_tokens, 0);
}

// Coded pages give room back, broken ones all of it.
TEST(Traffic, ALittleHostMemoryForCodedPages) {
  TrafficSetup setup{.compressor = "quarot:bits=4", .options = options_of(8, 5, 200)};
  setup.options.host_memory = size_t{10} << 20;
  setup.options.wire_form = WireForm::coded;
  setup.options.inject_delay_us = 100;
  setup.options.inject_corruption_every = 301;
  const EngineStats stats = run_traffic(setup, visitors());
  EXPECT_GT(stats.recomputed_tokens, 0);
  EXPECT_LE(stats.peak_extent_bytes, stats.host_pool_bytes);
}

// Host memory for one of them; the others' full KV lies in a store that fails.
TEST(Traffic, AStoreBehindALittleHostMemory) {
  TrafficSetup setup{.compressor = "kivi:bits=4", .options = options_of(8, 5, 200)};
  setup.options.host_memory = size_t{8} << 20;
  setup.options.store_bytes = size_t{48} << 20;
  setup.options.open_store = [](size_t block_bytes, int blocks) {
    return std::make_unique<test::MemoryStore>(block_bytes, blocks, 47);
  };
  setup.options.inject_delay_us = 100;
  const EngineStats stats = run_traffic(setup, visitors());
  EXPECT_GT(stats.recomputed_tokens, 0);
}

// Nothing is resident: drafts see the tail alone.
TEST(Traffic, ACompressorThatKeepsNothing) {
  const std::vector<Visitor> few(visitors().begin(), visitors().begin() + 12);
  run_traffic({.compressor = "streaming-llm:sinks=0,window=0", .options = options_of(6, 4, 200)}, few);
}

Visitor plain_visitor(int prompt, int max_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  Visitor visitor;
  visitor.request.prompt = test::random_prompt(prompt, random);
  visitor.request.max_tokens = max_tokens;
  visitor.expected = Reference().answer(visitor.request);
  return visitor;
}

TEST(Traffic, AnAnswerThatEndsBeforeItsPagesAreOutEndsOnce) {
  TrafficSetup setup{.compressor = "kivi:bits=4", .options = options_of(1, 2, 800)};
  test::slow_wire(setup.options, 0.01, 20'000);
  run_traffic(setup, {plain_visitor(700, 2, 1), plain_visitor(650, 3, 2)});
}

// Tails grow while their pages wait for the wire: what the others need to go on stays theirs.
TEST(Traffic, TailsThatCannotLeaveStarveNobody) {
  TrafficSetup setup{.compressor = "kivi:bits=8", .options = options_of(32, 9, 130)};
  test::slow_wire(setup.options, 0.03, 2'000);
  std::vector<Visitor> visitors;
  for (int i = 0; i < 9; ++i) {
    const bool reads = i % 3 == 1;  // long prompts fill the way out while the others decode
    visitors.push_back(reads ? plain_visitor(900, 40, static_cast<uint64_t>(i))
                             : plain_visitor(20 + 9 * i, 400, static_cast<uint64_t>(i)));
    visitors.back().joins = reads ? 15 * i : 0;
  }
  run_traffic(setup, visitors);
}

// Its memory goes with it: no lane may be left at work on that.
TEST(Traffic, AnEngineMayEndWithSequencesUnderWay) {
  for (const int steps : {1, 2, 5, 20, 60, 200}) {
    const std::unique_ptr<Device> device = test::make_test_device();
    EngineOptions options = options_of(8, 3, 200);
    options.inject_delay_us = 500;
    {
      Engine engine(*test::small_model().model, *device, make_compressor("kivi:bits=4"), options);
      for (int i = 0; i < 5; ++i) {
        engine.submit(visitors()[static_cast<size_t>(i)].request);
      }
      for (int i = 0; i < steps; ++i) {
        engine.step();
      }
    }
    const auto* simulated = dynamic_cast<const test::SimulatedKernels*>(test::small_model().kernels.get());
    ASSERT_TRUE(simulated == nullptr || simulated->idle()) << steps;
  }
}

}  // namespace
}  // namespace vericache
