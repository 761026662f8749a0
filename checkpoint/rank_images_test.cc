// From the trainer's bytes to durable bytes: what is on the disk equals an image made by the
// definition; and every way in which an image ends void.
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr Rank kRank0{0};

uint32_t StateOf(ScriptedTrainer& trainer, uint64_t step) {
  const std::optional<ScriptedTrainer::Report> report = trainer.ReportOf(step);
  return report ? report->state : 0;
}

class RankImagesTest : public testing::Test {
 protected:
  void Make(const HarnessOptions& options = {}) {
    harness = std::make_unique<CaptureHarness>(options);
    id = harness->OpenAndRegister(kRank0);
  }
  ScriptedTrainer& trainer() { return harness->trainer(id); }
  const RecordingObserver::Image& Image(uint64_t step) {
    const RecordingObserver::Image* image = harness->observer().Of(kRank0, step);
    CHECK(image != nullptr);
    return *image;
  }
  RankImages& images() { return *harness->session(id).current_images(); }
  ImageId IdOf(uint64_t step) {
    for (const auto& [image_id, image] : harness->observer().images) {
      if (Value(image.checkpoint.step) == step) return image_id;
    }
    return {};
  }
  void ExpectDurable(uint64_t step) {
    ASSERT_TRUE(Image(step).durable_path) << step;
    EXPECT_THAT(harness->disk().Contents(*Image(step).durable_path),
                IsOkAndHolds(harness->OracleImage(id, step)));
  }
  void FillGrantedBlocks(int fill) {
    for (uint32_t slot = 0; slot < trainer().registration().slot_count; ++slot) {
      if (trainer().registration().slots[slot].state.load() != abi::SlotState::kGranted) continue;
      for (uint32_t block = 0; block < trainer().block_count(); ++block) {
        std::memset(trainer().Block(slot, block).data(), fill, 4096);
      }
    }
  }
  // A whole save, to the end.
  void ExpectWorks(uint64_t step) {
    harness->Settle();
    ASSERT_TRUE(trainer().Save(step, BlobsAt(step)));
    harness->Settle();
    ExpectDurable(step);
  }

  std::unique_ptr<CaptureHarness> harness;
  SessionId id{};
};

TEST_F(RankImagesTest, WhatIsDurableIsTheImageByDefinition) {
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    HarnessOptions options;
    options.seed = seed;
    Make(options);
    EXPECT_GE(trainer().block_count(), 6u);
    for (uint64_t step = 1; step <= 6; ++step) {
      harness->Settle();
      // Blocks come with whatever was in them.
      FillGrantedBlocks(static_cast<int>(0xa0 + step));
      const std::optional<uint32_t> slot = trainer().BeginSave(step, BlobsAt(step));
      ASSERT_TRUE(slot);
      // In pieces, so that blocks are on their way while others are being copied.
      while (!trainer().CopyBlocks(*slot, 1 + static_cast<uint32_t>(step % 3))) harness->Settle();
      harness->Settle();
      EXPECT_FALSE(Image(step).sealed);  // every block is there, but the trainer has not said so
      trainer().Finish(*slot);
      harness->Settle();
      ASSERT_TRUE(Image(step).sealed);
      ExpectDurable(step);
      EXPECT_EQ(Image(step).sealed->blob_bytes[0], BlobsAt(step)[0]->size());
      if (step > 1) images().Release(IdOf(step - 1));
    }
    harness->Settle();
    EXPECT_EQ(images().held_image_count(), 1u);
    EXPECT_EQ(images().pending_image_count(), 0u);
    EXPECT_THAT(harness->warnings(), IsEmpty());
  }
}

TEST_F(RankImagesTest, ReportsTellTheTrainer) {
  Make();
  const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
  const uint32_t events = trainer().page().agent_events.load();
  harness->Settle();
  EXPECT_GT(trainer().page().agent_events.load(), events);
  EXPECT_EQ(StateOf(trainer(), 5), 1u);  // capturing
  trainer().CopyBlocks(*slot, 2);
  harness->Settle();
  EXPECT_GE(trainer().ReportOf(5)->blocks_captured, 2u);
  trainer().CopyBlocks(*slot);
  trainer().Finish(*slot);
  harness->Settle();
  const ScriptedTrainer::Report report = *trainer().ReportOf(5);
  EXPECT_EQ(report.state, 2u);  // captured
  EXPECT_EQ(report.block_count, trainer().block_count());
  EXPECT_EQ(report.blocks_captured, trainer().block_count());
  EXPECT_EQ(report.blocks_flushed, trainer().block_count());
  EXPECT_GT(report.capture_ns, 0);
  EXPECT_GT(report.flush_ns, 0);
  harness->session(id).reports().SetCommitted(Step{5}, Survives::kPower,
                                              harness->executor().Elapsed());
  EXPECT_EQ(StateOf(trainer(), 5), 4u);
  EXPECT_EQ(trainer().page().committed_power_step.load(), 5u);
  EXPECT_EQ(trainer().page().committed_process_step.load(), 5u);
}

