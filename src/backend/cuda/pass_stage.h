// PassStage: what the kernels of a lane read of a pass, in device memory that stays where it is. Everything of a pass
// goes up in one copy. Called from the engine's thread.
#pragma once

#include <cstddef>

#include "backend/cuda/cuda_lane.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/ops.h"

namespace vericache::cuda {

class PassStage {
 public:
  // exact: the lane runs full passes, whose attention is planned here. layers, rows and sequences bound every pass.
  PassStage(const Limits& limits, bool exact);

  // The most that one pass sends.
  static size_t most_bytes(const Limits& limits, bool exact);

  void stage(const PassRows& pass, CudaLane& lane);

  const StagedPass& pass() const { return pass_; }
  // Of a full pass.
  const AttentionPlan& plan() const { return plan_; }
  const AttentionTile* tiles() const { return tiles_; }
  const AttentionTile* combine() const { return combine_; }
  // Of a draft pass.
  const KvFormat& format() const { return format_; }
  int longest_tokens() const { return longest_tokens_; }
  int read_tokens() const { return read_tokens_; }

  size_t device_bytes() const { return area_.bytes(); }

 private:
  Limits limits_;
  bool exact_;
  DeviceMemory area_;
  StagedPass pass_;
  AttentionPlan plan_;
  const AttentionTile* tiles_ = nullptr;
  const AttentionTile* combine_ = nullptr;
  KvFormat format_;
  int longest_tokens_ = 0;
  int read_tokens_ = 0;  // that a sequence reads at most where it chooses pages, 0 where none does
};

}  // namespace vericache::cuda
