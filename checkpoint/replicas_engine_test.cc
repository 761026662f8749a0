// copies = all, through the whole engine: replicas that agree are committed as if nobody had
// compared them; those that do not are refused with tensor, element and ranks, whatever dies
// meanwhile; and what was refused is nowhere to be restored from.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "checkpoint/engine_testing.h"
#include "format/writer_assignment.h"
#include "hook/holdfast.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// Whole tensors on all ranks (large enough to be written in parts), shards with holders of their
// own, strided ones included, optimizer states that nobody else has, and a scalar.
std::string DataParallel(uint32_t dp, uint32_t tp = 1) {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":%d},{"axis":"tp","size":%d}],
      "placements":{
        "columns":[{"op":"shard","dim":1,"axis":"tp","rule":"balanced"}],
        "cut":[{"op":"flat","axis":["dp","tp"],"rule":"balanced"}]},
      "tensors":[
      {"name":"wte","shape":[70,50],"states":[
        {"state":"param","dtype":"float32"},
        {"state":"exp_avg","dtype":"float32","place":"cut"}]},
      {"name":"up","shape":[12,50],"states":[
        {"state":"param","dtype":"bfloat16","place":"columns"}]},
      {"name":"steps","shape":[],"states":[{"state":"param","dtype":"int64"}]}]})",
      dp, tp);
}

EngineHarnessOptions WithCopies(abi::Copies copies = abi::Copies::kAll) {
  EngineHarnessOptions options;
  options.copies = copies;
  return options;
}

std::vector<TestTrainer*> Launch(EngineHarness& harness, uint32_t dp, uint32_t tp = 1) {
  return harness.LaunchIn(DataParallel(dp, tp)).value();
}

uint32_t BufferNumber(const TestTrainer& trainer, const std::string& name) {
  const RankLayout held = trainer.layout->ForRank(trainer.rank).value();
  for (uint32_t i = 0; i < held.buffers.size(); ++i) {
    if (held.buffers[i].name == name) return i;
  }
  CHECK(false);
}

// Three ranks have committed step 1 and captured step 2, which differs on rank 1 if `flip`: in this
// buffer, at bit 3 of byte 10. The engine has not seen it yet.
std::vector<TestTrainer*> SaveTwice(EngineHarness& harness, bool flip, const std::string& buffer) {
  std::vector<TestTrainer*> trainers = Launch(harness, 3);
  harness.SaveAll(trainers, 1);
  if (flip) harness.FlipBit(*trainers[1], BufferNumber(*trainers[1], buffer), 10, 3);
  for (TestTrainer* trainer : trainers) CHECK(harness.Save(*trainer, 2));
  return trainers;
}

// The text of a save that failed; empty if it has not.
std::string Refusal(const TestTrainer& trainer, uint64_t step) {
  const auto report = trainer.script->ReportOf(step);
  if (!report.has_value() || report->state != HF_SAVE_FAILED) return "";
  EXPECT_EQ(report->code, HF_DATA_LOSS) << report->text;
  return report->text;
}

std::string LastWarning(const EngineHarness& harness) {
  return harness.warnings().empty() ? "" : harness.warnings().back();
}

std::map<std::string, std::string> Files(SimDisk& disk) {
  std::map<std::string, std::string> files;
  for (const std::string& path : disk.AllFiles()) {
    if (path.ends_with(".h5") || path.ends_with("/INDEX")) files[path] = *disk.Contents(path);
  }
  return files;
}