// A block is written while later ones are still being copied.
TEST_F(RankImagesTest, FlushRunsBesideTheCapture) {
  Make();
  const std::optional<uint32_t> slot = trainer().BeginSave(1, BlobsAt(1));
  harness->Settle();
  trainer().CopyBlocks(*slot, 3);
  harness->Settle();
  EXPECT_GE(trainer().ReportOf(1)->blocks_flushed, 3u);
  EXPECT_LT(trainer().ReportOf(1)->blocks_flushed, trainer().block_count());
  EXPECT_FALSE(Image(1).sealed);
}

TEST_F(RankImagesTest, MemoryHoldsTwoImagesAndGrantsAgainAfterARelease) {
  Make();
  ASSERT_TRUE(trainer().Save(1, BlobsAt(1)));
  harness->Settle();
  ASSERT_TRUE(trainer().Save(2, BlobsAt(2)));
  harness->Settle();
  EXPECT_FALSE(trainer().HasGrant());
  EXPECT_TRUE(images().IsStarved());
  EXPECT_FALSE(trainer().Save(3, BlobsAt(3)));
  images().Release(IdOf(1));
  harness->Settle();
  EXPECT_TRUE(trainer().HasGrant());
  EXPECT_FALSE(images().IsStarved());
  ExpectWorks(3);
  EXPECT_THAT(images().Block(IdOf(1), 0), StatusIs(absl::StatusCode::kNotFound));
  ASSERT_OK_AND_ASSIGN(const RankImages::BlockView block, images().Block(IdOf(3), 1));
  const std::string oracle = harness->OracleImage(id, 3).substr(4096, 4096);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(block.bytes.data()), block.bytes.size()),
            oracle);
  EXPECT_EQ(block.crc32c, Image(3).sealed->block_crc32c[1]);
  EXPECT_EQ(block.bytes.data(), images().memory().data() + block.memory_offset);
  EXPECT_THAT(images().Block(IdOf(3), trainer().block_count()),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

// An image without a flush is sealed and waits.
TEST_F(RankImagesTest, FlushMayBeAllowedLate) {
  HarnessOptions options;
  options.flush_by_itself = false;
  Make(options);
  trainer().Save(7, BlobsAt(7));
  harness->Settle();
  EXPECT_TRUE(Image(7).sealed);
  EXPECT_THAT(harness->ImageFiles(), IsEmpty());
  EXPECT_EQ(images().pending_image_count(), 1u);
  images().StartFlush(IdOf(7), "/root/late.h5");
  images().StartFlush(IdOf(7), "/root/twice.h5");  // the first one counts
  harness->Settle();
  ExpectDurable(7);
  EXPECT_THAT(harness->ImageFiles(), ElementsAre("/root/late.h5"));
}

// ---- Every way to be void. After each, the trainer's next save works.

struct VoidCase {
  const char* name;
  std::function<void(CaptureHarness&, SessionId, uint32_t slot)> spoil;
  const char* text;
};

TEST_F(RankImagesTest, EveryWayToBeVoidIsNamedAndTheNextSaveWorks) {
  const auto shared = [](CaptureHarness& h, SessionId s) -> abi::RegistrationMemory& {
    return h.trainer(s).registration();
  };
  const std::vector<VoidCase> cases = {
      {"trainer gives up",
       [](CaptureHarness& h, SessionId s, uint32_t slot) {
         h.trainer(s).GiveUp(slot, 10, "tensor \"w\xc3\xbc\" changed\x01 under capture");
       },
       "tensor \"w\xc3\xbc\" changed? under capture"},
      {"gives up without a reason",
       [](CaptureHarness& h, SessionId s, uint32_t slot) { h.trainer(s).GiveUp(slot, 9999, ""); },
       "without a reason"},
      {"state jumps",
       [&](CaptureHarness& h, SessionId s, uint32_t slot) {
         shared(h, s).slots[slot].state.store(static_cast<abi::SlotState>(77));
       },
       "found 77"},
      {"state goes back",
       [&](CaptureHarness& h, SessionId s, uint32_t slot) {
         shared(h, s).slots[slot].state.store(abi::SlotState::kGranted);
       },
       "found 1"},
      {"another generation",
       [&](CaptureHarness& h, SessionId s, uint32_t slot) {
         shared(h, s).slots[slot].generation.fetch_add(1);
       },
       "slot generation: expected 4294967297, found 4294967298"},
      {"a mark that is none",
       [](CaptureHarness& h, SessionId s, uint32_t slot) {
         h.trainer(s).BlockDone(slot, h.trainer(s).block_count() - 1).store(5);
       },
       "expected 0 or 1, found 5"},
      {"its device may still write",
       [](CaptureHarness& h, SessionId s, uint32_t slot) {
         h.trainer(s).GiveUp(slot, 13, "device 0 (H100): CUDA_ERROR_ECC_UNCORRECTABLE (214)",
                             abi::SlotState::kAbandoned);
       },
       "CUDA_ERROR_ECC_UNCORRECTABLE"},
      {"captured too early",
       [](CaptureHarness& h, SessionId s, uint32_t slot) { h.trainer(s).Finish(slot); },
       "is not done"},
      {"voided by the job",
       [](CaptureHarness& h, SessionId s, uint32_t) {
         RankImages& images = *h.session(s).current_images();
         images.Void(h.observer().images.begin()->first,
                     absl::AlreadyExistsError("step 5 is there"));
       },
       "step 5 is there"},
  };
  for (const VoidCase& spoiled : cases) {
    SCOPED_TRACE(spoiled.name);
    Make();
    const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
    trainer().CopyBlocks(*slot, 2);
    harness->Settle();
    spoiled.spoil(*harness, id, *slot);
    harness->Settle();
    ASSERT_TRUE(Image(5).void_status);
    EXPECT_THAT(std::string(Image(5).void_status->message()), HasSubstr(spoiled.text));
    EXPECT_EQ(Image(5).afterwards, ImageObserver::Afterwards::kGone);
    EXPECT_EQ(StateOf(trainer(), 5), 5u);
    EXPECT_THAT(trainer().ReportOf(5)->text, HasSubstr(spoiled.text));
    EXPECT_THAT(harness->ImageFiles(), IsEmpty());  // the begun file is gone
    // While the trainer may still write, its blocks are not given to anybody.
    const bool trainer_stopped = std::string(spoiled.name).find("gives up") != std::string::npos ||
                                 std::string(spoiled.name) == "captured too early";
    const uint32_t quarantined =
        harness->session(id).memory(1)->pool().count(BlockState::kQuarantined);
    EXPECT_EQ(quarantined, trainer_stopped ? 0 : trainer().block_count());
    trainer().GiveUp(*slot, 10, "done with it");
    harness->Settle();
    EXPECT_EQ(harness->session(id).memory(1)->pool().count(BlockState::kQuarantined), 0u);
    ExpectWorks(6);
    ExpectWorks(7);
    EXPECT_EQ(images().held_image_count(), 2u);
  }
}

// A capture that was given up before the agent had heard of it, while a device may still write: the
// blocks are not granted again before the device, or the process, is done.
TEST_F(RankImagesTest, BlocksThatADeviceMayWriteAreFreeWhenItIsDoneOrTheProcessGone) {
  for (const bool process_dies : {false, true}) {
    SCOPED_TRACE(process_dies);
    Make();
    const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
    trainer().GiveUp(*slot, 13, "lost", abi::SlotState::kAbandoned);
    harness->Settle();
    EXPECT_EQ(StateOf(trainer(), 5), 5u);
    const auto quarantined = [&] {
      return harness->session(id).memory(1)->pool().count(BlockState::kQuarantined);
    };
    EXPECT_EQ(quarantined(), trainer().block_count());
    ExpectWorks(6);
    EXPECT_EQ(quarantined(), trainer().block_count());
    if (process_dies) {
      harness->session(id).ProcessDied();
    } else {
      trainer().GiveUp(*slot, 13, "lost");
    }
    harness->Settle();
    EXPECT_EQ(quarantined(), 0u);
  }
}

// What cannot even begin.
TEST_F(RankImagesTest, AGarbageBeginningIsVoid) {
  Make();
  // A blob longer than its area: the save is named and void.
  std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
  auto* blob_bytes = reinterpret_cast<uint64_t*>(trainer().registration_bytes().data() +
                                                 trainer().registration().blob_bytes_offset);
  blob_bytes[*slot * 3] = 101;
  harness->Settle();
  ASSERT_TRUE(Image(5).void_status);
  EXPECT_THAT(std::string(Image(5).void_status->message()),
              HasSubstr("blob \"rng\": expected at most 100 bytes, found 101"));
  trainer().GiveUp(*slot, 10, "");
  ExpectWorks(6);
  // No step: there is no save to speak of.
  const size_t told = harness->observer().log.size();
  slot = trainer().BeginSave(8, BlobsAt(8));
  trainer().registration().slots[*slot].step.store(abi::kNoStep);
  harness->Settle();
  EXPECT_EQ(harness->observer().log.size(), told);
  trainer().GiveUp(*slot, 10, "");
  ExpectWorks(9);
}

// Bytes that change behind the checksum: found by the second look, at any block.
TEST_F(RankImagesTest, ABlockThatChangesAfterItsChecksumVoidsTheImage) {
  HarnessOptions options;
  options.flush_by_itself = false;
  for (uint32_t block = 0;; ++block) {
    Make(options);
    if (block == trainer().block_count()) break;
    const std::optional<uint32_t> slot = trainer().Save(5, BlobsAt(5));
    harness->Settle();
    ASSERT_TRUE(Image(5).sealed);
    trainer().Block(*slot, block)[17] ^= std::byte{1};
    images().StartFlush(IdOf(5), "/root/x.h5");
    harness->Settle();
    ASSERT_TRUE(Image(5).void_status) << block;
    EXPECT_THAT(std::string(Image(5).void_status->message()),
                HasSubstr(absl::StrCat("block ", block, " of the image changed")));
    EXPECT_THAT(harness->ImageFiles(), IsEmpty());
    trainer().Save(6, BlobsAt(6));
    harness->Settle();
    images().StartFlush(IdOf(6), "/root/y.h5");
    harness->Settle();
    ExpectDurable(6);
  }
}

// ---- Death of the trainer

TEST_F(RankImagesTest, DeathDuringTheCaptureVoidsAndFreesEverything) {
  for (uint32_t copied = 0;; ++copied) {
    Make();
    const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
    if (copied % 2 == 0) harness->Settle();  // with and without having been seen
    const bool all_done = trainer().CopyBlocks(*slot, copied);
    harness->KillProcess(id);
    harness->session(id).ProcessDied();
    harness->Settle();
    if (all_done) {
      // Dead between the last block and kCaptured: captured_ns says that it is whole.
      ExpectDurable(5);
      break;
    }
    ASSERT_TRUE(Image(5).void_status);
    EXPECT_THAT(std::string(Image(5).void_status->message()),
                AllOf(HasSubstr("died during the capture"), HasSubstr("blocks were done")));
    EXPECT_TRUE(harness->session(id).IsFinished());
    EXPECT_THAT(harness->ImageFiles(), IsEmpty());
    const BlockPool& pool = harness->session(id).memory(1)->pool();
    EXPECT_EQ(pool.count(BlockState::kFree), pool.block_count());
  }
}

// check_source = all: whole, but never compared, and nobody is left to do it.
TEST_F(RankImagesTest, AnImageThatMustBeComparedDiesWithItsTrainer) {
  for (const bool seen : {true, false}) {
    for (const bool compared : {true, false}) {
      SCOPED_TRACE(absl::StrCat(seen, " ", compared));
      Make();
      const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
      trainer().registration().slots[*slot].must_compare.store(1);
      if (seen) harness->Settle();
      ASSERT_TRUE(trainer().CopyBlocks(*slot));
      if (seen) harness->Settle();
      if (compared) trainer().Finish(*slot);
      harness->KillProcess(id);
      harness->session(id).ProcessDied();
      harness->Settle();
      if (compared) {
        ExpectDurable(5);
        continue;
      }
      ASSERT_TRUE(Image(5).void_status);
      EXPECT_FALSE(Image(5).sealed);
      EXPECT_THAT(std::string(Image(5).void_status->message()),
                  HasSubstr("died before it had compared the image"));
      EXPECT_THAT(harness->ImageFiles(), IsEmpty());
      EXPECT_TRUE(harness->session(id).IsFinished());
    }
  }
}

TEST_F(RankImagesTest, WhatWasCapturedSurvivesItsTrainer) {
  Make();
  ASSERT_TRUE(trainer().Save(5, BlobsAt(5)));  // the doorbell was never heard
  harness->KillProcess(id);
  harness->session(id).ProcessDied();
  harness->Settle();
  ExpectDurable(5);
  EXPECT_FALSE(trainer().HasGrant());  // nothing is granted to the dead
  EXPECT_FALSE(harness->session(id).IsFinished());
  images().Release(IdOf(5));
  harness->Settle();
  EXPECT_TRUE(harness->session(id).IsFinished());
}

// A fenced session's capture is void, and what it begins afterwards is the observer's to void.
TEST_F(RankImagesTest, FencedSessionsGrantNothing) {
  Make();
  trainer().Save(1, BlobsAt(1));
  harness->Settle();
  const std::optional<uint32_t> slot = trainer().BeginSave(2, BlobsAt(2));
  harness->Settle();
  harness->session(id).Fence(Attempt{2});
  harness->Settle();
  EXPECT_EQ(trainer().page().fenced_by.load(), 2u);
  EXPECT_THAT(std::string(Image(2).void_status->message()), HasSubstr("fenced: attempt 2"));
  EXPECT_TRUE(Image(1).durable_path);
  trainer().CopyBlocks(*slot);
  trainer().Finish(*slot);
  harness->Settle();
  EXPECT_FALSE(trainer().HasGrant());
}

// ---- Release at any time

TEST_F(RankImagesTest, ReleaseAtEveryStepLeavesNothingBehind) {
  size_t released_unfinished = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    HarnessOptions options;
    options.seed = seed;
    Make(options);
    ASSERT_TRUE(trainer().Save(5, BlobsAt(5)));
    harness->Ring();
    for (uint64_t i = 0; i < seed; ++i) harness->executor().RunOne();
    const ImageId image = IdOf(5);
    if (image.generation == 0) continue;  // not told yet
    released_unfinished += Image(5).durable_path ? 0 : 1;
    const bool was_durable = images().counters()[0].state == "durable";
    images().Release(image);
    images().Release(image);  // twice is harmless
    harness->Settle();
    EXPECT_EQ(images().held_image_count(), 0u);
    // Only what was durable may have been published.
    EXPECT_THAT(harness->ImageFiles(), SizeIs(was_durable ? 1 : 0));
    ExpectWorks(6);
  }
  EXPECT_GT(released_unfinished, 5u);
}

