// What is selected: patterns, names, dropped states and dtypes, and that what fits nothing is
// refused with the nearest known word.
#include "converter/selection.h"

#include <string>
#include <utility>
#include <vector>

#include "converter/optimizer_groups.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Four tensors of a model, two of them tied, and states of two.
ForeignIndex Sample() {
  ForeignIndex index;
  const uint32_t bytes = index.AddInline(std::string(64, '\0'));
  const auto add = [&](const std::string& name, const std::string& state, Dtype dtype) {
    index.AddWholePiece(index.AddState({name, state, dtype, {2}}), bytes, 0);
  };
  add("layers.0.weight", "param", Dtype::kFloat32);
  add("layers.1.weight", "param", Dtype::kFloat32);
  add("head.weight", "param", Dtype::kFloat32);
  add("calls", "buffer", Dtype::kInt64);
  add("layers.0.weight", "exp_avg", Dtype::kFloat32);
  add("layers.1.weight", "exp_avg", Dtype::kFloat32);
  index.aliases.push_back({2, 0});
  EXPECT_THAT(Finish(index), IsOk());
  return index;
}

std::vector<std::string> NamesIn(const ForeignIndex& index) {
  std::vector<std::string> names;
  for (const TensorState& state : index.tensor_states) {
    names.push_back(state.tensor + " " + state.state);
  }
  return names;
}

TEST(Selection, NothingAskedIsEverything) {
  ASSERT_OK_AND_ASSIGN(const Selection selection, Select(Sample(), {}));
  EXPECT_EQ(NamesIn(selection.index), NamesIn(Sample()));
  EXPECT_EQ(selection.index.pieces.size(), 6u);
  EXPECT_EQ(selection.dtypes.size(), 6u);
  EXPECT_THAT(selection.left_out, IsEmpty());
  EXPECT_THAT(selection.casts, IsEmpty());
}

TEST(Selection, PatternsAndKindsLeaveOut) {
  ASSERT_OK_AND_ASSIGN(Selection selection, Select(Sample(), {.only = {"layers.{n}.weight"}}));
  EXPECT_THAT(NamesIn(selection.index),
              ElementsAre("layers.0.weight param", "layers.1.weight param",
                          "layers.0.weight exp_avg", "layers.1.weight exp_avg"));
  EXPECT_THAT(selection.left_out, ElementsAre("2 tensors that --only does not name"));
  EXPECT_THAT(selection.index.aliases, IsEmpty());
  for (uint32_t i = 0; i < 4; ++i) {
    const auto [begin, end] = selection.index.PiecesOf(i);
    EXPECT_EQ(end - begin, 1u);
  }
  EXPECT_THAT(Finish(selection.index), IsOk());

  for (const std::string kind : {"exp_avg", "*"}) {
    ASSERT_OK_AND_ASSIGN(selection, Select(Sample(), {.drop = {kind}}));
    EXPECT_EQ(selection.index.tensor_states.size(), 4u);
    EXPECT_EQ(selection.index.aliases.size(), 1u);
    EXPECT_THAT(selection.left_out, ElementsAre("2 tensors of state exp_avg"));
  }
}

TEST(Selection, WhatFitsNothingIsRefused) {
  const std::vector<std::pair<SelectionRequest, std::string>> requests = {
      {{.only = {"layer.0.weight"}}, "did you mean \"layers.0.weight\""},
      {{.only = {"x{"}}, "--only x{: expected a name between { and }"},
      {{.drop = {"exp_avgs"}}, "did you mean \"exp_avg\""},
      {{.drop = {"unreadible"}}, "did you mean \"unreadable\""},
      {{.dtypes = {"bfloat61"}}, "did you mean \"bfloat16\""},
      {{.dtypes = {"int64"}}, "expected float32, bfloat16, float16 or float64"},
      {{.dtypes = {"exp_av=float32"}}, "did you mean \"exp_avg\""},
      {{.dtypes = {"=float32"}}, "expected STATE=DTYPE"},
      {{.rename = "prefix lyers. blocks."}, "it fits no tensor's name"},
  };
  for (const auto& [request, expected] : requests) {
    EXPECT_THAT(Select(Sample(), request).status(),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr(expected)));
  }
}

