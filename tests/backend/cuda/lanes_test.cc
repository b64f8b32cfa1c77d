// Lanes and memory: uploads, copies and marks in order under random traffic; draft passes replayed as graphs; host
// memory that is pinned while it is used.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "backend/cuda/cuda_device.h"
#include "backend/cuda/cuda_kernels.h"
#include "backend/cuda/device_array.h"
#include "base/error.h"

namespace vericache::cuda::test {
namespace {

using Place = Kernels::Place;
using Engine = std::mt19937_64;

constexpr KvShape kShape{.layers = 2, .kv_heads = 2, .head_dim = 64};
constexpr int kHeads = 4;

std::unique_ptr<Kernels> make_kernels(bool graphs = true) {
  return make_cuda_kernels({.shape = kShape,
                            .heads = kHeads,
                            .max_rows = 128,
                            .max_context_tokens = 4096,
                            .max_sequences = 8,
                            .graphs = graphs});
}

int below(Engine& engine, int n) {
  return static_cast<int>(engine() % static_cast<uint64_t>(n));
}

std::vector<std::byte> random_bytes(size_t count, Engine& engine) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(engine());
  }
  return bytes;
}

TEST(CudaDevice, BlocksAreZeroAlignedAndWithinTheBudget) {
  const std::unique_ptr<Device> device = make_cuda_device(64 << 20);
  EXPECT_FALSE(device->addressable());
  for (const size_t bytes : {size_t{1}, size_t{5000}, size_t{100000}, size_t{20} << 20}) {
    std::byte* block = device->allocate(bytes, "a test");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block) % 4096, 0u);
    std::vector<std::byte> content(bytes, std::byte{1});
    device->read(content.data(), block, bytes);
    EXPECT_EQ(content, std::vector<std::byte>(bytes));
    Engine engine(bytes);
    const std::vector<std::byte> written = random_bytes(bytes, engine);
    device->write(block, written.data(), bytes);
    device->read(content.data(), block, bytes);
    EXPECT_EQ(content, written);
  }
  EXPECT_THROW(device->allocate(64 << 20, "too much"), Error);
}

// A block of more than one slab is used from its start while the rest is still being pinned; a copy may cross the
// border.
TEST(CudaDevice, LargeHostBlocksArePinnedInTheBackground) {
  const std::unique_ptr<Device> device = make_cuda_device(8 << 20);
  const std::unique_ptr<Device> host = device->make_host_memory(size_t{700} << 20);
  const std::unique_ptr<Kernels> kernels = make_kernels();
  constexpr size_t kBytes = size_t{600} << 20;
  std::byte* block = host->allocate(kBytes, "a test");
  EXPECT_TRUE(host->addressable());
  size_t ready = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (ready < kBytes && std::chrono::steady_clock::now() < end) {
    const size_t now = host->ready(block, kBytes);
    EXPECT_GE(now, ready);
    ready = now;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ASSERT_EQ(ready, kBytes);
  EXPECT_EQ(host->ready(block, 100), 100u);
  constexpr size_t kCopied = 4 << 20;
  std::byte* on_device = device->allocate(kCopied, "a test");
  Engine engine(1);
  for (const size_t at : {kSlabBytes - 1000, 2 * kSlabBytes - (size_t{1} << 20), kBytes - kCopied}) {
    const std::vector<std::byte> written = random_bytes(kCopied, engine);
    std::memcpy(block + at, written.data(), kCopied);
    const BlockCopy in{on_device, block + at, kCopied};
    kernels->copy({&in, 1});
    kernels->wait(kernels->mark());
    std::memset(block + at, 0, kCopied);
    const BlockCopy out{block + at, on_device, kCopied};
    kernels->copy({&out, 1});
    kernels->wait(kernels->mark());
    EXPECT_EQ(std::memcmp(block + at, written.data(), kCopied), 0);
  }
}

TEST(CudaDevice, SmallHostBlocksAreReadyAtOnceAndTheGpuSeesThem) {
  const std::unique_ptr<Device> device = make_cuda_device(1 << 20);
  const std::unique_ptr<Device> host = device->make_host_memory(1 << 20);
  auto* floats = host->allocate_array<float>(1000, "a test");
  EXPECT_EQ(host->ready(reinterpret_cast<std::byte*>(floats), 4000), 4000u);
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(floats[i], 0.0f);
    floats[i] = static_cast<float>(i);
  }
  const std::unique_ptr<Kernels> kernels = make_kernels();
  kernels->add_bias(floats, 1, 1000, floats);  // in place, in host memory
  kernels->wait(kernels->mark());
  EXPECT_EQ(floats[999], 1998.0f);
}

