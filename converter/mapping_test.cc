// Every operation of a mapping, in both directions, on tensors that are stored in every way,
// against the same operation element by element; every state; and what is refused.
#include "converter/mapping.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "converter/block_tensor.h"
#include "converter/mapping_sample.h"
#include "converter/optimizer_groups.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kWhere[] = "--map test";

MappingRules MustParse(const std::string& text) {
  auto rules = ParseMappingRules(text, kWhere);
  EXPECT_THAT(rules, IsOk());
  return *std::move(rules);
}

struct Settings {
  std::vector<std::string> set = {};
  std::string arguments = {};
  std::string config = {};
  Unmapped unmapped = Unmapped::kRefuse;
};

absl::Status Apply(const std::string& text, MappingDirection direction, MappingSample& sample,
                   const Settings& settings = {}, std::vector<std::string>* left_out = nullptr) {
  const MappingRules rules = MustParse(text);
  auto numbers = ModelNumbers::Create(
      {.set = settings.set, .arguments = settings.arguments, .config = settings.config});
  EXPECT_THAT(numbers, IsOk());
  std::vector<std::string> nowhere;
  return ApplyMapping(
      {.rules = rules, .direction = direction, .where = kWhere, .unmapped = settings.unmapped},
      sample.folder(), *numbers, sample.index, left_out == nullptr ? nowhere : *left_out);
}

using Named = std::vector<std::pair<std::string, Dense>>;

// `left` and `right` are the two sides of the equation: each becomes the other.
void ExpectEqual(const std::string& text, const Named& left, const Named& right,
                 const Settings& settings = {}) {
  for (const Cut cut : kAllCuts) {
    for (const bool forward : {true, false}) {
      MappingSample sample;
      for (const auto& [name, tensor] : forward ? left : right) {
        sample.Add(name, "param", tensor, cut);
      }
      sample.Finished();
      ASSERT_THAT(
          Apply(text, forward ? MappingDirection::kLeftToRight : MappingDirection::kRightToLeft,
                sample, settings),
          IsOk())
          << text;
      const Named& expected = forward ? right : left;
      EXPECT_EQ(sample.index.tensor_states.size(), expected.size());
      for (const auto& [name, tensor] : expected) {
        EXPECT_EQ(sample.Read(sample.index, name, "param"), tensor)
            << text << " " << name << " cut " << static_cast<int>(cut) << " forward " << forward;
      }
    }
  }
}

TEST(Mapping, TransposesMatricesAndStacksOfThem) {
  for (const std::vector<uint64_t>& shape :
       {std::vector<uint64_t>{3, 5}, {1, 4}, {4, 1}, {2, 3, 4}, {0, 3}}) {
    const Dense tensor = Dense::Of(shape, 7);
    ExpectEqual("transpose(a) = b", {{"a", tensor}}, {{"b", TransposedDense(tensor)}});
  }
}

TEST(Mapping, FusesAndSplitsInEveryProportion) {
  for (const uint64_t columns : {0, 1, 3}) {  // 0: vectors
    const auto shaped = [&](uint64_t rows) {
      return columns == 0 ? std::vector<uint64_t>{rows} : std::vector<uint64_t>{rows, columns};
    };
    const Dense gate = Dense::Of(shaped(4), 0);
    const Dense up = Dense::Of(shaped(4), 100);
    ExpectEqual("fused = concat(gate, up)", {{"fused", InterleavedDense({gate, up}, 1)}},
                {{"gate", gate}, {"up", up}});
    for (const auto& [heads, groups] :
         {std::pair<uint64_t, uint64_t>{4, 4}, {4, 2}, {4, 1}, {6, 3}}) {
      for (const uint64_t rows_of_head : {1, 2, 3}) {
        const Dense q = Dense::Of(shaped(heads * rows_of_head), 0);
        const Dense k = Dense::Of(shaped(groups * rows_of_head), 1000);
        const Dense v = Dense::Of(shaped(groups * rows_of_head), 2000);
        ExpectEqual("qkv = interleave(groups, heads * q, groups * k, groups * v)",
                    {{"qkv", InterleavedDense({q, k, v}, groups)}}, {{"q", q}, {"k", k}, {"v", v}},
                    {.set = {absl::StrCat("heads=", heads), absl::StrCat("groups=", groups)}});
      }
    }
  }
}