TEST(Selection, NamesStayDistinct) {
  ASSERT_OK_AND_ASSIGN(Selection selection, Select(Sample(), {.rename = "prefix layers. blocks."}));
  EXPECT_EQ(selection.index.tensor_states[4].tensor, "blocks.0.weight");
  ASSERT_OK_AND_ASSIGN(const auto groups, OptimizerGroupsOf(selection.index));
  ASSERT_EQ(groups.size(), 1u);
  EXPECT_THAT(groups[0].parameters, ElementsAre("blocks.0.weight", "blocks.1.weight"));
  EXPECT_THAT(Select(Sample(), {.rename = "regex \\d X"}).status(),
              StatusIs(StatusCode::kFailedPrecondition,
                       HasSubstr("\"layers.0.weight\" and \"layers.1.weight\" would both be "
                                 "called \"layers.X.weight\"")));
}

TEST(Selection, OnlyFloatingTensorsAreCast) {
  ASSERT_OK_AND_ASSIGN(
      const Selection selection,
      Select(Sample(), {.dtypes = {"bfloat16", "exp_avg=float64", "exp_avg=float16"}}));
  const std::vector<Dtype> expected = {Dtype::kBfloat16, Dtype::kBfloat16, Dtype::kBfloat16,
                                       Dtype::kInt64,    Dtype::kFloat16,  Dtype::kFloat16};
  EXPECT_EQ(selection.dtypes, expected);
  EXPECT_THAT(selection.casts, ElementsAre("2 tensors from float32 to float16",
                                           "3 tensors from float32 to bfloat16"));
}

TEST(Selection, WhatIsUnreadableIsDroppedByName) {
  ForeignIndex index = Sample();
  index.unreadable.push_back({"s", "is sparse"});
  EXPECT_THAT(Select(index, {}).status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("s is sparse")));
  ASSERT_OK_AND_ASSIGN(const Selection selection, Select(index, {.drop = {"unreadable"}}));
  EXPECT_THAT(selection.left_out, ElementsAre("s, which is sparse"));
}

TEST(Selection, WhatIsLostIsLeftOutOnlyIfAsked) {
  ForeignIndex index = Sample();
  index.losses = {"a shard is not there", "another"};
  EXPECT_THAT(Select(index, {}).status(),
              StatusIs(StatusCode::kDataLoss, HasSubstr("a shard is not there (and 1 more")));
  EXPECT_THAT(Select(index, {.drop = {"*", "unreadable"}}).status(),
              StatusIs(StatusCode::kDataLoss));
  ASSERT_OK_AND_ASSIGN(const Selection selection, Select(index, {.drop = {"lost"}}));
  EXPECT_THAT(selection.left_out, ElementsAre("lost: a shard is not there", "lost: another"));
  EXPECT_THAT(selection.index.losses, IsEmpty());
}