TEST(Replicas, ThatAgreeAreCommittedAsIfNobodyHadComparedThem) {
  for (const auto& [dp, tp] :
       std::vector<std::pair<uint32_t, uint32_t>>{{1, 1}, {2, 1}, {5, 1}, {1, 2}, {2, 2}, {3, 2}}) {
    SCOPED_TRACE(absl::StrFormat("dp %d tp %d", dp, tp));
    std::map<std::string, std::string> files[3];
    for (const abi::Copies copies :
         {abi::Copies::kOnce, abi::Copies::kPerNode, abi::Copies::kAll}) {
      SimDisk disk;
      EngineHarness harness(disk, WithCopies(copies));
      const std::vector<TestTrainer*> trainers = Launch(harness, dp, tp);
      for (const uint64_t step : {1, 2, 3}) {
        harness.SaveAll(trainers, step);
        for (TestTrainer* trainer : trainers) {
          EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), step);
          EXPECT_EQ(EngineHarness::CommittedPower(*trainer), step);
          const auto report = *trainer->script->ReportOf(step);
          EXPECT_EQ(report.block_count, trainer->script->block_count());
          EXPECT_EQ(report.blocks_captured, report.block_count);
          EXPECT_EQ(report.blocks_flushed, trainer->script->image_bytes() / 4096);
          EXPECT_EQ(report.blocks_flushed < report.block_count,
                    copies == abi::Copies::kAll && dp * tp > 1);
        }
      }
      EXPECT_TRUE(harness.warnings().empty());
      files[static_cast<int>(copies)] = Files(disk);
      // And restored, in another number of ranks.
      KillAll(harness, trainers);
      const std::vector<TestTrainer*> next = Launch(harness, 2);
      for (TestTrainer* trainer : next) {
        ExpectState(harness.Restore(*trainer), *trainer, 3, dp * tp);
      }
    }
    EXPECT_EQ(files[0].size(), 3 * (dp * tp + 1));
    EXPECT_TRUE(files[1] == files[0]);
    EXPECT_TRUE(files[2] == files[0]);
  }
}

// "rank 2", "ranks 0, 1"
std::string Named(const std::vector<uint32_t>& ranks) {
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(ranks, ", "));
}

// Which of 2 to 5 copies differ, all of them: who is named is the minority, if there is one.
TEST(Replicas, ThatDifferNameTheMinorityOrNobody) {
  for (uint32_t count = 2; count <= 5; ++count) {
    SimDisk disk;
    EngineHarness harness(disk, WithCopies());
    const std::vector<TestTrainer*> trainers = Launch(harness, count);
    harness.SaveAll(trainers, 1);
    uint64_t step = 1;
    for (uint32_t flipped = 1; flipped + 1 < uint32_t{1} << count; ++flipped) {
      std::vector<uint32_t> odd;
      std::vector<uint32_t> even;
      for (uint32_t rank = 0; rank < count; ++rank) {
        trainers[rank]->flipped.clear();
        (flipped >> rank & 1 ? odd : even).push_back(rank);
        if (flipped >> rank & 1) {
          harness.FlipBit(*trainers[rank], BufferNumber(*trainers[rank], "param/wte"), 4 * 1234, 0);
        }
      }
      ++step;
      harness.SaveAll(trainers, step);
      SCOPED_TRACE(absl::StrCat("flipped: ", Named(odd)));
      const std::vector<uint32_t>& fewer = odd.size() < even.size() ? odd : even;
      const std::vector<uint32_t>& more = odd.size() < even.size() ? even : odd;
      const std::string vote =
          fewer.size() < more.size()
              ? absl::StrCat(Named(fewer), fewer.size() == 1 ? " differs from " : " differ from ",
                             Named(more))
              : absl::StrCat(Named(odd[0] == 0 ? odd : even), " and ",
                             Named(odd[0] == 0 ? even : odd),
                             " differ from each other, without a majority");
      for (const TestTrainer* trainer : trainers) {
        EXPECT_THAT(Refusal(*trainer, step),
                    AllOf(HasSubstr(absl::StrCat("step ", step, " of attempt 1 was not committed")),
                          HasSubstr(vote), HasSubstr("tensor \"wte\", state \"param\""),
                          HasSubstr("element 1234 (at [24, 34])"), HasSubstr("1 of elements [")));
        EXPECT_EQ(EngineHarness::CommittedPower(*trainer), 1u);
        EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), 1u);
      }
      EXPECT_THAT(LastWarning(harness), HasSubstr(vote));
    }
  }
}

