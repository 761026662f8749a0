// Looks at blocks: what they find, and in which order they are taken.
#include "checkpoint/block_checksums.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32c.h"
#include "checkpoint/block_sums.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using Look = BlockChecksums::Request::Look;
using testing::IsEmpty;

constexpr uint64_t kBlockBytes = 4096;

// Jobs run when the test says so.
class ManualPool final : public WorkPool {
 public:
  void Run(std::function<void()> work, std::function<void()> done) override {
    jobs_.emplace_back(std::move(work), std::move(done));
  }
  size_t size() const { return jobs_.size(); }
  void RunFirst() {
    const auto [work, done] = std::move(jobs_.front());
    jobs_.pop_front();
    work();
    done();
  }

 private:
  std::deque<std::pair<std::function<void()>, std::function<void()>>> jobs_;
};

class BlockChecksumsTest : public testing::Test {
 protected:
  void SetUp() override {
    const RegistrationOwner owner{.job = "job",
                                  .job_uuid = kTestUuid,
                                  .rank = Rank{0},
                                  .world_size = 1,
                                  .block_bytes = kBlockBytes};
    ASSERT_OK_AND_ASSIGN(
        registration_,
        Registration::Build(EncodeDocument(TestLayout(1), TestBuffers(), TestBlobs()), owner,
                            TestScratchDirectory()));
    ASSERT_OK_AND_ASSIGN(memory_, SharedMapping::Create("test", registration_->image_bytes()));
    std::mt19937 random(1);
    for (std::byte& byte : memory_->bytes()) byte = static_cast<std::byte>(random());
    checksums_ = std::make_unique<BlockChecksums>(
        memory_, registration_, 2, pool_,
        [this](const BlockChecksums::Request& request, const BlockChecksums::Found& found) {
          log_ += request.look == Look::kFirst ? 'f' : 's';
          found_.push_back(found);
        },
        [this](uint32_t slot) { idle_.push_back(slot); });
  }

  // Block i of the image lies in block i of the memory.
  void Add(Look look, uint32_t block, uint32_t slot = 0) {
    checksums_->Add({.slot = slot, .block = block, .memory_block = block, .look = look});
  }
  std::span<const std::byte> Block(uint32_t block) const {
    return memory_->bytes().subspan(block * kBlockBytes, kBlockBytes);
  }

  std::shared_ptr<const Registration> registration_;
  std::shared_ptr<SharedMapping> memory_;
  ManualPool pool_;
  std::unique_ptr<BlockChecksums> checksums_;
  std::string log_;
  std::vector<BlockChecksums::Found> found_;
  std::vector<uint32_t> idle_;
};

TEST_F(BlockChecksumsTest, FirstLooksGoBeforeSecondOnesWhichNeverHoldTheLastJob) {
  for (uint32_t block = 0; block < 4; ++block) Add(Look::kSecond, block);
  EXPECT_EQ(pool_.size(), 1u);  // of two
  for (uint32_t block = 0; block < 4; ++block) Add(Look::kFirst, block);
  EXPECT_EQ(pool_.size(), 2u);
  pool_.RunFirst();
  EXPECT_EQ(log_, "s");
  EXPECT_EQ(pool_.size(), 2u);
  while (pool_.size() > 0) {
    pool_.RunFirst();
    EXPECT_LE(pool_.size(), 2u);
  }
  EXPECT_EQ(log_, "sffffsss");
  EXPECT_THAT(idle_, testing::Each(0u));
  EXPECT_EQ(checksums_->pending(0), 0u);
}

TEST_F(BlockChecksumsTest, BothLooksFindTheChecksumAndTheSecondTheFingerprints) {
  const uint32_t blocks = registration_->block_count();
  ASSERT_GE(blocks, 3u);
  std::vector<std::span<const std::byte>> image;
  std::vector<uint32_t> block_crc32c;
  std::vector<Fingerprint> sums(registration_->layout().tensor_states().size());
  for (uint32_t block = 0; block < blocks; ++block) {
    for (const Look look : {Look::kFirst, Look::kSecond}) {
      Add(look, block);
      pool_.RunFirst();
      EXPECT_EQ(found_.back().crc32c, Crc32c(Block(block)));
      if (look == Look::kFirst) {
        EXPECT_THAT(found_.back().parts, IsEmpty());
      }
      for (const FingerprintPart& part : found_.back().parts) sums[part.tensor_state] += part.sum;
    }
    image.push_back(Block(block));
    block_crc32c.push_back(found_.back().crc32c);
  }
  std::vector<Fingerprint> expected(sums.size());
  for (const PlacedPiece& placed : registration_->stored_pieces()) {
    const TensorState& state = registration_->layout().tensor_states()[placed.piece.tensor_state];
    expected[placed.piece.tensor_state] += Fingerprinter().OfPiece(
        state, placed.piece, registration_->stored_boxes(), 0,
        memory_->bytes().subspan(placed.image_offset_bytes,
                                 placed.piece.ElementCount() * ElementBytes(state.dtype)));
  }
  EXPECT_EQ(sums, expected);
  EXPECT_EQ(SumImage(*registration_, image, block_crc32c), expected);
  block_crc32c[1] ^= 1;
  EXPECT_EQ(SumImage(*registration_, image, block_crc32c), std::nullopt);
}

TEST_F(BlockChecksumsTest, WhatIsCancelledIsNeitherDoneNorPending) {
  for (const Look look : {Look::kFirst, Look::kSecond}) {
    for (uint32_t block = 0; block < 3; ++block) {
      Add(look, block, 0);
      Add(look, block, 1);
    }
  }
  checksums_->Cancel(0);
  // Of slot 0, one first look is in a job, and that may read the block until it ends.
  EXPECT_EQ(checksums_->pending(0), 1u);
  while (pool_.size() > 0) pool_.RunFirst();
  EXPECT_EQ(log_.size(), 6u);  // slot 1
  EXPECT_EQ(checksums_->pending(0), 0u);
  EXPECT_THAT(idle_, testing::Contains(0u));
  EXPECT_THAT(idle_, testing::Contains(1u));
}

}  // namespace
}  // namespace holdfast
