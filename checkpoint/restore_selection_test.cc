// What a partial restore chooses: the patterns against an oracle, what fits nothing, hostile bytes;
// and, with an engine, that what is left out is not touched and need not be there.
#include "checkpoint/restore_selection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "checkpoint/engine_testing.h"
#include "hook/abi/messages.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<TensorState> States(const std::vector<std::pair<std::string, std::string>>& names) {
  std::vector<TensorState> states;
  for (const auto& [tensor, state] : names) states.push_back({tensor, state, Dtype::kInt8, {1}});
  return states;
}

// `*` by the definition: any characters. Exponential, for short names.
bool Fits(std::string_view pattern, std::string_view name) {
  if (pattern.empty()) return name.empty();
  if (pattern[0] == '*') {
    return Fits(pattern.substr(1), name) || (!name.empty() && Fits(pattern, name.substr(1)));
  }
  return !name.empty() && pattern[0] == name[0] && Fits(pattern.substr(1), name.substr(1));
}

bool FitsOne(const std::vector<std::string>& patterns, const std::string& name) {
  for (const std::string& pattern : patterns) {
    if (Fits(pattern, name)) return true;
  }
  return patterns.empty();
}

TEST(RestoreSelection, ChoosesWhatTheDefinitionChooses) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto text = [&](const char* letters, size_t count_max) {
    std::string result(1 + random() % count_max, ' ');
    for (char& c : result) c = letters[random() % strlen(letters)];
    return result;
  };
  int chosen_count = 0;
  int refused_count = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::pair<std::string, std::string>> names;
    for (size_t i = 1 + random() % 6; i > 0; --i) {
      const std::string tensor = text("ab.", 6);
      for (size_t k = 1 + random() % 3; k > 0; --k) names.emplace_back(tensor, text("xy", 3));
    }
    RestoreSelection selection;
    for (size_t i = random() % 3; i > 0; --i) selection.tensors.push_back(text("ab.*", 5));
    for (size_t i = random() % 3; i > 0; --i) selection.states.push_back(text("xy*", 3));
    const auto found = ChooseStates(selection, States(names));
    // A pattern is of use if something fits it that the patterns of the other kind choose as well.
    bool all_used = true;
    for (const std::string& pattern : selection.tensors) {
      bool used = false;
      for (const auto& [tensor, state] : names) {
        used |= Fits(pattern, tensor) && FitsOne(selection.states, state);
      }
      all_used &= used;
    }
    for (const std::string& pattern : selection.states) {
      bool used = false;
      for (const auto& [tensor, state] : names) {
        used |= Fits(pattern, state) && FitsOne(selection.tensors, tensor);
      }
      all_used &= used;
    }
    ASSERT_EQ(found.ok(), all_used) << found.status();
    ++(all_used ? chosen_count : refused_count);
    if (!found.ok()) {
      EXPECT_THAT(found.status(), StatusIs(absl::StatusCode::kInvalidArgument));
      continue;
    }
    for (size_t i = 0; i < names.size(); ++i) {
      ASSERT_EQ((*found)[i], FitsOne(selection.tensors, names[i].first) &&
                                 FitsOne(selection.states, names[i].second))
          << names[i].first << " " << names[i].second;
    }
  }
  EXPECT_GT(chosen_count, 300);
  EXPECT_GT(refused_count, 300);
}

