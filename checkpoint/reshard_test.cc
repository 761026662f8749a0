// Goal: what a reshard commits is the same tensors and blobs in the other layout, bit for bit, at
// any budget of memory; and what it cannot do rightly it refuses, and publishes nothing.
// Method: random pairs and chains of layout documents over all operations, on the simulated disk,
// read back element by element; every kind of damage and refusal; threads on a real disk.
#include "checkpoint/reshard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "checkpoint/reshard_testing.h"
#include "format/layout_oracle.h"
#include "format/layout_rules.h"
#include "io/posix_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr char kUuid[] = "fedcba98-7654-4321-8fed-cba987654321";
constexpr uint64_t kLots = uint64_t{64} << 20;

std::unique_ptr<SimDisk> NewDisk() {
  auto disk = std::make_unique<SimDisk>();
  for (const char* root : {"/src", "/out", "/root"}) EXPECT_OK(disk->CreateDirectory(root));
  EXPECT_OK(disk->SyncDirectory("/"));
  return disk;
}

ReshardRequest RequestFor(const Found& source, const std::string& layout,
                          const std::string& job = "job") {
  ReshardRequest request;
  request.source_directory = source.entry.directory;
  request.layout_json = layout;
  request.root = "/out";
  request.job = job;
  request.new_job_uuid = kUuid;
  request.writer = "reshard";
  request.scratch_directory = ScratchDirectory();
  return request;
}

// From plan to commit.
absl::StatusOr<ReshardReport> Reshard(const ReshardStorage& storage, const ReshardRequest& request,
                                      const Index& source, uint64_t buffer_bytes = kLots,
                                      uint32_t thread_count = 1,
                                      uint64_t* distinct_read_bytes = nullptr) {
  ASSIGN_OR_RETURN(std::unique_ptr<const ReshardPlan> plan,
                   PlanReshard(storage.file_system, request, source));
  ASSIGN_OR_RETURN(const ReshardSchedule schedule,
                   plan->Schedule(std::max(buffer_bytes, plan->buffer_bytes_min()), thread_count));
  if (distinct_read_bytes != nullptr) *distinct_read_bytes = schedule.distinct_read_bytes;
  return RunReshard(storage, request, std::move(plan), schedule,
                    {.source_caching = Caching::kDirect, .target_caching = Caching::kDirect});
}

uint64_t Seed() {
  const char* text = std::getenv("HOLDFAST_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : 20261126;
  std::printf("seed %llu (HOLDFAST_TEST_SEED)\n", static_cast<unsigned long long>(seed));
  return seed;
}

// A document that Layout::Parse accepts.
std::string RandomLayout(oracle::Random& random, const std::vector<oracle::Tensor>& tensors) {
  for (;;) {
    std::string json = oracle::ToJson(oracle::RandomDocument(random, tensors), random);
    if (Layout::Parse(json).ok()) return json;
  }
}

TEST(Reshard, AnyLayoutBecomesAnyOtherAtAnyBudget) {
  oracle::Random random(Seed());
  uint64_t bytes = 0;
  uint64_t read = 0;
  uint64_t read_again = 0;
  for (int pair = 0; pair < 100; ++pair) {
    const std::vector<oracle::Tensor> tensors = oracle::RandomTensors(random);
    const std::string from = RandomLayout(random, tensors);
    const std::string to = RandomLayout(random, tensors);
    const std::string where = absl::StrCat("pair ", pair, "\n", from, "\n", to);
    const auto disk = NewDisk();
    ASSERT_OK(WriteTestCheckpoint(*disk, from, {})) << where;
    ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk, "/src", "job"));
    // From a block of the source and one of the target to room for everything.
    const uint64_t budget = 4096 * (2 + (pair % 3 == 0 ? 0 : random() % 40));
    uint64_t distinct_bytes = 0;
    ASSERT_OK_AND_ASSIGN(const ReshardReport report,
                         Reshard(SimReshardStorage(*disk), RequestFor(source, to), source.index,
                                 budget, /*thread_count=*/1, &distinct_bytes));
    ASSERT_OK_AND_ASSIGN(const Found target, FindNewest(*disk, "/out", "job"));
    ASSERT_OK(CheckTestCheckpoint(*disk, SimReadAt(*disk), target.entry, source.index.world_size))
        << where;
    EXPECT_EQ(report.directory, target.entry.directory);
    EXPECT_EQ(report.fingerprints_equal, source.index.tensor_states.size());
    bytes += report.bytes_written;
    read += report.bytes_read;
    read_again += report.bytes_read - distinct_bytes;
    if (HasFailure()) return;
  }
  std::printf("%llu bytes written, %llu read, %llu of them again\n",
              static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(read),
              static_cast<unsigned long long>(read_again));
  EXPECT_GT(bytes, 1'000'000u);
  EXPECT_GT(read_again, 0u);  // some budgets were tight
}