TEST(Replicas, ThatAllDifferAreAllNamed) {
  SimDisk disk;
  EngineHarness harness(disk, WithCopies());
  const std::vector<TestTrainer*> trainers = Launch(harness, 3);
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const uint32_t wte = BufferNumber(*trainers[rank], "param/wte");
    const uint32_t steps = BufferNumber(*trainers[rank], "param/steps");
    harness.FlipBit(*trainers[rank], wte, 0, static_cast<int>(rank));
    if (rank == 2) harness.FlipBit(*trainers[rank], steps, 7, 7);
  }
  harness.SaveAll(trainers, 5);
  EXPECT_THAT(LastWarning(harness),
              AllOf(HasSubstr("rank 0 and rank 1 and rank 2 differ from each other"),
                    HasSubstr("element 0 (at [0, 0]): 0x"), HasSubstr(" on rank 1, 0x"),
                    // Of the other tensor a majority knows.
                    HasSubstr("in all, 2 pieces of 2 tensor states differ, suspected: rank 2")));
}

// No byte of a replica goes uncompared: neither those in images nor the extra copies, wherever the
// cuts between writers lie. And what is not replicated is nobody else's affair.
TEST(Replicas, EveryByteIsCompared) {
  constexpr uint32_t kDp = 2;
  constexpr uint32_t kTp = 2;
  SimDisk disk;
  EngineHarness harness(disk, WithCopies());
  const std::vector<TestTrainer*> trainers = Launch(harness, kDp, kTp);
  uint64_t step = 0;
  size_t refused = 0;
  for (const auto& [name, element_bytes] : std::map<std::string, uint64_t>{
           {"param/wte", 4}, {"param/up", 2}, {"param/steps", 8}, {"exp_avg/wte", 4}}) {
    for (const uint32_t rank : {0u, 3u}) {
      TestTrainer& trainer = *trainers[rank];
      const uint32_t buffer = BufferNumber(trainer, name);
      const uint64_t bytes = trainer.script->buffers()[buffer].size();
      // Both sides of every cut between writers, the ends, and a prime step in between.
      std::set<uint64_t> places = {bytes - 1};
      for (uint64_t byte = 0; byte < bytes; byte += 211) places.insert(byte);
      for (uint64_t cut = kWriterGrainBytes; cut < bytes; cut += kWriterGrainBytes) {
        places.insert({cut - 1, cut});
      }
      for (const uint64_t byte : places) {
        ++step;
        SCOPED_TRACE(absl::StrFormat("byte %d of %s on rank %d, step %d", byte, name, rank, step));
        trainer.flipped.clear();
        harness.FlipBit(trainer, buffer, byte, static_cast<int>(step % 8));
        harness.SaveAll(trainers, step);
        trainer.flipped.clear();
        if (name == "exp_avg/wte") {
          EXPECT_EQ(EngineHarness::CommittedPower(trainer), step);
          continue;
        }
        ++refused;
        EXPECT_THAT(Refusal(trainer, step), HasSubstr("replicas differ"));
        if (name == "param/wte") {
          EXPECT_THAT(Refusal(trainer, step),
                      HasSubstr(absl::StrFormat("element %d (", byte / element_bytes)));
        }
        // Of a shard only its two holders are named.
        if (name == "param/up") {
          EXPECT_THAT(Refusal(trainer, step), HasSubstr(rank == 0 ? "rank 0 and rank 2 differ"
                                                                  : "rank 1 and rank 3 differ"));
        } else {
          EXPECT_THAT(Refusal(trainer, step),
                      HasSubstr(absl::StrFormat("rank %d differs from ranks ", rank)));
        }
        if (testing::Test::HasFailure()) return;
      }
    }
  }
  printf("%zu saves refused of %lu\n", refused, step);
  EXPECT_GT(refused, 100u);
}

