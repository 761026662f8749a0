// Documents made from others: what `--to` and rules give, and what they refuse by which words. That
// what they give means the same tensors is the oracle's to say; here it is compared with documents
// written by hand.
#include "format/layout_rules.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "format/layout.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

// A transformer's corner: stages, tensor parallelism, experts on their own mesh, the zero rule.
std::string Document(const std::string& mesh, const std::string& experts, uint32_t stage,
                     const std::string& more = "") {
  return absl::StrCat(
      R"({"holdfast_layout":1,"mesh":[)", mesh, R"(],"meshes":{"experts":[)", experts,
      R"(]},"zero":{"stage":)", stage, R"(,"axis":"dp"},"placements":{)",
      R"("wte":[{"op":"place","axis":"pp","coordinates":[0,-1]},)",
      R"({"op":"shard","dim":0,"axis":"tp","rule":"ceil"},{"op":"zero","rule":"ceil"}],)",
      R"("l1":[{"op":"place","axis":"pp","index":1,"count":2,"rule":"balanced"},)",
      R"({"op":"shard","dim":1,"axis":"tp","rule":"even"},{"op":"zero","rule":"ceil"}],)",
      R"("e":{"mesh":"experts","ops":[{"op":"place","axis":"ep","index":1,"count":2,"rule":"ceil"}]}},)",
      R"("tensors":[{"name":"wte","shape":[10,4],"states":[)",
      R"({"state":"param","dtype":"float32","place":"wte"},)",
      R"({"state":"exp_avg","dtype":"float32","place":"wte"}]},)",
      R"({"name":"l1.w","shape":[4,12],"states":[{"state":"param","dtype":"bfloat16","place":"l1"}]},)",
      R"({"name":"e1","shape":[3],"states":[{"state":"param","dtype":"float32","place":"e"}]})",
      more, "]}");
}
std::string Axis(const std::string& name, uint32_t size) {
  return absl::StrCat(R"({"axis":")", name, R"(","size":)", size, "}");
}
const std::string kMesh = absl::StrCat(Axis("pp", 2), ",", Axis("dp", 2), ",", Axis("tp", 1));
const std::string kExperts = absl::StrCat(Axis("pp", 2), ",", Axis("ep", 2));

std::string ErrorOf(const absl::StatusOr<std::string>& document) {
  return document.ok() ? "accepted: " + *document : std::string(document.status().message());
}

TEST(ResizeLayout, NamesAxesOfTheDocumentAndTheStage) {
  const std::string document = Document(kMesh, kExperts, 1);
  const auto mesh = [](uint32_t pp, uint32_t dp, uint32_t tp) {
    return absl::StrCat(Axis("pp", pp), ",", Axis("dp", dp), ",", Axis("tp", tp));
  };
  const auto experts = [](uint32_t pp, uint32_t ep) {
    return absl::StrCat(Axis("pp", pp), ",", Axis("ep", ep));
  };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"tp=2,dp=1", Document(mesh(2, 1, 2), experts(2, 2), 1)},
      {"pp=1,dp=4,experts.ep=4,zero=3", Document(mesh(1, 4, 1), experts(1, 4), 3)},
      {"zero=0", Document(kMesh, kExperts, 0)},
      {"pp=3,dp=1,tp=2", Document(mesh(3, 1, 2), experts(3, 2), 1)},
      {"experts.pp=1,experts.ep=4", Document(kMesh, experts(1, 4), 1)},
      {"tp=1", document},
      // A mesh that is given its own size does not follow, wherever that stands.
      {"pp=1,experts.pp=2,dp=4,experts.ep=2", Document(mesh(1, 4, 1), experts(2, 2), 1)},
      {"experts.pp=2,experts.ep=2,pp=1,dp=4", Document(mesh(1, 4, 1), experts(2, 2), 1)},
  };
  for (const auto& [to, expected] : cases) {
    const auto resized = ResizeLayout(document, to);
    ASSERT_TRUE(resized.ok()) << to << ": " << resized.status().ToString();
    EXPECT_EQ(*resized, expected) << to;
  }
}

