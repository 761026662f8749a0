// The rules against dictionaries as the tools that people use build them. Whole checkpoints of the
// frameworks are in the tests of the readers.
#include "converter/state_names.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using Path = std::vector<std::string>;

StateKey Of(const Path& path) {
  StateKey key{.path = path};
  for (size_t i = 0; i < path.size(); ++i) key.key += (i == 0 ? "" : ".") + path[i];
  return key;
}

StateKey Joined(const std::string& key) { return {.key = key}; }

// `name|state` of each.
std::vector<std::string> Names(const std::vector<StateKey>& tensors,
                               const std::vector<StateKey>& others = {}) {
  std::vector<std::string> names;
  for (const StateName& named : NameStates(tensors, others)) {
    names.push_back(named.name + "|" + named.state);
  }
  return names;
}

TEST(StateNames, TheDictionaryOfPyTorchsTutorial) {
  EXPECT_THAT(
      Names({Of({"app", "model", "emb.weight"}), Of({"app", "model", "table"}),
             Of({"app", "optim", "state", "emb.weight", "exp_avg"}),
             Of({"app", "optim", "state", "emb.weight", "step"})},
            {Of({"app", "optim", "param_groups", "0", "lr"})}),
      ElementsAre("emb.weight|param", "table|param", "emb.weight|exp_avg", "emb.weight|step"));
}

TEST(StateNames, AFlattenedOptimizer) {
  EXPECT_THAT(
      Names({Of({"app", "model", "emb.weight"}), Of({"app", "optim", "state.emb.weight.exp_avg"})},
            {Of({"app", "optim", "param_groups.emb.weight.lr"})}),
      ElementsAre("emb.weight|param", "emb.weight|exp_avg"));
}

// torchtitan: the model's keys stand at the top, and begin with "model." by themselves.
TEST(StateNames, AModelAtTheTopIsKnownByItsOptimizer) {
  EXPECT_THAT(Names({Of({"model.layers.0.wq.weight"}), Of({"freqs"}),
                     Of({"optimizer", "state.model.layers.0.wq.weight.exp_avg"})},
                    {Of({"optimizer", "param_groups.model.layers.0.wq.weight.lr"})}),
              ElementsAre("model.layers.0.wq.weight|param", "freqs|param",
                          "model.layers.0.wq.weight|exp_avg"));
  EXPECT_THAT(Names({Of({"model.layers.0.wq.weight"}), Of({"loss"})}),
              ElementsAre("model.layers.0.wq.weight|other", "loss|other"));
}

// A planner that keeps no paths: only the text is there.
TEST(StateNames, WithoutPathsTheOptimizerShowsWhereNamesBegin) {
  EXPECT_THAT(Names({Joined("model.emb.weight"), Joined("model.table"),
                     Joined("optimizer.state.emb.weight.exp_avg"), Joined("loss")}),
              ElementsAre("emb.weight|param", "table|param", "emb.weight|exp_avg", "loss|other"));
  EXPECT_THAT(Names({Joined("model.emb.weight")}), ElementsAre("model.emb.weight|other"));
}

TEST(StateNames, NumbersAreNoNames) {
  const std::vector<StateKey> tensors = {Of({"model", "w"}),
                                         Of({"optim", "state", "12", "exp_avg"})};
  const std::vector<StateName> names = NameStates(tensors, {});
  EXPECT_EQ(names[1].name, "optim.state.12");
  EXPECT_EQ(names[1].state, "exp_avg");
  EXPECT_EQ(names[1].parameter_number, 12u);
  EXPECT_EQ(names[1].optimizer, "optim.state");
}

// A raw optimizer.state_dict() that was saved as the whole.
TEST(StateNames, AnOptimizerAtTheTop) {
  EXPECT_THAT(
      Names({Of({"state", "emb.weight", "momentum_buffer"})}, {Of({"param_groups", "0", "lr"})}),
      ElementsAre("emb.weight|momentum_buffer"));
  // Without param_groups `state` is a word like any other.
  EXPECT_THAT(Names({Of({"state", "emb.weight", "momentum_buffer"})}),
              ElementsAre("state.emb.weight.momentum_buffer|other"));
}

TEST(StateNames, AStateMayBeADictionary) {
  EXPECT_THAT(Names({Of({"optim", "state", "w", "factors", "0"})}), ElementsAre("w|factors.0"));
}

TEST(StateNames, TwoModelsWithEqualNamesKeepTheirKeys) {
  EXPECT_THAT(
      Names({Of({"generator", "model", "w"}), Of({"critic", "model", "w"}),
             Of({"critic", "model", "v"}), Of({"generator", "optim", "state", "w", "exp_avg"}),
             Of({"critic", "optim", "state", "w", "exp_avg"})}),
      ElementsAre("generator.model.w|param", "critic.model.w|param", "critic.model.v|param",
                  "generator.optim.state.w|exp_avg", "critic.optim.state.w|exp_avg"));
}

TEST(StateNames, WhatIsInNoModelKeepsItsKey) {
  EXPECT_THAT(Names({Of({"rank_0", "rng", "cpu"}), Of({"nested", "list", "0"}),
                     Of({"key.with.dots"}), Of({"", "x"})}),
              ElementsAre("rank_0.rng.cpu|other", "nested.list.0|other", "key.with.dots|other",
                          ".x|other"));
}

}  // namespace
}  // namespace holdfast::converter