TEST(Mapping, PairsAndHalvesOfRotaryEmbeddings) {
  for (const uint64_t heads : {1, 2, 3}) {
    for (const uint64_t half : {1, 2, 4}) {
      const Dense meta = Dense::Of({heads * 2 * half, 3}, 0);
      ExpectEqual("rotary(heads, wq) = q", {{"wq", meta}}, {{"q", RotaryDense(meta, heads)}},
                  {.set = {absl::StrCat("heads=", heads)}});
    }
  }
}

TEST(Mapping, StacksLayersOfExperts) {
  Named separate;
  std::vector<Dense> layers;
  for (int layer = 0; layer < 2; ++layer) {
    std::vector<Dense> experts;
    for (int expert = 0; expert < 3; ++expert) {
      const uint32_t first = static_cast<uint32_t>(1000 * layer + 100 * expert);
      const Dense w1 = Dense::Of({2, 3}, first);
      const Dense w3 = Dense::Of({2, 3}, first + 50);
      separate.emplace_back(absl::StrCat("l.", layer, ".e.", expert, ".w1"), w1);
      separate.emplace_back(absl::StrCat("l.", layer, ".e.", expert, ".w3"), w3);
      experts.push_back(InterleavedDense({w1, w3}, 1));
    }
    layers.push_back(StackedDense(experts));
  }
  ExpectEqual("all = stack(n, stack(e, concat(l.{n}.e.{e}.w1, l.{n}.e.{e}.w3)))",
              {{"all", StackedDense(layers)}}, separate);
  ExpectEqual("m.{n} = stack(e, concat(l.{n}.e.{e}.w1, l.{n}.e.{e}.w3))",
              {{"m.0", layers[0]}, {"m.1", layers[1]}}, separate);
}

TEST(Mapping, PadsVocabulariesAndTakesThePaddingAway) {
  for (const uint64_t padded : {5, 6, 9}) {
    for (const Cut cut : kAllCuts) {
      MappingSample sample;
      const Dense words = Dense::Of({5, 3}, 10);
      sample.Add("words", "param", words, cut);
      sample.Add("words", "fp32", words, cut);
      sample.Add("words", "exp_avg", words, cut);
      sample.Finished();
      const Settings settings{.set = {"vocab=5", absl::StrCat("padded_vocab=", padded)}};
      ASSERT_THAT(Apply("embedding = pad(words)", MappingDirection::kRightToLeft, sample, settings),
                  IsOk());
      Dense repeated = words;
      Dense zeros = words;
      repeated.shape[0] = zeros.shape[0] = padded;
      for (uint64_t row = 5; row < padded; ++row) {
        repeated.values.insert(repeated.values.end(), {22, 23, 24});
        zeros.values.insert(zeros.values.end(), {0, 0, 0});
      }
      EXPECT_EQ(sample.Read(sample.index, "embedding", "param"), repeated);
      EXPECT_EQ(sample.Read(sample.index, "embedding", "fp32"), repeated);
      EXPECT_EQ(sample.Read(sample.index, "embedding", "exp_avg"), zeros);
      std::vector<std::string> left_out;
      ASSERT_THAT(Apply("embedding = pad(words)", MappingDirection::kLeftToRight, sample, settings,
                        &left_out),
                  IsOk());
      for (const char* state : {"param", "fp32", "exp_avg"}) {
        EXPECT_EQ(sample.Read(sample.index, "words", state), words);
      }
      if (padded > 5) {
        EXPECT_THAT(left_out,
                    ElementsAre(absl::StrCat(padded - 5, " rows of padding of embedding")));
      } else {
        EXPECT_THAT(left_out, IsEmpty());
      }
    }
  }
  MappingSample sample;
  sample.Add("words", "param", Dense::Of({130, 2}, 0));
  sample.Finished();
  ASSERT_THAT(Apply("embedding = pad(words)", MappingDirection::kRightToLeft, sample), IsOk());
  EXPECT_EQ(sample.index.tensor_states[0].shape[0], 256u);  // Megatron's rule
}

