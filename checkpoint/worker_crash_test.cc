// The worker dies behind any step of its loop, and a new one takes over from the keeper's
// descriptors. And: whatever a trainer writes into the memory it shares, the worker stays up and
// other ranks' images are right.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/crc32c.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

constexpr Rank kRank0{0};
constexpr Rank kRank1{1};

void Release(CaptureHarness& harness, SessionId id, uint64_t step) {
  for (const auto& [image_id, image] : harness.observer().images) {
    if (image_id.session != id || Value(image.checkpoint.step) != step) continue;
    if (RankImages* images = harness.session(id).images_of(image_id)) images->Release(image_id);
  }
}

// Two ranks save three steps, releasing what is superseded; a trainer dies at the end, in the
// middle of a capture. `harness` may crash anywhere in between.
void RunScript(CaptureHarness& harness, SessionId first, SessionId second) {
  for (uint64_t step = 1; step <= 3; ++step) {
    harness.Settle();
    const std::optional<uint32_t> slot = harness.trainer(first).BeginSave(step, BlobsAt(step));
    ASSERT_TRUE(slot) << step;
    harness.Settle();
    ASSERT_TRUE(harness.trainer(second).Save(step, BlobsAt(step))) << step;
    harness.trainer(first).CopyBlocks(*slot, 3);
    harness.Settle();
    harness.trainer(first).CopyBlocks(*slot);
    harness.trainer(first).Finish(*slot);
    harness.Settle();
    for (const SessionId id : {first, second}) {
      if (step > 1) Release(harness, id, step - 1);
    }
  }
  harness.Settle();
  const std::optional<uint32_t> slot = harness.trainer(second).BeginSave(4, BlobsAt(4));
  ASSERT_TRUE(slot);
  harness.trainer(second).CopyBlocks(*slot, 2);
  harness.Settle();
  harness.KillProcess(second);
  harness.session(second).ProcessDied();
  harness.Settle();
}

// What the session's trainer captured behind the image at `step` is in memory. Returns how much.
uint64_t ExpectExtraCopies(CaptureHarness& harness, SessionId session, uint64_t step) {
  uint64_t copied = 0;
  for (const auto& [id, image] : harness.observer().images) {
    if (id.session != session || Value(image.checkpoint.step) != step) continue;
    const RankImages& images = *harness.session(session).images_of(id);
    for (const auto& [offset, bytes] : harness.trainer(session).TrainerBytes(step, BlobsAt(step))) {
      if (offset < image.sealed->image_bytes) continue;
      copied += bytes.size();
      for (uint64_t i = 0; i < bytes.size(); ++i) {
        const auto view = images.Block(id, (offset + i) / 4096);
        EXPECT_EQ(static_cast<char>(view->bytes[(offset + i) % 4096]), bytes[i]);
      }
    }
  }
  return copied;
}

void ExpectOutcome(CaptureHarness& harness, SessionId first, SessionId second) {
  // Every image that was captured is durable with the right bytes, and its name is the only file.
  size_t durable_count = 0;
  for (const SessionId id : {first, second}) {
    for (uint64_t step = 1; step <= 3; ++step) {
      const RecordingObserver::Image* image =
          harness.observer().Of(harness.session(id).identity().rank, step);
      ASSERT_NE(image, nullptr);
      ASSERT_TRUE(image->durable_path) << "step " << step;
      EXPECT_THAT(harness.disk().Contents(*image->durable_path),
                  IsOkAndHolds(harness.OracleImage(id, step)));
      ++durable_count;
    }
  }
  EXPECT_THAT(harness.ImageFiles(), SizeIs(durable_count));
  const RecordingObserver::Image* last = harness.observer().Of(kRank1, 4);
  ASSERT_NE(last, nullptr);
  EXPECT_TRUE(last->void_status);
  EXPECT_THAT(harness.warnings(), IsEmpty());
  // No block is lost: one image each is held, the living trainer has a grant.
  for (const SessionId id : {first, second}) {
    const BlockPool& pool =
        harness.session(id).memory(harness.session(id).current_registration_id())->pool();
    const uint32_t image = harness.trainer(id).block_count();
    EXPECT_EQ(pool.count(BlockState::kImage), image);
    EXPECT_EQ(pool.count(BlockState::kQuarantined), 0u);
    EXPECT_EQ(pool.count(BlockState::kAbsent), 0u);
    EXPECT_EQ(pool.count(BlockState::kGranted), id == first ? image : 0u);
  }
  EXPECT_TRUE(harness.trainer(first).HasGrant());
}