TEST(Replicas, ThatDifferAreNowhereToBeRestoredFrom) {
  for (const bool go_on : {false, true}) {
    SimDisk disk;
    EngineHarness harness(disk, WithCopies());
    const std::vector<TestTrainer*> trainers = Launch(harness, 4);
    harness.SaveAll(trainers, 1);
    harness.FlipBit(*trainers[2], BufferNumber(*trainers[2], "param/steps"), 0, 0);
    harness.SaveAll(trainers, 2);
    EXPECT_THAT(Refusal(*trainers[0], 2), HasSubstr("rank 2 differs from ranks 0, 1, 3"));
    EXPECT_THAT(harness.engine().StatusJson(), HasSubstr("rank 2 differs from ranks 0, 1, 3"));
    ASSERT_OK_AND_ASSIGN(Catalog catalog, harness.ReadJob());
    EXPECT_EQ(catalog.entries[*catalog.newest].id, (CheckpointId{Attempt{1}, Step{1}}));
    // Its memory is free again: more saves than there is room for.
    uint64_t newest = 1;
    for (; go_on && newest < 6; ++newest) {
      trainers[2]->flipped.clear();
      harness.SaveAll(trainers, newest + 2);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[2]), newest + 2);
    }
    KillAll(harness, trainers);
    const std::vector<TestTrainer*> next = Launch(harness, 4);
    for (TestTrainer* trainer : next) {
      ExpectState(harness.Restore(*trainer), *trainer, go_on ? newest + 1 : 1, 4);
    }
    harness.SaveAll(next, 20);
    EXPECT_EQ(EngineHarness::CommittedPower(*next[0]), 20u);
  }
}

// The worker dies behind any step of its loop. The next one finds image and copies, and votes.
TEST(Replicas, AWorkerThatDiesBetweenCaptureAndCommitStillVotes) {
  for (const bool flip : {false, true}) {
    int crash_step = 0;
    int told = 0;
    for (;; ++crash_step) {
      SCOPED_TRACE(absl::StrFormat("flip %d, crash behind step %d", flip, crash_step));
      SimDisk disk;
      EngineHarness harness(disk, WithCopies());
      const std::vector<TestTrainer*> trainers = SaveTwice(harness, flip, "param/up");
      int steps = 0;
      while (steps < crash_step && harness.executor().RunOne()) ++steps;
      // Who was told before need not be told again: the images may be given back already.
      const bool was_told = !Refusal(*trainers[0], 2).empty();
      told += was_told ? 1 : 0;
      harness.CrashWorker(SimDisk::InFlight::kAll);
      for (const TestTrainer* trainer : trainers) {
        EXPECT_EQ(EngineHarness::CommittedPower(*trainer), flip ? 1u : 2u);
        EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), flip ? 1u : 2u);
        if (flip && !was_told) {
          EXPECT_THAT(Refusal(*trainer, 2),
                      AllOf(HasSubstr("rank 1 differs from ranks 0, 2"), HasSubstr("element 5 (")));
        }
      }
      for (TestTrainer* trainer : trainers) trainer->flipped.clear();
      harness.SaveAll(trainers, 3);
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 3u);
      if (testing::Test::HasFailure() || steps < crash_step) break;
    }
    printf("%d crash points, %d of them behind the refusal\n", crash_step, told);
    EXPECT_GT(crash_step - told, 40);
  }
}

