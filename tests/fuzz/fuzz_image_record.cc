// What a former worker left behind: every slot is damaged and says so, or can be written again as
// it is and reads the same afterwards.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "base/check.h"
#include "checkpoint/image_record.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

UniqueFd MemoryOf(Input input) {
  UniqueFd fd(memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK(fd.get() >= 0);
  CHECK(ftruncate(fd.get(), static_cast<off_t>(input.size())) == 0);
  CHECK(pwrite(fd.get(), input.data(), input.size(), 0) == static_cast<ssize_t>(input.size()));
  CHECK(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
  return fd;
}

void UseSlot(ImageRecord& record, uint32_t slot) {
  const absl::StatusOr<SlotRecord> before = record.slot(slot);
  if (!before.ok()) {
    CHECK(before.status().code() == absl::StatusCode::kDataLoss);
    return;
  }
  CHECK(before->path.size() <= kRecordPathBytesMax && before->text.size() <= kRecordTextBytesMax);
  record.Update(slot, *before);
  for (uint32_t block = 0; block < record.header().block_count; ++block) {
    record.SetChecksum(slot, block, before->generation, block);
    CHECK(record.Checksum(slot, block, before->generation) == block);
    CHECK(!record.Checksum(slot, block, before->generation + 1).has_value());
  }
}

}  // namespace

bool FuzzImageRecord(Input input) {
  const auto record = ImageRecord::Reopen(MemoryOf(input));
  if (!record.ok()) {
    CHECK(record.status().code() == absl::StatusCode::kDataLoss ||
          record.status().code() == absl::StatusCode::kFailedPrecondition);
    return false;
  }
  const RecordHeader header = (*record)->header();
  for (uint32_t slot = 0; slot < header.slot_count; ++slot) UseSlot(**record, slot);
  const auto again = ImageRecord::Reopen(UniqueFd(fcntl((*record)->fd(), F_DUPFD_CLOEXEC, 0)));
  CHECK_OK(again.status());
  CHECK((*again)->header() == header);
  for (uint32_t slot = 0; slot < header.slot_count; ++slot) {
    const absl::StatusOr<SlotRecord>& before = (*record)->slot(slot);
    const absl::StatusOr<SlotRecord>& after = (*again)->slot(slot);
    CHECK(before.ok() == after.ok() && (!before.ok() || *before == *after));
  }
  return true;
}

}  // namespace holdfast::fuzz