void CrashEverywhere(abi::Copies copies, SimDisk::InFlight in_flight, uint64_t seed) {
  uint64_t crash_step = 1;
  for (;; ++crash_step) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", crash behind step " << crash_step
                                    << ", in flight " << static_cast<int>(in_flight));
    HarnessOptions options;
    options.seed = seed;
    options.copies = copies;
    CaptureHarness harness(options);
    const SessionId first = harness.OpenAndRegister(kRank0, 2);
    const SessionId second = harness.OpenAndRegister(kRank1, 2);
    harness.CrashAtStep(crash_step, in_flight);
    RunScript(harness, first, second);
    ExpectOutcome(harness, first, second);
    const uint64_t copied =
        ExpectExtraCopies(harness, first, 3) + ExpectExtraCopies(harness, second, 3);
    EXPECT_EQ(copied, copies == abi::Copies::kAll ? 37u * 5 * 4 * 2 + 14 + 3001 * 4 + 8 : 0u);
    if (testing::Test::HasFailure() || !harness.crashed()) break;
  }
  EXPECT_GT(crash_step, 100u);
  printf("%lu crash points, seed %lu\n", crash_step - 1, seed);
}

TEST(WorkerCrashTest, NothingCapturedIsLostAtAnyStepOfTheLoop) {
  for (const SimDisk::InFlight in_flight : {SimDisk::InFlight::kAll, SimDisk::InFlight::kNone}) {
    for (const uint64_t seed : {0, 7}) {
      CrashEverywhere(abi::Copies::kOnce, in_flight, seed);
      ASSERT_FALSE(testing::Test::HasFailure());
    }
  }
}

TEST(WorkerCrashTest, NorAreExtraCopies) {
  for (const uint64_t seed : {0, 7}) {
    CrashEverywhere(abi::Copies::kAll, SimDisk::InFlight::kAll, seed);
    ASSERT_FALSE(testing::Test::HasFailure());
  }
}

// Training goes on while the worker is dead: what the trainer saves then, into the slot that it was
// granted before, is durable afterwards, wherever the worker died.
TEST(WorkerCrashTest, ASaveWhileTheWorkerIsDeadIsTakenOver) {
  size_t taken_over = 0;
  size_t renamed = 0;
  for (uint64_t crash_step = 1;; ++crash_step) {
    SCOPED_TRACE(testing::Message() << "crash behind step " << crash_step);
    CaptureHarness harness({});
    const SessionId id = harness.OpenAndRegister(kRank0);
    ScriptedTrainer& trainer = harness.trainer(id);
    harness.CrashAtStep(crash_step, SimDisk::InFlight::kAll);
    bool saved = false;
    std::vector<std::string> files_before;
    harness.set_while_dead([&] {
      files_before = harness.ImageFiles();
      saved = trainer.Save(9, BlobsAt(9)).has_value();
    });
    ASSERT_TRUE(trainer.Save(1, BlobsAt(1)));
    harness.Settle();
    if (!harness.crashed()) break;
    ASSERT_TRUE(harness.observer().Of(kRank0, 1)->durable_path);
    const std::string durable = *harness.observer().Of(kRank0, 1)->durable_path;
    EXPECT_THAT(harness.disk().Contents(durable), IsOkAndHolds(harness.OracleImage(id, 1)));
    // A file that the dead worker had begun is never gone on with, and its name not used again.
    for (const std::string& file : files_before) {
      if (file == durable) continue;
      ++renamed;
      EXPECT_THAT(harness.disk().Contents(file), StatusIs(absl::StatusCode::kNotFound));
    }
    if (saved) {
      ++taken_over;
      const RecordingObserver::Image* image = harness.observer().Of(kRank0, 9);
      ASSERT_NE(image, nullptr);
      ASSERT_TRUE(image->durable_path);
      EXPECT_THAT(harness.disk().Contents(*image->durable_path),
                  IsOkAndHolds(harness.OracleImage(id, 9)));
    }
    if (testing::Test::HasFailure()) break;
  }
  EXPECT_GT(taken_over, 15u);
  EXPECT_GT(renamed, 5u);
}

// The name of a file that a dead worker had begun is not used again, even where it cannot be
// removed.
TEST(WorkerCrashTest, AnAbandonedNameIsNotUsedAgain) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  const std::optional<uint32_t> slot = harness.trainer(id).BeginSave(1, BlobsAt(1));
  harness.trainer(id).CopyBlocks(*slot, 3);
  harness.Settle();
  ASSERT_THAT(harness.ImageFiles(), ElementsAre("/root/a1.s1.rank-00000.h5"));
  harness.Crash(SimDisk::InFlight::kNone);
  harness.Crash(SimDisk::InFlight::kNone);
  harness.trainer(id).CopyBlocks(*slot);
  harness.trainer(id).Finish(*slot);
  harness.Settle();
  EXPECT_THAT(harness.ImageFiles(), ElementsAre("/root/a1.s1.rank-00000.r2.h5"));
  EXPECT_EQ(harness.observer().Of(kRank0, 1)->durable_path, "/root/a1.s1.rank-00000.r2.h5");
}

// ---- Garbage

struct Lcg {
  std::mt19937_64 random;
  uint64_t operator()(uint64_t below) { return random() % below; }
};

void Scribble(std::span<std::byte> bytes, Lcg& random) {
  const uint64_t length = 1 + random(random(4) == 0 ? 64 : 4);
  const uint64_t at = random(bytes.size());
  const std::byte fill = static_cast<std::byte>(random(4) == 0 ? 0xff : random(256));
  for (uint64_t i = at; i < std::min<uint64_t>(bytes.size(), at + length); ++i) bytes[i] = fill;
}