// All ranks die behind any step, and a new attempt asks where to start: from the save that they had
// captured only if its replicas agree, and from nothing older than what was called committed.
TEST(Replicas, ANewAttemptWaitsForTheVote) {
  for (const bool flip : {false, true}) {
    size_t from_newest = 0;
    int death_step = 0;
    for (;; ++death_step) {
      SCOPED_TRACE(absl::StrFormat("flip %d, death behind step %d", flip, death_step));
      SimDisk disk;
      EngineHarness harness(disk, WithCopies());
      const std::vector<TestTrainer*> trainers = SaveTwice(harness, flip, "param/wte");
      int steps = 0;
      while (steps < death_step && harness.executor().RunOne()) ++steps;
      const uint64_t committed = *EngineHarness::CommittedProcess(*trainers[0]);
      KillAll(harness, trainers);
      const std::vector<TestTrainer*> next = Launch(harness, 2);
      const RestoreOutcome outcome = harness.Restore(*next[0]);
      const uint64_t restored = Value(outcome.checkpoint.step);
      EXPECT_GE(restored, committed);
      EXPECT_LE(restored, flip ? 1u : 2u);
      ExpectState(outcome, *next[0], restored, 3);
      from_newest += restored == 2 ? 1 : 0;
      if (testing::Test::HasFailure() || steps < death_step) break;
    }
    printf("%d points, %zu from the newest\n", death_step, from_newest);
    EXPECT_GT(death_step, 50);
    EXPECT_EQ(from_newest > 0, !flip);
  }
}

// A vote that takes long: nothing is called committed before it, and where the next attempt starts
// is decided behind it.
TEST(Replicas, ADecisionWaitsForAVoteThatTakesLong) {
  for (const bool flip : {false, true}) {
    SimDisk disk;
    EngineHarness harness(disk, WithCopies());
    const std::vector<TestTrainer*> trainers = SaveTwice(harness, flip, "param/wte");
    while (harness.engine().StatusJson().find("\"comparing\"") == std::string::npos) {
      ASSERT_TRUE(harness.executor().RunOne());
    }
    harness.executor().HoldNewestPoolWork();
    harness.Settle();
    EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]), 1u);
    EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
    KillAll(harness, trainers);
    TestTrainer* const next = *harness.Open(Rank{0}, 1);
    ASSERT_OK(harness.Register(*next, DataParallel(1)));
    std::optional<absl::StatusOr<RestoreBegun>> begun;
    harness.engine().Restore(
        next->session, next->registration_id, {},
        [&](absl::StatusOr<RestoreBegun> answer) { begun = std::move(answer); },
        [](const absl::StatusOr<RestoreEnded>&) {});
    harness.Settle();
    EXPECT_FALSE(begun.has_value());
    harness.executor().ReleasePoolWork();
    harness.Settle();
    ASSERT_TRUE(begun.has_value());
    ASSERT_OK(begun->status());
    EXPECT_EQ(Value((*begun)->checkpoint.step), flip ? 1u : 2u);
  }
}

TEST(Replicas, AWriteThatFailedDoesNotChangeTheVote) {
  for (const bool flip : {false, true}) {
    uint64_t index = 0;
    for (;; ++index) {
      SCOPED_TRACE(absl::StrFormat("flip %d, write %d", flip, index));
      SimDisk disk;
      disk.FailOperation(SimDisk::Operation::kRingWrite, index, absl::DataLossError("EIO"));
      EngineHarness harness(disk, WithCopies());
      const std::vector<TestTrainer*> trainers = Launch(harness, 2);
      if (flip) harness.FlipBit(*trainers[1], BufferNumber(*trainers[1], "param/wte"), 0, 0);
      harness.SaveAll(trainers, 1);
      if (disk.fault_count() == 0) break;
      EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]),
                flip ? std::nullopt : std::optional<uint64_t>(1));
      EXPECT_EQ(Refusal(*trainers[0], 1).empty(), !flip);
    }
    EXPECT_GE(index, 4u);
  }
}