// Queries, keys and values with all states of a training, in two groups of the optimizer.
void AddTraining(MappingSample& sample, uint32_t step_of_v) {
  uint32_t first = 0;
  for (const char* name : {"q", "k", "v"}) {
    for (const char* state : {"fp32", "param", "exp_avg", "exp_avg_sq"}) {
      sample.Add(name, state, Dense::Of({4, 2}, first += 100), Cut::kRange);
    }
    sample.Add(name, "step", Dense{{}, {name[0] == 'v' ? step_of_v : 3}});
  }
  sample.Add("norm", "param", Dense::Of({3}, 5));
  sample.Add("norm", "fp32", Dense::Of({3}, 5));
  sample.Finished();
}

TEST(Mapping, MapsTheOptimizerLikeTheWeights) {
  const std::string text = "qkv = interleave(2, q, k, v)\nnorm = norm\n";
  MappingSample sample;
  AddTraining(sample, 3);
  const ForeignIndex before = sample.index;
  SetOptimizerGroups({{{"v", "q", "k"}, {{"lr", 0.5}}}, {{"norm"}, {{"lr", 0.25}}}}, sample.index);
  ASSERT_THAT(Apply(text, MappingDirection::kRightToLeft, sample), IsOk());
  for (const char* state : {"param", "fp32", "exp_avg", "exp_avg_sq"}) {
    const auto part = [&](const char* name) { return sample.Read(before, name, state); };
    EXPECT_EQ(sample.Read(sample.index, "qkv", state),
              InterleavedDense({part("q"), part("k"), part("v")}, 2));
  }
  EXPECT_THAT(sample.Read(sample.index, "qkv", "step").values, ElementsAre(3u));
  ASSERT_OK_AND_ASSIGN(std::vector<OptimizerGroup> groups, OptimizerGroupsOf(sample.index));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_THAT(groups[0].parameters, ElementsAre("qkv"));
  EXPECT_THAT(groups[1].parameters, ElementsAre("norm"));
  EXPECT_EQ(groups[1].values["lr"], 0.25);
  // And back.
  ASSERT_THAT(Apply(text, MappingDirection::kLeftToRight, sample), IsOk());
  for (const TensorState& state : before.tensor_states) {
    EXPECT_EQ(sample.Read(sample.index, state.tensor, state.state),
              sample.Read(before, state.tensor, state.state));
  }
  ASSERT_OK_AND_ASSIGN(groups, OptimizerGroupsOf(sample.index));
  EXPECT_THAT(groups[0].parameters, ElementsAre("q", "k", "v"));
}

void ExpectRefused(const std::string& text, MappingSample& sample, const std::string& said,
                   const Settings& settings = {},
                   StatusCode code = StatusCode::kFailedPrecondition) {
  sample.Finished();
  const size_t count = sample.index.tensor_states.size();
  EXPECT_THAT(Apply(text, MappingDirection::kLeftToRight, sample, settings),
              StatusIs(code, HasSubstr(said)))
      << text;
  EXPECT_EQ(sample.index.tensor_states.size(), count);  // as it was
}

