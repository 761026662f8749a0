// What one layout saved, any other restores, from memory and from storage: a matrix of layouts as
// frameworks use them, every pair of them, and chains in which what was restored is what is saved.
// The oracle is the harness's: the value of an element depends on its tensor and number alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "checkpoint/engine_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

// ---- Layouts of one model ----

// Where the tensors of a kind lie, as "place" members of the layout document; empty: everywhere.
struct Places {
  std::string vocabulary = {};           // wte: [10, 6]
  std::string column = {};               // up: [8, 6], by its rows
  std::string row = {};                  // down: [6, 8], by its columns
  std::string fused = {};                // qkv: [12, 6], three blocks of 4 rows
  std::vector<std::string> layer = {};   // of each layer, in front of all of these; empty: none
  std::vector<std::string> expert = {};  // of each expert: the whole placement
  // Behind each of them: of parameters, and of moments.
  std::string of_param = {};
  std::string of_moment = {};
};

struct ModelLayout {
  std::string name;
  std::string mesh;
  std::string more;  // meshes, zero, packs
  Places places;
};

constexpr int kLayers = 3;
constexpr int kExperts = 4;

std::string Place(const std::vector<std::string>& ops) {
  std::string list;
  for (const std::string& op : ops) {
    if (!op.empty()) absl::StrAppend(&list, list.empty() ? "" : ",", op);
  }
  return list.empty() ? "" : absl::StrFormat(R"(,"place":[%s])", list);
}

std::string Tensor(const std::string& name, const std::string& shape,
                   const std::vector<std::string>& ops, const Places& places,
                   const std::string& whole_place = "") {
  const auto place = [&](const std::string& last) {
    if (!whole_place.empty()) return absl::StrCat(R"(,"place":)", whole_place);
    std::vector<std::string> all = ops;
    all.push_back(last);
    return Place(all);
  };
  return absl::StrFormat(
      R"({"name":"%s","shape":%s,"states":[{"state":"param","dtype":"bfloat16"%s},
         {"state":"exp_avg","dtype":"float32"%s},{"state":"exp_avg_sq","dtype":"float32"%s}]})",
      name, shape, place(places.of_param), place(places.of_moment),
      // The second moment is packed apart, and otherwise as the first.
      place(places.of_moment.find("\"m1\"") == std::string::npos ? places.of_moment
                                                                 : R"({"op":"pack","pack":"m2"})"));
}

std::string Document(const ModelLayout& model) {
  const Places& places = model.places;
  std::vector<std::string> tensors;
  const auto in_layer = [&](int layer, const std::string& op) {
    const std::string place = places.layer.empty() ? "" : places.layer[static_cast<size_t>(layer)];
    return std::vector<std::string>{place, op};
  };
  tensors.push_back(Tensor("wte", "[10,6]", in_layer(0, places.vocabulary), places));
  for (int i = 0; i < kLayers; ++i) {
    const std::string name = absl::StrFormat("layers.%d.", i);
    tensors.push_back(Tensor(name + "norm", "[6]", in_layer(i, ""), places));
    tensors.push_back(Tensor(name + "qkv", "[12,6]", in_layer(i, places.fused), places));
    tensors.push_back(Tensor(name + "up", "[8,6]", in_layer(i, places.column), places));
    tensors.push_back(Tensor(name + "down", "[6,8]", in_layer(i, places.row), places));
  }
  for (int i = 0; i < kExperts; ++i) {
    const std::string whole = places.expert.empty() ? "" : places.expert[static_cast<size_t>(i)];
    tensors.push_back(Tensor(absl::StrFormat("experts.%d.w", i), "[4,3]", in_layer(kLayers - 1, ""),
                             places, whole));
  }
  tensors.push_back(R"({"name":"step","shape":[],"states":[{"state":"value","dtype":"int64"}]})");
  std::string list;
  for (const std::string& tensor : tensors) absl::StrAppend(&list, list.empty() ? "" : ",", tensor);
  return absl::StrFormat(R"({"holdfast_layout":1,"mesh":[%s],%s"tensors":[%s]})", model.mesh,
                         model.more, list);
}

