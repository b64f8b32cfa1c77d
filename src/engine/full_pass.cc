#include "engine/full_pass.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"
#include "base/trace.h"

namespace vericache {

FullPass::FullPass(const Transformer& model, Compressor* compressor, KeyRounding* rounding, Wire* wire,
                   std::vector<FullPassMember> members)
    : model_(model), compressor_(compressor), rounding_(rounding), wire_(wire), members_(std::move(members)) {
  std::vector<FetchPart> parts;
  int staged = 0;
  for (FullPassMember& member : members_) {
    Sequence& sequence = *member.sequence;
    sequence.in_pass = true;
    member.position = sequence.verified;
    if (!sequence.full) {
      member.past_pages = sequence.folded / kPageTokens;
    }
    // Rows of decided tokens are verified KV as soon as they are computed: whole pages of them can be folded in this
    // pass.
    member.fold_end = (member.position + member.backlog_rows) / kPageTokens * kPageTokens;
    member.chooses =
        member.decides ? !sequence.replays() : member.replay.rows() > 0 && member.replay.end == sequence.replay_tokens;
    member.first_staged = staged;
    if (wire != nullptr) {
      const bool joined = sequence.full->code() == ResidualCode::resident;
      parts.push_back({sequence.full.get(), joined ? sequence.resident.get() : nullptr, member.past_pages, staged});
      staged += member.past_pages;
    }
  }
  if (wire != nullptr) {
    fetch_ = wire->fetch(std::move(parts));
  }
}

bool FullPass::members_ready() const {
  return std::all_of(members_.begin(), members_.end(), [](const FullPassMember& member) {
    const Sequence& s = *member.sequence;
    return !member.decides || s.cancelled || s.backlog() > 1 || s.ready() || s.drafted >= member.most_drafts;
  });
}

bool FullPass::decides() const {
  return std::any_of(members_.begin(), members_.end(), [](const FullPassMember& member) { return member.decides; });
}

int FullPass::past_pages() const {
  int pages = 0;
  for (const FullPassMember& member : members_) {
    pages += member.past_pages;
  }
  return pages;
}

bool FullPass::arrived() const {
  return wire_ == nullptr || wire_->arrived(*fetch_, 0);
}

void FullPass::wait_arrival() const {
  if (wire_ != nullptr) {
    wire_->wait(*fetch_, std::max(0, next_layer_));
  }
}

bool FullPass::layer_ready() const {
  return wire_ == nullptr || wire_->ready(*fetch_, next_layer_);
}

void FullPass::start(Activations& activations, const PassResults& results, bool drafts_on) {
  int rows = 0;
  for (FullPassMember& member : members_) {
    Sequence& sequence = *member.sequence;
    member.first_row = rows;
    member.drafts = member.decides ? std::min(sequence.drafts_done, member.most_drafts) : 0;
    member.bonus = member.drafts == 0 || !drafts_on;
    sequence.pass_end = member.position + member.rows();
    check(sequence.tail->end() >= sequence.pass_end, "a pass has room in the tails for its rows");
    rows += member.rows();
    for (int i = 0; i < member.deciding_rows(); ++i) {
      const size_t index = logit_rows_.size();
      logit_rows_.push_back({.row = member.deciding_row() + i,
                             .position = static_cast<int>(sequence.tokens.size()) + i,
                             .sampling = sequence.request.sampling,
                             .token = results.tokens + index,
                             .hash = results.hashes + index});
    }
  }
  place_rows();
  pass_ = {.buffers = activations.hidden,
           .rows = rows,
           .layers = model_.config().layers,
           .draft = false,
           .sequences = sequence_rows_,
           .logit_rows = logit_rows_};
  activations.lane->stage(pass_);
  model_.embed(pass_, activations);
  next_layer_ = 0;
}

void FullPass::place_rows() {
  for (int layer = 0; layer < model_.config().layers; ++layer) {
    for (size_t i = 0; i < members_.size(); ++i) {
      const FullPassMember& member = members_[i];
      const bool replays = member.replay.rows() > 0;
      sequence_rows_.push_back({.first_row = member.first_row,
                                .rows = member.rows(),
                                .position = member.position,
                                .tokens = member.sequence->board,
                                .kv = full_view(member, i, layer),
                                .queries = replays ? QueryRing{} : queries(*member.sequence, layer),
                                .token_lag = replays ? member.position - member.replay.first : 0});
    }
  }
}

LayerKv FullPass::full_view(const FullPassMember& member, size_t index, int layer) const {
  const Sequence& sequence = *member.sequence;
  LayerKv kv;
  kv.tail_position = member.past_pages * kPageTokens;
  kv.tail = sequence.tail->view(layer, kv.tail_position);
  kv.past = wire_ == nullptr ? sequence.resident->layer(layer).view()
                             : wire_->staged_view(*fetch_, layer, fetch_->parts()[index]);
  return kv;
}

QueryRing FullPass::queries(const Sequence& sequence, int layer) const {
  if (sequence.query_memory == nullptr) {
    return {};
  }
  const size_t capacity = static_cast<size_t>(compressor_->query_window());
  const size_t heads = static_cast<size_t>(model_.config().heads);
  const size_t q_values = capacity * heads * static_cast<size_t>(model_.kv_shape().key_dim());
  const size_t layer_bytes = q_values * sizeof(bf16) + capacity * heads * sizeof(float);
  std::byte* memory = sequence.query_memory + static_cast<size_t>(layer) * layer_bytes;
  return {reinterpret_cast<bf16*>(memory), reinterpret_cast<float*>(memory + q_values * sizeof(bf16)),
          static_cast<int>(capacity)};
}

void FullPass::run_layer(Activations& activations) {
  const int layer = next_layer_;
  Kernels& lane = *activations.lane;
  if (wire_ != nullptr) {
    wire_->await(*fetch_, layer, lane);
  }
  const Mark begin = lane.mark();
  model_.layer(layer, pass_, activations);
  if (compressor_ != nullptr) {
    for (size_t i = 0; i < members_.size(); ++i) {
      members_[i].corrupt = members_[i].corrupt || (fetch_ != nullptr && fetch_->corrupt(i));
      if (members_[i].replay.rows() > 0 && !members_[i].corrupt) {
        reconstruct(members_[i], pass_.layer(layer)[i], layer, activations);
      } else if (compressor_->observes() && !members_[i].corrupt) {
        observe(members_[i], pass_.layer(layer)[i], layer, activations);
      }
    }
    if (compressor_->query_window() > 0) {
      lane.keep_queries(activations.q, activations.log_sum_exp, model_.config().heads, model_.kv_shape(), pass_, layer);
    }
    for (size_t i = 0; rounding_ != nullptr && i < members_.size(); ++i) {
      if (!members_[i].corrupt) {
        rounding_->learn(lane, layer, model_.config().heads, fed_queries(members_[i], activations), members_[i].rows());
      }
    }
    for (size_t i = 0; i < members_.size(); ++i) {
      if (!members_[i].corrupt) {
        compress(members_[i], pass_.layer(layer)[i], layer, lane);
      }
    }
  }
  spans_.emplace_back(begin, lane.mark());
  if (wire_ != nullptr) {
    wire_->release(*fetch_, layer, lane);
  }
  ++next_layer_;
}

Attended FullPass::attended(const Sequence& sequence, const QueryRing& queries, int first, int end, int layer) const {
  const auto index = static_cast<size_t>(layer);
  Notes notes = sequence.notes;
  notes.device = notes.device == nullptr ? nullptr : notes.device + index * sequence.notes_bytes;
  notes.report = notes.report == nullptr ? nullptr : notes.report + layer * sequence.report_values;
  return {.heads = model_.config().heads,
          .scale = model_.attention_scale(),
          .queries = queries,
          .rows = end - first,
          .position = first,
          .rope = model_.weights().rope,
          .notes = notes,
          .rounding = rounding_ == nullptr ? nullptr : rounding_->of(layer)};
}

// The queries of a member's rows as the pass has them.
QueryRing FullPass::fed_queries(const FullPassMember& member, const Activations& activations) const {
  const size_t heads = static_cast<size_t>(model_.config().heads);
  const size_t first = static_cast<size_t>(member.first_row) * heads;
  return {activations.q + first * static_cast<size_t>(model_.kv_shape().key_dim()), activations.log_sum_exp + first,
          member.rows(), member.position};
}

void FullPass::reconstruct(const FullPassMember& member, const SequenceRows& rows, int layer,
                           const Activations& activations) {
  const int end = member.position + member.rows();
  compressor_->reconstruct(*activations.lane, {model_.kv_shape(), rows.kv, layer}, member.sequence->replay_tokens,
                           attended(*member.sequence, fed_queries(member, activations), member.position, end, layer));
}

// Queries of decided tokens: accepted drafts of earlier passes, which stand in the rings until this pass's rows do, and
// then the backlog. Which of this pass's drafts stand is not known yet.
void FullPass::observe(const FullPassMember& member, const SequenceRows& rows, int layer,
                       const Activations& activations) {
  const Sequence& sequence = *member.sequence;
  const FullLayer full{model_.kv_shape(), rows.kv, layer};
  const int accepted_from = std::max(sequence.notes.observed, sequence.queries_from);
  int observed = sequence.notes.observed;
  if (accepted_from < member.position) {
    compressor_->observe(*activations.lane, full,
                         attended(sequence, rows.queries, accepted_from, member.position, layer));
    observed = member.position;
  }
  const QueryRing fed = fed_queries(member, activations);
  Attended seen = attended(sequence, fed, member.position, member.position + member.backlog_rows, layer);
  seen.notes.observed = observed;
  compressor_->observe(*activations.lane, full, seen);
}

void FullPass::compress(const FullPassMember& member, const SequenceRows& rows, int layer, Kernels& lane) {
  Sequence& sequence = *member.sequence;
  // The rings hold consecutive positions, up to this pass's last row; those of a replay are not among them.
  const QueryRing ring = queries(sequence, layer);
  const int end = member.position + member.rows() - member.replay.rows();
  const int first = std::min(end, std::max(end - ring.capacity, sequence.queries_from));
  Attended seen = attended(sequence, ring, first, end, layer);
  seen.notes.observed = member.position + member.backlog_rows;
  if (member.replay.rows() > 0) {
    seen.notes.reconstructed = sequence.replay_tokens;
  }
  const TokenRange fresh{sequence.folded, member.fold_end};
  const bool due = compressor_->chooses_anew_in(layer) ? member.chooses && fresh.end > 0 : fresh.end > fresh.begin;
  if (due) {
    check(
        compressor_->compress(lane, {model_.kv_shape(), rows.kv, layer}, fresh, seen, sequence.resident->layer(layer)),
        "admission reserves the resident pages of a sequence");
  }
}

void FullPass::run_logits(Activations& activations) {
  if (!logit_rows_.empty()) {
    model_.logits(pass_, activations);
  }
  last_mark_ = activations.lane->mark();
}

double FullPass::seconds(const Activations& activations) const {
  double seconds = activations.lane->seconds(spans_.back().second, last_mark_);
  for (const auto& [from, to] : spans_) {
    seconds += activations.lane->seconds(from, to);
  }
  return seconds;
}

void FullPass::trace(Trace& trace, const Activations& activations) const {
  Lane& lane = *activations.lane;
  const std::string_view name = decides() ? "verify" : "prefill";
  for (size_t layer = 0; layer < spans_.size(); ++layer) {
    trace.span("pass", fmt::format("{} layer {}, {} rows", name, layer, rows()), lane.time(spans_[layer].first),
               lane.time(spans_[layer].second));
  }
  trace.span("pass", "logits", lane.time(spans_.back().second), lane.time(last_mark_));
  if (fetch_ != nullptr) {
    fetch_->trace(trace);
  }
}

void FullPass::collect_corruption() {
  for (size_t i = 0; fetch_ != nullptr && i < members_.size(); ++i) {
    members_[i].corrupt = fetch_->corrupt(i);
  }
}

}  // namespace vericache