TEST(ResizeLayout, RefusesByColumnAndWords) {
  const std::string document = Document(kMesh, kExperts, 1);
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "--to, column 1: expected AXIS=SIZE, found \"\""},
      {"tp=2,", "--to, column 6: expected AXIS=SIZE"},
      {"tp", "column 1: expected AXIS=SIZE, found \"tp\""},
      {"dp=2,tp=x", "column 9: expected a number of at most 1048576, found \"x\""},
      {"dp=-1", "column 4: expected a number"},
      {"tp=0", "column 1: expected a size of at least 1"},
      {"tp=2,tp=4", "column 6: \"tp\" is there twice"},
      {"dp=2,tq=2",
       "column 6: unknown axis \"tq\"; did you mean \"tp\"?; the checkpoint's layout has: pp, dp, "
       "tp, experts.pp, experts.ep. Another axis needs a layout file"},
      {"ep=2", "unknown axis \"ep\"; did you mean \"experts.ep\"?"},
      {"expert.ep=2", "unknown mesh \"expert\"; did you mean \"experts\"?"},
      {"experts.tp=2",
       "unknown axis \"tp\"; did you mean \"pp\"?; the checkpoint's layout has: pp"},
      {"zero=4", "expected a stage of 0 to 3, found 4"},
      // What the document then says does not fit.
      {"dp=4", "--to dp=4: meshes.experts: expected axes of 8 ranks in all"},
      {"tp=5,dp=1,experts.ep=5", "expected a multiple of 5 elements in dimension 1"},
  };
  for (const auto& [to, expected] : cases) {
    EXPECT_THAT(ErrorOf(ResizeLayout(document, to)), HasSubstr(expected)) << to;
  }
  EXPECT_THAT(ErrorOf(ResizeLayout("{}", "tp=2")), HasSubstr("expected the key"));
  const std::string without = absl::StrReplaceAll(
      Document(kMesh, kExperts, 1),
      {{R"("zero":{"stage":1,"axis":"dp"},)", ""}, {R"(,{"op":"zero","rule":"ceil"})", ""}});
  EXPECT_THAT(ErrorOf(ResizeLayout(without, "zero=1")), HasSubstr("no zero rule"));
}

// What names ranks or coordinates one by one does not say what it is on others.
TEST(ResizeLayout, RefusesWhatSaysNothingOfOtherSizes) {
  const auto with = [](const std::string& state) {
    return Document(
        kMesh, kExperts, 1,
        absl::StrCat(R"(,{"name":"t","shape":[4],"states":[{"state":"p","dtype":"int8",)", state,
                     "}]}"));
  };
  EXPECT_THAT(ErrorOf(ResizeLayout(
                  with(R"("place":[{"op":"place","axis":"pp","coordinates":[1]}])"), "pp=4,dp=1")),
              HasSubstr("tensor \"t\", state \"p\" is placed at coordinate 1 of axis \"pp\""));
  EXPECT_THAT(
      ErrorOf(ResizeLayout(with(R"("segments":[{"ranks":[0],"lo":[0],"size":[4]}])"), "tp=2,dp=1")),
      HasSubstr("tensor \"t\", state \"p\" lists its segments rank by rank"));
  EXPECT_THAT(ErrorOf(ResizeLayout(
                  with(R"("place":[{"op":"flat","axis":"dp","rule":"sizes","sizes":[1,3]}])"),
                  "pp=1,dp=4,experts.ep=4")),
              HasSubstr("one size for each of the 4 ranks of axis \"dp\""));
  // Nothing is resized: it may stay.
  EXPECT_TRUE(
      ResizeLayout(with(R"("segments":[{"ranks":[0],"lo":[0],"size":[4]}])"), "zero=3").ok());
}

const std::vector<TensorState> kStates = {
    {"layers.0.attn.weight", "param", Dtype::kBfloat16, {8, 4}},
    {"layers.0.attn.weight", "exp_avg", Dtype::kFloat32, {8, 4}},
    {"layers.1.attn.weight", "param", Dtype::kBfloat16, {8, 4}},
    {"layers.10.norm", "param", Dtype::kFloat32, {4}},
    {"step", "value", Dtype::kInt64, {}},
};

std::string Rules(const std::string& rules) {
  return absl::StrCat(R"({"holdfast_layout_rules":1,"mesh":[{"axis":"pp","size":2},)",
                      R"({"axis":"tp","size":2}],"rules":[)", rules, "]}");
}