// Storage that fails for good takes nothing from the memory tier, nor from the vote.
TEST(Replicas, AreComparedWhereStorageHasFailed) {
  for (const bool flip : {false, true}) {
    SimDisk disk;
    EngineHarness harness(disk, WithCopies());
    const std::vector<TestTrainer*> trainers = Launch(harness, 3);
    if (flip) harness.FlipBit(*trainers[1], BufferNumber(*trainers[1], "param/wte"), 0, 0);
    for (uint64_t index = 0; index < 200; ++index) {
      disk.FailOperation(SimDisk::Operation::kRingWrite, index,
                         absl::ResourceExhaustedError("full"), "rank-00000");
    }
    harness.SaveAll(trainers, 1);
    EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), std::nullopt);
    EXPECT_EQ(EngineHarness::CommittedProcess(*trainers[0]),
              flip ? std::nullopt : std::optional<uint64_t>(1));
    EXPECT_THAT(absl::StrJoin(harness.warnings(), "\n"),
                flip ? HasSubstr("rank 1 differs from ranks 0, 2") : HasSubstr("full"));
    KillAll(harness, trainers);
    const std::vector<TestTrainer*> next = Launch(harness, 1);
    const RestoreOutcome outcome = harness.Restore(*next[0]);
    if (flip) {
      EXPECT_THAT(outcome.status, StatusIs(absl::StatusCode::kNotFound));
    } else {
      ExpectState(outcome, *next[0], 1, 3);
    }
  }
}

// The blocks behind rank 0's image, written over.
void SpoilCopies(const TestTrainer& trainer, uint32_t slot) {
  const auto first = static_cast<uint32_t>(trainer.script->image_bytes() / 4096);
  ASSERT_LT(first, trainer.script->block_count());
  for (uint32_t block = first; block < trainer.script->block_count(); ++block) {
    for (std::byte& byte : trainer.script->Block(slot, block)) byte ^= std::byte{0xff};
  }
}

// A trainer that goes on writing into what it has captured: sums were taken of the bytes that have
// the checksum, so it changes no vote, and at most the text of one.
TEST(Replicas, WhatIsWrittenIntoACopyLaterChangesNoVote) {
  for (const bool flip : {false, true}) {
    for (const bool crash : {false, true}) {
      SCOPED_TRACE(absl::StrFormat("flip %d crash %d", flip, crash));
      SimDisk disk;
      EngineHarness harness(disk, WithCopies());
      const std::vector<TestTrainer*> trainers = Launch(harness, 2);
      const std::optional<uint32_t> slot = harness.BeginSave(*trainers[0], 1);
      harness.FinishSave(*trainers[0], *slot);
      harness.Settle();
      SpoilCopies(*trainers[0], *slot);
      if (crash) harness.CrashWorker(SimDisk::InFlight::kAll);
      if (flip) harness.FlipBit(*trainers[1], BufferNumber(*trainers[1], "param/wte"), 0, 0);
      ASSERT_TRUE(harness.Save(*trainers[1], 1));
      harness.Settle();
      const auto report = trainers[1]->script->ReportOf(1);
      ASSERT_TRUE(report.has_value());
      if (crash) {
        // The sums died with the worker, and cannot be taken again.
        EXPECT_EQ(report->state, HF_SAVE_FAILED);
        EXPECT_EQ(report->code, HF_ABORTED);
        EXPECT_THAT(report->text, HasSubstr("what rank 0 captured has changed in memory"));
      } else if (flip) {
        EXPECT_THAT(Refusal(*trainers[1], 1),
                    AllOf(HasSubstr("rank 0 and rank 1 differ"), HasSubstr("tensor \"wte\""),
                          HasSubstr("elements [0, 3500)"), HasSubstr("overwritten")));
      } else {
        EXPECT_EQ(report->state, HF_SAVE_COMMITTED_POWER);
      }
    }
  }
}

