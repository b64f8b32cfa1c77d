// Options: how an engine is set up; the budget of device memory is the Device's own. Plain data; read once at
// construction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "kv/wire.h"

namespace vericache {

class Trace;

struct EngineOptions {
  // Tokens a sequence drafts before its verification starts. 0 = no drafting: plain decoding with the full KV, one pass
  // a token. kAdaptive = chosen anew after every round between 1 and max_horizon.
  static constexpr int kAdaptive = -1;
  int horizon = kAdaptive;
  int max_horizon = 64;

  int max_model_len = 0;   // tokens of one sequence, prompt and output; 0 = the model's
  int max_sequences = 1;   // in flight at once
  int pass_rows = 512;     // rows of one full pass: the prefill chunk
  size_t host_memory = 0;  // bytes for the full KV outside the device; 0 = what max_sequences of max_model_len need
  // Where the full KV goes that the host memory has no room for: bytes of it, and how it is opened. 0 = nowhere.
  size_t store_bytes = 0;
  std::function<std::unique_ptr<BlockStore>(size_t block_bytes, int blocks)> open_store;
  double wire_gbps = 0;  // bandwidth cap of the wire in GB/s, each direction; 0 = none
  WireForm wire_form = WireForm::automatic;
  int ring_layers = 3;     // layers of full KV that staging holds
  Trace* trace = nullptr;  // what the lanes do goes there; outlives the engine
  // For tests: delays (us, random up to this) at every point where a lane hands over to another; corruption of stored
  // blocks.
  int inject_delay_us = 0;
  uint64_t inject_corruption_every = 0;  // every n-th page that leaves the device has one bit flipped; 0 = none
};

}  // namespace vericache
