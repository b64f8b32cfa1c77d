#include "engine/full_pass.h"

#include <algorithm>

#include "base/check.h"

namespace vericache {

FullPass::FullPass(const Transformer& model, Compressor* compressor, Wire* wire, std::vector<FullPassMember> members)
    : model_(model), compressor_(compressor), wire_(wire), members_(std::move(members)) {
  const size_t heads = static_cast<size_t>(model.config().kv_heads);
  std::vector<FetchPart> parts;
  int staged = 0;
  size_t table = 0;
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
    member.first_staged = staged;
    table_begin_.push_back(table);
    past_tokens_.insert(past_tokens_.end(), heads, member.past_pages * kPageTokens);
    if (wire != nullptr) {
      const bool exact = compressor != nullptr && compressor->format().exact();
      parts.push_back({sequence.full.get(), exact ? sequence.resident.get() : nullptr, member.past_pages, staged});
      staged += member.past_pages;
      table += heads * static_cast<size_t>(member.past_pages);
    }
  }
  staged_table_.resize(table);
  if (wire != nullptr) {
    fetch_ = wire->fetch(std::move(parts));
  }
}

bool FullPass::members_ready() const {
  return std::all_of(members_.begin(), members_.end(), [](const FullPassMember& member) {
    const Sequence& s = *member.sequence;
    return !member.decides || s.cancelled || s.backlog() > 1 ||
           static_cast<int>(s.drafted.size()) >= std::min(s.horizon.tokens(), s.useful_drafts());
  });
}

bool FullPass::decides() const {
  return std::any_of(members_.begin(), members_.end(), [](const FullPassMember& member) { return member.decides; });
}

bool FullPass::layer_arrived() const {
  return wire_ == nullptr || wire_->arrived(*fetch_, std::max(0, next_layer_));
}

void FullPass::wait_layer() const {
  if (wire_ != nullptr) {
    wire_->wait(*fetch_, std::max(0, next_layer_));
  }
}

void FullPass::start(Activations& activations) {
  std::vector<TokenId> tokens;
  for (FullPassMember& member : members_) {
    Sequence& sequence = *member.sequence;
    member.first_row = static_cast<int>(tokens.size());
    member.drafts = member.decides ? std::min(static_cast<int>(sequence.drafted.size()), member.most_drafts) : 0;
    sequence.pass_end = member.position + member.rows();
    check(sequence.tail->end() >= member.position + member.rows(), "a pass has room in the tails for its rows");
    const auto first = sequence.tokens.begin() + member.position;
    tokens.insert(tokens.end(), first, first + member.backlog_rows);
    tokens.insert(tokens.end(), sequence.drafted.begin(), sequence.drafted.begin() + member.drafts);
    sequence_rows_.push_back(
        {.first_row = member.first_row, .rows = member.rows(), .position = member.position, .kv = {}});
  }
  rows_ = static_cast<int>(tokens.size());
  model_.embed(tokens, activations);
  next_layer_ = 0;
}

LayerKv FullPass::full_view(const FullPassMember& member, size_t index, int layer) {
  const Sequence& sequence = *member.sequence;
  LayerKv kv;
  kv.tail_position = member.past_pages * kPageTokens;
  kv.tail = sequence.tail->view(layer, kv.tail_position);
  if (wire_ == nullptr) {
    kv.past = sequence.resident->layer(layer).view();
    return kv;
  }
  const KvShape shape = model_.kv_shape();
  std::byte** table = staged_table_.data() + table_begin_[index];
  for (int page = 0; page < member.past_pages; ++page) {
    std::byte* staged = wire_->staged(*fetch_, layer, member.first_staged + page);
    for (int head = 0; head < shape.kv_heads; ++head) {
      table[head * member.past_pages + page] = staged + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, shape);
    }
  }
  kv.past.head_pages = table;
  kv.past.page_stride = member.past_pages;
  kv.past.tokens = past_tokens_.data() + index * static_cast<size_t>(shape.kv_heads);
  return kv;
}

void FullPass::run_layer(Activations& activations) {
  const int layer = next_layer_;
  for (size_t i = 0; i < members_.size(); ++i) {
    sequence_rows_[i].kv = full_view(members_[i], i, layer);
    members_[i].corrupt = members_[i].corrupt || (fetch_ != nullptr && fetch_->corrupt(i));
  }
  model_.layer(layer, rows_, sequence_rows_, activations);
  for (size_t i = 0; i < members_.size(); ++i) {
    if (compressor_ != nullptr && !members_[i].corrupt) {
      compress(members_[i], sequence_rows_[i].kv, layer, activations);
    }
  }
  if (wire_ != nullptr) {
    wire_->release(*fetch_, layer);
  }
  ++next_layer_;
}

void FullPass::compress(const FullPassMember& member, const LayerKv& kv, int layer, const Activations& activations) {
  Sequence& sequence = *member.sequence;
  const ModelConfig& config = model_.config();
  const KvShape shape = model_.kv_shape();
  Attended seen;
  if (!sequence.windows.empty()) {
    QueryWindow& window = sequence.windows[static_cast<size_t>(layer)];
    window.append(activations.q + static_cast<ptrdiff_t>(member.first_row) * config.heads * shape.key_dim(),
                  activations.log_sum_exp + static_cast<ptrdiff_t>(member.first_row) * config.heads, member.rows(),
                  member.position);
    seen = window.attended(config.heads, model_.attention_scale());
  }
  const TokenRange fresh{sequence.folded, member.fold_end};
  const bool due = compressor_->chooses_anew() ? member.decides && fresh.end > 0 : fresh.end > fresh.begin;
  if (due) {
    check(compressor_->compress(model_.kernels(), {shape, kv}, fresh, seen, sequence.resident->layer(layer)),
          "admission reserves the resident pages of a sequence");
  }
  sequence.resident_end[static_cast<size_t>(layer)] = fresh.end;
}

void FullPass::run_logits(Activations& activations) {
  std::vector<int> rows;
  for (const FullPassMember& member : members_) {
    for (int i = 0; member.decides && i <= member.drafts; ++i) {
      rows.push_back(member.deciding_row() + i);
    }
  }
  if (!rows.empty()) {
    model_.logits(rows, activations);
  }
}

}  // namespace vericache
