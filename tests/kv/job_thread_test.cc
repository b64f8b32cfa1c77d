#include "kv/job_thread.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace vericache {
namespace {

TEST(JobThread, DoesJobsInTheirOrder) {
  std::vector<int> order;
  JobThread thread;
  uint64_t last = 0;
  for (int i = 0; i < 100; ++i) {
    last = thread.enqueue([&order, i] { order.push_back(i); });
    EXPECT_EQ(last, static_cast<uint64_t>(i + 1));
  }
  while (!thread.done(last)) {
    std::this_thread::yield();
  }
  EXPECT_TRUE(thread.done(1));
  EXPECT_FALSE(thread.done(last + 1));
  ASSERT_EQ(order.size(), 100u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST(JobThread, EndsWithTheJobThatRuns) {
  std::atomic<bool> begun = false;
  std::atomic<bool> may_end = false;
  std::atomic<int> done = 0;
  {
    JobThread thread;
    thread.enqueue([&] {
      begun = true;
      while (!may_end) {
        std::this_thread::yield();
      }
      ++done;
    });
    thread.enqueue([&] { done += 10; });
    while (!begun) {
      std::this_thread::yield();
    }
    may_end = true;
  }
  EXPECT_TRUE(done == 1 || done == 11) << "the second may have begun before the end was known";
}

}  // namespace
}  // namespace vericache
