// Tests of checksum and prove: against the same function on the host; what flips or moves is noticed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <set>

#include "backend/cuda/checksum.h"
#include "backend/cuda/device_array.h"

namespace vericache::cuda::test {
namespace {

std::vector<std::byte> random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> out(count);
  for (size_t i = 0; i + 8 <= count; i += 8) {
    const uint64_t word = random();
    std::memcpy(out.data() + i, &word, 8);
  }
  return out;
}

struct Geometry {
  size_t bytes;
  size_t stride;
  int count;
};
constexpr Geometry kGeometries[] = {{16, 16, 1},          {48, 64, 300},         {4096, 4096, 7},
                                    {4112, 8192, 130},    {32768, 32768, 600},   {262144, 262144, 8},
                                    {262144, 262160, 65}, {262144, 262144, 130}, {1048592, 1048592, 3}};

uint32_t* proof_scratch() {
  static const DeviceArray<uint32_t> scratch(std::vector<uint32_t>(2, 0));
  return const_cast<uint32_t*>(scratch.data());
}

TEST(CudaChecksum, EqualsTheHost) {
  for (const Geometry& g : kGeometries) {
    const auto count = static_cast<size_t>(g.count);
    const std::vector<std::byte> bytes = random_bytes(g.stride * count, g.bytes);
    const DeviceArray<std::byte> device(bytes);
    PinnedArray<uint64_t> sums(count + 1);
    checksum({device.data(), g.stride, g.bytes, g.count}, sums.data(), nullptr);
    finish();
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(sums[i], checksum_of(bytes.data() + i * g.stride, g.bytes)) << g.bytes << " bytes, block " << i;
    }
    EXPECT_EQ(sums[count], ~uint64_t{0});
  }
}

TEST(CudaChecksum, ChecksumsMayLieApart) {
  constexpr size_t kBytes = 4096;
  const std::vector<std::byte> bytes = random_bytes(kBytes * 5, 9);
  const DeviceArray<std::byte> device(bytes);
  PinnedArray<uint64_t> sums(15);
  PinnedArray<uint32_t> mismatches(1);
  const BlockRow blocks{device.data(), kBytes, kBytes, 5, 3};
  checksum(blocks, sums.data(), nullptr);
  finish();
  for (size_t i = 0; i < 15; ++i) {
    EXPECT_EQ(sums[i], i % 3 == 0 ? checksum_of(bytes.data() + i / 3 * kBytes, kBytes) : ~uint64_t{0});
  }
  mismatches[0] = 0;
  prove(blocks, sums.data(), mismatches.data(), proof_scratch(), nullptr);
  finish();
  EXPECT_EQ(mismatches[0], 0u);
  sums[6] ^= 1;
  prove(blocks, sums.data(), mismatches.data(), proof_scratch(), nullptr);
  finish();
  EXPECT_EQ(mismatches[0], 1u);
}

TEST(CudaChecksum, ReadsHostMemoryInPlace) {
  constexpr size_t kBytes = 262144;
  const std::vector<std::byte> bytes = random_bytes(kBytes * 3, 1);
  const PinnedArray<std::byte> pinned(bytes.size());
  std::copy(bytes.begin(), bytes.end(), pinned.data());
  PinnedArray<uint64_t> sums(3);
  checksum({pinned.data(), kBytes, kBytes, 3}, sums.data(), nullptr);
  finish();
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(sums[i], checksum_of(bytes.data() + i * kBytes, kBytes));
  }
}

TEST(CudaChecksum, ProveCountsTheBlocksThatChanged) {
  std::mt19937_64 random(2);
  for (const Geometry& g : kGeometries) {
    const auto count = static_cast<size_t>(g.count);
    std::vector<std::byte> bytes = random_bytes(g.stride * count, g.bytes + 1);
    DeviceArray<std::byte> device(bytes);
    PinnedArray<uint64_t> sums(count);
    PinnedArray<uint32_t> mismatches(1);
    const BlockRow blocks{device.data(), g.stride, g.bytes, g.count};
    checksum(blocks, sums.data(), nullptr);
    finish();
    mismatches[0] = 5;
    prove(blocks, sums.data(), mismatches.data(), proof_scratch(), nullptr);
    finish();
    EXPECT_EQ(mismatches[0], 5u);
    uint32_t changed = 0;
    for (size_t i = 0; i < count; i += 1 + random() % 3) {
      bytes[i * g.stride + random() % g.bytes] ^= std::byte{1} << random() % 8;
      ++changed;
    }
    device.write(bytes);
    prove(blocks, sums.data(), mismatches.data(), proof_scratch(), nullptr);
    finish();
    EXPECT_EQ(mismatches[0], 5 + changed) << g.bytes;
  }
}

// Every single bit, at every place of a small block: all checksums differ.
TEST(CudaChecksum, EveryBitCounts) {
  std::vector<std::byte> block = random_bytes(512, 3);
  for (const bool zeros : {false, true}) {
    std::fill(block.begin(), zeros ? block.end() : block.begin(), std::byte{0});
    std::set<uint64_t> sums = {checksum_of(block.data(), block.size())};
    for (size_t bit = 0; bit < block.size() * 8; ++bit) {
      block[bit / 8] ^= std::byte{1} << bit % 8;
      sums.insert(checksum_of(block.data(), block.size()));
      block[bit / 8] ^= std::byte{1} << bit % 8;
    }
    EXPECT_EQ(sums.size(), block.size() * 8 + 1);
  }
}

// Words that change places, whole or nearly equal, and two flips of the same bit in two places.
TEST(CudaChecksum, WhatMovesIsNoticed) {
  std::mt19937_64 random(4);
  std::vector<uint64_t> words(512);
  const auto sum = [&] { return checksum_of(words.data(), words.size() * 8); };
  for (int round = 0; round < 20'000; ++round) {
    const bool sparse = round % 2 == 0;
    for (uint64_t& word : words) {
      word = sparse ? 0x3f803f803f803f80u : random();
    }
    const size_t a = random() % words.size();
    size_t b = round % 4 < 2 ? a ^ 1 : random() % words.size();
    b = a == b ? a ^ 2 : b;
    const uint64_t bit = uint64_t{1} << random() % 64;
    words[a] ^= bit;
    const uint64_t before = sum();
    std::swap(words[a], words[b]);
    ASSERT_NE(sum(), before) << round;
    std::swap(words[a], words[b]);
    words[a] ^= bit;
    words[b] ^= bit;
    ASSERT_NE(sum(), before) << round;
  }
}

TEST(CudaChecksum, LengthCounts) {
  const std::vector<std::byte> zeros(256);
  std::set<uint64_t> sums;
  for (size_t bytes = 0; bytes <= zeros.size(); ++bytes) {
    sums.insert(checksum_of(zeros.data(), bytes));
  }
  EXPECT_EQ(sums.size(), zeros.size() + 1);
}

}  // namespace
}  // namespace vericache::cuda::test
