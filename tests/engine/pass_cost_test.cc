#include "engine/pass_cost.h"

#include <gtest/gtest.h>

namespace vericache {
namespace {

TEST(PassCost, FindsTheLine) {
  PassCost cost;
  for (int i = 0; i < 50; ++i) {
    const int rows = 1 + i % 17;
    cost.add(rows, 0.004 + 0.0005 * rows);
  }
  EXPECT_NEAR(cost.base(), 0.004, 1e-6);
  EXPECT_NEAR(cost.per_row(), 0.0005, 1e-7);
}

TEST(PassCost, EqualRowsSayNothingOfTheSlope) {
  PassCost cost;
  for (int i = 0; i < 20; ++i) {
    cost.add(17, i % 2 == 0 ? 0.009 : 0.011);
  }
  EXPECT_EQ(cost.per_row(), 0);
  EXPECT_NEAR(cost.base(), 0.010, 2e-4);
}

TEST(PassCost, NoiseDoesNotMakeThePassLookFree) {
  PassCost cost;
  for (int i = 0; i < 20; ++i) {
    cost.add(16, 0.001);
    cost.add(18, 0.019);  // a slope that would put the base far below zero
  }
  EXPECT_GE(cost.base(), 0.24 * 0.010);
  EXPECT_GT(cost.per_row(), 0);
  PassCost falling;
  falling.add(1, 0.02);
  falling.add(20, 0.01);
  EXPECT_EQ(falling.per_row(), 0);
}

TEST(PassCost, KnowsNothingAtFirst) {
  EXPECT_EQ(PassCost().base(), 0);
  EXPECT_EQ(PassCost().per_row(), 0);
}

}  // namespace
}  // namespace vericache
