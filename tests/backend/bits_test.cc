// Rule 1: a row's bits depend on that row alone. One layer is computed row by row, then again in random passes (chunks,
// mixes of sequences, thread counts, page addresses, borders between past and tail, garbage in unwritten slots); every
// byte has to agree.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

using Matmul = void (*)(Kernels& kernels, const struct Layer& layer, const bf16* x, int rows, float* y);

struct Layer {
  KvShape shape;
  int heads = 0;
  int hidden = 0;
  int up = 0;
  float scale = 0;
  Packed qkv, out, gate_up, down;
  std::vector<float> norm, cos, sin;
  int qkv_width() const { return (heads + 2 * shape.kv_heads) * shape.head_dim; }
};

// What a run leaves per token of a sequence.
struct Result {
  std::vector<bf16> keys, values;  // (kv_heads, tokens, head_dim)
  std::vector<bf16> attended;      // (tokens, padded heads * head_dim)
  std::vector<float> log_sum_exp;  // (tokens, heads)
  std::vector<float> y;            // (tokens, hidden)
};

struct Input {
  std::vector<float> x;  // (tokens, hidden)
  int tokens = 0;
};

Layer make_layer(const Kernels& kernels, const KvShape& shape, int heads, Random& random, int positions) {
  Layer l;
  l.shape = shape;
  l.heads = heads;
  l.hidden = 16 * random.between(2, 9);
  l.up = 8 * random.between(3, 20);
  l.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  const int width = heads * shape.head_dim;
  l.qkv = pack(kernels, random.bf16s(at(l.qkv_width(), l.hidden), 0.3f), l.qkv_width(), l.hidden);
  l.out = pack(kernels, random.bf16s(at(l.hidden, width), 0.3f), l.hidden, width);
  l.gate_up = pack(kernels, random.bf16s(at(2 * l.up, l.hidden), 0.3f), 2 * l.up, l.hidden);
  l.down = pack(kernels, random.bf16s(at(l.hidden, l.up), 0.3f), l.hidden, l.up);
  l.norm = random.floats(static_cast<size_t>(l.hidden));
  l.cos = random.floats(at(positions, shape.head_dim / 2));
  l.sin = random.floats(at(positions, shape.head_dim / 2));
  return l;
}

// The KV of a sequence under way: all its pages, of which any number of the first whole ones may be called past.
struct Store {
  Store(const Layer& layer, int tokens, Random& random)
      : pages(layer.shape, {}, tokens / kPageTokens + 1, random),
        past_tokens(static_cast<size_t>(layer.shape.kv_heads)) {}
  LayerKv kv(int past_pages) {
    std::fill(past_tokens.begin(), past_tokens.end(), past_pages * kPageTokens);
    KvView past = pages.view();
    past.tokens = past_tokens.data();
    KvView tail = pages.view(past_pages);
    tail.tokens = nullptr;
    return {past, tail, past_pages * kPageTokens};
  }
  Pages pages;
  std::vector<int> past_tokens;
  int done = 0;
};

void right_matmul(Kernels& kernels, const Layer& layer, const bf16* x, int rows, float* y) {
  kernels.matmul(layer.down.matrix, x, rows, y, Epilogue::add);
}

// The mistake that rule 1 forbids: K is cut in two when there are many rows.
void split_k_matmul(Kernels& kernels, const Layer& layer, const bf16* x, int rows, float* y) {
  if (rows <= 4) {
    return right_matmul(kernels, layer, x, rows, y);
  }
  const int k = padded_dim(layer.up);
  std::vector<bf16> halves[2];
  for (int half = 0; half < 2; ++half) {
    halves[half].assign(x, x + at(rows, k));
    for (int r = 0; r < rows; ++r) {
      std::fill_n(halves[half].begin() + static_cast<std::ptrdiff_t>(at(r, k, half == 0 ? k / 2 : 0)), k / 2, bf16{0});
    }
  }
  std::vector<float> second(at(rows, layer.hidden));
  kernels.matmul(layer.down.matrix, halves[0].data(), rows, y, Epilogue::add);
  kernels.matmul(layer.down.matrix, halves[1].data(), rows, second.data(), Epilogue::store);
  for (size_t i = 0; i < second.size(); ++i) {
    y[i] += second[i];
  }
}

