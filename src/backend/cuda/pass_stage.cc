#include "backend/cuda/pass_stage.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "base/check.h"

namespace vericache::cuda {
namespace {

static_assert(std::is_trivially_copyable_v<SequenceRows> && std::is_trivially_copyable_v<LogitRow> &&
              std::is_trivially_copyable_v<AttentionTile>);

// Parts of one block of memory, one behind the other. They come in an order and in sizes that follow from the shape of
// a draft pass alone, so that captured kernels find them where they were.
class Parts {
 public:
  template <typename T>
  size_t add(size_t count) {
    const size_t at = bytes_;
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 64;
  size_t bytes_ = 0;
};

struct PassParts {
  size_t sequences, sequence_of_row, logit_rows, tiles, combine, bytes;
};
PassParts parts_of(size_t sequence_rows, size_t rows, size_t logit_rows, size_t tiles, size_t combine) {
  Parts parts;
  PassParts at{};
  at.sequences = parts.add<SequenceRows>(sequence_rows);
  at.sequence_of_row = parts.add<int>(rows);
  at.logit_rows = parts.add<LogitRow>(logit_rows);
  at.tiles = parts.add<AttentionTile>(tiles);
  at.combine = parts.add<AttentionTile>(combine);
  at.bytes = parts.bytes();
  return at;
}

template <typename T>
void put(std::byte* target, const T* source, size_t count) {
  if (count > 0) {
    std::memcpy(target, source, count * sizeof(T));
  }
}

int pages_for(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// Launches of drafts depend on it: in steps of an eighth, so that few graphs serve a growing context, and the work is
// cut for little more than there is.
int rounded_tokens(int tokens) {
  const auto pages = static_cast<unsigned>(pages_for(tokens));
  const unsigned step = std::max(1u, std::bit_ceil(pages) / 16);
  return static_cast<int>((pages + step - 1) / step * step) * kPageTokens;
}

}  // namespace

PassStage::PassStage(const Limits& limits, bool exact)
    : limits_(limits), exact_(exact), area_(most_bytes(limits, exact), "a lane's passes") {}

size_t PassStage::most_bytes(const Limits& limits, bool exact) {
  const size_t tiles = exact ? max_attention_tiles(limits) : 0;
  const auto rows = static_cast<size_t>(limits.max_rows);
  return parts_of(static_cast<size_t>(limits.shape.layers) * static_cast<size_t>(limits.max_sequences), rows, rows,
                  tiles, tiles)
      .bytes;
}

void PassStage::stage(const PassRows& pass, CudaLane& lane) {
  check(pass.layers > 0 && pass.sequences.size() % static_cast<size_t>(pass.layers) == 0,
        "a pass has every sequence in every layer");
  check(exact_ || pass.draft, "full passes run on the lane that plans their attention");
  const std::span<const SequenceRows> sequences = pass.layer(0);
  plan_.tiles.clear();
  plan_.combine.clear();
  if (!pass.draft) {
    plan_attention(pass, limits_, plan_);
  }
  const auto rows = static_cast<size_t>(pass.rows);
  const PassParts at =
      parts_of(pass.sequences.size(), rows, pass.logit_rows.size(), plan_.tiles.size(), plan_.combine.size());
  check(at.bytes <= area_.bytes(), "a pass is within the limits that its lane was built for");

  std::byte* block = lane.reserve(at.bytes);
  put(block + at.sequences, pass.sequences.data(), pass.sequences.size());
  auto* sequence_of_row = reinterpret_cast<int*>(block + at.sequence_of_row);
  std::fill_n(sequence_of_row, pass.rows, -1);
  format_ = sequences.empty() ? KvFormat{} : sequences.front().kv.past.format;
  const PageChoice& choice = format_.choice;
  int longest = 1;
  int most_read = 1;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const SequenceRows& sequence = sequences[i];
    check(sequence.first_row >= 0 && sequence.rows >= 0 && sequence.rows <= pass.rows - sequence.first_row,
          "a sequence's rows lie in the pass");
    check(sequence.position >= sequence.kv.tail_position, "a sequence's rows stand in its tail");
    std::fill_n(sequence_of_row + sequence.first_row, sequence.rows, static_cast<int>(i));
    longest = std::max(longest, sequence.position + sequence.rows);
    const int tail_position = sequence.kv.tail_position;
    most_read = std::max(most_read, choice.pages_of(pages_for(tail_position)) * kPageTokens + sequence.position +
                                        sequence.rows - tail_position);
  }
  check(std::find(sequence_of_row, sequence_of_row + pass.rows, -1) == sequence_of_row + pass.rows,
        "every row belongs to a sequence");
  check(longest <= limits_.max_context_tokens, "a sequence stays within the context that its lane was built for");
  put(block + at.logit_rows, pass.logit_rows.data(), pass.logit_rows.size());
  put(block + at.tiles, plan_.tiles.data(), plan_.tiles.size());
  put(block + at.combine, plan_.combine.data(), plan_.combine.size());
  auto* area = area_.as<std::byte>();
  lane.send(area, block, at.bytes);

  pass_ = {.rows = pass.rows,
           .count = static_cast<int>(sequences.size()),
           .draft = pass.draft,
           .sequences = reinterpret_cast<const SequenceRows*>(area + at.sequences),
           .sequence_of_row = reinterpret_cast<const int*>(area + at.sequence_of_row),
           .logit_rows = reinterpret_cast<const LogitRow*>(area + at.logit_rows),
           .logit_count = static_cast<int>(pass.logit_rows.size())};
  tiles_ = reinterpret_cast<const AttentionTile*>(area + at.tiles);
  combine_ = reinterpret_cast<const AttentionTile*>(area + at.combine);
  longest_tokens_ = std::min(rounded_tokens(longest), pages_for(limits_.max_context_tokens) * kPageTokens);
  read_tokens_ = choice.bounded ? rounded_tokens(most_read) : 0;
}

}  // namespace vericache::cuda