TEST(Reshard, AChainOfLayoutsEndsWithTheBytesThatItBeganWith) {
  oracle::Random random(Seed());
  for (int chain = 0; chain < 15; ++chain) {
    const std::vector<oracle::Tensor> tensors = oracle::RandomTensors(random);
    const std::vector<std::string> layouts = {RandomLayout(random, tensors),
                                              RandomLayout(random, tensors),
                                              RandomLayout(random, tensors)};
    const auto disk = NewDisk();
    ASSERT_OK(WriteTestCheckpoint(*disk, layouts[0], {}));
    ASSERT_OK_AND_ASSIGN(const Found first, FindNewest(*disk, "/src", "job"));
    Found from = first;
    for (const size_t to : {1, 2, 0}) {
      const std::string job = absl::StrCat("job", to);
      ASSERT_OK(Reshard(SimReshardStorage(*disk), RequestFor(from, layouts[to], job), from.index));
      ASSERT_OK_AND_ASSIGN(from, FindNewest(*disk, "/out", job));
    }
    // Old ranks' blobs went along; everything else is where it was.
    EXPECT_EQ(from.index.blob_world_size, 0u);
    EXPECT_EQ(from.index.BlobWorldSize(), first.index.BlobWorldSize());
    ASSERT_EQ(from.index.pieces.size(), first.index.pieces.size());
    for (size_t i = 0; i < first.index.facts.size(); ++i) {
      EXPECT_EQ(from.index.facts[i], first.index.facts[i]);
    }
    for (size_t i = 0; i < first.index.pieces.size(); ++i) {
      const IndexPiece& a = first.index.pieces[i];
      const IndexPiece& b = from.index.pieces[i];
      EXPECT_EQ(a.image, b.image);
      EXPECT_EQ(a.piece.begin, b.piece.begin);
      EXPECT_EQ(a.piece.end, b.piece.end);
      const uint64_t bytes = a.piece.ElementCount() *
                             ElementBytes(first.index.tensor_states[a.piece.tensor_state].dtype);
      const auto piece_bytes = [&](const Found& in, const IndexPiece& piece) {
        const std::string path =
            absl::StrCat(in.entry.directory, "/", in.index.images[piece.image].file);
        return disk->Contents(path).value().substr(piece.offset_bytes, bytes);
      };
      EXPECT_EQ(piece_bytes(first, a), piece_bytes(from, b));
    }
    if (HasFailure()) return;
  }
}

// ---- Memory ----

// Cut along dimension 1 by so many that one source block has something for each of them.
std::string WideLayout(uint32_t ranks, bool flat) {
  const std::string place = flat ? R"({"op":"flat","axis":"tp","rule":"ceil"})"
                                 : R"({"op":"shard","dim":1,"axis":"tp","rule":"even"})";
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"tp","size":%d}],"tensors":[
      {"name":"w","shape":[64,16384],"states":[{"state":"param","dtype":"float32","place":[%s]}]}]})",
      ranks, place);
}