std::string Axis(const char* name, int size) {
  return absl::StrFormat(R"({"axis":"%s","size":%d})", name, size);
}
std::string Shard(int dim, const char* axis, const char* rule = "even") {
  return absl::StrFormat(R"({"op":"shard","dim":%d,"axis":"%s","rule":"%s"})", dim, axis, rule);
}
std::string Flat(const char* axis, const char* rule) {
  return absl::StrFormat(R"({"op":"flat","axis":"%s","rule":"%s"})", axis, rule);
}
std::string PadTo(const char* axis, int multiple) {
  return absl::StrFormat(R"({"op":"pad","dim":0,"multiple":%d,"axis":"%s"})", multiple, axis);
}
std::string Fused(const char* axis) {
  return absl::StrFormat(R"({"op":"shard","dim":0,"axis":"%s","rule":"even","blocks":[4,4,4]})",
                         axis);
}
std::vector<std::string> Stages(const std::vector<int>& stage_of_layer) {
  std::vector<std::string> places;
  for (const int stage : stage_of_layer) {
    places.push_back(absl::StrFormat(R"({"op":"place","axis":"pp","coordinates":[%d]})", stage));
  }
  return places;
}
// Experts dealt out to ranks on a mesh of their own; `more` behind.
std::vector<std::string> Experts(const std::string& more = "") {
  std::vector<std::string> places;
  for (int i = 0; i < kExperts; ++i) {
    places.push_back(absl::StrFormat(
        R"({"mesh":"experts","ops":[{"op":"place","axis":"ep","index":%d,"count":%d,"rule":"even"}%s]})",
        i, kExperts, more.empty() ? "" : "," + more));
  }
  return places;
}

std::string Packs(const char* axis) {
  return absl::StrFormat(R"("packs":[{"pack":"m1","axis":"%s","buffer":"m1"},
                            {"pack":"m2","axis":"%s","buffer":"m2","multiple_elements":8}],)",
                         axis, axis);
}
constexpr char kPacked[] = R"({"op":"pack","pack":"m1"})";

std::vector<ModelLayout> Layouts() {
  const std::string tp2 = Axis("tp", 2);
  const Places tensor_parallel = {.vocabulary = Shard(0, "tp"),
                                  .column = Shard(0, "tp"),
                                  .row = Shard(1, "tp"),
                                  .fused = Fused("tp")};
  std::vector<ModelLayout> layouts;
  layouts.push_back({"one rank", Axis("dp", 1), "", {}});
  layouts.push_back({"DP of 3", Axis("dp", 3), "", {}});
  layouts.push_back({"ZeRO-1 of 4, packed", Axis("dp", 4), Packs("dp"), {.of_moment = kPacked}});
  layouts.push_back({"ZeRO-3 of 3, each tensor flat",
                     Axis("dp", 3),
                     "",
                     {.of_param = Flat("dp", "ceil"), .of_moment = Flat("dp", "ceil")}});
  layouts.push_back({"FSDP2 of 4, by rows",
                     Axis("dp", 4),
                     R"("zero":{"stage":3,"axis":"dp"},)",
                     {.of_param = R"({"op":"zero","rule":"balanced"})",
                      .of_moment = R"({"op":"zero","rule":"balanced"})"}});
  layouts.push_back({"TP of 2", tp2, "", tensor_parallel});
  {
    ModelLayout padded = {"TP of 4, padded vocabulary", Axis("tp", 4), "", tensor_parallel};
    padded.places.vocabulary = PadTo("tp", 2) + "," + Shard(0, "tp");
    layouts.push_back(padded);
  }
  layouts.push_back({"PP of 2, uneven", Axis("pp", 2), "", {.layer = Stages({0, 0, 1})}});
  {
    ModelLayout both = {"TP of 2 by DP of 2, ZeRO-1", Axis("dp", 2) + "," + tp2, Packs("dp"),
                        tensor_parallel};
    both.places.of_moment = kPacked;
    layouts.push_back(both);
  }
  {
    ModelLayout three = {"PP of 3 by TP of 2", Axis("pp", 3) + "," + tp2, "", tensor_parallel};
    three.places.layer = Stages({0, 1, 2});
    layouts.push_back(three);
  }
  layouts.push_back({"EP of 2 in DP of 4",
                     Axis("dp", 4),
                     R"("meshes":{"experts":[{"axis":"edp","size":2},{"axis":"ep","size":2}]},)",
                     {.expert = Experts()}});
  {
    ModelLayout experts = {
        "EP of 2 with expert TP, TP of 2, ZeRO-1", Axis("dp", 2) + "," + tp2,
        absl::StrCat(R"("meshes":{"experts":[{"axis":"ep","size":2},)",
                     R"({"axis":"etp","size":2}]},)", R"("zero":{"stage":1,"axis":"dp"},)"),
        tensor_parallel};
    experts.places.of_moment = R"({"op":"zero","rule":"ceil"})";
    experts.places.expert = Experts(Shard(1, "etp", "ceil"));
    layouts.push_back(experts);
  }
  return layouts;
}