struct Take {
  int sequence;
  int rows;
  int past_pages;
};

// One pass of the layer over the given rows; their results go to their tokens.
void pass(Kernels& kernels, const Layer& layer, const std::vector<Input>& inputs, std::vector<Store>& stores,
          const std::vector<Take>& takes, Matmul matmul, std::vector<Result>& results) {
  std::vector<SequenceRows> sequences;
  std::vector<float> x;
  for (const Take& take : takes) {
    Store& store = stores[static_cast<size_t>(take.sequence)];
    sequences.push_back(
        {static_cast<int>(x.size()) / layer.hidden, take.rows, store.done, nullptr, store.kv(take.past_pages)});
    const float* from = inputs[static_cast<size_t>(take.sequence)].x.data() + at(store.done, layer.hidden);
    x.insert(x.end(), from, from + at(take.rows, layer.hidden));
  }
  const int rows = static_cast<int>(x.size()) / layer.hidden;
  const int width = padded_dim(layer.heads * layer.shape.head_dim);
  std::vector<bf16> normed(at(rows, padded_dim(layer.hidden)));
  std::vector<float> qkv(at(rows, layer.qkv_width()));
  std::vector<bf16> q(at(rows * layer.heads, layer.shape.key_dim()));
  std::vector<bf16> attended(at(rows, width));
  std::vector<float> lse(at(rows, layer.heads));
  std::vector<float> gate_up(at(rows, 2 * layer.up));
  std::vector<bf16> activated(at(rows, padded_dim(layer.up)));
  kernels.rms_norm(x.data(), layer.norm.data(), 1e-5f, rows, layer.hidden, normed.data());
  kernels.matmul(layer.qkv.matrix, normed.data(), rows, qkv.data(), Epilogue::store);
  QkvArgs args{.shape = layer.shape, .heads = layer.heads, .qkv = qkv.data()};
  args.rope = {layer.cos.data(), layer.sin.data(), static_cast<int>(layer.cos.size()) / (layer.shape.head_dim / 2)};
  const PassRows staged = one_layer(sequences);
  kernels.stage(staged);
  args.pass = &staged;
  args.q = q.data();
  kernels.store_qkv(args);
  kernels.attention({layer.shape, layer.heads, layer.scale, q.data(), &staged, 0, attended.data(), lse.data()});
  kernels.matmul(layer.out.matrix, attended.data(), rows, x.data(), Epilogue::add);
  kernels.rms_norm(x.data(), layer.norm.data(), 1e-5f, rows, layer.hidden, normed.data());
  kernels.matmul(layer.gate_up.matrix, normed.data(), rows, gate_up.data(), Epilogue::store);
  kernels.silu_mul(gate_up.data(), rows, layer.up, activated.data());
  matmul(kernels, layer, activated.data(), rows, x.data());
  for (size_t i = 0; i < takes.size(); ++i) {
    Store& store = stores[static_cast<size_t>(takes[i].sequence)];
    Result& result = results[static_cast<size_t>(takes[i].sequence)];
    const int first = sequences[i].first_row;
    std::copy_n(attended.data() + at(first, width), at(takes[i].rows, width),
                result.attended.data() + at(store.done, width));
    std::copy_n(lse.data() + at(first, layer.heads), at(takes[i].rows, layer.heads),
                result.log_sum_exp.data() + at(store.done, layer.heads));
    std::copy_n(x.data() + at(first, layer.hidden), at(takes[i].rows, layer.hidden),
                result.y.data() + at(store.done, layer.hidden));
    store.done += takes[i].rows;
  }
}