TEST(Reshard, SmallerUnitsSpareReadsWhereManyImagesNeedOneBlock) {
  const auto disk = NewDisk();
  ASSERT_OK(WriteTestCheckpoint(*disk, WideLayout(4, true), {.block_bytes = 262144}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk, "/src", "job"));
  const ReshardRequest request = RequestFor(source, WideLayout(16, false));
  ASSERT_OK_AND_ASSIGN(auto plan, PlanReshard(*disk, request, source.index));
  // 4 MiB in blocks of 256 KiB; every image needs something of each, and there is room for eight.
  ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule, plan->Schedule(8 * 262144, 1));
  EXPECT_LT(schedule.unit_bytes, 262144u);
  EXPECT_LE(schedule.buffer_bytes(), 8u * 262144u);
  EXPECT_LE(schedule.read_bytes, schedule.distinct_read_bytes * 3 / 2);
  ASSERT_OK_AND_ASSIGN(const ReshardReport report, RunReshard(SimReshardStorage(*disk), request,
                                                              std::move(plan), schedule, {}));
  // One thread reads exactly what the plan said.
  EXPECT_EQ(report.bytes_read, schedule.read_bytes);
  ASSERT_OK_AND_ASSIGN(const Found target, FindNewest(*disk, "/out", "job"));
  EXPECT_OK(CheckTestCheckpoint(*disk, SimReadAt(*disk), target.entry, 4));
}

TEST(Reshard, BuffersKeepToTheBudgetAndBelowTheLeastItIsRefused) {
  const auto disk = NewDisk();
  ASSERT_OK(WriteTestCheckpoint(*disk, WideLayout(4, true), {}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk, "/src", "job"));
  ASSERT_OK_AND_ASSIGN(auto plan,
                       PlanReshard(*disk, RequestFor(source, WideLayout(2, false)), source.index));
  for (uint64_t budget = plan->buffer_bytes_min(); budget < 100 * 4096; budget += 1000) {
    for (const uint32_t threads : {1, 3, 8}) {
      ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule, plan->Schedule(budget, threads));
      EXPECT_LE(schedule.buffer_bytes(), budget);
      // Every thread can hold a block, and one of them wait for none.
      EXPECT_GE(schedule.slot_count, schedule.thread_count);
      EXPECT_LE(schedule.thread_count, threads);
    }
  }
  EXPECT_THAT(plan->Schedule(plan->buffer_bytes_min() - 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("8192")));
}

TEST(Reshard, TheListOfUnitsCountsAsMemoryAndSmallerUnitsAreNotTriedWhereItDoesNotFit) {
  const auto disk = NewDisk();
  ASSERT_OK(WriteTestCheckpoint(*disk, WideLayout(4, true), {.block_bytes = 262144}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk, "/src", "job"));
  ASSERT_OK_AND_ASSIGN(auto plan,
                       PlanReshard(*disk, RequestFor(source, WideLayout(16, false)), source.index));
  const auto with_list = [](const ReshardSchedule& schedule) {
    return schedule.buffer_bytes() + schedule.units.size() * sizeof(ReshardUnit);
  };
  const uint64_t buffers = 8 * 262144;
  ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule, plan->Schedule(buffers, 1));
  ASSERT_LT(schedule.unit_bytes, 262144u);
  // One byte less for all of it: something has to give.
  const uint64_t memory_bytes = with_list(schedule) - 1;
  ASSERT_OK_AND_ASSIGN(const ReshardSchedule with_less, plan->Schedule(buffers, 1, memory_bytes));
  EXPECT_LE(with_list(with_less), memory_bytes);
  const uint64_t least = plan->memory_bytes_min();
  for (uint64_t memory = least; memory < least + 4 * 262144; memory += 10'000) {
    for (const uint32_t threads : {1, 6}) {
      ASSERT_OK_AND_ASSIGN(const ReshardSchedule found, plan->Schedule(kLots, threads, memory));
      EXPECT_LE(with_list(found), memory);
    }
  }
  EXPECT_THAT(plan->Schedule(kLots, 1, least - 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat(least))));
}