TEST(Mapping, RefusesWhatDoesNotFit) {
  const auto with = [](const std::vector<std::pair<std::string, std::vector<uint64_t>>>& tensors) {
    auto sample = std::make_unique<MappingSample>();
    for (const auto& [name, shape] : tensors) sample->Add(name, "param", Dense::Of(shape, 0));
    return sample;
  };
  ExpectRefused("a = b", *with({{"a", {1}}, {"x", {1}}, {"y", {1}}}),
                "expected a rule for \"x\" (and 1 others), found none; --drop unmapped");
  ExpectRefused("\nconcat(a, b) = c", *with({{"a", {1}}}), "line 2: expected \"b\"");
  ExpectRefused("a = c\nb = c", *with({{"a", {1}}, {"b", {1}}}),
                "line 2: \"c\" (state param) is made twice: by the rule in line 1 too");
  ExpectRefused("concat(a, b) = c", *with({{"a", {2}}, {"b", {3}}}),
                "1 : 1, in multiples of 1, "
                "found 2 : 3");
  ExpectRefused("a = concat(b, c)", *with({{"a", {3}}}), "\"a\": expected rows for parts");
  ExpectRefused("a = interleave(4, b, c)", *with({{"a", {6}}}), "in multiples of 4");
  ExpectRefused("concat(a, b) = c", *with({{"a", {2, 3}}, {"b", {2, 4}}}),
                "found uint32 [2, 3] and uint32 [2, 4]");
  ExpectRefused("transpose(a) = b", *with({{"a", {3}}}), "\"a\": transpose: expected 2 dimensions");
  ExpectRefused("a = concat(b, c)", *with({{"a", {}}}), "expected 1 dimension or more");
  ExpectRefused("stack(e, a.{e}) = b", *with({{"a.0", {1}}, {"a.2", {1}}}),
                "{e} from 0 to at most 65535 without a gap, found 2 numbers up to 2");
  ExpectRefused("stack(e, a.{e}) = b", *with({{"a.0", {1}}, {"a.1", {2}}}),
                "expected equal shapes");
  ExpectRefused(
      "a = concat(heads * b, c)", *with({{"a", {3}}}),
      "heads: the checkpoint does not say it; expected --set heads=N, or --model DIR with "
      "num_attention_heads");
  ExpectRefused("a = pad(b)", *with({{"a", {3}}}), "vocab: the checkpoint does not say it");
  ExpectRefused("a = pad(b)", *with({{"a", {3}}}), "expected at least 4 rows",
                {.set = {"vocab=4"}});
  ExpectRefused("pad(a) = b", *with({{"a", {3}}}), "expected 4 rows (vocab), found 3",
                {.set = {"vocab=4"}});
  ExpectRefused("pad(a, 3, 1048580) = b", *with({{"a", {3}}}),
                "at most 1048576 rows of padding for the 3 rows that are there");
  ExpectRefused("a.{n} = " + std::string(kNameBytesMax - 3, 'b') + "{n}", *with({{"a.1000", {1}}}),
                "expected a name of at most 4096 bytes");
  ExpectRefused("transpose(a) = concat(b, c)",
                *with({{"a", std::vector<uint64_t>(kTensorDimsMax + 1, 1)}}),
                "expected at most 32 dimensions");
  ExpectRefused("stack(n, a.{n}) = b", *with({{"a.0", std::vector<uint64_t>(kTensorDimsMax, 1)}}),
                "expected at most 32 dimensions, found 33");
  ExpectRefused("rotary(2, a) = b", *with({{"a", {6}}}), "even number of rows");
  ExpectRefused("a = b\nc = d\nshape a [x y]\nshape b [y]", *with({{"a", {3}}, {"c", {3}}}),
                "line 3: tensor \"a\", state \"param\": expected 2 dimensions");
  ExpectRefused("a = b\nc = d\nshape a [x]\nshape c [x]", *with({{"a", {3}}, {"c", {4}}}),
                "expected a size x of 3, as \"a\" has, found [4]");
  ExpectRefused("require args.swiglu true\na = b", *with({{"a", {3}}}),
                "line 1: it is for models with swiglu true, found false in the training arguments",
                {.arguments = R"({"swiglu": false})"});
  ExpectRefused("a = concat(heads * b, groups * c)", *with({{"a", {3}}}),
                "the training arguments in the checkpoint say 4, config.json says 2",
                {.arguments = R"({"num_attention_heads": 4})", .config = R"({"n_head": 2})"});
}

// A rule's blocks are bounded, and what padding makes can be counted.
TEST(Mapping, RefusesWhatTakesTooMuch) {
  EXPECT_THAT(CheckBlockCount(kMappingBlocksMax), IsOk());
  EXPECT_THAT(CheckBlockCount(kMappingBlocksMax + 1), StatusIs(StatusCode::kResourceExhausted));
  ForeignIndex index;
  BlockTensor tensor{.dtype = Dtype::kFloat32, .shape = {uint64_t{1} << 30, 1 << 30}, .blocks = {}};
  EXPECT_THAT(AddBlocks(tensor, "a", "param", index), IsOkAndHolds(0u));
  tensor.shape = {uint64_t{1} << 31, 1 << 30};
  EXPECT_THAT(AddBlocks(tensor, "b", "param", index), StatusIs(StatusCode::kResourceExhausted));
  tensor.shape = {uint64_t{1} << 32, uint64_t{1} << 32};
  EXPECT_THAT(AddBlocks(tensor, "c", "param", index), StatusIs(StatusCode::kResourceExhausted));
}