// The worker dies behind the commit, and the sums with it; the trainer has written into its copies
// since. The memory is given back, but nobody says of what is durable that it was not committed.
TEST(Replicas, WhatIsCommittedStaysSoThoughItsCopiesCannotBeComparedAnew) {
  SimDisk disk;
  EngineHarness harness(disk, WithCopies());
  const std::vector<TestTrainer*> trainers = Launch(harness, 2);
  harness.SaveAll(trainers, 1);
  const std::optional<uint32_t> slot = harness.BeginSave(*trainers[0], 2);
  ASSERT_TRUE(slot.has_value());
  harness.FinishSave(*trainers[0], *slot);
  ASSERT_TRUE(harness.Save(*trainers[1], 2));
  harness.Settle();
  ASSERT_EQ(EngineHarness::CommittedPower(*trainers[0]), 2u);
  SpoilCopies(*trainers[0], *slot);
  harness.CrashWorker(SimDisk::InFlight::kAll);
  EXPECT_THAT(harness.warnings(),
              testing::ElementsAre(AllOf(HasSubstr("the copies in memory of step 2 of attempt 1"),
                                         HasSubstr("which is committed, are given back"),
                                         HasSubstr("what rank 0 captured has changed in memory"))));
  EXPECT_THAT(harness.engine().StatusJson(), Not(HasSubstr("was not committed")));
  for (const TestTrainer* trainer : trainers) {
    EXPECT_EQ(EngineHarness::CommittedPower(*trainer), 2u);
    EXPECT_EQ(EngineHarness::CommittedProcess(*trainer), 2u);
    const auto report = trainer->script->ReportOf(2);
    ASSERT_TRUE(report.has_value());
    EXPECT_EQ(report->state, HF_SAVE_COMMITTED_POWER);
    EXPECT_EQ(report->code, HF_OK) << report->text;
  }
  KillAll(harness, trainers);
  const std::vector<TestTrainer*> next = Launch(harness, 2);
  for (TestTrainer* trainer : next) {
    const RestoreOutcome outcome = harness.Restore(*trainer);
    ExpectState(outcome, *trainer, 2, 2);
    EXPECT_EQ(outcome.bytes_from_memory, 0u);
  }
}

TEST(Replicas, RanksMustAgreeOnWhatTheyCapture) {
  SimDisk disk;
  EngineHarness harness(disk, WithCopies());
  std::vector<TestTrainer*> trainers;
  for (uint32_t rank = 0; rank < 2; ++rank) trainers.push_back(*harness.Open(Rank{rank}, 2));
  ASSERT_OK(harness.Register(*trainers[0], DataParallel(2), abi::Copies::kAll));
  for (const abi::Copies other : {abi::Copies::kOnce, abi::Copies::kPerNode}) {
    EXPECT_THAT(harness.Register(*trainers[1], DataParallel(2), other),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("rank 1 has registered with copies = "),
                               HasSubstr("rank 0 with copies = all"), Not(HasSubstr("byte")))));
  }
  ASSERT_OK(harness.Register(*trainers[1], DataParallel(2), abi::Copies::kAll));
  harness.SaveAll(trainers, 1);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 1u);
  // Another choice is another round, as another layout is.
  for (TestTrainer* trainer : trainers) {
    ASSERT_OK(harness.Register(*trainer, DataParallel(2), abi::Copies::kOnce));
  }
  harness.FlipBit(*trainers[1], BufferNumber(*trainers[1], "param/wte"), 0, 0);
  harness.SaveAll(trainers, 2);
  EXPECT_EQ(EngineHarness::CommittedPower(*trainers[0]), 2u);
}

TEST(Replicas, ThatDoNotFitTheBudgetAreRefusedAtOnce) {
  uint64_t image_blocks = 0;
  {
    SimDisk disk;
    EngineHarness harness(disk, WithCopies(abi::Copies::kOnce));
    image_blocks = Launch(harness, 4)[0]->script->block_count();
  }
  SimDisk disk;
  EngineHarnessOptions options = WithCopies();
  options.host_memory_bytes = image_blocks * 4096;
  EngineHarness harness(disk, options);
  TestTrainer* const trainer = *harness.Open(Rank{0}, 4);
  EXPECT_THAT(harness.Register(*trainer, DataParallel(4)),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("3 are extra copies (copies = all)"),
                             HasSubstr("are free of --host-memory"))));
  EXPECT_OK(harness.Register(*trainer, DataParallel(4), abi::Copies::kOnce));
}

}  // namespace
}  // namespace holdfast
