// Sessions: memory and its budget, reuse by the next attempt, registrations that replace each
// other, what is kept, and what a recovery drops.
#include "checkpoint/session.h"

#include <sys/resource.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "checkpoint/capture_harness.h"
#include "checkpoint/image_record.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr Rank kRank0{0};

void SaveAndExpectDurable(CaptureHarness& harness, SessionId id, uint64_t step) {
  harness.Settle();
  ASSERT_TRUE(harness.trainer(id).Save(step, BlobsAt(step))) << step;
  harness.Settle();
  const RecordingObserver::Image* image =
      harness.observer().Of(harness.session(id).identity().rank, step);
  ASSERT_NE(image, nullptr);
  ASSERT_TRUE(image->durable_path) << step;
  EXPECT_THAT(harness.disk().Contents(*image->durable_path),
              IsOkAndHolds(harness.OracleImage(id, step)));
}

ImageId IdOf(CaptureHarness& harness, uint64_t step) {
  for (const auto& [id, image] : harness.observer().images) {
    if (Value(image.checkpoint.step) == step) return id;
  }
  return {};
}

uint64_t ImageBytes() {
  CaptureHarness harness({});
  return harness.trainer(harness.OpenAndRegister(kRank0)).image_bytes();
}

TEST(SessionTest, BudgetIsHardAndSaysWhatItNeeds) {
  const uint64_t image_bytes = ImageBytes();
  HarnessOptions options;
  options.budget_bytes = image_bytes - 4096;
  CaptureHarness small(options);
  EXPECT_THAT(small.Register(small.Open(kRank0)),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr(absl::StrCat(image_bytes)),
                             HasSubstr(absl::StrCat(image_bytes - 4096)))));
  EXPECT_EQ(small.budget().used_bytes(), 0u);

  // One image is enough to work, one at a time.
  options.budget_bytes = image_bytes + 4096;
  CaptureHarness one(options);
  const SessionId id = one.OpenAndRegister(kRank0);
  EXPECT_EQ(one.trainer(id).registration().slot_count, 1u);
  SaveAndExpectDurable(one, id, 1);
  EXPECT_FALSE(one.trainer(id).HasGrant());
  EXPECT_TRUE(one.session(id).current_images()->IsStarved());
  one.session(id).current_images()->Release(IdOf(one, 1));
  SaveAndExpectDurable(one, id, 2);
  EXPECT_LE(one.budget().used_bytes(), options.budget_bytes);
}

TEST(SessionTest, TheNextAttemptUsesTheSameMemoryOnceTheOldProcessIsDead) {
  CaptureHarness harness({});
  const SessionId old_id = harness.OpenAndRegister(kRank0);
  SaveAndExpectDurable(harness, old_id, 1);
  RankMemory* memory = harness.session(old_id).memory(1);

  // The old process lives: a fresh memory.
  harness.session(old_id).Fence(Attempt{2});
  const SessionId second = harness.OpenAndRegister(kRank0, 1, Attempt{2});
  EXPECT_NE(harness.session(second).memory(1), memory);
  SaveAndExpectDurable(harness, second, 2);

  // Dead: its memory serves, its image stays in it.
  harness.KillProcess(old_id);
  harness.session(old_id).ProcessDied();
  harness.KillProcess(second);
  harness.session(second).ProcessDied();
  harness.Settle();
  const uint64_t used = harness.budget().used_bytes();
  const SessionId third = harness.OpenAndRegister(kRank0, 1, Attempt{3});
  EXPECT_EQ(harness.budget().used_bytes(), used);
  SaveAndExpectDurable(harness, third, 3);
  ASSERT_OK(harness.session(old_id).current_images()->Block(IdOf(harness, 1), 0));
  ASSERT_OK(harness.session(second).current_images()->Block(IdOf(harness, 2), 0));

  // When nothing of a session is left, it can go; memory goes with its last user.
  harness.session(old_id).current_images()->Release(IdOf(harness, 1));
  harness.session(second).current_images()->Release(IdOf(harness, 2));
  harness.Settle();
  EXPECT_TRUE(harness.session(old_id).IsFinished());
  EXPECT_TRUE(harness.session(second).IsFinished());
  EXPECT_FALSE(harness.session(third).IsFinished());
}