// What is left of a void image (a stamp, checksums, writes on their way) never touches the blocks'
// next image, whenever it is given up. One image of memory, so that it is the same blocks.
TEST_F(RankImagesTest, AVoidImageNeverTouchesTheNextOne) {
  size_t given_up_under_way = 0;
  for (uint64_t seed = 0; seed < 120; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    HarnessOptions options;
    options.seed = seed;
    options.images_per_rank_max = 1;
    Make(options);
    const std::optional<uint32_t> slot = trainer().BeginSave(5, BlobsAt(5));
    trainer().CopyBlocks(*slot, static_cast<uint32_t>(seed % 7));
    harness->Ring();
    harness->RunSteps(seed % 23);
    trainer().GiveUp(*slot, 10, "given up");
    harness->Ring();
    given_up_under_way += harness->disk().in_flight_count() > 0 ? 1 : 0;
    for (int i = 0; i < 2000 && !trainer().HasGrant(); ++i) harness->RunSteps(1);
    ASSERT_TRUE(trainer().HasGrant());
    ASSERT_TRUE(trainer().Save(6, BlobsAt(6)));
    harness->Settle();
    ExpectDurable(6);
    EXPECT_TRUE(Image(5).void_status);
    EXPECT_THAT(harness->ImageFiles(), SizeIs(1));
  }
  EXPECT_GT(given_up_under_way, 5u);
}

// ---- Staging

TEST_F(RankImagesTest, StagingTakesAnUnusedGrantBackAndReturnsIt) {
  Make();
  const size_t blocks = harness->session(id).memory(1)->pool().block_count();
  const std::vector<uint64_t> taken = images().TakeStaging(blocks * 2);
  EXPECT_FALSE(taken.empty());
  const std::vector<uint64_t> more = images().TakeStaging(1);  // from the grant
  EXPECT_THAT(more, SizeIs(1));
  harness->Settle();
  EXPECT_FALSE(trainer().HasGrant());
  images().ReturnStaging(taken);
  images().ReturnStaging(more);
  harness->Settle();
  EXPECT_TRUE(trainer().HasGrant());
  ExpectWorks(1);
}

}  // namespace
}  // namespace holdfast
