// The rest of the op list on the CPU: choosing tokens, blocks and their checksums, random weights, marks, memory.
#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "backend/device.h"
#include "backend/kv_fixture.h"
#include "backend/random_fill.h"
#include "base/hash.h"

namespace vericache::test {
namespace {

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

std::unique_ptr<Kernels> kernels_of(int threads) {
  return make_cpu_kernels(best_isa(), threads,
                          {.shape = {1, 1, 16}, .heads = 1, .max_rows = 64, .max_context_tokens = 1024});
}

TEST(Choose, IsTheChoiceOfSamplingAndHashesTheRow) {
  Random random(50);
  const int vocabulary = 1013;
  const int rows = 23;
  auto logits = random.floats(at(rows, vocabulary), 4.0f);
  logits[5] = std::nanf("");
  std::vector<TokenId> tokens(rows, -1);
  std::vector<uint64_t> hashes(rows, 0);
  std::vector<LogitRow> logit_rows;
  for (int i = 0; i < rows; ++i) {
    const Sampling sampling{.temperature = i % 3 == 0 ? 0.0f : 0.8f,
                            .top_k = i % 4 == 0 ? 40 : 0,
                            .top_p = i % 5 == 0 ? 0.9f : 1.0f,
                            .seed = static_cast<uint64_t>(random.below(1000))};
    logit_rows.push_back({.row = i,
                          .position = random.below(5000),
                          .sampling = sampling,
                          .token = &tokens[static_cast<size_t>(i)],
                          .hash = i % 2 == 0 ? &hashes[static_cast<size_t>(i)] : nullptr});
  }
  const PassRows pass{.rows = rows, .layers = 1, .logit_rows = logit_rows};
  for (const int threads : {1, 3}) {
    std::fill(tokens.begin(), tokens.end(), -1);
    const auto kernels = kernels_of(threads);
    kernels->stage(pass);
    kernels->choose(logits.data(), pass, vocabulary);
    for (int i = 0; i < rows; ++i) {
      const std::span<const float> row(logits.data() + at(i, vocabulary), static_cast<size_t>(vocabulary));
      const LogitRow& wanted = logit_rows[static_cast<size_t>(i)];
      EXPECT_EQ(tokens[static_cast<size_t>(i)], choose(row, wanted.sampling, wanted.position));
      EXPECT_EQ(hashes[static_cast<size_t>(i)], i % 2 == 0 ? hash_bytes(row.data(), row.size_bytes()) : 0);
    }
  }
  // One bit of one logit is another hash.
  const uint64_t before = hashes[2];
  reinterpret_cast<uint32_t*>(logits.data())[at(2, vocabulary, 700)] ^= 1;
  const auto kernels = kernels_of(2);
  kernels->choose(logits.data(), pass, vocabulary);
  EXPECT_NE(hashes[2], before);
}

TEST(SelectRows, CopiesTheRowsThatWantLogits) {
  Random random(51);
  const int dim = 37;
  const auto x = random.floats(at(9, dim));
  const LogitRow logit_rows[] = {{.row = 8}, {.row = 0}, {.row = 3}, {.row = 3}};
  const PassRows pass{.rows = 9, .layers = 1, .logit_rows = logit_rows};
  std::vector<float> out(at(4, dim) + 1, 42.0f);
  kernels_of(2)->select_rows(x.data(), pass, dim, out.data());
  for (int i = 0; i < 4; ++i) {
    for (int d = 0; d < dim; ++d) {
      ASSERT_EQ(out[at(i, dim, d)], x[at(logit_rows[i].row, dim, d)]);
    }
  }
  EXPECT_EQ(out.back(), 42.0f);
}

// Blocks among bytes that are not theirs.
TEST(Blocks, ProofNoticesEveryFlippedBit) {
  Random random(52);
  for (const int threads : {1, 3}) {
    const auto kernels = kernels_of(threads);
    std::vector<std::byte> memory(40000);
    for (std::byte& byte : memory) {
      byte = static_cast<std::byte>(random.below(256));
    }
    const BlockRow blocks{.first = memory.data() + 64, .stride = 3000, .bytes = 2048, .count = 13};
    std::vector<uint64_t> checksums(14, 77);
    kernels->checksum(blocks, checksums.data());
    EXPECT_EQ(checksums.back(), 77u);
    for (int i = 0; i < blocks.count; ++i) {
      EXPECT_EQ(checksums[static_cast<size_t>(i)], hash_bytes(blocks.first + 3000 * i, 2048));
    }
    uint32_t mismatches = 5;
    kernels->prove(blocks, checksums.data(), &mismatches);
    EXPECT_EQ(mismatches, 5u) << "added to";
    for (int round = 0; round < 100; ++round) {
      const int block = random.below(blocks.count);
      std::byte& byte = memory[static_cast<size_t>(64 + 3000 * block + random.below(2048))];
      const std::byte bit{static_cast<uint8_t>(1 << random.below(8))};
      byte ^= bit;
      mismatches = 0;
      kernels->prove(blocks, checksums.data(), &mismatches);
      ASSERT_EQ(mismatches, 1u);
      byte ^= bit;
    }
    memory[64 + 2048] ^= std::byte{1};  // between two blocks
    memory[64] ^= std::byte{1};
    memory[64 + 3000 * 12] ^= std::byte{1};
    mismatches = 0;
    kernels->prove(blocks, checksums.data(), &mismatches);
    EXPECT_EQ(mismatches, 2u);
  }
}

TEST(Blocks, CopyMovesEveryByteAndNoOther) {
  Random random(53);
  for (const int threads : {1, 3}) {
    const auto kernels = kernels_of(threads);
    for (int round = 0; round < 30; ++round) {
      std::vector<std::byte> source(300000);
      for (std::byte& byte : source) {
        byte = static_cast<std::byte>(random.below(256));
      }
      std::vector<std::byte> target(source.size(), std::byte{0});
      std::vector<std::byte> expected = target;
      std::vector<BlockCopy> copies;
      size_t from = 0;
      size_t to = 0;
      const int most = round % 2 == 0 ? 100 : 60000;
      while (from + static_cast<size_t>(most) < source.size() && to + static_cast<size_t>(most) + 10 < target.size()) {
        const size_t bytes = static_cast<size_t>(random.below(most));
        copies.push_back({target.data() + to, source.data() + from, bytes});
        std::copy_n(source.data() + from, bytes, expected.data() + to);
        from += bytes;
        to += bytes + static_cast<size_t>(random.below(10));
      }
      std::shuffle(copies.begin(), copies.end(), random.engine());
      kernels->copy(copies);
      ASSERT_TRUE(target == expected);
      kernels->zero(target.data() + 10, 1000);
      std::fill_n(expected.begin() + 10, 1000, std::byte{0});
      ASSERT_TRUE(target == expected);
    }
    kernels->copy({});
  }
}

TEST(FillRandom, IsAFunctionOfSeedRowAndColumn) {
  const float scale = 0.25f;
  const auto fill = [&](int threads, int out, int in, uint64_t seed) {
    const auto kernels = kernels_of(threads);
    Packed packed = pack(*kernels, std::vector<bf16>(at(out, in), bf16{0}), out, in);
    kernels->fill_random(packed.matrix, seed, scale);
    std::vector<TokenId> tokens(static_cast<size_t>(out));
    std::vector<float> values(at(out, in));
    for (int row = 0; row < out; ++row) {  // embed reads rows back
      tokens[static_cast<size_t>(row)] = row;
      const SequenceRows sequence{.first_row = 0, .rows = 1, .position = row, .tokens = tokens.data()};
      kernels->embed(packed.matrix, one_layer({&sequence, 1}), values.data() + at(row, in));
    }
    return values;
  };
  const auto values = fill(1, 75, 50, 3);
  EXPECT_EQ(values, fill(3, 75, 50, 3));
  EXPECT_NE(values, fill(1, 75, 50, 4));
  EXPECT_NE(values, fill(1, 75, 50, 3 + (uint64_t{1} << 32))) << "all of the seed counts";
  const auto wider = fill(2, 80, 66, 3);
  double sum = 0;
  double squares = 0;
  for (int row = 0; row < 75; ++row) {
    for (int i = 0; i < 50; ++i) {
      const float value = values[at(row, 50, i)];
      ASSERT_EQ(value, wider[at(row, 66, i)]) << "whatever the matrix's size";
      ASSERT_EQ(value, to_float(random_value(3, row, i, scale)));
      ASSERT_LE(std::abs(value), scale);
      sum += value;
      squares += value * value;
    }
  }
  EXPECT_NEAR(sum / (75 * 50), 0, 0.01);
  EXPECT_NEAR(squares / (75 * 50), scale * scale / 3, 0.002);
}

// What lies outside the matrix stays zero: products run over padded panels.
TEST(FillRandom, LeavesThePaddingZero) {
  Random random(54);
  const auto kernels = kernels_of(2);
  const int out = 21;
  const int in = 50;
  Packed packed = pack(*kernels, std::vector<bf16>(at(out, in), bf16{0}), out, in);
  kernels->fill_random(packed.matrix, 1, 1.0f);
  std::vector<bf16> filled;
  for (int row = 0; row < out; ++row) {
    for (int i = 0; i < in; ++i) {
      filled.push_back(random_value(1, row, i, 1.0f));
    }
  }
  const Packed expected = pack(*kernels, filled, out, in);
  EXPECT_EQ(std::memcmp(packed.matrix.data, expected.matrix.data, kernels->packed_bytes(out, in)), 0);
}

TEST(Lane, MarksMeasureTime) {
  const auto kernels = kernels_of(1);
  const Mark first = kernels->mark();
  EXPECT_EQ(first, 1u);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const Mark second = kernels->mark();
  EXPECT_GE(kernels->seconds(first, second), 0.02);
  EXPECT_LT(kernels->seconds(first, second), 10);
  EXPECT_EQ(kernels->seconds(second, second), 0);
  EXPECT_TRUE(kernels->reached(second));
  kernels->wait(second);
  Kernels& other = kernels->lane(Kernels::Place::draft);
  other.follow(*kernels, second);
  for (int i = 0; i < 5000; ++i) {
    const Mark mark = kernels->mark();
    ASSERT_GE(kernels->seconds(mark - 1, mark), 0);
    ASSERT_LT(kernels->seconds(mark - 1, mark), 10);
  }
  std::vector<std::byte> target(100);
  const std::vector<std::byte> source(100, std::byte{9});
  kernels->upload(target.data(), source.data(), 100);
  EXPECT_TRUE(target == source);
}

TEST(CpuDevice, HostMemoryIsADeviceWithItsOwnBudget) {
  const auto device = make_cpu_device(1 << 20);
  EXPECT_TRUE(device->addressable());
  const auto host = device->make_host_memory(8192);
  std::byte* block = host->allocate(8192, "test");
  EXPECT_EQ(host->available(), 0u);
  EXPECT_EQ(device->used(), 0u);
  EXPECT_ANY_THROW(host->allocate(1, "test"));
  EXPECT_EQ(host->ready(block, 8192), 8192u);
  const std::vector<std::byte> source(8192, std::byte{3});
  std::vector<std::byte> back(8192);
  host->write(block, source.data(), source.size());
  host->read(back.data(), block, back.size());
  EXPECT_TRUE(back == source);
}

}  // namespace
}  // namespace vericache::test