TEST(Mapping, RefusesStatesThatDoNotFit) {
  {
    MappingSample sample;
    AddTraining(sample, 4);
    EXPECT_THAT(Apply("qkv = concat(q, k, v)\nnorm = norm", MappingDirection::kRightToLeft, sample),
                StatusIs(StatusCode::kFailedPrecondition,
                         HasSubstr("state step of \"q\" and of \"v\" differs")));
  }
  {
    MappingSample sample;
    AddTraining(sample, 3);
    SetOptimizerGroups({{{"q", "norm"}, {}}, {{"k", "v"}, {}}}, sample.index);
    EXPECT_THAT(Apply("qkv = concat(q, k, v)\nnorm = norm", MappingDirection::kRightToLeft, sample),
                StatusIs(StatusCode::kFailedPrecondition,
                         HasSubstr("\"k\" is in another parameter group")));
  }
  {
    MappingSample sample;
    sample.Add("a", "param", Dense::Of({2}, 0));
    sample.Add("b", "param", Dense::Of({2}, 0));
    sample.Add("b", "exp_avg", Dense::Of({2}, 0));
    ExpectRefused("concat(a, b) = c", sample, "expected the same states of \"a\" and \"b\"");
  }
  {
    MappingSample sample;
    sample.Add("a", "param", Dense::Of({4, 2}, 0));
    sample.Add("a", "exp_avg_sq_row", Dense::Of({4}, 0));
    ExpectRefused("a = concat(b, c)", sample, "state exp_avg_sq_row has another shape");
    // A tensor that is only renamed keeps it.
    ASSERT_THAT(Apply("a = b", MappingDirection::kLeftToRight, sample), IsOk());
    EXPECT_EQ(sample.Read(sample.index, "b", "exp_avg_sq_row"), Dense::Of({4}, 0));
  }
}

TEST(Mapping, ProvesThatNothingIsMissing) {
  MappingSample sample;
  sample.Add("a", "param", Dense::Of({4, 2}, 0));
  sample.index.pieces[0].piece.end = 7;
  ExpectRefused("a = concat(b, c)", sample, "tensor \"c\"", {}, StatusCode::kDataLoss);
}

TEST(Mapping, LeavesOutWhatItIsTold) {
  MappingSample sample;
  sample.Add("a.0", "param", Dense::Of({2}, 0));
  sample.Add("a.01", "param", Dense::Of({2}, 0));  // no number that a name gives back
  sample.Add("mask.0", "buffer", Dense::Of({2}, 0));
  sample.Finished();
  std::vector<std::string> left_out;
  ASSERT_THAT(Apply("a.{n} = b.{n}\ndrop mask.{n}", MappingDirection::kLeftToRight, sample,
                    {.unmapped = Unmapped::kLeaveOut}, &left_out),
              IsOk());
  ASSERT_EQ(sample.index.tensor_states.size(), 1u);
  EXPECT_EQ(sample.index.tensor_states[0].tensor, "b.0");
  EXPECT_THAT(left_out, ElementsAre("1 tensors that --map test drops",
                                    "a.01, for which --map test has no rule"));
}

TEST(Mapping, TiedWeightsStayTied) {
  MappingSample sample;
  const uint32_t words = sample.Add("words", "param", Dense::Of({4, 2}, 0));
  const uint32_t head = sample.Add("head", "param", Dense::Of({4, 2}, 0));
  sample.index.aliases.push_back({head, words});
  sample.Finished();
  ASSERT_THAT(Apply("pad(w) = words\npad(h) = head", MappingDirection::kRightToLeft, sample,
                    {.set = {"vocab=3"}}),
              IsOk());
  ASSERT_EQ(sample.index.aliases.size(), 1u);
  EXPECT_EQ(sample.index.tensor_states[sample.index.aliases[0].tensor_state].tensor, "h");
  EXPECT_EQ(sample.index.tensor_states[sample.index.aliases[0].of].tensor, "w");
}

// Masters that are rounded when they are read can be transposed like everything else.
TEST(Mapping, RoundedWeightsAreTransposed) {
  MappingSample sample;
  const uint32_t number = sample.index.AddState({"a", "param", Dtype::kBfloat16, {2, 2}});
  const std::vector<float> masters = {1, 2, 3, 4};
  std::string bytes(16, '\0');
  std::memcpy(bytes.data(), masters.data(), 16);
  sample.index.AddWholePiece(number, sample.index.AddInline(bytes), 0);
  sample.index.pieces[0].rounded = true;
  sample.Finished();
  ASSERT_THAT(Apply("transpose(a) = b", MappingDirection::kLeftToRight, sample), IsOk());
  WholeTensorReader reader(sample.folder(), sample.index);
  std::vector<uint16_t> found(4);
  ASSERT_THAT(reader.ReadRange(0, 0, 4, std::as_writable_bytes(std::span(found))), IsOk());
  EXPECT_THAT(found, ElementsAre(0x3F80, 0x4040, 0x4000, 0x4080));  // 1, 3, 2, 4
}