TEST(CudaLanes, MarksAreReachedInOrderAndTimed) {
  const std::unique_ptr<Kernels> kernels = make_kernels();
  EXPECT_TRUE(kernels->reached(0));
  const Mark first = kernels->mark();
  EXPECT_EQ(first, 1u);
  kernels->delay(20000);
  const Mark second = kernels->mark();
  EXPECT_FALSE(kernels->reached(second));
  kernels->wait(second);
  EXPECT_TRUE(kernels->reached(first));
  EXPECT_GE(kernels->seconds(first, second), 19.9e-3);
  EXPECT_LT(kernels->seconds(first, second), 1.0);
  EXPECT_GE(kernels->time(second) - kernels->time(first), 19.9e-3);
  Kernels& other = kernels->lane(Place::draft);
  const Mark there = other.mark();
  other.wait(there);
  EXPECT_GT(other.time(there), kernels->time(second));
  for (int i = 0; i < 10000; ++i) {  // more than a lane keeps
    const Mark mark = kernels->mark();
    EXPECT_EQ(mark, second + 1 + static_cast<Mark>(i));
  }
  EXPECT_TRUE(kernels->reached(first));
  kernels->wait(second);
  check_cuda(cudaGetLastError(), "nothing failed on the way");
}

TEST(CudaLanes, FourLanesOfOneBackend) {
  const std::unique_ptr<Kernels> kernels = make_kernels();
  EXPECT_EQ(&kernels->lane(Place::pass), kernels.get());
  for (const Place place : {Place::draft, Place::wire_in, Place::wire_out}) {
    Kernels& lane = kernels->lane(place);
    EXPECT_NE(&lane, kernels.get());
    EXPECT_EQ(&lane.lane(place), &lane);
    EXPECT_EQ(&lane.lane(Place::pass), kernels.get());
    EXPECT_EQ(lane.name(), kernels->name());
  }
  EXPECT_EQ(kernels->name().substr(0, 5), "cuda ");
}

// Uploads of all sizes, larger than the ring too, whose source is overwritten at once, behind a lane that is late.
TEST(CudaLanes, UploadsLeaveTheirSourceAtOnce) {
  Engine engine(2);
  const std::unique_ptr<Kernels> kernels = make_kernels();
  constexpr size_t kArea = size_t{40} << 20;
  const DeviceArray<std::byte> area(kArea);
  std::vector<std::byte> expected = area.read();
  kernels->delay(2000);
  for (int i = 0; i < 200; ++i) {
    const size_t most = i % 50 == 49 ? size_t{20} << 20 : i % 3 == 0 ? size_t{3} << 20 : size_t{5000};
    const size_t bytes = 1 + engine() % most;
    const size_t first = engine() % (kArea - bytes + 1);
    std::vector<std::byte> source(bytes, static_cast<std::byte>(engine()));
    source.front() = static_cast<std::byte>(engine());
    source.back() = static_cast<std::byte>(engine());
    kernels->upload(area.data() + first, source.data(), bytes);
    std::memcpy(expected.data() + first, source.data(), bytes);
    std::fill(source.begin(), source.end(), std::byte{0xaa});
  }
  kernels->wait(kernels->mark());
  EXPECT_TRUE(area.read() == expected);
}