TEST(Reshard, ThreadsOnARealDiskMakeTheSameBytes) {
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  const std::string root = directory.path();
  ASSERT_OK(WriteTestCheckpoint(*file_system, WideLayout(4, true), {.root = root, .job = "src"}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*file_system, root, "src"));
  std::vector<std::vector<uint32_t>> checksums;
  for (const uint32_t threads : {1, 6}) {
    ReshardRequest request =
        RequestFor(source, WideLayout(8, false), absl::StrCat("threads", threads));
    request.root = root;
    ASSERT_OK_AND_ASSIGN(auto plan, PlanReshard(*file_system, request, source.index));
    // So few blocks that threads wait for each other.
    ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule,
                         plan->Schedule(threads * 3 * 4096, threads));
    EXPECT_EQ(schedule.thread_count, threads);
    uint64_t last = 0;
    const uint64_t image_bytes = plan->image_bytes();
    ReshardOptions options;
    options.progress = [&last](uint64_t done, uint64_t total) {
      EXPECT_GT(done, last);
      EXPECT_LE(done, total);
      last = done;
      return true;
    };
    ASSERT_OK(
        RunReshard(RealReshardStorage(*file_system), request, std::move(plan), schedule, options)
            .status());
    // With others, this thread may find nothing left to do.
    if (threads == 1) {
      EXPECT_EQ(last, image_bytes);
    }
    ASSERT_OK_AND_ASSIGN(const Found target, FindNewest(*file_system, root, request.job));
    EXPECT_OK(CheckTestCheckpoint(*file_system, PlainReadAt(), target.entry, 4));
    checksums.push_back(target.index.images[3].block_crc32c);
  }
  // But for the first blocks, where the name of the job is.
  EXPECT_TRUE(std::equal(checksums[0].begin() + 3, checksums[0].end(), checksums[1].begin() + 3));
}

// ---- Refusals ----

class ReshardSmall : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(WriteTestCheckpoint(*disk_, SmallLayout(3), {}));
    ASSERT_OK_AND_ASSIGN(source_, FindNewest(*disk_, "/src", "job"));
  }
  absl::Status Try(const std::string& layout) {
    return Reshard(storage_, RequestFor(source_, layout), source_.index).status();
  }
  void ExpectNothingPublished() {
    const auto catalog = ReadCatalog(*disk_, "/out", "job");
    if (!catalog.ok()) {
      EXPECT_THAT(catalog.status(), IsNotFound());
      return;
    }
    EXPECT_EQ(catalog->outcome, Lineage::Outcome::kNone);
    for (const std::string& path : disk_->AllFiles()) {
      EXPECT_FALSE(path.starts_with("/out") && path.ends_with(".h5")) << path;
    }
  }

  std::unique_ptr<SimDisk> disk_ = NewDisk();
  const ReshardStorage storage_ = SimReshardStorage(*disk_);
  Found source_;
};

TEST_F(ReshardSmall, TheJobNamesItsSourceAndTheCheckpointHasNoParent) {
  ASSERT_OK(Try(SmallLayout(2)));
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, ReadCatalog(*disk_, "/out", "job"));
  EXPECT_EQ(catalog.job.job_uuid, kUuid);
  EXPECT_EQ(catalog.job.source, (JobSource{"job", source_.index.job_uuid, source_.index.checkpoint,
                                           source_.entry.directory}));
  ASSERT_EQ(catalog.entries.size(), 1u);
  EXPECT_EQ(catalog.entries[0].id, (CheckpointId{Attempt{0}, Step{7}}));
  EXPECT_EQ(catalog.entries[0].manifest->parent, std::nullopt);
  EXPECT_EQ(catalog.greatest_attempt, Attempt{0});
  EXPECT_EQ(catalog.newest, 0u);
}

TEST_F(ReshardSmall, OtherTensorStatesAreRefusedByName) {
  const std::string layout = SmallLayout(2);
  EXPECT_THAT(Try(absl::StrReplaceAll(layout, {{"\"wte\"", "\"wtf\""}})),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"wtf\", state \"param\": in the layout, not in"),
                             HasSubstr("\"wte\", state \"exp_avg\": in the checkpoint, not in"))));
  EXPECT_THAT(Try(absl::StrReplaceAll(layout, {{"[37,25]", "[25,37]"}})),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("float32[25, 37] in the layout, float32[37, 25] in the")));
  EXPECT_THAT(Try(absl::StrReplaceAll(layout, {{"int64", "uint64"}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("uint64[] in the layout")));
  EXPECT_THAT(Try("{}"), StatusIs(absl::StatusCode::kInvalidArgument));
  ExpectNothingPublished();
  EXPECT_THAT(ReadCatalog(*disk_, "/out", "job"), IsNotFound());  // not even a directory
}

TEST_F(ReshardSmall, ADamagedBlockIsNamedAndNothingIsPublished) {
  for (uint32_t image = 0; image < 3; ++image) {
    const IndexImage& damaged = source_.index.images[image];
    const std::string path = absl::StrCat(source_.entry.directory, "/", damaged.file);
    for (const IndexPiece& piece : source_.index.pieces) {
      if (piece.image != image) continue;
      disk_->FlipBit(path, piece.offset_bytes, 3);
      EXPECT_THAT(Try(SmallLayout(2)),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr(damaged.file)));
      ExpectNothingPublished();
      disk_->FlipBit(path, piece.offset_bytes, 3);
    }
  }
  // What failed leaves nothing that is in the way.
  ASSERT_OK(Try(SmallLayout(2)));
  ASSERT_OK_AND_ASSIGN(const Found target, FindNewest(*disk_, "/out", "job"));
  EXPECT_OK(CheckTestCheckpoint(*disk_, SimReadAt(*disk_), target.entry, 3));
}