// The words that matter, aimed at.
void ScribbleSlots(ScriptedTrainer& trainer, Lcg& random) {
  abi::ImageSlot& slot = trainer.registration().slots[random(2)];
  switch (random(6)) {
    case 0:
      slot.state.store(static_cast<abi::SlotState>(random(7)));
      break;
    case 1:
      slot.generation.store(slot.generation.load() + random(3));
      break;
    case 2:
      slot.step.store(random(2) == 0 ? UINT64_MAX : random(10));
      break;
    case 3:
      slot.captured_ns.store(static_cast<int64_t>(random(3)) - 1);
      break;
    case 4:
      trainer
          .BlockDone(static_cast<uint32_t>(random(2)),
                     static_cast<uint32_t>(random(trainer.block_count())))
          .store(static_cast<uint8_t>(random(3)));
      break;
    default:
      for (char& c : slot.void_text) c = static_cast<char>(random(256));
      break;
  }
}

TEST(WorkerCrashTest, GarbageInSharedMemoryHarmsNobodyElse) {
  size_t hostile_durable = 0;
  size_t hostile_void = 0;
  size_t crashes = 0;
  size_t faults = 0;
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Lcg random{std::mt19937_64(seed)};
    HarnessOptions options;
    options.seed = seed;
    CaptureHarness harness(options);
    const SessionId hostile = harness.OpenAndRegister(kRank0, 2);
    const SessionId honest = harness.OpenAndRegister(kRank1, 2);
    if (seed % 3 == 0) harness.CrashAtStep(1 + random(150), SimDisk::InFlight::kAll);
    const auto spoil = [&] {
      ScriptedTrainer& trainer = harness.trainer(hostile);
      switch (random(4)) {
        case 0:
          Scribble(trainer.registration_bytes(), random);
          break;
        case 1:
          Scribble(trainer.page_bytes(), random);
          break;
        case 2:
          Scribble(trainer.memory_bytes(), random);
          break;
        default:
          ScribbleSlots(trainer, random);
          break;
      }
    };
    for (uint64_t step = 1; step <= 4; ++step) {
      harness.Settle();
      // Its storage has its troubles too, so that there are second tries.
      if (random(3) == 0) {
        harness.disk().FailOperation(SimDisk::Operation::kRingWrite, random(8),
                                     absl::DataLossError("EIO"), "rank-00000");
      }
      const std::optional<uint32_t> slot = harness.trainer(hostile).BeginSave(step, BlobsAt(step));
      ASSERT_TRUE(harness.trainer(honest).Save(step, BlobsAt(step)));
      harness.Ring();
      for (int i = 0; i < 12; ++i) {
        if (slot) harness.trainer(hostile).CopyBlocks(*slot, 1);
        if (random(3) == 0) spoil();
        harness.Ring();
        harness.RunSteps(random(6));
      }
      if (slot && random(8) != 0) harness.trainer(hostile).Finish(*slot);
      harness.Settle();
      if (step > 1) Release(harness, honest, step - 1);
      if (step > 1) Release(harness, hostile, step - 1);
    }
    harness.KillProcess(hostile);
    harness.session(hostile).ProcessDied();
    harness.Settle();
    crashes += harness.crashed() ? 1 : 0;
    faults += harness.disk().fault_count();

    for (uint64_t step = 1; step <= 4; ++step) {
      const RecordingObserver::Image* image = harness.observer().Of(kRank1, step);
      ASSERT_NE(image, nullptr);
      ASSERT_TRUE(image->durable_path) << step;
      EXPECT_THAT(harness.disk().Contents(*image->durable_path),
                  IsOkAndHolds(harness.OracleImage(honest, step)));
    }
    // Of the hostile one, what is called durable has on the disk what its checksums say.
    for (const auto& [id, image] : harness.observer().images) {
      if (id.session != hostile) continue;
      hostile_void += image.void_status ? 1 : 0;
      if (!image.durable_path) continue;
      ++hostile_durable;
      ASSERT_OK_AND_ASSIGN(const std::string bytes, harness.disk().Contents(*image.durable_path));
      for (size_t block = 0; block < image.sealed->block_crc32c.size(); ++block) {
        EXPECT_EQ(Crc32c(std::as_bytes(std::span(bytes).subspan(block * 4096, 4096))),
                  image.sealed->block_crc32c[block]);
      }
    }
    // Its death gives every block back that no sealed image holds.
    const BlockPool& pool = harness.session(hostile).memory(1)->pool();
    EXPECT_EQ(pool.count(BlockState::kQuarantined) + pool.count(BlockState::kGranted), 0u);
    if (testing::Test::HasFailure()) break;
  }
  printf("hostile images: %zu durable, %zu void; %zu worker crashes, %zu storage faults\n",
         hostile_durable, hostile_void, crashes, faults);
  EXPECT_GT(faults, 50u);
  EXPECT_GT(hostile_durable, 50u);
  EXPECT_GT(hostile_void, 50u);
  EXPECT_GT(crashes, 20u);
}

}  // namespace
}  // namespace holdfast