TEST(MappingRules, SaysWhatIsWrongAndWhere) {
  for (const auto& [text, said] : std::vector<std::pair<std::string, std::string>>{
           {"a = b\ndro c", "line 2: expected \"=\", found \"c\"; did you mean \"drop\"?"},
           {"a = transpse(b)",
            "line 1: expected an operation (transpose, concat, interleave, stack, "
            "pad, rotary), found \"transpse\"; did you mean \"transpose\"?"},
           {"a =\n\n  concat(b,\n c", "line 4: expected \")\", found the end of the file"},
           {"a = concat(b c)", "expected \")\", found \"c\""},
           {"a = interleave(b)", "expected \",\", found \")\""},
           {"a = interleave(0, b)", "expected a number from 1 to"},
           {"a = b c", "expected the end of the line, found \"c\""},
           {"a.{n} = b", "expected the same numbers on both sides, found {n} and {}"},
           {"a.{n} = concat(b.{n}, c)", "expected {n} in all names of one side, found {}"},
           {"a = stack(e, b)", "stack: expected {e} in the names that it counts"},
           {"a = concat(b, b)", "\"b\" is on one side twice"},
           {"a = b\n\nc = \"\xff\"", "line 3: expected UTF-8"},
           {"a{ = b", "expected a name between { and }"},
           {"\"a*\" = b", "without *"},
           {"\"a = b", "expected a JSON string"},
           {"shape a b", "expected \"[\", found \"b\""},
           {"shape a [b", "expected a word for a size, or \"]\", found the end of the file"},
           {"require swiglu true", "expected args.NAME or config.NAME, found \"swiglu\""},
           {"require args.x", "expected a value, found the end of the file"},
           {"= b", "expected a tensor's name, found \"=\""},
           {"a = " + std::string(10, ' ') +
                "transpose(transpose(transpose(transpose(transpose("
                "transpose(transpose(transpose(transpose(transpose(b))))))))))",
            "expected at most 8 operations in each other"}}) {
    EXPECT_THAT(ParseMappingRules(text, kWhere),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr(said)))
        << text;
  }
}

TEST(MappingRules, QuotedNamesAndComments) {
  const MappingRules rules =
      MustParse("# first\n\"my (odd) name\" = b # why\n\n transpose( \n c ) = d");
  ASSERT_EQ(rules.rules.size(), 2u);
  EXPECT_EQ(rules.rules[0].left.name->text(), "my (odd) name");
  EXPECT_EQ(rules.rules[1].line, 4u);
}

TEST(ModelNumbers, KnowsWhereToLook) {
  ASSERT_OK_AND_ASSIGN(
      ModelNumbers numbers,
      ModelNumbers::Create({.arguments = R"({"num_attention_heads": 8, "num_query_groups": 1,
                                             "group_query_attention": false, "vocab_size": 250})",
                            .config = R"({"vocab_size": 251, "n_head": 8})"}));
  EXPECT_THAT(numbers.Get({.name = "groups"}), IsOkAndHolds(8u));  // not 1
  EXPECT_THAT(numbers.Get({.name = "vocab"}), IsOkAndHolds(251u));
  const std::vector<std::string> set = {"heeds=4"};
  ASSERT_OK_AND_ASSIGN(numbers, ModelNumbers::Create({.set = set}));
  EXPECT_THAT(numbers.Get({.name = "heads"}), StatusIs(StatusCode::kInvalidArgument));
  EXPECT_THAT(numbers.CheckAllUsed(),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("did you mean \"heads\"?")));
  for (const char* text : {"heads", "=4", "heads=", "heads=0", "heads=-1", "heads=x"}) {
    const std::vector<std::string> one = {text};
    EXPECT_THAT(ModelNumbers::Create({.set = one}), StatusIs(StatusCode::kInvalidArgument));
  }
}

}  // namespace
}  // namespace holdfast::converter