// Computes all sequences, most_rows = 1: row by row; else in random chunks and mixes.
std::vector<Result> run(Kernels& kernels, const Layer& layer, const std::vector<Input>& inputs, int most_rows,
                        Matmul matmul, Random& random) {
  std::vector<Store> stores;
  std::vector<Result> results(inputs.size());
  for (size_t s = 0; s < inputs.size(); ++s) {
    stores.emplace_back(layer, inputs[s].tokens, random);
    results[s].attended.resize(at(inputs[s].tokens, padded_dim(layer.heads * layer.shape.head_dim)));
    results[s].log_sum_exp.resize(at(inputs[s].tokens, layer.heads));
    results[s].y.resize(at(inputs[s].tokens, layer.hidden));
  }
  for (;;) {
    std::vector<int> open;
    for (size_t s = 0; s < inputs.size(); ++s) {
      if (stores[s].done < inputs[s].tokens) {
        open.push_back(static_cast<int>(s));
      }
    }
    if (open.empty()) {
      break;
    }
    std::shuffle(open.begin(), open.end(), random.engine());
    open.resize(most_rows == 1 ? 1 : static_cast<size_t>(random.between(1, static_cast<int>(open.size()))));
    std::vector<Take> takes;
    for (const int s : open) {
      const Store& store = stores[static_cast<size_t>(s)];
      const int left = inputs[static_cast<size_t>(s)].tokens - store.done;
      const int rows = random.below(4) == 0 ? 1 : random.between(1, most_rows);
      takes.push_back({s, std::min(left, rows), most_rows == 1 ? 0 : random.between(0, store.done / kPageTokens)});
    }
    pass(kernels, layer, inputs, stores, takes, matmul, results);
  }
  for (size_t s = 0; s < inputs.size(); ++s) {
    for (int head = 0; head < layer.shape.kv_heads; ++head) {
      for (int t = 0; t < inputs[s].tokens; ++t) {
        for (int d = 0; d < layer.shape.head_dim; ++d) {
          results[s].keys.push_back(stores[s].pages.key(head, t, d));
          results[s].values.push_back(stores[s].pages.value(head, t, d));
        }
      }
    }
  }
  return results;
}

template <typename T>
int differing(const std::vector<T>& a, const std::vector<T>& b) {
  int count = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  }
  return count;
}

int mismatches(const std::vector<Result>& a, const std::vector<Result>& b) {
  int count = 0;
  for (size_t s = 0; s < a.size(); ++s) {
    count += differing(a[s].keys, b[s].keys) + differing(a[s].values, b[s].values) +
             differing(a[s].attended, b[s].attended) + differing(a[s].log_sum_exp, b[s].log_sum_exp) +
             differing(a[s].y, b[s].y);
  }
  return count;
}

struct World {
  KvShape shape;
  int group;
  std::vector<int> tokens;
};

std::unique_ptr<Kernels> kernels_for(const World& world, Isa isa, int threads) {
  return make_cpu_kernels(isa, threads,
                          {.shape = world.shape,
                           .heads = world.shape.kv_heads * world.group,
                           .max_rows = 1024,
                           .max_context_tokens = 2048});
}

// Total of differing values over `cases` random schedules.
int compare(const World& world, Isa isa, int cases, Matmul matmul, uint64_t seed) {
  Random random(seed);
  std::vector<std::unique_ptr<Kernels>> kernels;
  for (const int threads : {1, 2, 3, 5}) {
    kernels.push_back(kernels_for(world, isa, threads));
  }
  const Layer layer = make_layer(*kernels[0], world.shape, world.shape.kv_heads * world.group, random, 2048);
  std::vector<Input> inputs;
  for (const int tokens : world.tokens) {
    inputs.push_back({random.floats(at(tokens, layer.hidden)), tokens});
  }
  const std::vector<Result> expected = run(*kernels[0], layer, inputs, 1, right_matmul, random);
  int count = 0;
  for (int i = 0; i < cases; ++i) {
    const int most_rows = i % 5 == 0 ? 300 : random.between(2, 80);
    count += mismatches(expected, run(*kernels[static_cast<size_t>(i % 4)], layer, inputs, most_rows, matmul, random));
  }
  return count;
}

class Bits : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Bits, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

// 5 worlds x 140 cases on the class that this machine would choose, 20 on the others.
TEST_P(Bits, RowsDoNotDependOnTheirCompany) {
  const World worlds[] = {
      {{1, 2, 16}, 2, {70, 130, 5, 64}}, {{1, 1, 64}, 4, {1100, 33}},  {{1, 2, 32}, 1, {200, 65, 190}},
      {{1, 1, 80}, 7, {150, 40}},        {{1, 2, 128}, 2, {100, 129}},
  };
  const int cases = GetParam() == best_isa() ? 140 : 20;
  uint64_t seed = 1000;
  for (const World& world : worlds) {
    EXPECT_EQ(compare(world, GetParam(), cases, right_matmul, ++seed), 0) << "head size " << world.shape.head_dim;
  }
}