// The machine has less memory than the budget allows.
TEST(SessionTest, WhatCannotBePrefaultedIsRefusedAndCanBeAskedForAgain) {
  int failures_left = 2;
  HarnessOptions options;
  options.populate = [&](int, uint64_t, std::span<std::byte>) {
    return --failures_left >= 0 ? absl::ResourceExhaustedError("ENOMEM") : absl::OkStatus();
  };
  CaptureHarness harness(options);
  const SessionId id = harness.Open(kRank0);
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(harness.Register(id),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("ENOMEM")));
    EXPECT_EQ(harness.budget().used_bytes(), 0u);
    EXPECT_EQ(harness.session(id).current_registration_id(), 0u);
    EXPECT_THAT(harness.keeper().Names(), SizeIs(3));  // the session alone
  }
  ASSERT_OK(harness.Register(id));
  SaveAndExpectDurable(harness, id, 1);
}

// The process runs out of descriptors in the middle of it, at any place.
TEST(SessionTest, ARegistrationThatFailsLeavesNothingInTheKeeper) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  int failures = 0;
  // One is the trainer's, for the document.
  for (rlim_t spare = 1; spare < 40; ++spare) {
    CaptureHarness harness({});
    const SessionId id = harness.Open(kRank0);
    const int next = dup(0);
    ASSERT_GE(next, 0);
    close(next);
    const rlimit small{static_cast<rlim_t>(next) + spare, before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &small), 0);
    const absl::Status registered = harness.Register(id);
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    if (registered.ok()) break;
    ++failures;
    EXPECT_THAT(harness.keeper().Names(), SizeIs(3)) << spare << ": " << registered;
    EXPECT_EQ(harness.budget().used_bytes(), 0u) << spare;
    ASSERT_OK(harness.Register(id)) << spare;
  }
  EXPECT_GE(failures, 3);
  EXPECT_LT(failures, 40);
}

TEST(SessionTest, ForgettingLeavesNothingInTheKeeper) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  EXPECT_THAT(harness.keeper().Names(),
              ElementsAre("memory/0000000000000001", "session/0000000000000001/1/document",
                          "session/0000000000000001/1/memory", "session/0000000000000001/1/record",
                          "session/0000000000000001/identity", "session/0000000000000001/page",
                          "session/0000000000000001/process"));
  harness.KillProcess(id);
  harness.session(id).ProcessDied();
  harness.Settle();
  ASSERT_TRUE(harness.session(id).IsFinished());
  harness.session(id).Forget();
  EXPECT_THAT(harness.keeper().Names(), IsEmpty());
}

// hf_save right behind hf_register, without waiting for room, is not refused.
TEST(SessionTest, WhoHasRegisteredHasAGrant) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  EXPECT_TRUE(harness.granted_when_answered());
  harness.Settle();
  ASSERT_OK(harness.Register(id));
  EXPECT_TRUE(harness.granted_when_answered());
}

TEST(SessionTest, ASecondRegistrationReplacesTheFirstWhoseImagesGoOn) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  ASSERT_TRUE(harness.trainer(id).Save(1, BlobsAt(1)));
  harness.Ring();
  harness.RunSteps(3);  // still on its way
  ASSERT_OK(harness.Register(id));
  EXPECT_EQ(harness.session(id).current_registration_id(), 2u);
  // The first registration's image is durable, and then its registration goes.
  harness.Settle();
  ASSERT_TRUE(harness.observer().Of(kRank0, 1)->durable_path);
  SaveAndExpectDurable(harness, id, 2);
  EXPECT_NE(harness.session(id).images(1), nullptr);
  harness.session(id).images_of(IdOf(harness, 1))->Release(IdOf(harness, 1));
  harness.Settle();
  EXPECT_EQ(harness.session(id).images(1), nullptr);
  EXPECT_THAT(harness.keeper().Names(), Not(Contains(HasSubstr("/1/"))));
  // A third one, in the same memory.
  const uint64_t used = harness.budget().used_bytes();
  ASSERT_OK(harness.Register(id));
  EXPECT_EQ(harness.budget().used_bytes(), used);
  harness.session(id).images_of(IdOf(harness, 2))->Release(IdOf(harness, 2));
  SaveAndExpectDurable(harness, id, 3);
}

