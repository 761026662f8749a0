// A registration that is understood gives every byte of the slot, extra copies included, one
// writer, inside of what was registered.
#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "checkpoint/registration.h"
#include "tests/fuzz/scratch.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

void CheckWriters(const Registration& registration) {
  std::vector<ImageRange> ranges = {{0, registration.image().head_bytes()}};
  for (const abi::CaptureOp& op : registration.capture_ops()) {
    ranges.push_back({op.image_offset, op.image_offset + op.run_bytes * op.count});
    CHECK(op.buffer_offset + (op.count - 1) * op.buffer_stride + op.run_bytes <=
          registration.buffers()[op.buffer_index].bytes);
  }
  for (const RegisteredBlob& blob : registration.blobs()) {
    if (!blob.image_offset_bytes.has_value() || blob.capacity_bytes == 0) continue;
    ranges.push_back({*blob.image_offset_bytes, *blob.image_offset_bytes + blob.capacity_bytes});
  }
  for (const ImageRange& gap : registration.gaps()) ranges.push_back(gap);
  std::sort(ranges.begin(), ranges.end(),
            [](const ImageRange& a, const ImageRange& b) { return a.begin < b.begin; });
  uint64_t covered = 0;
  for (const ImageRange& range : ranges) {
    CHECK(range.begin == covered && range.end >= range.begin);
    covered = range.end;
  }
  CHECK(covered == registration.slot_bytes());
  CHECK(registration.slot_bytes() >= registration.image_bytes());
}

}  // namespace

bool FuzzRegistration(Input input) {
  bool is_accepted = false;
  for (const uint32_t world_size : {1u, 2u, 4u, 6u}) {
    RegistrationOwner owner;
    owner.job = "job";
    owner.job_uuid = "01234567-89ab-cdef-0123-456789abcdef";
    owner.rank = Rank{0};
    owner.world_size = world_size;
    owner.block_bytes = 4096;
    const auto registration =
        Registration::Build(std::string(input.begin(), input.end()), owner, ScratchDirectory());
    if (registration.ok()) {
      CheckWriters(**registration);
      is_accepted = true;
      continue;
    }
    CHECK(registration.status().code() == absl::StatusCode::kInvalidArgument ||
          registration.status().code() == absl::StatusCode::kResourceExhausted);
  }
  return is_accepted;
}

}  // namespace holdfast::fuzz