// The comparison above can fail: it sees one product whose order of summation depends on the number of rows.
TEST(BitsComparison, AnOrderThatDependsOnTheRowCountIsSeen) {
  EXPECT_GT(compare({{1, 2, 16}, 2, {70, 130, 5, 64}}, best_isa(), 3, split_k_matmul, 7), 0);
}

// Past in another format, ragged heads: rows still do not depend on each other, on threads or on page addresses.
TEST_P(Bits, DraftRowsDoNotDependOnTheirCompany) {
  Random random(30);
  const KvShape shape{1, 2, 64};
  const int heads = 4;
  const auto one = make_cpu_kernels(GetParam(), 1, {shape, heads, 64, 4096});
  const auto many = make_cpu_kernels(GetParam(), 3, {shape, heads, 64, 4096});
  for (int i = 0; i < 20; ++i) {
    const KvFormat formats[] = {{2 << random.below(4), 2 << random.below(4)},
                                {3, 6},
                                {8, 7, KvCode::plane},
                                {8, 8, KvCode::int8},
                                {4, 3, KvCode::affine, true}};
    const KvFormat format = formats[i % 5];
    const int past_pages = 40;
    Pages past(shape, format, past_pages, random);
    Pages tail(shape, {}, 2, random);
    Pages source(shape, {}, 1, random);
    for (int head = 0; head < shape.kv_heads; ++head) {
      past.tokens()[static_cast<size_t>(head)] = random.between(0, past_pages * kPageTokens);
      for (int page = 0; page < past_pages; ++page) {
        for (int t = 0; t < kPageTokens; ++t) {
          source.write(0, t, random.bf16s(64).data(), random.bf16s(64).data());
        }
        one->quantize_head_page(source.head_page(0, 0), kPageTokens, shape, format, past.head_page(head, page));
      }
    }
    const int rows = random.between(2, 40);
    const LayerKv kv{past.view(), tail.view(), 64 * past_pages};
    const auto q = random.bf16s(at(rows * heads, shape.key_dim()));
    const int width = padded_dim(heads * shape.head_dim);
    std::vector<bf16> alone(at(rows, width));
    std::vector<bf16> together(at(rows, width));
    const int position = 64 * past_pages + random.below(64);
    for (int r = 0; r < rows; ++r) {
      const SequenceRows row{r, 1, position + r, nullptr, kv};
      const PassRows pass = one_layer({&row, 1});
      one->stage(pass);
      one->attention({shape, heads, 0.125f, q.data(), &pass, 0, alone.data(), nullptr});
    }
    const SequenceRows all{0, rows, position, nullptr, kv};
    const PassRows pass = one_layer({&all, 1});
    many->stage(pass);
    many->attention({shape, heads, 0.125f, q.data(), &pass, 0, together.data(), nullptr});
    ASSERT_EQ(differing(alone, together), 0) << "case " << i;
  }
}

// Every matrix size with and without edges, K blocks and row blocks: one row against all rows.
TEST_P(Bits, MatmulRowsDoNotDependOnTheirCompany) {
  Random random(31);
  const auto one = make_cpu_kernels(GetParam(), 1, {{1, 1, 16}, 1, 1, 64});
  const auto many = make_cpu_kernels(GetParam(), 3, {{1, 1, 16}, 1, 1, 64});
  for (int i = 0; i < 12; ++i) {
    const int out = random.between(1, 400);
    const int in = random.between(1, i % 3 == 0 ? 2000 : 300);
    const int rows = random.between(2, i % 4 == 0 ? 420 : 60);
    const Packed weight = pack(*one, random.bf16s(at(out, in)), out, in);
    const auto x = random.rows(rows, in);
    for (const Epilogue epilogue : {Epilogue::store, Epilogue::add}) {
      auto alone = random.floats(at(rows, out));
      auto together = alone;
      for (int r = 0; r < rows; ++r) {
        one->matmul(weight.matrix, x.data() + at(r, padded_dim(in)), 1, alone.data() + at(r, out), epilogue);
      }
      many->matmul(weight.matrix, x.data(), rows, together.data(), epilogue);
      ASSERT_EQ(differing(alone, together), 0) << rows << " rows of " << out << " x " << in;
    }
  }
}

}  // namespace
}  // namespace vericache::test