// ---- Saving and restoring ----

uint32_t WorldSize(const std::string& document) {
  return Layout::Parse(document).value()->world_size();
}

void ExpectMatrix(bool from_memory) {
  std::vector<std::pair<std::string, std::string>> layouts;  // name, document
  for (const ModelLayout& layout : Layouts()) layouts.emplace_back(layout.name, Document(layout));
  size_t pairs = 0;
  for (const auto& [from_name, from] : layouts) {
    std::unique_ptr<SimDisk> disk;
    std::unique_ptr<EngineHarness> harness;
    for (const auto& [to_name, to] : layouts) {
      SCOPED_TRACE(testing::Message() << from_name << " -> " << to_name);
      // In memory it stays until its room is needed.
      if (from_memory || disk == nullptr) {
        harness.reset();
        disk = std::make_unique<SimDisk>();
        // Room for an image of any of the layouts beside what is saved.
        harness =
            std::make_unique<EngineHarness>(*disk, EngineHarnessOptions{.images_per_rank_max = 4});
        ASSERT_OK_AND_ASSIGN(const auto savers, harness->LaunchIn(from, "save"));
        harness->SaveAll(savers, 7);
        ASSERT_EQ(EngineHarness::CommittedPower(*savers[0]), 7u);
        KillAll(*harness, savers);
      }
      if (!from_memory) {
        harness.reset();
        harness = std::make_unique<EngineHarness>(
            *disk, EngineHarnessOptions{.writer = absl::StrCat("x", pairs, "w")});
      }
      ASSERT_OK_AND_ASSIGN(const auto trainers, harness->LaunchIn(to, to_name));
      for (TestTrainer* trainer : trainers) {
        const RestoreOutcome outcome = harness->Restore(*trainer);
        ExpectState(outcome, *trainer, 7, WorldSize(from));
        EXPECT_EQ(outcome.bytes_from_memory, from_memory ? outcome.bytes : 0);
      }
      ++pairs;
      if (testing::Test::HasFailure()) return;
    }
  }
  std::printf("pairs: %zu\n", pairs);
  EXPECT_EQ(pairs, layouts.size() * layouts.size());
}

TEST(EngineLayouts, EveryPairFromMemory) { ExpectMatrix(true); }

TEST(EngineLayouts, EveryPairFromStorage) { ExpectMatrix(false); }

