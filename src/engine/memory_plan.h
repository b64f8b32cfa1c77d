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
  WireOptions wire;        // slot_pages: of all sequences in a pass
  int resident_pages = 0;  // head pages in the pool
  int host_extents = 0;
  int store_extents = 0;
  size_t query_window_bytes = 0;  // of one sequence
  size_t notes_bytes = 0;         // of the compressor, of one sequence and layer
  int report_values = 0;          // the same, in host memory
  size_t index_bytes = 0;         // of one sequence: tables of its tail and resident part
  size_t tail_index_bytes = 0;    // of them, the tail's
  int resident_head_pages = 0;    // pages that a head may hold
  int chosen_stride = 0;          // tokens that a head may keep where some are dropped, else 0
  size_t scratch_bytes = 0;       // of the compressor
  size_t rounding_bytes = 0;      // of keys (KeyRounding)
  size_t activation_bytes = 0;
  size_t tail_bytes = 0;
  size_t staging_bytes = 0;
  size_t resident_bytes = 0;
  size_t board_bytes = 0;    // of one sequence's tokens, their drafts' margins, the compressor's reports
  size_t margin_offset = 0;  // of the margins
  size_t report_offset = 0;  // of the reports
  size_t record_bytes = 0;   // of one sequence's pages: checksums and ends
  size_t host_bytes = 0;     // the host tier, boards, records, results

  size_t sequence_notes_bytes(const KvShape& shape) const { return notes_bytes * static_cast<size_t>(shape.layers); }
};

// Error, naming the least budget that works, if what the device has left or the host budget cannot hold one sequence
// of max_len.
MemoryPlan plan_memory(const Transformer& model, const Compressor* compressor, const EngineOptions& options,
                       const Device& device);

// Sequences of max_len tokens for whose full KV there is room outside the device at once, when all but the last are
// read.
int sequences_stored(const MemoryPlan& plan, const EngineOptions& options, const KvShape& shape);

// Sequences of max_len tokens that can be in flight at once under `options` without their max_sequences, `most` at
// most. Error as plan_memory, if it is not even one.
int sequences_that_fit(const Transformer& model, const Compressor* compressor, const EngineOptions& options,
                       const Device& device, int most);

// Head pages of resident KV that a sequence of `tokens` tokens needs at most.
int resident_pages_for(const Compressor& compressor, int tokens, const KvShape& shape);

}  // namespace vericache