TEST(OptimizerGroups, AreWhatTheScalarsTell) {
  ForeignIndex index = Sample();
  // In the words of a DCP checkpoint; the second group has nothing of this index.
  index.scalars = {{"optim.param_groups.0.lr", "0.5"},
                   {"optim.param_groups.0.betas", "[0.9, 0.95]"},
                   {"optim.param_groups.0.params", "[\"layers.1.weight\", \"layers.0.weight\"]"},
                   {"optim.param_groups.1.params", "[\"other\"]"}};
  ASSERT_OK_AND_ASSIGN(auto groups, OptimizerGroupsOf(index));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_THAT(groups[0].parameters, ElementsAre("layers.1.weight", "layers.0.weight"));
  EXPECT_EQ(groups[0].values.dump(), R"({"lr":0.5,"betas":[0.9,0.95]})");
  EXPECT_THAT(groups[1].parameters, IsEmpty());
  SetOptimizerGroups(groups, index);
  ASSERT_EQ(index.scalars.size(), 1u);
  ASSERT_OK_AND_ASSIGN(const auto again, OptimizerGroupsOf(index));
  EXPECT_EQ(again[0].parameters, groups[0].parameters);
  EXPECT_EQ(again[0].values, groups[0].values);

  // In the words of a torch optimizer with named parameters.
  index.scalars = {{"optimizer.param_groups",
                    R"([{"params": [0], "param_names": ["layers.1.weight"]},
                        {"params": [1], "param_names": ["layers.0.weight"]}])"}};
  ASSERT_OK_AND_ASSIGN(groups, OptimizerGroupsOf(index));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_THAT(groups[0].parameters, ElementsAre("layers.1.weight"));
  EXPECT_EQ(groups[0].values.dump(), "{}");

  // Numbers say nothing: with one group there is one way, with two there is none.
  index.scalars = {{"param_groups", R"([{"lr": 1.0, "params": [0, 1]}])"}};
  ASSERT_OK_AND_ASSIGN(groups, OptimizerGroupsOf(index));
  EXPECT_THAT(groups[0].parameters, ElementsAre("layers.0.weight", "layers.1.weight"));
  index.scalars = {{"param_groups", R"([{"params": [0]}, {"params": [1]}])"}};
  EXPECT_THAT(OptimizerGroupsOf(index).status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("2 parameter groups")));
}

// Weight decay for matrices, none for vectors and biases, experts apart.
TEST(OptimizerGroups, MegatronsAreNamedByItsRule) {
  ForeignIndex index;
  for (const auto& [name, shape] : std::vector<std::pair<std::string, std::vector<uint64_t>>>{
           {"decoder.norm.weight", {4}},
           {"decoder.fc.weight", {4, 4}},
           {"decoder.odd.bias", {4, 4}},
           {"decoder.mlp.experts.fc1.weight", {4, 4}},
           {"decoder.mlp.shared_experts.fc1.weight", {4, 4}}}) {
    index.AddState({name, "exp_avg", Dtype::kFloat32, shape});
  }
  const std::string dense = R"([{"wd_mult": 1.0, "is_expert_parallel": false, "lr": 0.5},
                                {"wd_mult": 0.0, "is_expert_parallel": false, "lr": 0.25}])";
  const std::string experts = R"([{"wd_mult": 1.0, "is_expert_parallel": true, "lr": 0.125}])";
  index.scalars = {{"optimizer.0.param_groups", dense}, {"optimizer.1.param_groups", experts}};
  ASSERT_OK_AND_ASSIGN(std::vector<OptimizerGroup> groups, OptimizerGroupsOf(index));
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_THAT(groups[0].parameters, ElementsAre("decoder.mlp.experts.fc1.weight"));
  EXPECT_EQ(groups[0].values["lr"], 0.125);
  EXPECT_THAT(groups[1].parameters,
              ElementsAre("decoder.fc.weight", "decoder.mlp.shared_experts.fc1.weight"));
  EXPECT_THAT(groups[2].parameters, ElementsAre("decoder.norm.weight", "decoder.odd.bias"));
  EXPECT_EQ(groups[2].values["lr"], 0.25);
  // In one optimizer, where experts are not spread, and told once for each rank.
  index.scalars = {{"optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1",
                    R"({"param_groups": )" + dense + "}"},
                   {"optimizer.distributed.dp_group_idx_1.optimizer/shard_0_1",
                    R"({"param_groups": )" + dense + "}"}};
  ASSERT_OK_AND_ASSIGN(groups, OptimizerGroupsOf(index));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].parameters.size(), 3u);
  // Two groups of one kind: another rule than Megatron's standard one.
  index.scalars = {{"optimizer.param_groups",
                    R"([{"wd_mult": 1.0, "is_expert_parallel": false, "lr": 0.5},
                        {"wd_mult": 1.0, "is_expert_parallel": false, "lr": 0.25}])"}};
  EXPECT_THAT(OptimizerGroupsOf(index), StatusIs(StatusCode::kFailedPrecondition));
}

}  // namespace
}  // namespace holdfast::converter