TEST_F(ReshardSmall, AnotherFingerprintThanTheSourcesIsNamedAndNothingIsPublished) {
  for (size_t i = 0; i < source_.index.facts.size(); ++i) {
    Index wrong = source_.index;
    *wrong.facts[i].fingerprint += Fingerprint(1);
    const TensorState& state = wrong.tensor_states[i];
    EXPECT_THAT(Reshard(storage_, RequestFor(source_, SmallLayout(2)), wrong).status(),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr(absl::StrFormat("\"%s\"", state.tensor)),
                               HasSubstr(absl::StrFormat("\"%s\"", state.state)))));
    ExpectNothingPublished();
  }
}

TEST_F(ReshardSmall, WithoutFingerprintsInTheSourceTheyAreComputed) {
  ASSERT_OK(
      WriteTestCheckpoint(*disk_, SmallLayout(2), {.job = "none", .with_fingerprints = false}));
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk_, "/src", "none"));
  ASSERT_OK_AND_ASSIGN(const ReshardReport report,
                       Reshard(storage_, RequestFor(source, SmallLayout(3)), source.index));
  EXPECT_EQ(report.fingerprints_equal, 0u);
  EXPECT_EQ(report.fingerprints_not_computed, source.index.tensor_states.size());
  ASSERT_OK_AND_ASSIGN(const Found target, FindNewest(*disk_, "/out", "job"));
  EXPECT_OK(CheckTestCheckpoint(*disk_, SimReadAt(*disk_), target.entry, 2));
}

TEST_F(ReshardSmall, AGapInTheSourceIsFoundBeforeAnythingIsWritten) {
  Index gap = source_.index;
  gap.pieces.erase(gap.pieces.begin());
  EXPECT_THAT(Reshard(storage_, RequestFor(source_, SmallLayout(2)), gap).status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("\"a/b.c\"")));
  EXPECT_THAT(ReadCatalog(*disk_, "/out", "job"), IsNotFound());
}

TEST_F(ReshardSmall, WithoutRoomNothingIsBegun) {
  disk_->SetCapacity(disk_->used_bytes() + 10'000);
  EXPECT_THAT(Try(SmallLayout(2)), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(ReadCatalog(*disk_, "/out", "job"), IsNotFound());
}

TEST_F(ReshardSmall, WhatIsThereIsNeverReplaced) {
  const auto refused = [&](const ReshardRequest& request, const std::string& why) {
    const std::vector<std::string> before = disk_->AllFiles();
    EXPECT_THAT(Reshard(storage_, request, source_.index),
                StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(why)));
    EXPECT_EQ(disk_->AllFiles(), before);
  };
  // The source's own job.
  ReshardRequest request = RequestFor(source_, SmallLayout(2));
  request.root = "/src";
  refused(request, "holds a job of its own");
  // Done before.
  ASSERT_OK(Try(SmallLayout(2)));
  refused(RequestFor(source_, SmallLayout(2)), "made before");
  // Of another source.
  Found other = source_;
  other.index.checkpoint.step = Step{8};
  EXPECT_THAT(Reshard(storage_, RequestFor(other, SmallLayout(2)), other.index),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("made from step 7")));
  // Begun, and ended by a crash.
  disk_->RemoveFile("/out/job/s000000000007.a0000/MANIFEST.json");
  refused(RequestFor(source_, SmallLayout(2)), "never ended");
  // A name that is no job's.
  disk_->RemoveFile("/out/job/JOB.json");
  refused(RequestFor(source_, SmallLayout(2)), "holds s000000000007.a0000 and no whole JOB.json");
}

