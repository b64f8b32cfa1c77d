#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include "base/error.h"
#include "compress/compressor.h"

namespace vericache {
namespace {

TEST(CompressorFactory, ReadsWhatItNames) {
  const std::pair<const char*, const char*> specs[] = {
      {"none", "none"},
      {"kivi", "kivi:bits=4"},
      {"kivi:bits=2", "kivi:bits=2"},
      {"kivi:bits=8", "kivi:bits=8"},
      {"kivi:k=8,v=4", "kivi:k=8,v=4"},
      {"kivi:v=2", "kivi:k=4,v=2"},
      {"kivi:k=16,v=4", "kivi:k=16,v=4"},
      {"kivi:bits=4,v=4,k=4", "kivi:bits=4"},
      {"kivi:bits=3", "kivi:bits=3"},
      {"kivi:bits=6,v=3", "kivi:k=6,v=3"},
      {"plane", "plane:bits=8"},
      {"plane:bits=6", "plane:bits=6"},
      {"plane:bits=7,k=9", "plane:k=9,v=7"},
      {"plane:k=16", "plane:k=16,v=8"},
      {"fp8", "fp8"},
      {"quarot", "quarot:bits=4"},
      {"quarot:bits=3", "quarot:bits=3"},
      {"quarot:k=16,v=2", "quarot:k=16,v=2"},
      {"snapkv+quarot", "snapkv:budget=0.2,window=32,kernel=7+quarot:bits=4"},
      {"int8", "int8"},
      {"kvquant", "kvquant:bits=4,outliers=0.01"},
      {"kvquant:bits=3", "kvquant:bits=3,outliers=0.01"},
      {"kvquant:k=16,v=2,outliers=0", "kvquant:k=16,v=2,outliers=0"},
      {"snapkv+kvquant:bits=3,outliers=0.025", "snapkv:budget=0.2,window=32,kernel=7+kvquant:bits=3,outliers=0.025"},
      {"kvquant;layers=2:snapkv+kvquant",
       "kvquant:bits=4,outliers=0.01;layers=2:snapkv:budget=0.2,window=32,kernel=7+kvquant:bits=4,outliers=0.01"},
      {"snapkv+plane:bits=7", "snapkv:budget=0.2,window=32,kernel=7+plane:bits=7"},
      {"streaming-llm+fp8", "streaming-llm:sinks=4,window=1024+fp8"},
      {"snapkv+int8", "snapkv:budget=0.2,window=32,kernel=7+int8"},
      {"streaming-llm", "streaming-llm:sinks=4,window=1024"},
      {"streaming-llm:window=0.25", "streaming-llm:sinks=4,window=0.25"},
      {"streaming-llm:window=7,sinks=0", "streaming-llm:sinks=0,window=7"},
      {"snapkv", "snapkv:budget=0.2,window=32,kernel=7"},
      {"snapkv:budget=4096,window=16,kernel=1", "snapkv:budget=4096,window=16,kernel=1"},
      {"snapkv:budget=0.00001", "snapkv:budget=1e-05,window=32,kernel=7"},
      {"snapkv:budget=16777216", "snapkv:budget=16777216,window=32,kernel=7"},
      {"quest", "quest:budget=0.2,dense=2"},
      {"quest:budget=1024,dense=0", "quest:budget=1024,dense=0"},
      {"quest:budget=0.1+kivi:bits=4", "quest:budget=0.1,dense=2+kivi:bits=4"},
      {"quest:budget=0.1+quarot:k=3,v=2", "quest:budget=0.1,dense=2+quarot:k=3,v=2"},
      {"quest;layers=2-3:quest", "quest:budget=0.2,dense=2;layers=2-3:quest:budget=0.2,dense=2"},
      {"snapkv:budget=0.3+kivi", "snapkv:budget=0.3,window=32,kernel=7+kivi:bits=4"},
      {"streaming-llm+kivi:k=8,v=2", "streaming-llm:sinks=4,window=1024+kivi:k=8,v=2"},
      {"pyramidkv", "pyramidkv:budget=0.2,window=8,kernel=7,beta=20"},
      {"pyramidkv:beta=2.5,budget=300", "pyramidkv:budget=300,window=8,kernel=7,beta=2.5"},
      {"h2o", "h2o:budget=0.2"},
      {"kvzip", "kvzip:budget=0.2"},
      {"adakv(kvzip:budget=64)+kivi:bits=4;layers=0:kvzip+kivi",
       "adakv:alpha=0.2(kvzip:budget=64)+kivi:bits=4;layers=0:kvzip:budget=0.2+kivi:bits=4"},
      {"tova:budget=0.1+kivi:bits=8", "tova:budget=0.1+kivi:bits=8"},
      {"knorm", "knorm:budget=0.2"},
      {"keydiff:budget=7", "keydiff:budget=7"},
      {"expected", "expected:budget=0.2,window=128,future=512,sinks=4"},
      {"expected:sinks=0,future=1,window=9", "expected:budget=0.2,window=9,future=1,sinks=0"},
      {"adakv(snapkv)", "adakv:alpha=0.2(snapkv:budget=0.2,window=32,kernel=7)"},
      {"adakv:alpha=1(h2o:budget=0.5)+kivi", "adakv:alpha=1(h2o:budget=0.5)+kivi:bits=4"},
      {"snapkv;layers=0-1:none", "snapkv:budget=0.2,window=32,kernel=7;layers=0-1:none"},
      {"none;layers=3:adakv(knorm);layers=5-5:tova:budget=9",
       "none;layers=3:adakv:alpha=0.2(knorm:budget=0.2);layers=5:tova:budget=9"},
      {"kivi;layers=2:snapkv+kivi", "kivi:bits=4;layers=2:snapkv:budget=0.2,window=32,kernel=7+kivi:bits=4"},
  };
  for (const auto& [spec, name] : specs) {
    EXPECT_EQ(make_compressor(spec)->name(), name);
    const std::unique_ptr<Compressor> again = make_compressor(name);
    EXPECT_EQ(again->name(), name);
    EXPECT_EQ(again->format(), make_compressor(spec)->format());
  }
  EXPECT_EQ(make_compressor("snapkv:window=99")->query_window(), 99);
  EXPECT_EQ(make_compressor("kivi:k=2,v=8")->format(), (KvFormat{2, 8}));
  EXPECT_EQ(make_compressor("plane:bits=7")->format(), (KvFormat{7, 7, KvCode::plane}));
  EXPECT_EQ(make_compressor("fp8")->format(), (KvFormat{8, 8, KvCode::fp8}));
  EXPECT_EQ(make_compressor("int8")->format(), (KvFormat{8, 8, KvCode::int8}));
  EXPECT_EQ(make_compressor("kvquant:k=3,v=2,outliers=0.03")->format(), (KvFormat{3, 2, KvCode::nuq, false, 30}));
  EXPECT_TRUE(make_compressor("none")->format().exact());
  EXPECT_TRUE(make_compressor("snapkv")->chooses_anew());
  EXPECT_FALSE(make_compressor("kivi")->chooses_anew());
  const auto mixed = make_compressor("none;layers=1-2:snapkv:window=99");
  EXPECT_EQ(mixed->query_window(), 99);
  EXPECT_TRUE(mixed->chooses_anew());
  EXPECT_EQ(std::vector<bool>({mixed->chooses_anew_in(0), mixed->chooses_anew_in(1), mixed->chooses_anew_in(2),
                               mixed->chooses_anew_in(3)}),
            std::vector<bool>({false, true, true, false}));
}

TEST(CompressorFactory, RefusesEverythingElseAndSaysWhatThereIs) {
  for (const char* spec : {"",
                           "None",
                           " none",
                           "none ",
                           "none:bits=4",
                           "h2o:window=4",
                           "kvzip:chunk=4",
                           "h2",
                           "pyramidkv:beta=0.5",
                           "pyramidkv:beta",
                           "tova:window=1",
                           "knorm:budget=-1",
                           "expected:window=0",
                           "expected:sinks=65",
                           "expected:future=0",
                           "quest:budget=-1",
                           "quest:dense=0.5",
                           "quest:window=3",
                           "quest+snapkv",
                           "quest;layers=0:none",
                           "adakv(quest)",
                           "adakv",
                           "adakv()",
                           "adakv(",
                           "adakv)",
                           "adakv(snapkv",
                           "adakv(snapkv))",
                           "adakv(snapkv)x",
                           "adakv(snapkv)kivi",
                           "adakv(snapkv+kivi)",
                           "adakv(none)",
                           "adakv(streaming-llm)",
                           "adakv(adakv(snapkv))",
                           "adakv:alpha=1.5(snapkv)",
                           "snapkv(knorm)",
                           "snapkv()",
                           "snapkv;",
                           "snapkv;;",
                           ";layers=0:none",
                           "snapkv;none",
                           "snapkv;layers=:none",
                           "snapkv;layers=0",
                           "snapkv;layers=a:none",
                           "snapkv;layers=-1:none",
                           "snapkv;layers=1-0:none",
                           "snapkv;layers=1-:none",
                           "snapkv;layers=99999:none",
                           "snapkv;layers=0-3:none;layers=3:knorm",
                           "snapkv;layers=0:kivi",
                           "snapkv+kivi;layers=0:none",
                           "snapkv;layers=0:zip",
                           "kivi:",
                           "kivi:bits",
                           "kivi:bits=",
                           "kivi:bits=5",
                           "kivi:bits=7",
                           "kivi:bits=16",
                           "quarot:bits=16",
                           "quarot:k=16,v=16",
                           "quarot+kivi",
                           "plane:bits=5",
                           "plane:bits=4",
                           "plane:bits=16",
                           "plane:k=16,v=16",
                           "plane:bits=8,bits=8",
                           "fp8:bits=8",
                           "int8:bits=8",
                           "kvquant:bits=8",
                           "kvquant:k=16,v=16",
                           "kvquant:outliers=0.031",
                           "kvquant:outliers=0.0105",
                           "kvquant:outliers=-0.01",
                           "kvquant:sensitivity=1",
                           "kvquant+kivi",
                           "kvquant;layers=0:kvquant:outliers=0",
                           "int4",
                           "plane+kivi",
                           "fp8+int8",
                           "none+plane",
                           "kivi:bits=4.5",
                           "kivi:bits=-4",
                           "kivi:bits=1e99",
                           "kivi:bits=nan",
                           "kivi:bits=inf",
                           "kivi:bits=4,bits=4",
                           "kivi:k=16,v=16",
                           "kivi:window=3",
                           "kivi:bits=4 ",
                           "kivi:bits=0x4",
                           "streaming-llm:sinks=-1",
                           "streaming-llm:sinks=1.5",
                           "streaming-llm:window=99999999999",
                           "streaming-llm:window=-0.1",
                           "streaming_llm",
                           "snapkv:budget=-1",
                           "snapkv:budget=nan",
                           "snapkv:kernel=0",
                           "snapkv:kernel=4",
                           "snapkv:kernel=257",
                           "snapkv:window=0",
                           "snapkv:window=257",
                           "snapkv:,",
                           "snapkv:=",
                           "snapkv:budget=0.2,,window=4",
                           "+",
                           "+kivi",
                           "snapkv+",
                           "none+kivi",
                           "kivi+kivi",
                           "snapkv+none",
                           "snapkv+streaming-llm",
                           "snapkv+kivi+kivi",
                           "snapkv+kivi:k=16,v=16",
                           "snapkv+kivi:bits=5",
                           "snapkv:budget=1e+3",
                           "\xff\xfe",
                           "{}",
                           "kivi:{}={}"}) {
    if (std::string_view(spec) == "kivi:") {
      EXPECT_EQ(make_compressor(spec)->name(), "kivi:bits=4");  // no options are given
      continue;
    }
    try {
      make_compressor(spec);
      ADD_FAILURE() << "'" << spec << "' is taken";
    } catch (const UsageError& error) {
      const std::string_view message = error.what();
      EXPECT_NE(message.find(compressor_help()), std::string_view::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string_view::npos);
    }
  }
}

// Pieces of specs in any order: a compressor whose name reads back, or a UsageError.
RC_GTEST_PROP(CompressorFactory, RandomTextNeverCrashes, ()) {
  static const std::vector<std::string> pieces{
      "plane",  "fp8",    "int8",  "kvquant",  "outliers", "0.01",   "6",
      "7",      "9",      "3",     "none",     "kivi",     "snapkv", "streaming-llm",
      ":",      ",",      "=",     "+",        "bits",     "k",      "v",
      "budget", "window", "sinks", "kernel",   "0",        "1",      "2",
      "4",      "8",      "16",    "0.3",      "1e9",      "-",      "nan",
      "inf",    " ",      "\xc3",  "{}",       "%s",       "33",     "9999999999999999999999",
      "adakv",  "(",      ")",     ";layers=", "h2o",      "tova",   "knorm",
      "alpha"};
  std::string text;
  const auto chosen = *rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(0, pieces.size() + 8));
  for (const size_t i : chosen) {
    text += i < pieces.size() ? pieces[i] : *rc::gen::arbitrary<std::string>();
  }
  std::unique_ptr<Compressor> compressor;
  try {
    compressor = make_compressor(text);
  } catch (const UsageError&) {
    return;
  }
  RC_ASSERT(make_compressor(compressor->name())->name() == compressor->name());
}

// Valid specs of any values: what is admitted grows with the context, and never keeps more than there is.
RC_GTEST_PROP(CompressorFactory, RandomOptionsReadBack, ()) {
  const std::string share = std::to_string(*rc::gen::inRange(0, 3000)) + (*rc::gen::arbitrary<bool>() ? "e-3" : "");
  std::string spec = *rc::gen::arbitrary<bool>()
                         ? "snapkv:budget=" + share + ",kernel=" + std::to_string(2 * *rc::gen::inRange(0, 127) + 1) +
                               ",window=" + std::to_string(*rc::gen::inRange(1, 257))
                         : "streaming-llm:window=" + share + ",sinks=" + std::to_string(*rc::gen::inRange(0, 3000));
  const std::string scorer =
      *rc::gen::element<std::string>("", "h2o", "tova", "knorm", "keydiff", "expected", "kvzip", "pyramidkv");
  if (!scorer.empty()) {
    spec = scorer + ":budget=" + share;
    spec += scorer == "pyramidkv" ? ",beta=" + std::to_string(*rc::gen::inRange(1, 50)) : "";
    spec = *rc::gen::arbitrary<bool>() ? "adakv(" + spec + ")" : spec;
  }
  if (*rc::gen::arbitrary<bool>()) {
    spec += "+kivi:k=" + *rc::gen::element<std::string>("2", "3", "4", "6", "8", "16") +
            ",v=" + *rc::gen::element<std::string>("2", "3", "4", "6", "8");
  }
  const std::unique_ptr<Compressor> compressor = make_compressor(spec);
  RC_ASSERT(make_compressor(compressor->name())->name() == compressor->name());
  int before = 0;
  for (int tokens = 0; tokens <= 40 * kPageTokens; tokens += 1 + tokens / 7) {
    const int kept = compressor->kept_tokens(tokens);
    RC_ASSERT(kept >= before && kept <= tokens);
    RC_ASSERT(make_compressor(compressor->name())->kept_tokens(tokens) == kept);
    before = kept;
  }
  // What is admitted at some length is enough for every shorter one, whole pages or not.
  const KvShape shape{.layers = *rc::gen::inRange(1, 9), .kv_heads = *rc::gen::inRange(1, 5), .head_dim = 32};
  const int longest = *rc::gen::inRange(0, 40 * kPageTokens);
  // Some layers have followed the context already when the others have not.
  const int lag = kPageTokens * *rc::gen::inRange(0, 5);
  for (int tokens = 0; tokens <= longest; tokens += kPageTokens) {
    int pages = 0;
    for (int layer = 0; layer < shape.layers; ++layer) {
      const int held = compressor->layer_tokens(tokens, layer, shape);
      RC_ASSERT(held >= 0 && held <= shape.kv_heads * tokens);
      RC_ASSERT(compressor->layer_pages(tokens, layer, shape) * kPageTokens >= held);
      const int behind = std::max(0, tokens - (layer % 2 == 0 ? 0 : lag));
      pages += compressor->layer_pages(behind, layer, shape);
    }
    RC_ASSERT(pages <= compressor->resident_pages(longest, shape));
  }
}

}  // namespace
}  // namespace vericache