// Random copies among slots on four lanes. A job follows the last ones that wrote what it reads and touched what it
// writes, as the engine does it; the outcome is that of doing them one after the other.
TEST(CudaLanes, JobsFollowWhatTheyDependOn) {
  Engine engine(3);
  const std::unique_ptr<Kernels> kernels = make_kernels();
  constexpr int kSlots = 24;
  constexpr size_t kSlotBytes = 96 << 10;
  const DeviceArray<std::byte> device_slots(kSlots / 2 * kSlotBytes);
  const PinnedArray<std::byte> host_slots(kSlots / 2 * kSlotBytes);
  const auto slot = [&](int i) {
    return i < kSlots / 2 ? device_slots.data() + static_cast<size_t>(i) * kSlotBytes
                          : host_slots.data() + static_cast<size_t>(i - kSlots / 2) * kSlotBytes;
  };
  std::vector<std::vector<std::byte>> expected(kSlots);
  for (int i = 0; i < kSlots; ++i) {
    expected[static_cast<size_t>(i)] = random_bytes(kSlotBytes, engine);
    check_cuda(cudaMemcpy(slot(i), expected[static_cast<size_t>(i)].data(), kSlotBytes, cudaMemcpyDefault), "filling");
  }
  finish();
  struct Touch {
    Kernels* lane = nullptr;
    Mark mark = 0;
  };
  std::vector<std::vector<Touch>> touches(kSlots);  // the last write and what came since
  const Place places[] = {Place::pass, Place::draft, Place::wire_in, Place::wire_out};
  for (int job = 0; job < 1500; ++job) {
    Kernels& lane = kernels->lane(places[below(engine, 4)]);
    std::vector<std::pair<int, int>> moves;  // target, source: no slot twice
    std::vector<int> free(kSlots);
    for (int i = 0; i < kSlots; ++i) {
      free[static_cast<size_t>(i)] = i;
    }
    std::shuffle(free.begin(), free.end(), engine);
    for (int i = below(engine, 5); i >= 0; --i) {
      const int target = free[static_cast<size_t>(2 * i)];
      const int source = free[static_cast<size_t>(2 * i + 1)];
      if (std::min(target, source) < kSlots / 2) {  // one of them on the device
        moves.emplace_back(target, source);
      }
    }
    if (moves.empty()) {
      continue;
    }
    for (const auto& [target, source] : moves) {
      for (const Touch& touch : touches[static_cast<size_t>(target)]) {
        lane.follow(*touch.lane, touch.mark);
      }
      if (!touches[static_cast<size_t>(source)].empty()) {
        const Touch& write = touches[static_cast<size_t>(source)].front();
        lane.follow(*write.lane, write.mark);
      }
    }
    if (below(engine, 4) == 0) {
      lane.delay(below(engine, 200));
    }
    std::vector<BlockCopy> copies;
    for (const auto& [target, source] : moves) {
      copies.push_back({slot(target), slot(source), kSlotBytes});
    }
    lane.copy(copies);
    const int cleared = moves.front().first;
    const bool clears = cleared < kSlots / 2 && below(engine, 4) == 0;
    if (clears) {
      lane.zero(slot(cleared) + 100, 1000);
    }
    const Mark mark = lane.mark();
    for (const auto& [target, source] : moves) {
      expected[static_cast<size_t>(target)] = expected[static_cast<size_t>(source)];
      if (clears && target == cleared) {
        std::memset(expected[static_cast<size_t>(target)].data() + 100, 0, 1000);
      }
      touches[static_cast<size_t>(target)] = {{&lane, mark}};
      touches[static_cast<size_t>(source)].push_back({&lane, mark});
    }
  }
  finish();
  for (int i = 0; i < kSlots; ++i) {
    std::vector<std::byte> content(kSlotBytes);
    check_cuda(cudaMemcpy(content.data(), slot(i), kSlotBytes, cudaMemcpyDefault), "reading");
    EXPECT_TRUE(content == expected[static_cast<size_t>(i)]) << i;
  }
}

// A small model's layer without attention, whose KV and outcome are compared.
class DraftModel {
 public:
  static constexpr int kVocabulary = 100;
  static constexpr int kHidden = 256;
  static constexpr int kQkv = (kHeads + 2 * kShape.kv_heads) * kShape.head_dim;
  static constexpr int kContext = 4096;

  DraftModel(bool graphs, Device& device)
      : kernels(make_kernels(graphs)),
        lane(kernels->lane(Place::draft)),
        hidden(8 * kHidden),
        normed(8 * kHidden),
        qkv(8 * kQkv),
        q(8 * kHeads * kShape.head_dim),
        chosen(8 * kHidden) {
    embedding = weight(kVocabulary, kHidden, 1, device);
    project = weight(kQkv, kHidden, 2, device);
    norm = device.allocate_array<float>(kHidden, "a norm");
    angles = device.allocate_array<float>(size_t{kContext} * kShape.head_dim / 2, "angles");
    const std::vector<float> ones(kHidden, 1.0f);
    device.write(reinterpret_cast<std::byte*>(norm), ones.data(), ones.size() * sizeof(float));
    std::vector<float> ramp(size_t{kContext} * kShape.head_dim / 2);
    for (size_t i = 0; i < ramp.size(); ++i) {
      ramp[i] = static_cast<float>(i % 1013) / 1013;
    }
    device.write(reinterpret_cast<std::byte*>(angles), ramp.data(), ramp.size() * sizeof(float));
    const PackedMatrix weights[] = {project};
    kernels->tune(weights);
  }

  PackedMatrix weight(int out, int in, uint64_t seed, Device& device) const {
    PackedMatrix matrix{out, in, reinterpret_cast<bf16*>(device.allocate(kernels->packed_bytes(out, in), "a weight"))};
    kernels->fill_random(matrix, seed, 0.1f);
    return matrix;
  }

