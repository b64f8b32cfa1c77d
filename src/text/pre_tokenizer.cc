#include "text/pre_tokenizer.h"

#include "text/byte_level.h"

namespace vericache {

const std::string_view kGpt2Words = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

// Joins spans as `behavior` says and drops what it drops.
void arrange(SplitBehavior behavior, std::vector<Span>& spans) {
  size_t kept = 0;
  bool previous_match = false;
  const auto keep = [&](const Span& span) { spans[kept++] = span; };
  switch (behavior) {
    case SplitBehavior::kIsolated:
      return;
    case SplitBehavior::kRemoved:
      std::erase_if(spans, [](const Span& span) { return span.is_match; });
      return;
    case SplitBehavior::kContiguous:
      for (size_t i = 0; i < spans.size(); ++i) {
        const Span span = spans[i];
        if (kept > 0 && span.is_match == previous_match) {
          spans[kept - 1].end = span.end;
        } else {
          keep(span);
        }
        previous_match = span.is_match;
      }
      break;
    case SplitBehavior::kMergedWithPrevious:
      for (size_t i = 0; i < spans.size(); ++i) {
        const Span span = spans[i];
        if (kept > 0 && span.is_match && !previous_match) {
          spans[kept - 1].end = span.end;
        } else {
          keep(span);
        }
        previous_match = span.is_match;
      }
      break;
    case SplitBehavior::kMergedWithNext:
      // A match joins what follows it unless that is a match too.
      for (size_t i = 0; i < spans.size(); ++i) {
        Span span = spans[i];
        if (span.is_match && i + 1 < spans.size() && !spans[i + 1].is_match) {
          span.end = spans[++i].end;
        }
        keep(span);
      }
      break;
  }
  spans.resize(kept);
}

// Runs one step over all pieces that are still text.
class StepRun {
 public:
  StepRun(std::vector<Piece>& pieces, TextArena& arena) : pieces_(pieces), arena_(arena) {}

  void operator()(const Split& step) {
    for_each_text([&](const Piece& piece) {
      step.pattern.cut(piece.text, spans_);
      if (step.invert) {
        for (Span& span : spans_) span.is_match = !span.is_match;
      }
      arrange(step.behavior, spans_);
      emit_spans(piece);
    });
  }

  void operator()(const ByteLevelSplit& step) {
    size_t bytes = 0;
    for_each_text([&](Piece piece) {
      if (step.add_prefix_space && !piece.text.starts_with(' ')) {
        piece.text = arena_.keep(" " + std::string(piece.text));
      }
      bytes += piece.text.size();
      if (step.use_regex) {
        step.words.cut(piece.text, spans_);
        emit_spans(piece);
      } else {
        emit(piece);
      }
    });
    spell_bytes(bytes);
  }

  void operator()(const Metaspace& step) {
    const Pattern mark = Pattern::literal(step.replacement, "Metaspace");
    const Pattern space = Pattern::literal(" ", "Metaspace");
    for_each_text([&](Piece piece) {
      std::string text = space.replace(piece.text, step.replacement, 4 * piece.text.size());
      const bool wanted =
          step.prepend == Metaspace::Prepend::kAlways || (step.prepend == Metaspace::Prepend::kFirst && piece.at_start);
      if (wanted && !text.starts_with(step.replacement)) text.insert(0, step.replacement);
      piece.text = arena_.keep(std::move(text));
      if (!step.split) return emit(piece);
      mark.cut(piece.text, spans_);
      arrange(SplitBehavior::kMergedWithNext, spans_);
      emit_spans(piece);
    });
  }

 private:
  template <typename Body>
  void for_each_text(const Body& body) {
    out_.clear();
    out_.reserve(pieces_.size());
    for (const Piece& piece : pieces_) {
      if (piece.token != kNoToken) {
        out_.push_back(piece);
      } else {
        body(piece);
      }
    }
    pieces_.swap(out_);
  }

  void emit(const Piece& piece) {
    if (!piece.text.empty()) out_.push_back(piece);
  }

  void emit_spans(const Piece& piece) {
    for (const Span& span : spans_) {
      emit({piece.text.substr(span.begin, span.end - span.begin), kNoToken, piece.at_start && span.begin == 0});
    }
  }

  // All pieces are spelled into one string: no allocation per word.
  void spell_bytes(size_t bytes) {
    std::string spelled;
    spelled.reserve(2 * bytes);
    for (const Piece& piece : pieces_) {
      if (piece.token == kNoToken) append_byte_level(piece.text, spelled);
    }
    const std::string_view all = arena_.keep(std::move(spelled));
    size_t begin = 0;
    for (Piece& piece : pieces_) {
      if (piece.token != kNoToken) continue;
      const size_t length = byte_level_length(piece.text);
      piece.text = all.substr(begin, length);
      begin += length;
    }
  }

  std::vector<Piece>& pieces_;
  TextArena& arena_;
  std::vector<Piece> out_;
  std::vector<Span> spans_;
};

}  // namespace

void PreTokenizer::apply(std::vector<Piece>& pieces, TextArena& arena) const {
  StepRun run(pieces, arena);
  for (const Step& step : steps_) {
    std::visit(run, step);
  }
}

}  // namespace vericache