// The worker died before the reply to a second registration: the trainer still uses the first.
TEST(SessionTest, ATrainerMayResumeWithTheRegistrationItKnows) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  const std::string document = EncodeDocument(TestLayout(1), TestBuffers(), TestBlobs());
  harness.session(id).Prepare(SealedDocument(document), document.size(), [](const auto&) {});
  harness.executor().RunUntilIdle();
  harness.session(id).Register([](const auto&) { ADD_FAILURE() << "the reply was lost"; });
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_EQ(harness.session(id).current_registration_id(), 2u);
  EXPECT_FALSE(harness.session(id).Resume(7));
  EXPECT_TRUE(harness.session(id).Resume(1));
  EXPECT_TRUE(harness.session(id).Resume(1));
  harness.Settle();
  EXPECT_EQ(harness.session(id).current_registration_id(), 1u);
  SaveAndExpectDurable(harness, id, 1);
  EXPECT_EQ(harness.session(id).images(2), nullptr);
}

TEST(SessionTest, AnIdentityComesBackWholeWithItsFlags) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(Rank{1}, 3, Attempt{9});
  const SessionIdentity identity = harness.session(id).identity();
  harness.session(id).Close();
  harness.session(id).Fence(Attempt{10});
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_EQ(harness.session(id).identity(), identity);
  EXPECT_TRUE(harness.session(id).is_closed());
  EXPECT_TRUE(harness.session(id).is_fenced());
  EXPECT_FALSE(harness.session(id).is_open());
  harness.KillProcess(id);
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_TRUE(harness.session(id).is_process_dead());
}

// Any one descriptor is missing: the rest goes on, nothing crashes, nothing foreign is touched.
TEST(SessionTest, ALostDescriptorDropsOnlyWhatNeedsIt) {
  CaptureHarness probe({});
  probe.OpenAndRegister(kRank0, 2);
  const size_t per_session = probe.keeper().Names().size();
  for (size_t lost = 0; lost < per_session; ++lost) {
    CaptureHarness harness({});
    const SessionId first = harness.OpenAndRegister(kRank0, 2);
    const SessionId second = harness.OpenAndRegister(Rank{1}, 2);
    std::vector<std::string> names;
    for (const std::string& name : harness.keeper().Names()) {
      if (name.find("0000000000000001") != std::string::npos) names.push_back(name);
    }
    ASSERT_THAT(names, SizeIs(per_session));
    SCOPED_TRACE(names[lost]);
    harness.keeper().Drop(names[lost]);
    harness.Crash(SimDisk::InFlight::kAll);
    SaveAndExpectDurable(harness, second, 5);
    // Nothing useless is kept of the first.
    const bool has_session = harness.HasSession(first);
    const bool has_images = has_session && harness.session(first).current_images() != nullptr;
    EXPECT_FALSE(has_images);
    size_t left = 0;
    for (const std::string& name : harness.keeper().Names()) {
      left += name.find("0000000000000001") != std::string::npos ? 1 : 0;
    }
    EXPECT_EQ(left, has_session ? 3u : 0u);
    // A session without a registration may register again.
    if (has_session) {
      ASSERT_OK(harness.Register(first));
      SaveAndExpectDurable(harness, first, 6);
    }
  }
}