TEST_F(ReshardSmall, AnAgentThatOpensTheJobMeanwhileFencesIt) {
  const ReshardRequest request = RequestFor(source_, SmallLayout(2));
  ASSERT_OK_AND_ASSIGN(auto plan, PlanReshard(*disk_, request, source_.index));
  ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule, plan->Schedule(kLots, 1));
  ReshardOptions options;
  bool is_fenced = false;
  options.progress = [&](uint64_t, uint64_t) {
    if (!is_fenced) {
      EXPECT_OK(FenceCheckpoint(*disk_, "/out/job", "agent", {Attempt{0}, Step{7}}, Attempt{1}));
    }
    is_fenced = true;
    return true;
  };
  EXPECT_THAT(RunReshard(storage_, request, std::move(plan), schedule, options),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("fenced")));
  EXPECT_TRUE(is_fenced);
}

TEST_F(ReshardSmall, AStopIsClean) {
  const ReshardRequest request = RequestFor(source_, SmallLayout(2));
  ASSERT_OK_AND_ASSIGN(auto plan, PlanReshard(*disk_, request, source_.index));
  ASSERT_OK_AND_ASSIGN(const ReshardSchedule schedule, plan->Schedule(kLots, 1));
  ReshardOptions options;
  options.progress = [](uint64_t, uint64_t) { return false; };
  EXPECT_THAT(RunReshard(storage_, request, std::move(plan), schedule, options),
              StatusIs(absl::StatusCode::kCancelled));
  ExpectNothingPublished();
  EXPECT_OK(Try(SmallLayout(2)));
}

// ---- What comes after ----

TEST(ReshardedJob, IsRestoredByAnAgentWithTheBlobsOfAllOldRanksAndGoesOn) {
  const auto disk = NewDisk();
  EngineHarness harness(*disk, {.root_exists = true});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(4));
  harness.SaveAll(trainers, 5);
  ASSERT_OK_AND_ASSIGN(const Found source, FindNewest(*disk, "/root", "job"));
  ASSERT_OK_AND_ASSIGN(const std::string layout, ResizeLayout(source.index.layouts[0], "dp=2"));
  ReshardRequest request = RequestFor(source, layout, "other");
  request.root = "/root";
  ASSERT_OK_AND_ASSIGN(const ReshardReport report,
                       Reshard(SimReshardStorage(*disk), request, source.index));
  EXPECT_EQ(report.fingerprints_equal, source.index.tensor_states.size());

  for (const uint32_t world_size : {2u, 4u}) {  // that of the target, and that of the blobs
    ASSERT_OK_AND_ASSIGN(const auto others,
                         harness.Launch(world_size, absl::StrCat("run", world_size), "other"));
    for (TestTrainer* trainer : others) {
      const RestoreOutcome outcome = harness.Restore(*trainer);
      ExpectState(outcome, *trainer, 5, 4);
      EXPECT_EQ(outcome.checkpoint.attempt, Attempt{0});
    }
    KillAll(harness, others);
  }
  ASSERT_OK_AND_ASSIGN(const auto last, harness.Launch(2, "last", "other"));
  ASSERT_OK(harness.Restore(*last[0]).status);
  harness.SaveAll(last, 6);
  ASSERT_OK_AND_ASSIGN(const Catalog catalog, ReadCatalog(*disk, "/root", "other"));
  ASSERT_EQ(catalog.entries.size(), 2u);
  const CatalogEntry& newest = catalog.entries[*catalog.newest];
  EXPECT_EQ(newest.id, (CheckpointId{Attempt{3}, Step{6}}));
  EXPECT_EQ(newest.manifest->parent, (CheckpointId{Attempt{0}, Step{5}}));
  EXPECT_EQ(catalog.entries[0].branch, Branch::kCurrent);
}

}  // namespace
}  // namespace holdfast
