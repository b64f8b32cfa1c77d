#include "engine/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "compress/key_rounding.h"
#include "kv/full_kv.h"
#include "kv/tail.h"
#include "kv/wire.h"

namespace vericache {
namespace {

constexpr size_t kBlockAlignment = 4096;

size_t aligned(size_t bytes) {
  return (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}
int pages_for(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}
double megabytes(size_t bytes) {
  return static_cast<double>(bytes) / 1e6;
}

// Sizes that do not depend on the budget.
MemoryPlan fixed_sizes(const Transformer& model, const Compressor* compressor, const EngineOptions& o) {
  const ModelConfig& config = model.config();
  const KvShape shape = model.kv_shape();
  MemoryPlan plan;
  plan.max_len = o.max_model_len > 0 ? std::min(o.max_model_len, config.max_position) : config.max_position;
  const int horizon = o.horizon == EngineOptions::kAdaptive ? o.max_horizon : o.horizon;
  plan.most_drafts = 2 * horizon;  // as many again while a verification is on the wire
  if (o.pass_rows < 1 + plan.most_drafts) {
    throw Error("a pass of {} rows cannot verify {} drafts; raise --prefill-chunk to {} or lower the horizon to {}",
                o.pass_rows, plan.most_drafts, plan.most_drafts + 1, (o.pass_rows - 1) / 2);
  }
  plan.logit_rows = std::min(o.pass_rows, o.max_sequences * (1 + plan.most_drafts));
  // A decoding sequence's tail holds what no whole page is made of yet, the rows of the last pass until they are stored
  // outside, and what was drafted since; it may begin and end within a page.
  plan.decode_sets = (2 * (kPageTokens - 1) + 2 * (plan.most_drafts + 1)) / kPageTokens + 1;
  const int chunk_sets = pages_for(o.pass_rows) + 1;
  plan.sequence_sets = plan.decode_sets + 2 * chunk_sets;
  plan.tail_sets = o.max_sequences * plan.decode_sets + 2 * chunk_sets;
  plan.tail_bytes = static_cast<size_t>(plan.tail_sets) * page_set_bytes(shape);
  plan.activation_bytes = model.activation_bytes(o.pass_rows, plan.logit_rows);
  if (horizon > 0) {
    plan.activation_bytes += model.activation_bytes(o.max_sequences, o.max_sequences);
  }
  if (compressor != nullptr) {
    plan.scratch_bytes = compressor->scratch_bytes(plan.max_len, shape);
    plan.rounding_bytes = KeyRounding::bytes(compressor->format(), shape);
    plan.notes_bytes = (compressor->notes_bytes(plan.max_len, shape) + 63) / 64 * 64;
    plan.report_values = compressor->report_values(shape);
  }
  if (compressor != nullptr && compressor->query_window() > 0) {
    const size_t row =
        static_cast<size_t>(config.heads) * (static_cast<size_t>(shape.key_dim()) * sizeof(bf16) + sizeof(float));
    plan.query_window_bytes =
        aligned(row * static_cast<size_t>(compressor->query_window()) * static_cast<size_t>(shape.layers));
  }
  return plan;
}

// The full KV of a streaming engine has no resident part to be joined with.
WireOptions wire_options(const Compressor* compressor, bool streaming, const EngineOptions& o, const Device& device) {
  WireOptions wire{.gbps = o.wire_gbps, .ring_layers = o.ring_layers};
  const bool coded = o.wire_form == WireForm::automatic ? !device.addressable() : o.wire_form == WireForm::coded;
  if (coded) {
    const bool own = streaming || compressor == nullptr;
    wire.code = own ? ResidualCode::lossless : compressor->residual_code();
    wire.coded_share = own ? 0.72 : compressor->coded_share();
  }
  return wire;
}

// Sequences whose full KV so many extents hold at once: the next one needs its worst case, those before it have what
// their pages take, as a rule a little less than this.
int stored_at_once(size_t extents, int max_pages, const KvShape& shape, const WireOptions& wire) {
  const auto worst = static_cast<size_t>(extents_for(max_pages, shape, wire.code));
  if (extents < worst) {
    return 0;
  }
  const double share = wire.code == ResidualCode::plain ? 1 : 1.0625 * wire.coded_share;
  const double bytes = share * static_cast<double>(static_cast<size_t>(max_pages) * page_bytes(shape));
  const auto settled = static_cast<size_t>(shape.layers) *
                       static_cast<size_t>(std::ceil(bytes / static_cast<double>(extent_bytes(shape))));
  return static_cast<int>(1 + (extents - worst) / std::min(settled, worst));
}

}  // namespace

int resident_pages_for(const Compressor& compressor, int tokens, const KvShape& shape) {
  return compressor.resident_pages(tokens, shape);
}

MemoryPlan plan_memory(const Transformer& model, const Compressor* compressor, const EngineOptions& o,
                       const Device& device) {
  const size_t available = device.available();
  const KvShape shape = model.kv_shape();
  MemoryPlan plan = fixed_sizes(model, compressor, o);
  const size_t sequences = static_cast<size_t>(o.max_sequences);
  const int max_pages = pages_for(plan.max_len);
  const bool mirrored = !device.addressable();
  plan.tail_index_bytes = mirrored ? Tail::index_bytes(shape, plan.sequence_sets) : 0;
  plan.resident_head_pages = compressor == nullptr ? max_pages : pages_for(compressor->kept_tokens(plan.max_len));
  plan.chosen_stride = compressor != nullptr && compressor->chooses_anew() ? compressor->kept_tokens(plan.max_len) : 0;
  plan.index_bytes = aligned(plan.tail_index_bytes +
                             ResidentIndex::bytes(shape, plan.resident_head_pages, plan.chosen_stride, mirrored));
  const size_t fixed = aligned(plan.activation_bytes) + aligned(plan.tail_bytes) + aligned(plan.scratch_bytes) +
                       aligned(plan.rounding_bytes) +
                       sequences * (plan.query_window_bytes + plan.sequence_notes_bytes(shape) + plan.index_bytes);

  const KvFormat format = compressor == nullptr ? KvFormat{} : compressor->format();
  // The full KV stays on the device when nothing is lost in the resident part and one sequence of it fits.
  const bool full_mode = format.exact() && (compressor == nullptr || !compressor->chooses_anew());
  const size_t full_sequence =
      static_cast<size_t>(max_pages * shape.layers * shape.kv_heads) * head_page_bytes(format, shape);
  plan.full_on_device = full_mode && fixed + full_sequence <= available;
  plan.streaming = full_mode && !plan.full_on_device;
  if (plan.streaming && o.horizon != 0) {
    throw Error(
        "the full KV of {} tokens needs {:.1f} MB of device memory and {:.1f} MB are left: compressor '{}' cannot "
        "draft there; "
        "choose another compressor, or --horizon 0 to stream the full KV",
        plan.max_len, megabytes(fixed + full_sequence), megabytes(available),
        compressor == nullptr ? "none" : compressor->name());
  }

  size_t head_page = 0;
  int sequence_pages = 0;
  if (plan.full_on_device) {
    head_page = head_page_bytes(format, shape);
    sequence_pages = max_pages * shape.layers * shape.kv_heads;
  } else if (!plan.streaming) {
    head_page = head_page_bytes(format, shape);
    sequence_pages = resident_pages_for(*compressor, plan.max_len, shape);
  }
  const size_t sequence_bytes = static_cast<size_t>(sequence_pages) * head_page;
  plan.wire = wire_options(compressor, plan.streaming, o, device);
  const auto staging_for = [&](size_t contexts) {
    WireOptions wire = plan.wire;
    wire.slot_pages = max_pages * static_cast<int>(contexts);
    return wire_device_bytes(shape, wire, device);
  };
  const size_t staging = plan.full_on_device ? 0 : staging_for(1);
  const size_t least = fixed + staging + aligned(sequence_bytes);
  if (least > available) {
    throw Error(
        "device memory: one sequence of {} tokens needs {:.1f} MB beside the weights ({:.1f} activations, {:.1f} tail, "
        "{:.1f} staging, "
        "{:.1f} resident KV) and {:.1f} MB are left; raise --device-memory by {:.1f} MB, or lower --max-model-len, "
        "--prefill-chunk or --ring-layers",
        plan.max_len, megabytes(least), megabytes(plan.activation_bytes), megabytes(plan.tail_bytes),
        megabytes(staging), megabytes(sequence_bytes), megabytes(available), megabytes(least - available + 1000000));
  }
  size_t left = (available - fixed - staging) / kBlockAlignment * kBlockAlignment;
  if (head_page > 0) {
    plan.resident_pages = static_cast<int>(std::min(sequences * static_cast<size_t>(sequence_pages), left / head_page));
    plan.resident_bytes = aligned(static_cast<size_t>(plan.resident_pages) * head_page);
    left -= plan.resident_bytes;
  }
  if (!plan.full_on_device) {
    // Room for several sequences in one pass saves reading the weights as often.
    size_t contexts = std::min(sequences, size_t{4});
    while (contexts > 1 && staging_for(contexts) - staging > left) {
      --contexts;
    }
    plan.wire.slot_pages = max_pages * static_cast<int>(contexts);
    plan.staging_bytes = staging_for(contexts);
    const size_t extent = extent_bytes(shape);
    const size_t sequence_extents = static_cast<size_t>(extents_for(max_pages, shape, plan.wire.code));
    const size_t wanted = sequences * sequence_extents;
    const size_t extents = o.host_memory > 0 ? std::min(wanted, o.host_memory / extent) : wanted;
    const size_t behind = std::min(wanted - extents / sequence_extents * sequence_extents, o.store_bytes / extent);
    if (std::max(extents, behind) < sequence_extents) {
      throw Error(
          "host memory: the full KV of {} tokens needs {:.1f} MB; raise --host-memory, give it a --kv-store, or lower "
          "--max-model-len",
          plan.max_len, megabytes(sequence_extents * extent));
    }
    plan.host_extents = static_cast<int>(extents);
    plan.store_extents = static_cast<int>(behind);
    plan.wire.stores = behind > 0;
    plan.record_bytes = aligned(FullKv::record_bytes(shape, max_pages));
    plan.host_bytes =
        aligned(extents * extent) + sequences * plan.record_bytes + wire_host_bytes(shape, plan.wire, device);
  }
  // A draft may stand behind the last token that can be decided.
  const int last = plan.max_len + 2 * plan.most_drafts + 1;
  const size_t positions = static_cast<size_t>(last) + 1;
  plan.margin_offset = aligned(positions * sizeof(TokenId));
  plan.report_offset = plan.margin_offset + aligned(positions * sizeof(float));
  plan.board_bytes = plan.report_offset;
  plan.board_bytes += aligned(static_cast<size_t>(plan.report_values * shape.layers) * sizeof(int));
  plan.host_bytes += sequences * plan.board_bytes +
                     2 * aligned(static_cast<size_t>(plan.logit_rows) * sizeof(uint64_t)) + (size_t{1} << 20);
  return plan;
}

int sequences_stored(const MemoryPlan& plan, const EngineOptions& options, const KvShape& shape) {
  if (plan.full_on_device || options.host_memory == 0) {
    return std::numeric_limits<int>::max();
  }
  const auto in = [&](size_t bytes) {
    return stored_at_once(bytes / extent_bytes(shape), pages_for(plan.max_len), shape, plan.wire);
  };
  return in(options.host_memory) + in(options.store_bytes);
}

int sequences_that_fit(const Transformer& model, const Compressor* compressor, const EngineOptions& options,
                       const Device& device, int most) {
  const KvShape shape = model.kv_shape();
  int fit = 1;
  for (int count = 1; count <= most; ++count) {
    EngineOptions o = options;
    o.max_sequences = count;
    MemoryPlan plan;
    try {
      plan = plan_memory(model, compressor, o, device);
    } catch (const Error&) {
      if (count == 1) {
        throw;
      }
      return fit;
    }
    const int max_pages = pages_for(plan.max_len);
    const int pages = compressor == nullptr ? plan.resident_head_pages * shape.layers * shape.kv_heads
                                            : resident_pages_for(*compressor, plan.max_len, shape);
    const bool resident = plan.streaming || plan.resident_pages >= count * pages;
    const bool staged = !plan.streaming || plan.wire.slot_pages >= count * max_pages;
    if (!resident || !staged || sequences_stored(plan, o, shape) < count) {
      return fit;
    }
    fit = count;
  }
  return fit;
}

}  // namespace vericache
