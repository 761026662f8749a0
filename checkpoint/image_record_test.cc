// The record's promise, by enumeration: take a picture of the memory after every single store of an
// update; whatever the picture, it reads as the record before the update or as the one after it.
#include "checkpoint/image_record.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

RecordHeader Header() {
  RecordHeader header;
  header.session_id = 7;
  header.registration_id = 3;
  header.memory_id = 11;
  header.block_bytes = 4096;
  header.document_bytes = 1234;
  header.slot_count = 2;
  header.block_count = 5;  // odd: the last word of a table is half used
  header.blob_count = 3;
  return header;
}

// A record whose every field is random.
SlotRecord RandomRecord(std::mt19937_64& random) {
  SlotRecord record;
  record.state = static_cast<SlotRecord::State>(random() % 5);
  record.file = static_cast<SlotRecord::File>(random() % 4);
  record.generation = random();
  record.step = random();
  record.begun_ns = static_cast<int64_t>(random());
  record.names_used = static_cast<uint32_t>(random());
  record.block_root = static_cast<uint32_t>(random());
  record.code = static_cast<int32_t>(random() % 17);
  record.path = std::string(random() % (kRecordPathBytesMax + 1), 'p');
  record.text = std::string(random() % (kRecordTextBytesMax + 1), 't');
  if (random() % 4 != 0) {
    for (int i = 0; i < 5; ++i) record.block_table.push_back(static_cast<uint32_t>(random()));
  }
  if (random() % 4 != 0) {
    for (int i = 0; i < 3; ++i) record.blob_bytes.push_back(random());
  }
  return record;
}

std::string BytesOfFd(int fd) {
  const off_t size = lseek(fd, 0, SEEK_END);
  std::string bytes(static_cast<size_t>(size), '\0');
  EXPECT_EQ(pread(fd, bytes.data(), bytes.size(), 0), size);
  return bytes;
}

// A record memfd with these bytes, sealed as the real one is.
UniqueFd FdWith(const std::string& bytes) {
  UniqueFd fd(memfd_create("picture", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(write(fd.get(), bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  EXPECT_EQ(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
  return fd;
}

absl::StatusOr<std::unique_ptr<ImageRecord>> Open(const std::string& bytes) {
  return ImageRecord::Reopen(FdWith(bytes));
}

TEST(ImageRecordTest, EveryCrashLeavesTheOldOrTheNewRecord) {
  const uint64_t seed = 20240611;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  std::vector<std::string> pictures;
  ImageRecord* watched = nullptr;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> record,
                       ImageRecord::Create(Header(), [&] {
                         if (watched != nullptr) pictures.push_back(BytesOfFd(watched->fd()));
                       }));
  const SlotRecord other = RandomRecord(random);
  record->Update(1, other);
  watched = record.get();
  size_t picture_count = 0;
  size_t old_count = 0;
  for (int update = 0; update < 8; ++update) {
    const SlotRecord before = *record->slot(0);
    SlotRecord after = RandomRecord(random);
    // Also updates that keep what they refer to.
    if (update % 3 == 1) after.block_table = before.block_table;
    if (update % 3 == 2) after.blob_bytes = before.blob_bytes;
    pictures.clear();
    record->Update(0, after);
    bool was_new = false;
    for (const std::string& picture : pictures) {
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> reopened, Open(picture));
      ASSERT_OK(reopened->slot(0));
      const bool is_old = *reopened->slot(0) == before;
      EXPECT_TRUE(is_old || *reopened->slot(0) == after);
      EXPECT_FALSE(was_new && is_old);
      was_new |= !is_old;
      old_count += is_old ? 1 : 0;
      EXPECT_EQ(*reopened->slot(1), other);
      // Going on from there works: an update that a crash cut off is no obstacle to the next.
      const SlotRecord next = RandomRecord(random);
      reopened->Update(0, next);
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> again,
                           Open(BytesOfFd(reopened->fd())));
      EXPECT_EQ(*again->slot(0), next);
    }
    picture_count += pictures.size();
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> last, Open(pictures.back()));
    EXPECT_EQ(*last->slot(0), after);
  }
  RecordProperty("pictures", static_cast<int>(picture_count));
  EXPECT_GE(picture_count, 8u * 203u);
  // All but the last store of each update leave the old one.
  EXPECT_GE(old_count, picture_count - 8u * 2u);
}

TEST(ImageRecordTest, ChecksumsBelongToTheirGrant) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> record, ImageRecord::Create(Header()));
  const uint64_t generation = (uint64_t{3} << 32) | 1;
  EXPECT_EQ(record->Checksum(0, 4, generation), std::nullopt);
  record->SetChecksum(0, 4, generation, 0xdeadbeef);
  EXPECT_EQ(record->Checksum(0, 4, generation), 0xdeadbeef);
  EXPECT_EQ(record->Checksum(0, 3, generation), std::nullopt);
  EXPECT_EQ(record->Checksum(1, 4, generation), std::nullopt);
  EXPECT_EQ(record->Checksum(0, 4, generation + 1), std::nullopt);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> reopened, Open(BytesOfFd(record->fd())));
  EXPECT_EQ(reopened->Checksum(0, 4, generation), 0xdeadbeef);
  EXPECT_EQ(reopened->header(), Header());
}

// Damage is found, and drops no more than what it hit.
TEST(ImageRecordTest, EveryFlippedBitIsFoundOrHarmless) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> record, ImageRecord::Create(Header()));
  std::mt19937_64 random(5);
  SlotRecord slots[2];
  for (uint32_t index = 0; index < 2; ++index) {
    do {
      slots[index] = RandomRecord(random);
    } while (slots[index].block_table.empty() || slots[index].blob_bytes.empty());
    record->Update(index, slots[index]);
  }
  const std::string good = BytesOfFd(record->fd());
  int header_errors = 0;
  int slot_errors = 0;
  int older = 0;
  for (size_t bit = 0; bit < good.size() * 8; bit += 3) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    const auto reopened = Open(bad);
    if (!reopened.ok()) {
      ++header_errors;
      continue;
    }
    int damaged = 0;
    for (uint32_t index = 0; index < 2; ++index) {
      const absl::StatusOr<SlotRecord>& slot = (*reopened)->slot(index);
      if (!slot.ok()) {
        EXPECT_THAT(slot, StatusIs(absl::StatusCode::kDataLoss));
        ++damaged;
      } else if (*slot != slots[index]) {
        // The newest copy is hit: the one before it is read, which was empty.
        EXPECT_EQ(*slot, SlotRecord());
        ++older;
      }
    }
    EXPECT_LE(damaged, 1) << "bit " << bit;
    slot_errors += damaged;
  }
  EXPECT_GT(header_errors, 100);
  EXPECT_GT(slot_errors, 50);  // tables and lengths
  EXPECT_GT(older, 1000);
}

TEST(ImageRecordTest, RefusesWhatItDoesNotKnow) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ImageRecord> record, ImageRecord::Create(Header()));
  std::string bytes = BytesOfFd(record->fd());
  bytes[8] = static_cast<char>(kImageRecordVersion + 1);
  EXPECT_THAT(Open(bytes), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("version")));
  EXPECT_THAT(Open(BytesOfFd(record->fd()) + std::string(8, '\0')),
              StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(Open(std::string(4096, '\0')), StatusIs(absl::StatusCode::kDataLoss));
  UniqueFd unsealed(memfd_create("unsealed", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(unsealed.get(), 4096), 0);
  EXPECT_THAT(ImageRecord::Reopen(std::move(unsealed)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("seals")));
}

}  // namespace
}  // namespace holdfast