TEST(RestoreSelection, APatternThatFitsNothingIsNamedWithTheNearestName) {
  const std::vector<TensorState> states = States({{"layers.0.weight", "param"},
                                                  {"layers.0.weight", "exp_avg"},
                                                  {"layers.11.weight", "param"},
                                                  {"wte", "param"}});
  const auto choose = [&](std::vector<std::string> tensors, std::vector<std::string> of_states) {
    return ChooseStates({std::move(tensors), std::move(of_states)}, states).status();
  };
  EXPECT_OK(choose({"layers.{n}.*", "wte"}, {"param"}));
  EXPECT_THAT(choose({"wte", "layer.0.weight"}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"layer.0.weight\""), HasSubstr("\"layers.0.weight\"?"))));
  EXPECT_THAT(choose({"layer.*.weight"}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean \"layers.")));
  EXPECT_THAT(choose({}, {"exp_avg_sq", "parm"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean \"exp_avg\"?")));
  EXPECT_THAT(choose({"wte"}, {"exp_*"}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"wte\" fits"), HasSubstr("as well"))));
  EXPECT_THAT(choose({"layers.{.weight"}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a name between { and }")));
  EXPECT_THAT(choose({"layers.{x}.b{x}*"}, {}), StatusIs(absl::StatusCode::kInvalidArgument));
}

std::string Encode(const std::vector<std::pair<uint32_t, std::string>>& patterns) {
  const abi::RestoreSelection header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                        patterns.size()};
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
  std::string texts;
  for (const auto& [of, text] : patterns) {
    const abi::SelectionPattern entry = {
        sizeof(header) + patterns.size() * sizeof(entry) + texts.size(),
        static_cast<uint32_t>(text.size()), of};
    bytes.append(reinterpret_cast<const char*>(&entry), sizeof(entry));
    texts += text;
  }
  return bytes + texts;
}

TEST(RestoreSelection, BytesAreReadStrictly) {
  const std::string good = Encode({{0, "layers.*"}, {1, "param"}, {0, "wte"}});
  ASSERT_OK_AND_ASSIGN(const RestoreSelection selection, DecodeSelection(good));
  EXPECT_EQ(selection.tensors, (std::vector<std::string>{"layers.*", "wte"}));
  EXPECT_EQ(selection.states, (std::vector<std::string>{"param"}));
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_THAT(DecodeSelection(good.substr(0, size)),
                StatusIs(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_FALSE(DecodeSelection(Encode({{2, "x"}})).ok());
  EXPECT_FALSE(DecodeSelection(Encode({{0, ""}})).ok());
  EXPECT_FALSE(DecodeSelection(Encode({{0, std::string(4097, 'x')}})).ok());
  EXPECT_FALSE(DecodeSelection(Encode({{0, std::string("a\0b", 3)}})).ok());
  EXPECT_OK(DecodeSelection(Encode(std::vector<std::pair<uint32_t, std::string>>(1000, {0, "x"}))));
  EXPECT_FALSE(
      DecodeSelection(Encode(std::vector<std::pair<uint32_t, std::string>>(1001, {0, "x"}))).ok());
  // Any byte may be wrong: it is refused, or another pattern.
  std::mt19937 random(1);
  for (int round = 0; round < 20'000; ++round) {
    std::string bad = good;
    for (size_t i = 1 + random() % 3; i > 0; --i) {
      bad[random() % bad.size()] = static_cast<char>(random());
    }
    const absl::StatusOr<RestoreSelection> decoded = DecodeSelection(bad);
    if (!decoded.ok()) continue;
    EXPECT_LE(decoded->tensors.size() + decoded->states.size(), 3u);
  }
}

// ---- With an engine ----

// What is chosen is that after `step`; every other byte is untouched.
void ExpectPart(const RestoreOutcome& outcome, const TestTrainer& trainer, uint64_t step,
                const RestoreSelection& selection) {
  ASSERT_OK(outcome.status);
  ASSERT_OK_AND_ASSIGN(const std::vector<bool> chosen,
                       ChooseStates(selection, trainer.layout->tensor_states()));
  std::vector<std::vector<std::byte>> expected = StateAfter(*trainer.layout, trainer.rank, step);
  const RankLayout held = trainer.layout->ForRank(trainer.rank).value();
  std::set<uint32_t> filled;
  std::set<uint32_t> left_out;
  for (const Segment& segment : held.segments) {
    const uint32_t state = segment.piece.tensor_state;
    (chosen[state] ? filled : left_out).insert(state);
    if (chosen[state]) continue;
    ASSERT_EQ(segment.strides, kContiguous);
    const uint64_t bytes =
        segment.piece.ElementCount() * ElementBytes(trainer.layout->tensor_states()[state].dtype);
    std::fill_n(
        expected[segment.buffer].begin() + static_cast<std::ptrdiff_t>(segment.buffer_offset_bytes),
        bytes, std::byte{0xEE});
  }
  EXPECT_TRUE(outcome.buffers == expected);
  EXPECT_EQ(outcome.tensor_states, filled.size());
  EXPECT_EQ(outcome.tensor_states_left_out, left_out.size());
}

TEST(PartialRestore, FillsWhatIsChosenAndTouchesNothingElse) {
  const std::vector<RestoreSelection> selections = {{{}, {}},
                                                    {{"*"}, {}},
                                                    {{"wte"}, {}},
                                                    {{}, {"param"}},
                                                    {{}, {"exp_*"}},
                                                    {{"a/*", "cut"}, {}},
                                                    {{"wte", "steps"}, {"param"}}};
  for (const bool from_memory : {true, false}) {
    SimDisk disk;
    auto harness = std::make_unique<EngineHarness>(disk, EngineHarnessOptions{});
    ASSERT_OK_AND_ASSIGN(const auto first, harness->Launch(3, "a"));
    harness->SaveAll(first, 7);
    KillAll(*harness, first);
    if (!from_memory) {
      harness.reset();
      harness = std::make_unique<EngineHarness>(disk, EngineHarnessOptions{.writer = "x"});
    }
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness->Launch(2, "b"));
    uint64_t bytes = 0;
    for (const RestoreSelection& selection : selections) {
      for (TestTrainer* trainer : trainers) {
        const RestoreOutcome outcome = harness->Restore(*trainer, selection);
        ExpectPart(outcome, *trainer, 7, selection);
        EXPECT_EQ(outcome.bytes_from_memory, from_memory ? outcome.bytes : 0);
        EXPECT_EQ(outcome.blobs.size(), 4u);
        bytes = std::max(bytes, outcome.bytes);
        if (!selection.is_everything() && selection.tensors != std::vector<std::string>{"*"}) {
          EXPECT_LT(outcome.bytes, bytes);
        }
      }
      if (HasFailure()) return;
    }
    EXPECT_THAT(harness->Restore(*trainers[0], {{"wtee"}, {}}).status,
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean \"wte\"?")));
    // Of use all the same.
    ExpectState(harness->Restore(*trainers[0]), *trainers[0], 7, 3);
  }
}

