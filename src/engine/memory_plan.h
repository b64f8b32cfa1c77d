// MemoryPlan: how the device's and the host's memory are cut into pools at start.
// Pure arithmetic; any thread.
#pragma once

#include <cstddef>

#include "compress/compressor.h"
#include "engine/options.h"
#include "model/transformer.h"

namespace vericache {

struct MemoryPlan {
  bool full_on_device = false;  // resident = full: nothing crosses the wire
  bool streaming = false;       // full-KV mode whose KV does not fit: every pass brings it whole
  int max_len = 0;
  int most_drafts = 0;     // that a sequence may have outstanding
  int logit_rows = 0;      // of a full pass
  int decode_sets = 0;     // tail page sets that a decoding sequence may need
  int sequence_sets = 0;   // the most that one may hold while it prefills
  int tail_sets = 0;       // in the pool
  int staging_pages = 0;   // a slot's
  int resident_pages = 0;  // head pages in the pool
  int host_extents = 0;
  size_t query_window_bytes = 0;  // of one sequence
  size_t activation_bytes = 0;
  size_t tail_bytes = 0;
  size_t staging_bytes = 0;
  size_t resident_bytes = 0;
  size_t host_bytes = 0;
};

// Error, naming the least budget that works, if `available` device bytes or the host budget cannot hold one sequence of
// max_len.
MemoryPlan plan_memory(const Transformer& model, const Compressor* compressor, const EngineOptions& options,
                       size_t available);

// Head pages of resident KV that a sequence of `tokens` tokens needs at most.
int resident_pages_for(const Compressor& compressor, int tokens, const KvShape& shape);

}  // namespace vericache