  void run(const PassRows& pass) {
    lane.stage(pass);
    lane.replay_pass(pass, [&] {
      ++bodies;
      lane.embed(embedding, pass, hidden.data());
      for (int layer = 0; layer < kShape.layers; ++layer) {
        lane.rms_norm(hidden.data(), norm, 1e-5f, pass.rows, kHidden, normed.data());
        lane.matmul(project, normed.data(), pass.rows, qkv.data(), Epilogue::store);
        QkvArgs args{.shape = kShape, .heads = kHeads, .qkv = qkv.data()};
        args.rope = {angles, angles, kContext};
        args.pass = &pass;
        args.layer = layer;
        args.q = q.data();
        lane.store_qkv(args);
        lane.add_bias(qkv.data(), 1, kHidden, hidden.data());
      }
      lane.select_rows(hidden.data(), pass, kHidden, chosen.data());
    });
  }

  std::unique_ptr<Kernels> kernels;
  Kernels& lane;
  PackedMatrix embedding, project;
  float* norm = nullptr;
  float* angles = nullptr;
  DeviceArray<float> hidden;
  DeviceArray<bf16> normed;
  DeviceArray<float> qkv;
  DeviceArray<bf16> q;
  DeviceArray<float> chosen;
  int bodies = 0;
};

// Tails of eight sequences in two layers, one page each that all positions of a test share.
struct Tails {
  Tails() : pages(static_cast<size_t>(8 * kShape.layers) * kPageValues) {
    std::vector<std::byte*> entries;
    for (int i = 0; i < 8 * kShape.layers * kShape.kv_heads; ++i) {
      entries.push_back(reinterpret_cast<std::byte*>(pages.data() + static_cast<size_t>(i) * kHeadValues));
    }
    table = std::make_unique<DeviceArray<std::byte*>>(entries);
    check_cuda(cudaMemset(pages.data(), 0, static_cast<size_t>(8 * kShape.layers) * kPageValues * sizeof(bf16)),
               "zero");
  }
  static constexpr size_t kHeadValues = size_t{kPageTokens} * 2 * kShape.head_dim;
  static constexpr size_t kPageValues = kHeadValues * kShape.kv_heads;
  DeviceArray<bf16> pages;
  std::unique_ptr<DeviceArray<std::byte*>> table;
};

TEST(CudaLanes, ReplayedDraftsDoWhatTheyWouldDoUnreplayed) {
  const std::unique_ptr<Device> device = make_cuda_device(64 << 20);
  DraftModel plain(false, *device);
  DraftModel replayed(true, *device);
  const Tails plain_tails;
  const Tails replayed_tails;
  const PinnedArray<TokenId> tokens(8 * DraftModel::kContext);
  Engine engine(4);
  for (size_t i = 0; i < 8 * size_t{DraftModel::kContext}; ++i) {
    tokens[i] = below(engine, DraftModel::kVocabulary);
  }
  int passes = 0;
  for (int step = 0; step < 120; ++step) {
    const int count = 1 + below(engine, 3);
    std::vector<int> positions;
    for (int i = 0; i < count; ++i) {
      positions.push_back(below(engine, step < 60 ? 64 : 200));
    }
    for (DraftModel* model : {&plain, &replayed}) {
      const Tails& tails = model == &plain ? plain_tails : replayed_tails;
      std::vector<SequenceRows> sequences;
      for (int layer = 0; layer < kShape.layers; ++layer) {
        for (int i = 0; i < count; ++i) {
          const int position = positions[static_cast<size_t>(i)];
          SequenceRows rows{.first_row = i, .rows = 1, .position = position};
          rows.tokens = tokens.data() + static_cast<ptrdiff_t>(i) * DraftModel::kContext;
          rows.kv.tail.head_pages = tails.table->data() + static_cast<ptrdiff_t>((layer * 8 + i) * kShape.kv_heads);
          rows.kv.tail.page_stride = 1;
          rows.kv.tail_position = position / kPageTokens * kPageTokens;
          sequences.push_back(rows);
        }
      }
      const std::vector<LogitRow> logit_rows{{.row = count - 1, .position = 0}};
      const PassRows pass{
          .rows = count, .layers = kShape.layers, .draft = true, .sequences = sequences, .logit_rows = logit_rows};
      model->run(pass);
      model->lane.wait(model->lane.mark());
    }
    ++passes;
    ASSERT_EQ(
        std::memcmp(plain.chosen.read().data(), replayed.chosen.read().data(), DraftModel::kHidden * sizeof(float)), 0)
        << step;
    ASSERT_EQ(plain.q.read(), replayed.q.read()) << step;
  }
  EXPECT_EQ(plain.bodies, passes);
  EXPECT_LT(replayed.bodies, passes / 2);
  EXPECT_EQ(plain_tails.pages.read(), replayed_tails.pages.read());
  check_cuda(cudaGetLastError(), "nothing failed on the way");
}

}  // namespace
}  // namespace vericache::cuda::test