// A slot of the record is damaged: its image is dropped with a warning, the other one goes on. The
// memory is not granted from any more, because who writes where is not known; a new registration
// gets another one.
TEST(SessionTest, ADamagedRecordDropsOnlyItsImage) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  SaveAndExpectDurable(harness, id, 1);
  SaveAndExpectDurable(harness, id, 2);
  const ImageId damaged = IdOf(harness, 1);
  for (const KeptDescriptor& kept : harness.keeper().HandOver()) {
    if (kept.name.find("/record") == std::string::npos) continue;
    // Both copies of the slot: 1624 bytes each, behind the 128 bytes of the header.
    for (int copy = 0; copy < 2; ++copy) {
      const char garbage = '\x5a';
      const off_t at = 128 + (damaged.slot_index * 2 + copy) * 1624 + 40;
      ASSERT_EQ(pwrite(kept.fd.get(), &garbage, 1, at), 1);
    }
  }
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_THAT(harness.warnings(), ElementsAre(HasSubstr("an image was dropped")));
  EXPECT_THAT(harness.session(id).images_of(damaged)->Block(damaged, 0),
              StatusIs(absl::StatusCode::kNotFound));
  ASSERT_OK(harness.session(id).current_images()->Block(IdOf(harness, 2), 0));
  harness.session(id).current_images()->Release(IdOf(harness, 2));
  harness.Settle();
  // What the known image held is free; what the lost one had stays untouched.
  const BlockPool& pool = harness.session(id).memory(1)->pool();
  EXPECT_GE(pool.count(BlockState::kAbsent), harness.trainer(id).block_count());
  ASSERT_OK(harness.Register(id));
  EXPECT_NE(harness.session(id).memory(2), harness.session(id).memory(1));
  SaveAndExpectDurable(harness, id, 3);
  SaveAndExpectDurable(harness, id, 4);
}

// A checksum in the record is wrong: the image is not called sealed again.
TEST(SessionTest, ADamagedChecksumVoidsTheImage) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  SaveAndExpectDurable(harness, id, 1);
  const ImageId image = IdOf(harness, 1);
  for (KeptDescriptor& kept : harness.keeper().HandOver()) {
    if (kept.name.find("/record") == std::string::npos) continue;
    ASSERT_OK_AND_ASSIGN(const auto record, ImageRecord::Reopen(std::move(kept.fd)));
    const std::optional<uint32_t> crc32c = record->Checksum(image.slot_index, 2, image.generation);
    ASSERT_TRUE(crc32c);
    record->SetChecksum(image.slot_index, 2, image.generation, *crc32c ^ 1);
  }
  harness.Crash(SimDisk::InFlight::kAll);
  const RecordingObserver::Image* told = harness.observer().Of(kRank0, 1);
  EXPECT_FALSE(told->sealed);
  ASSERT_TRUE(told->void_status);
  EXPECT_THAT(*told->void_status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("root")));
  SaveAndExpectDurable(harness, id, 2);
}

// Two images claim the same blocks: only one can be right, and nobody can say which bytes are
// whose.
TEST(SessionTest, BlocksThatTwoImagesClaimBelongToTheFirst) {
  CaptureHarness harness({});
  const SessionId id = harness.OpenAndRegister(kRank0);
  SaveAndExpectDurable(harness, id, 1);
  SaveAndExpectDurable(harness, id, 2);
  for (KeptDescriptor& kept : harness.keeper().HandOver()) {
    if (kept.name.find("/record") == std::string::npos) continue;
    ASSERT_OK_AND_ASSIGN(const auto record, ImageRecord::Reopen(std::move(kept.fd)));
    SlotRecord second = *record->slot(1);
    second.block_table[3] = record->slot(0)->block_table[3];
    record->Update(1, second);
  }
  harness.Crash(SimDisk::InFlight::kAll);
  EXPECT_THAT(harness.warnings(), ElementsAre(HasSubstr("belong to another image")));
  RankImages& images = *harness.session(id).current_images();
  const ImageId first = IdOf(harness, IdOf(harness, 1).slot_index == 0 ? 1 : 2);
  const ImageId second = IdOf(harness, IdOf(harness, 1).slot_index == 0 ? 2 : 1);
  ASSERT_OK(images.Block(first, 3));
  EXPECT_THAT(images.Block(second, 3), StatusIs(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace holdfast
