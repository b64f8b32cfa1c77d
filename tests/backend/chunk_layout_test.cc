// Where codes lie in a head page of a GPU: pure functions, so that they are tested where there is none.
#include "backend/cuda/chunk_layout.h"

#include <gtest/gtest.h>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

constexpr KvPart kParts[] = {KvPart(2),
                             KvPart(3),
                             KvPart(4),
                             KvPart(6),
                             KvPart(8),
                             KvPart(6, KvCode::plane),
                             KvPart(7, KvCode::plane),
                             KvPart(8, KvCode::plane),
                             KvPart(9, KvCode::plane),
                             KvPart(8, KvCode::fp8),
                             KvPart(8, KvCode::int8),
                             KvPart(2, KvCode::nuq, 10),
                             KvPart(3, KvCode::nuq),
                             KvPart(4, KvCode::nuq, 30)};

// K or V of a page whose every code is known.
class Part {
 public:
  Part(const KvPart& part, bool keys, int head_dim)
      : part_(part),
        keys_(keys),
        head_dim_(head_dim),
        groups_(group_bytes(part, head_dim, keys ? head_dim : kPageTokens)),
        stored_(static_cast<size_t>(groups_ + kPageTokens * head_dim * part.bits / 8)),
        codes_(static_cast<size_t>(kPageTokens * head_dim)) {}

  void write(Random& random) {
    for (int i = 0; i < runs(); ++i) {
      for (int e = 0; e < 8; ++e) {
        codes_[static_cast<size_t>(8 * i + e)] = static_cast<uint32_t>(random.below(1 << part_.bits));
      }
      cuda::chunked(part_) ? write_run(i) : write_plain(i);
    }
  }
  void expect_read() const {
    for (int i = 0; i < runs(); ++i) {
      uint32_t code[8];
      if (keys_) {
        cuda::key_codes(stored_.data(), part_, head_dim_, token(i), dim(i), code);
      } else {
        cuda::value_codes(stored_.data(), part_, head_dim_, token(i), dim(i), code);
      }
      for (int e = 0; e < 8; ++e) {
        ASSERT_EQ(code[e], codes_[static_cast<size_t>(8 * i + e)]) << part_.bits << " bits, run " << i;
      }
    }
  }

 private:
  int runs() const { return kPageTokens * head_dim_ / 8; }
  int token(int run) const { return keys_ ? run % kPageTokens : run % 8 * 8; }
  int dim(int run) const { return keys_ ? run / kPageTokens * 8 : run / 8; }

  void put(int at, uint32_t bits) {
    std::byte* place = stored_.data() + groups_ + at;
    const uint32_t held = cuda::word_at(place);
    ASSERT_EQ(held & bits, 0u) << "two codes in one place";
    const uint32_t now = held | bits;
    std::memcpy(place, &now, sizeof(now));
  }
  void write_run(int i) {
    const cuda::Run8 run = keys_ ? cuda::key_run(token(i), dim(i)) : cuda::value_run(token(i), dim(i));
    uint32_t code[8];
    std::copy_n(codes_.begin() + 8 * i, 8, code);
    const cuda::RunWords words = cuda::pack_run(code, part_, run);
    const int chunk = run.chunk * cuda::chunk_bytes(part_.bits);
    const auto at = [&](int width) { return chunk + cuda::run_offset(run, part_.bits, width); };
    if (cuda::in_threes(part_)) {
      for (int word = 0; word < 3; ++word) {
        put(chunk + cuda::three_offset(run, word), words.three[word]);
      }
      return;
    }
    if ((part_.bits & 8) != 0) {
      put(at(8), words.wide[0]);
      put(at(8) + 4, words.wide[1]);
    }
    if ((part_.bits & 4) != 0) {
      put(at(4), words.four);
    }
    if ((part_.bits & 2) != 0) {
      put(at(2), words.two);
    }
    if ((part_.bits & 1) != 0) {
      put(at(1), words.one);
    }
  }
  void write_plain(int i) {
    const int width = part_.bits == 2 ? 2 : 4;
    for (int e = 0; e < 8; ++e) {
      const uint32_t code = codes_[static_cast<size_t>(8 * i + e)];
      const cuda::CodePlace place =
          keys_ ? cuda::key_place(token(i), dim(i) + e, width) : cuda::value_place(token(i) + e, dim(i), width);
      if (part_.bits == 8) {
        put(place.word * 4, code >> 4 << place.shift);
        put(cuda::plane_bytes(4, head_dim_) + place.word * 4, (code & 15u) << place.shift);
      } else {
        put(place.word * 4, code << place.shift);
      }
    }
  }

  KvPart part_;
  bool keys_;
  int head_dim_;
  int groups_;
  std::vector<std::byte> stored_;
  std::vector<uint32_t> codes_;  // (runs, 8)
};

TEST(ChunkLayout, EveryCodeHasItsOwnPlace) {
  Random random(65);
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvPart& part : kParts) {
      for (const bool keys : {true, false}) {
        Part stored(part, keys, head_dim);
        stored.write(random);
        stored.expect_read();
        if (HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

// What a ring of pieces copies is the whole part, and no piece is larger than its stage.
TEST(ChunkLayout, PiecesAreThePart) {
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    for (const KvPart& part : kParts) {
      const cuda::Pieces keys = cuda::key_pieces(part, head_dim);
      const cuda::Pieces values = cuda::value_pieces(part, head_dim);
      EXPECT_EQ(static_cast<size_t>(cuda::bytes_of(keys)), key_page_bytes(part, shape));
      EXPECT_EQ(static_cast<size_t>(cuda::bytes_of(values)), value_page_bytes(part, shape));
      for (const cuda::Pieces& pieces : {keys, values}) {
        EXPECT_EQ(pieces.bytes % 16 + pieces.group_bytes % 16, 0);
        EXPECT_LE(pieces.bytes + pieces.group_bytes, std::max(4096 + 128, 36 * head_dim));
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
