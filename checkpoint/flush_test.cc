// Storage that fails: every single operation of a flush, once and for ever. An image is either
// durable under the name that was told, with the right bytes, or given up with all reasons; and no
// unpublished file is left.
#include "checkpoint/flush.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "checkpoint/capture_harness.h"
#include "format/checkpoint_names.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr Rank kRank3{3};

TEST(FlushTest, NamesOfRetriesAreThoseThatReadersOfADirectoryKnow) {
  for (const uint32_t number : {0, 1, 2, 17}) {
    EXPECT_EQ(NumberedFileName("/r/" + ImageFileName(kRank3), number),
              "/r/" + ImageFileName(kRank3, number));
  }
  EXPECT_EQ(NumberedFileName("/r/rank-00003.h5", 2), "/r/rank-00003.r2.h5");
  EXPECT_EQ(NumberedFileName("/a.b/image", 1), "/a.b/image.r1");
}

constexpr Rank kRank0{0};

struct Scene {
  explicit Scene(uint64_t seed = 0) {
    HarnessOptions options;
    options.seed = seed;
    harness = std::make_unique<CaptureHarness>(options);
    id = harness->OpenAndRegister(kRank0);
  }
  const RecordingObserver::Image& Image(uint64_t step) {
    const RecordingObserver::Image* image = harness->observer().Of(kRank0, step);
    CHECK(image != nullptr);
    return *image;
  }
  void Save(uint64_t step) {
    CHECK(harness->trainer(id).Save(step, BlobsAt(step)).has_value());
    harness->Settle();
  }
  void ExpectDurable(uint64_t step) {
    ASSERT_TRUE(Image(step).durable_path);
    EXPECT_THAT(harness->disk().Contents(*Image(step).durable_path),
                IsOkAndHolds(harness->OracleImage(id, step)));
  }
  RankImages& images() { return *harness->session(id).current_images(); }

  std::unique_ptr<CaptureHarness> harness;
  SessionId id{};
};

const absl::Status kEio = absl::DataLossError("EIO");

TEST(FlushTest, OneFailureOfAnyOperationIsRetriedUnderANewName) {
  using Operation = SimDisk::Operation;
  for (const Operation operation :
       {Operation::kCreateSized, Operation::kRingWrite, Operation::kRingSync}) {
    for (uint64_t index = 0;; ++index) {
      SCOPED_TRACE(testing::Message()
                   << "operation " << static_cast<int>(operation) << " number " << index);
      Scene scene(index);
      SimDisk& disk = scene.harness->disk();
      disk.FailOperation(operation, index, kEio);
      scene.Save(3);
      scene.ExpectDurable(3);
      const bool failed = disk.fault_count() > 0;
      EXPECT_THAT(scene.harness->ImageFiles(), ElementsAre(failed ? "/root/a1.s3.rank-00000.r1.h5"
                                                                  : "/root/a1.s3.rank-00000.h5"));
      if (!failed) {
        // As many as there are: one per block, one sync, one file.
        const uint64_t blocks = scene.harness->trainer(scene.id).block_count();
        EXPECT_EQ(index, operation == Operation::kRingWrite ? blocks : 1u);
        break;
      }
    }
  }
}

// The same for two failures, at any pair of syncs and writes: the third try is the last.
TEST(FlushTest, StorageIsGivenUpAfterThreeTriesAndTheImageStaysInMemory) {
  for (const SimDisk::Operation operation :
       {SimDisk::Operation::kCreateSized, SimDisk::Operation::kRingWrite,
        SimDisk::Operation::kRingSync}) {
    SCOPED_TRACE(testing::Message() << "operation " << static_cast<int>(operation));
    Scene scene;
    SimDisk& disk = scene.harness->disk();
    disk.FailOperationsFrom(operation, 0, absl::ResourceExhaustedError("ENOSPC of the test"));
    scene.Save(3);
    EXPECT_GE(disk.fault_count(), 3u);
    ASSERT_TRUE(scene.Image(3).void_status);
    EXPECT_THAT(*scene.Image(3).void_status,
                StatusIs(absl::StatusCode::kResourceExhausted,
                         AllOf(HasSubstr("try 1: "), HasSubstr("ENOSPC of the test; try 3: "))));
    EXPECT_EQ(scene.Image(3).afterwards, ImageObserver::Afterwards::kInMemory);
    EXPECT_THAT(scene.harness->observer().log, ElementsAre("begun 3", "sealed 3", "void 3"));
    EXPECT_THAT(scene.harness->ImageFiles(), IsEmpty());
    EXPECT_EQ(scene.harness->trainer(scene.id).ReportOf(3)->state, 5u);
    EXPECT_THAT(scene.harness->trainer(scene.id).ReportOf(3)->text, HasSubstr("ENOSPC"));
    EXPECT_EQ(scene.images().pending_image_count(), 0u);

    // In memory it is whole, also for a next worker.
    for (int worker = 0; worker < 2; ++worker) {
      const ImageId image = scene.harness->observer().images.begin()->first;
      const std::string oracle = scene.harness->OracleImage(scene.id, 3);
      for (uint32_t block = 0; block < scene.harness->trainer(scene.id).block_count(); ++block) {
        ASSERT_OK_AND_ASSIGN(const RankImages::BlockView view, scene.images().Block(image, block));
        EXPECT_EQ(std::string(reinterpret_cast<const char*>(view.bytes.data()), view.bytes.size()),
                  oracle.substr(block * 4096, 4096));
      }
      scene.harness->Crash(SimDisk::InFlight::kAll);
      scene.harness->Settle();
      EXPECT_EQ(scene.Image(3).afterwards, ImageObserver::Afterwards::kInMemory);
    }
    // The disk is well again: the next save is durable, and the slot of this one can be used.
    disk.ClearFaults();
    scene.images().Release(scene.harness->observer().images.begin()->first);
    scene.Save(4);
    scene.ExpectDurable(4);
    scene.Save(5);
    scene.ExpectDurable(5);
  }
}

