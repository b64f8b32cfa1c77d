// Compressor: what of the full KV stays in device memory, and in which form. full = join(resident, residual), bit for
// bit. Called from the engine's thread, layer by layer, while a full pass has the layer at hand.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "backend/kernels.h"
#include "kv/resident.h"

namespace vericache {

// Tokens [begin, end), multiples of 64.
struct TokenRange {
  int begin = 0;
  int end = 0;
};

// The full KV of one layer of one sequence: staged (or device-resident) pages, then the pages of the tail. Device
// memory.
struct FullLayer {
  KvShape shape;
  LayerKv kv;
  int layer = 0;
};

// What a compressor notes of one layer of one sequence, from call to call.
struct Notes {
  std::byte* device = nullptr;  // Compressor::notes_bytes of device memory
  int max_tokens = 0;           // that it was asked for
  int observed = 0;             // tokens that observe() has seen as keys
  int reconstructed = 0;        // tokens that reconstruct() has weighed, before this call
  // Compressor::report_values of host memory that the device reaches, zero at first: what an op wrote in one call, the
  // host may read in the next; until then nothing of the sequence is under way.
  int* report = nullptr;
};

// What the full passes saw, for free: the last queries (up to Compressor::query_window) of this layer and their softmax
// denominators; attention_mass turns them into mass per token.
struct Attended {
  int heads = 0;
  float scale = 0;
  QueryRing queries{};
  int rows = 0;      // of the ring
  int position = 0;  // of the first of them; they are consecutive
  RopeTable rope{};  // that turned them
  Notes notes{};
  const bf16* rounding = nullptr;  // of this layer's keys (KeyRounding), or null
  // The last of them alone.
  Attended last(int most) const {
    Attended out = *this;
    out.rows = rows < most ? rows : most;
    out.position = position + rows - out.rows;
    return out;
  }
};

class Compressor {
 public:
  virtual ~Compressor() = default;
  virtual std::string name() const = 0;  // with its options, as the factory reads it
  virtual KvFormat format() const = 0;   // how attention reads the resident part
  // Queries per layer that compress() wants to see; 0 = none.
  virtual int query_window() const { return 0; }
  // Whether compress() wants the layer only when decoding may begin (at the prompt's end and at every verification),
  // because it chooses among all tokens anew; otherwise it is called for every fold and extends.
  virtual bool chooses_anew() const { return false; }
  // The same of one layer; chooses_anew() is so if any layer does.
  virtual bool chooses_anew_in(int layer) const {
    (void)layer;
    return chooses_anew();
  }
  // Whether observe() wants every query of every decided token.
  virtual bool observes() const { return false; }
  virtual size_t notes_bytes(int max_tokens, const KvShape& shape) const {
    (void)max_tokens;
    (void)shape;
    return 0;
  }
  virtual int report_values(const KvShape& shape) const {
    (void)shape;
    return 0;
  }

  // Whether the context is replayed once its prompt is read, before compress() sees it for the first time: its own
  // tokens are fed again, chunk by chunk, in rows that stand behind it, see it whole and leave no KV. That costs about
  // a second prefill. A context that leaves no positions to stand at is not replayed.
  virtual bool reconstructs() const { return false; }

  // Device memory that compress() works in, for contexts of up to max_tokens; one block for all sequences and layers.
  virtual size_t scratch_bytes(int max_tokens, const KvShape& shape) const {
    (void)max_tokens;
    (void)shape;
    return 0;
  }
  virtual void set_scratch(std::byte* memory) { scratch_ = memory; }

  // The most that `tokens` tokens of a sequence occupy in device memory, all layers, in whole head pages. For
  // admission.
  size_t resident_bytes(int tokens, const KvShape& shape) const;
  // The most resident tokens of one head out of `tokens`, whichever head of whichever layer.
  virtual int kept_tokens(int tokens) const { return tokens; }
  // The code in which the full KV crosses the wire: `resident` where the resident part holds the same tokens page for
  // page and a page never changes once it is made; `plain` where nothing crosses.
  virtual ResidualCode residual_code() const { return ResidualCode::lossless; }
  // Of a bf16 page, what its encoded form is expected to take: 8-bit codes leave 3.6 of 16 bits open
  // (docs/compressors.md).
  double coded_share() const;
  // What crosses the wire for one verification at `tokens` tokens, all layers, in that form: about so much.
  size_t wire_bytes(int tokens, const KvShape& shape) const;
  // Resident tokens of a layer out of `tokens` (a multiple of 64), all heads together.
  virtual int layer_tokens(int tokens, int layer, const KvShape& shape) const {
    (void)layer;
    return shape.kv_heads * kept_tokens(tokens);
  }
  // The most head pages that they occupy.
  virtual int layer_pages(int tokens, int layer, const KvShape& shape) const {
    (void)layer;
    return shape.kv_heads * ((kept_tokens(tokens) + kPageTokens - 1) / kPageTokens);
  }
  // The most head pages of a sequence of up to `tokens` tokens, all layers.
  int resident_pages(int tokens, const KvShape& shape) const;

  // Each position once, in rising order; what `full` holds ends with the last of the queries. Enqueued on the lane.
  virtual void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) {
    (void)kernels;
    (void)full;
    (void)seen;
  }
  // A chunk of the replay: `seen` has the queries of its rows, whose softmax runs over all of `full` up to each of
  // them; tokens [0, tokens) of it are the context, the same for every chunk. Enqueued on the lane.
  virtual void reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) {
    (void)kernels;
    (void)full;
    (void)tokens;
    (void)seen;
  }
  // Makes `out` stand for tokens [0, fresh.end) of `full`; it stands for [0, fresh.begin) now. Enqueued on the lane.
  // false: the pool is out of pages (admission reserves them, so this is a bug where it is checked).
  virtual bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                        ResidentLayer& out) = 0;

 protected:
  std::byte* scratch() const { return scratch_; }

 private:
  std::byte* scratch_ = nullptr;
};

// "none", "kivi:bits=4", "kivi:k=8,v=4", "streaming-llm:sinks=4,window=1024", "snapkv:budget=0.2",
// "snapkv:budget=0.2+kivi:bits=4", "adakv(snapkv:budget=0.2)", "snapkv:budget=0.2;layers=0-1:none". UsageError, listing
// what there is, for an unknown name, option or value.
std::unique_ptr<Compressor> make_compressor(std::string_view spec);
// One line per method, for --help and for messages.
std::string_view compressor_help();

}  // namespace vericache