// A layout with one tensor more, and one of another shape.
std::string ChangedLayout(uint32_t world_size) {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":%d}],"tensors":[
      {"name":"wte","shape":[37,25],"states":[{"state":"param","dtype":"float32"}]},
      {"name":"head","shape":[5],"states":[{"state":"param","dtype":"float32"}]},
      {"name":"cut","shape":[9,40],"states":[{"state":"param","dtype":"float32"}]}]})",
      world_size);
}

TEST(PartialRestore, WhatTheCheckpointLacksIsAnErrorUnlessItIsLeftOut) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto first, harness.Launch(2, "a"));
  harness.SaveAll(first, 7);
  KillAll(harness, first);
  ASSERT_OK_AND_ASSIGN(TestTrainer* const trainer, harness.Open(Rank{0}, 1, "b"));
  ASSERT_OK(harness.Register(*trainer, ChangedLayout(1)));
  EXPECT_THAT(harness.Restore(*trainer).status,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"head\"")));
  EXPECT_THAT(harness.Restore(*trainer, {{"wte", "cut"}, {}}).status,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("\"cut\""), HasSubstr("[9, 40]"), HasSubstr("[10, 40]"))));
  const RestoreSelection selection = {{"wte"}, {}};
  const RestoreOutcome outcome = harness.Restore(*trainer, selection);
  ASSERT_OK(outcome.status);
  EXPECT_EQ(outcome.tensor_states, 1u);
  EXPECT_EQ(outcome.tensor_states_left_out, 2u);
  EXPECT_TRUE(outcome.buffers[0] == StateAfter(*trainer->layout, Rank{0}, 7)[0]);
  for (const size_t buffer : {1, 2}) {
    for (const std::byte byte : outcome.buffers[buffer]) ASSERT_EQ(byte, std::byte{0xEE});
  }
}