// Saves what the last restore gave, not what the harness would make.
void SaveRestored(EngineHarness& harness, TestTrainer& trainer, uint64_t step,
                  const RestoreOutcome& outcome) {
  std::vector<std::optional<std::string>> blobs;
  for (const TrainerBlob& blob : SmallBlobs()) {
    blobs.push_back(BlobText(blob.name, step, Value(trainer.rank)));
  }
  const std::optional<uint32_t> slot = trainer.script->BeginSave(step, blobs);
  ASSERT_TRUE(slot.has_value());
  trainer.script->buffers() = outcome.buffers;
  harness.engine().Doorbell(trainer.session);
  harness.FinishSave(trainer, *slot);
}

// A -> B -> C -> A, over all layouts in random orders: the bytes are those of the first save, step
// by step. Between them the agent dies, or does not, so that they come from storage or from memory
// (unless the images of the next layout are so much larger that they need the room): of the four
// ways to a round's second and third layout each comes up in three rounds of twelve.
TEST(EngineLayouts, ChainsReturnWhatWasSavedFirst) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const std::vector<ModelLayout> layouts = Layouts();
  size_t from_storage = 0;  // because the agent died
  size_t from_memory = 0;
  size_t made_room = 0;
  for (int round = 0; round < 12; ++round) {
    const size_t a = static_cast<size_t>(round) % layouts.size();
    const size_t b = random() % layouts.size();
    const size_t c = random() % layouts.size();
    SimDisk disk;
    // Room beside what is saved, as above.
    EngineHarness harness(disk, {.images_per_rank_max = 4});
    ASSERT_OK_AND_ASSIGN(const auto savers, harness.LaunchIn(Document(layouts[a]), "first"));
    harness.SaveAll(savers, 1);
    ASSERT_EQ(EngineHarness::CommittedPower(*savers[0]), 1u);
    KillAll(harness, savers);
    uint64_t step = 1;
    for (const size_t next : {b, c, a}) {
      const bool crash = ((static_cast<uint64_t>(round) >> (step - 1)) & 1) != 0;
      SCOPED_TRACE(testing::Message()
                   << layouts[a].name << " -> " << layouts[b].name << " -> " << layouts[c].name
                   << ", step " << step << (crash ? ", from storage" : ", from memory"));
      if (crash) harness.CrashAgent();
      ASSERT_OK_AND_ASSIGN(const auto trainers,
                           harness.LaunchIn(Document(layouts[next]), absl::StrCat(step)));
      std::vector<RestoreOutcome> outcomes;
      for (TestTrainer* trainer : trainers) {
        outcomes.push_back(harness.Restore(*trainer));
        ASSERT_OK(outcomes.back().status);
        EXPECT_EQ(Value(outcomes.back().checkpoint.step), step);
        const uint64_t in_memory = outcomes.back().bytes_from_memory;
        EXPECT_TRUE(in_memory == 0 || (!crash && in_memory == outcomes.back().bytes)) << in_memory;
        EXPECT_TRUE(outcomes.back().buffers ==
                    StateAfter(*trainer->layout, trainer->rank, /*step=*/1));
      }
      const bool is_from_memory =
          std::any_of(outcomes.begin(), outcomes.end(),
                      [](const RestoreOutcome& outcome) { return outcome.bytes_from_memory > 0; });
      ++(crash ? from_storage : is_from_memory ? from_memory : made_room);
      ++step;
      for (size_t i = 0; i < trainers.size(); ++i) {
        SaveRestored(harness, *trainers[i], step, outcomes[i]);
      }
      harness.Settle();
      ASSERT_EQ(EngineHarness::CommittedPower(*trainers[0]), step);
      KillAll(harness, trainers);
      if (HasFailure()) return;
    }
  }
  std::printf("%zu restores from storage, %zu from memory, %zu whose image made room\n",
              from_storage, from_memory, made_room);
  EXPECT_EQ(from_storage, 16u);
  EXPECT_GE(from_memory, 10u);
}

}  // namespace
}  // namespace holdfast