TEST(LayoutRules, TheFirstRuleThatFitsCountsAndNumbersAreFilledIn) {
  const auto document =
      ExpandLayoutRules(Rules(
                            R"({"tensors":"layers.{layer}.*.weight","states":["param"],"place":[
               {"op":"place","axis":"pp","index":"{layer}","count":12,"rule":"even"},
               {"op":"shard","dim":0,"axis":"tp","rule":"even"}]},
             {"tensors":"layers.{layer}.*","place":[
               {"op":"place","axis":"pp","index":"{layer}","count":12,"rule":"even"}]},
             {"tensors":"*"})"),
                        kStates);
  ASSERT_TRUE(document.ok()) << document.status().ToString();
  const std::string expected =
      R"({"holdfast_layout":1,"mesh":[{"axis":"pp","size":2},{"axis":"tp","size":2}],"tensors":[)"
      R"({"name":"layers.0.attn.weight","shape":[8,4],"states":[{"state":"param","dtype":"bfloat16","place":[{"op":"place","axis":"pp","index":0,"count":12,"rule":"even"},{"op":"shard","dim":0,"axis":"tp","rule":"even"}]},)"
      R"({"state":"exp_avg","dtype":"float32","place":[{"op":"place","axis":"pp","index":0,"count":12,"rule":"even"}]}]},)"
      R"({"name":"layers.1.attn.weight","shape":[8,4],"states":[{"state":"param","dtype":"bfloat16","place":[{"op":"place","axis":"pp","index":1,"count":12,"rule":"even"},{"op":"shard","dim":0,"axis":"tp","rule":"even"}]}]},)"
      R"({"name":"layers.10.norm","shape":[4],"states":[{"state":"param","dtype":"float32","place":[{"op":"place","axis":"pp","index":10,"count":12,"rule":"even"}]}]},)"
      R"({"name":"step","shape":[],"states":[{"state":"value","dtype":"int64"}]}]})";
  EXPECT_EQ(*document, expected);
}

TEST(LayoutRules, RefusesByPathAndWords) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({"tensors":"layers.*"})", "no rule fits tensor \"step\", state \"value\""},
      {R"({"tensors":"*"},{"tensors":"head"})", "rules[1]: this rule fits no tensor state"},
      {R"({"tensors":"layers.{layer"})", "rules[0].tensors: expected a name between { and }"},
      {R"({"tensors":"layers.{}"})", "expected a name between { and }"},
      {R"({"tensors":"*","states":[]})", "rules[0].states: expected at least one state"},
      {R"({"tensors":"*","plac":[]})", "rules[0]: unknown key \"plac\""},
      {R"({"tensors":"layers.{layer}.*","place":[{"op":"place","axis":"pp","index":"{lay}","count":12,"rule":"even"}]},{"tensors":"*"})",
       "\"{lay}\" is no number of the rule's pattern"},
      {R"({"tensors":"*","place":[{"op":"flat","axis":"dq","rule":"ceil"}]})",
       "rules[0].place[0].axis: unknown axis \"dq\""},
      // The second rule's, though of the fourth tensor state.
      {R"({"tensors":"layers.{n}.attn.*"},{"tensors":"*","place":[{"op":"shard","dim":1,"axis":"tp","rule":"ceil"}]})",
       "rules[1].place: expected a tensor with dimension 1 to cut over axis \"tp\", found 1 "
       "dimensions (tensor \"layers.10.norm\")"},
  };
  for (const auto& [rules, expected] : cases) {
    EXPECT_THAT(ErrorOf(ExpandLayoutRules(Rules(rules), kStates)), HasSubstr(expected)) << rules;
  }
  EXPECT_THAT(ErrorOf(ExpandLayoutRules(R"({"holdfast_layout_rules":2})", kStates)),
              HasSubstr("version 1"));
}

// Every pattern against every name: the whole table is the claim.
TEST(LayoutRules, PatternsFitWhatTheySay) {
  const std::vector<std::string> names = {"a", "a.1.b", "a.12.b", "a.1.2", "a.b", "x.a.1.b", "a.1"};
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"*", "yyyyyyy"},         {"a", "ynnnnnn"},       {"a*", "yyyyyny"},
      {"*b", "nyynyyn"},        {"a.{n}.b", "nyynnnn"}, {"a.{n}", "nnnnnny"},
      {"*.{n}", "nnnynny"},     {"*{n}.b", "nyynnyn"},  {"a.{n}.{n}", "nnnnnnn"},
      {"a.{n}.{m}", "nnnynnn"}, {"*.{n}.*", "nyyynyn"}, {"a.1{n}.b", "nnnnnnn"},
      {"**.b", "nyynyyn"},      {"", "nnnnnnn"},
  };
  for (const auto& [pattern, fits] : cases) {
    for (size_t i = 0; i < names.size(); ++i) {
      const std::vector<TensorState> one = {{names[i], "p", Dtype::kInt8, {2}}};
      const auto document =
          ExpandLayoutRules(Rules(absl::StrCat(R"({"tensors":")", pattern, "\"}")), one);
      EXPECT_EQ(document.ok(), fits[i] == 'y') << pattern << " against " << names[i];
    }
  }
}

TEST(LayoutRules, RulesAreToldFromDocuments) {
  EXPECT_TRUE(IsLayoutRules(Rules("")));
  EXPECT_FALSE(IsLayoutRules(Document(kMesh, kExperts, 1)));
  EXPECT_FALSE(IsLayoutRules("[]"));
  EXPECT_FALSE(IsLayoutRules("no JSON"));
}

}  // namespace
}  // namespace holdfast
