// The pool: every item once, whatever the counts, sleeps and nesting.
#include "base/threads.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>

namespace vericache {
namespace {

TEST(ThreadPool, RunsEveryItemOnce) {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 2000; ++round) {
      const int count = round % 37;
      std::vector<int> hits(static_cast<size_t>(count), 0);
      pool.parallel_for(count, [&](int i) { ++hits[static_cast<size_t>(i)]; });
      for (const int hit : hits) {
        ASSERT_EQ(hit, 1);
      }
    }
  }
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    std::this_thread::sleep_for(std::chrono::microseconds(round % 5 * 100));
    std::atomic<int> sum{0};
    pool.parallel_for(100, [&](int i) { sum += i; });
    ASSERT_EQ(sum.load(), 4950);
  }
}

TEST(ThreadPool, WaitsForSlowItems) {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> done{0};
    pool.parallel_for(3, [&](int) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++done;
    });
    ASSERT_EQ(done.load(), 3);
  }
}

TEST(ThreadPool, NestedCallsRunInline) {
  ThreadPool pool(3);
  std::vector<int> hits(64, 0);
  pool.parallel_for(8, [&](int i) {
    const int thread = ThreadPool::thread_index();
    pool.parallel_for(8, [&](int j) {
      EXPECT_EQ(ThreadPool::thread_index(), thread);
      ++hits[static_cast<size_t>(i * 8 + j)];
    });
  });
  EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), 64);
}

TEST(ThreadPool, ThreadIndexNamesScratchOfOneThread) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> inside(4);
  pool.parallel_for(5000, [&](int) {
    std::atomic<int>& mine = inside[static_cast<size_t>(ThreadPool::thread_index())];
    EXPECT_EQ(mine.fetch_add(1), 0);
    mine.fetch_sub(1);
  });
}

TEST(ThreadPool, PoolsComeAndGo) {
  for (int i = 0; i < 100; ++i) {
    ThreadPool pool(4);
    if (i % 2 == 0) {
      pool.parallel_for(4, [](int) {});
    }
  }
}

// A denormal product is zero on every thread, and the caller gets its own mode back.
TEST(FlushDenormals, HoldsOnEveryThreadAndEndsWithItsScope) {
  volatile float tiny = std::numeric_limits<float>::min();
  {
    const FlushDenormals flush;
    ThreadPool pool(4);
    std::vector<float> products(64, 1.0f);
    pool.parallel_for(64, [&](int i) {
      std::this_thread::yield();
      products[static_cast<size_t>(i)] = tiny * 0.5f;
    });
    for (const float product : products) {
      EXPECT_EQ(product, 0.0f);
    }
  }
  EXPECT_GT(tiny * 0.5f, 0.0f);
}

}  // namespace
}  // namespace vericache