// A look at a block counts for the try whose write it followed, not for the next one: a trainer
// that changes a block at any moment around a retry makes the image void, or harms nothing.
TEST(FlushTest, ALookCountsForItsOwnTryOnly) {
  size_t void_count = 0;
  size_t durable_count = 0;
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Scene scene(seed);
    SimDisk& disk = scene.harness->disk();
    ScriptedTrainer& trainer = scene.harness->trainer(scene.id);
    disk.FailOperation(SimDisk::Operation::kRingWrite, trainer.block_count() - 1, kEio);
    const std::optional<uint32_t> slot = trainer.Save(3, BlobsAt(3));
    ASSERT_TRUE(slot);
    scene.harness->Ring();
    for (int i = 0; i < 10'000 && disk.fault_count() == 0; ++i) scene.harness->RunSteps(1);
    ASSERT_EQ(disk.fault_count(), 1u);
    scene.harness->RunSteps(seed % 16);
    trainer.Block(*slot, static_cast<uint32_t>(seed % 3))[5] ^= std::byte{4};
    scene.harness->Settle();
    if (scene.Image(3).durable_path) {
      ++durable_count;
      scene.ExpectDurable(3);
    } else {
      ++void_count;
      EXPECT_TRUE(scene.Image(3).void_status);
    }
  }
  EXPECT_GT(void_count, 100u);
  RecordProperty("durable", static_cast<int>(durable_count));
}

TEST(FlushTest, AFullDiskIsAFailureWithItsReason) {
  Scene scene;
  scene.harness->disk().SetCapacity(scene.harness->disk().used_bytes() + 8192);
  scene.Save(3);
  ASSERT_TRUE(scene.Image(3).void_status);
  EXPECT_THAT(*scene.Image(3).void_status, StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(scene.harness->ImageFiles(), IsEmpty());
}

TEST(FlushTest, AReadOnlyMountIsAFailureWithItsReason) {
  Scene scene;
  scene.harness->disk().SetReadOnly(true);
  scene.Save(3);
  ASSERT_TRUE(scene.Image(3).void_status);
  EXPECT_THAT(*scene.Image(3).void_status, StatusIs(absl::StatusCode::kPermissionDenied));
}

// A name that exists is passed over and never touched.
TEST(FlushTest, NamesThatExistArePassedOver) {
  Scene scene;
  scene.harness->disk().PutFile("/root/a1.s3.rank-00000.h5", "somebody's");
  scene.harness->disk().PutFile("/root/a1.s3.rank-00000.r1.h5", "somebody's too");
  scene.Save(3);
  scene.ExpectDurable(3);
  EXPECT_EQ(*scene.Image(3).durable_path, "/root/a1.s3.rank-00000.r2.h5");
  EXPECT_THAT(scene.harness->disk().Contents("/root/a1.s3.rank-00000.h5"),
              IsOkAndHolds("somebody's"));
  EXPECT_THAT(scene.harness->disk().Contents("/root/a1.s3.rank-00000.r1.h5"),
              IsOkAndHolds("somebody's too"));
}

TEST(FlushTest, ManyNamesThatExistAreAnErrorAndStayUntouched) {
  Scene scene;
  for (uint32_t number = 0; number < 60; ++number) {
    scene.harness->disk().PutFile(NumberedFileName("/root/a1.s3.rank-00000.h5", number), "old");
  }
  scene.Save(3);
  ASSERT_TRUE(scene.Image(3).void_status);
  EXPECT_THAT(*scene.Image(3).void_status, StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(scene.harness->ImageFiles(), SizeIs(60));
}

// Writes in flight never exceed the limit.
TEST(FlushTest, KeepsToItsDepth) {
  for (const uint32_t depth : {1u, 3u}) {
    HarnessOptions options;
    options.writes_in_flight_max = depth;
    CaptureHarness harness(options);
    const SessionId id = harness.OpenAndRegister(kRank0);
    ASSERT_TRUE(harness.trainer(id).Save(1, BlobsAt(1)));
    harness.Ring();
    size_t most = 0;
    while (harness.executor().RunOne()) {
      most = std::max(most, harness.disk().in_flight_count());
      ASSERT_LE(harness.disk().in_flight_count(), depth);
    }
    EXPECT_EQ(most, depth);
  }
}

}  // namespace
}  // namespace holdfast