// The choice is the rank's own, and of a layout whose other ranks hold what this one does not.
TEST(PartialRestore, APatternMayFitOnlyWhatOtherRanksHold) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  const std::string layout = R"({"holdfast_layout":1,"mesh":[{"axis":"pp","size":2}],"tensors":[
      {"name":"first","shape":[5],"states":[{"state":"param","dtype":"int16",
       "place":[{"op":"place","axis":"pp","coordinates":[0]}]}]},
      {"name":"last","shape":[7],"states":[{"state":"param","dtype":"int16",
       "place":[{"op":"place","axis":"pp","coordinates":[1]}]}]}]})";
  const auto launch = [&](const std::string& key) {
    std::vector<TestTrainer*> trainers;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      trainers.push_back(harness.Open(Rank{rank}, 2, key).value());
    }
    for (TestTrainer* trainer : trainers) EXPECT_OK(harness.Register(*trainer, layout));
    return trainers;
  };
  const std::vector<TestTrainer*> first = launch("a");
  harness.SaveAll(first, 7);
  KillAll(harness, first);
  const std::vector<TestTrainer*> trainers = launch("b");
  for (TestTrainer* trainer : trainers) {
    const RestoreSelection selection = {{"last"}, {}};
    const RestoreOutcome outcome = harness.Restore(*trainer, selection);
    ExpectPart(outcome, *trainer, 7, selection);
    EXPECT_EQ(outcome.tensor_states, Value(trainer->rank));
  }
}

// Storage has refused the newest state: it is in memory only, where there is no room for another
// image. A rank that takes it piece by piece must not lose the rest of it after the first.
TEST(PartialRestore, WhatIsOnlyInMemoryStaysUntilTheRankHasAllOfIt) {
  uint64_t image_bytes = 0;
  {
    SimDisk disk;
    EngineHarness harness(disk, {});
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(1));
    image_bytes = uint64_t{4096} * trainers[0]->script->block_count();
  }
  SimDisk disk;
  EngineHarness harness(disk, {.host_memory_bytes = image_bytes});
  ASSERT_OK_AND_ASSIGN(const auto first, harness.Launch(1));
  disk.FailOperationsFrom(SimDisk::Operation::kRingSync, 0, absl::DataLossError("EIO"));
  ASSERT_TRUE(harness.Save(*first[0], 7));
  while (EngineHarness::CommittedProcess(*first[0]) != 7u) {
    ASSERT_TRUE(harness.executor().RunOne());
  }
  harness.Kill(*first[0]);  // before it could ask for room
  disk.ClearFaults();
  ASSERT_OK_AND_ASSIGN(const auto again, harness.Launch(1));
  TestTrainer& trainer = *again[0];
  ASSERT_FALSE(trainer.script->HasGrant());
  for (const char* tensor : {"wte", "a/b.c", "cut", "steps"}) {
    const RestoreSelection selection = {{tensor}, {}};
    ExpectPart(harness.Restore(trainer, selection), trainer, 7, selection);
    harness.Settle();
    EXPECT_FALSE(trainer.script->HasGrant());
  }
  ExpectState(harness.Restore(trainer), trainer, 7, 1);
  harness.Settle();
  EXPECT_TRUE(trainer.script->HasGrant());
  harness.SaveAll(again, 8);
  EXPECT_EQ(EngineHarness::CommittedPower(trainer), 8u);
}

}  // namespace
}  // namespace holdfast
