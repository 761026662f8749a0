#include "checkpoint/readback_testing.h"

#include <gtest/gtest.h>

#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/describe.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/restore.h"

namespace holdfast {
namespace {

std::string TextOf(const std::string& file, uint64_t offset, uint64_t bytes) {
  return file.substr(offset, bytes);
}

}  // namespace

ReadBack::ReadBack(uint32_t world_size) {
  const std::string document = SmallLayout(world_size);
  const std::unique_ptr<const Layout> layout = Layout::Parse(document).value();
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    std::vector<TrainerBuffer> buffers;
    const RankLayout held = layout->ForRank(Rank{rank}).value();
    for (const BufferNeed& need : held.buffers) {
      buffers.push_back({need.name, need.bytes, 0});
    }
    const RegistrationOwner owner{.job = "job",
                                  .job_uuid = "01234567-89ab-4cde-8f01-23456789abcd",
                                  .rank = Rank{rank},
                                  .world_size = world_size,
                                  .block_bytes = 4096};
    absl::StatusOr<std::shared_ptr<const Registration>> registration = Registration::Build(
        EncodeDocument(document, buffers, SmallBlobs()), owner, testing::TempDir());
    CHECK_OK(registration.status());
    targets_.push_back(*std::move(registration));
  }
}

absl::Status ReadBack::CheckOne(SimDisk& disk, const CatalogEntry& entry) const {
  ASSIGN_OR_RETURN(const VerifyReport report,
                   VerifyCheckpoint(disk, SimReadAt(disk), entry, VerifyOptions{}));
  if (report.verdict != Verdict::kGood) {
    return absl::DataLossError(
        absl::StrCat(Describe(entry.id), " is damaged: ", report.findings.front().text));
  }
  if (report.fingerprints_not_computed != 0) {
    return absl::DataLossError(absl::StrFormat("%s: %d fingerprints are not computed",
                                               Describe(entry.id),
                                               report.fingerprints_not_computed));
  }
  ASSIGN_OR_RETURN(const Index index, LoadIndex(disk, entry.directory, *entry.manifest));
  std::vector<std::string> files;
  for (const IndexImage& image : index.images) {
    ASSIGN_OR_RETURN(std::string bytes,
                     disk.Contents(absl::StrCat(entry.directory, "/", image.file)));
    files.push_back(std::move(bytes));
  }
  const uint64_t step = Value(entry.id.step);
  for (uint32_t rank = 0; rank < targets_.size(); ++rank) {
    const Registration& target = *targets_[rank];
    ASSIGN_OR_RETURN(const RestorePlan plan, PlanRestore(index, target, 4096));
    std::vector<std::vector<std::byte>> buffers;
    for (const RegisteredBuffer& buffer : target.buffers()) {
      buffers.emplace_back(buffer.bytes, std::byte{0xEE});
    }
    for (const RestorePiece& piece : plan.pieces) {
      const char* const source = files[piece.image].data() +
                                 piece.block * index.images[piece.image].block_bytes +
                                 piece.offset_bytes;
      for (uint64_t i = piece.first_op; i < piece.first_op + piece.op_count; ++i) {
        const abi::RestoreOp& op = plan.ops[i];
        for (uint64_t run = 0; run < op.count; ++run) {
          std::memcpy(buffers[op.buffer_index].data() + op.buffer_offset + run * op.buffer_stride,
                      source + op.source_offset + run * op.source_stride, op.run_bytes);
        }
      }
    }
    if (buffers != StateAfter(target.layout(), Rank{rank}, step)) {
      return absl::DataLossError(
          absl::StrFormat("%s: rank %d: not the state after that step", Describe(entry.id), rank));
    }
  }
  for (const IndexBlob& blob : index.blobs) {
    const std::string found = TextOf(files[blob.image], blob.offset_bytes, blob.bytes);
    const std::string expected = BlobText(blob.name, step, Value(blob.rank));
    if (found != expected) {
      return absl::DataLossError(absl::StrFormat("%s: blob %s: expected \"%s\", found \"%s\"",
                                                 Describe(entry.id), blob.name, expected, found));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CheckpointId>> ReadBack::CheckAll(SimDisk& disk, Parents parents) const {
  std::vector<CheckpointId> committed;
  const absl::StatusOr<Catalog> catalog = ReadCatalog(disk, "/root", "job");
  if (catalog.status().code() == absl::StatusCode::kNotFound) return committed;
  RETURN_IF_ERROR(catalog.status());
  for (const CatalogEntry& entry : catalog->entries) {
    if (entry.state == CatalogEntry::State::kDamaged) return absl::DataLossError(entry.why);
    if (entry.state != CatalogEntry::State::kCommitted) continue;
    RETURN_IF_ERROR(CheckOne(disk, entry));
    if (entry.branch != Branch::kCurrent) {
      return absl::DataLossError(absl::StrCat(Describe(entry.id), " is not on the branch"));
    }
    const std::optional<CheckpointId> before =
        committed.empty() ? std::nullopt : std::optional(committed.back());
    if (parents == Parents::kEach && entry.manifest->parent != before) {
      return absl::DataLossError(absl::StrCat(Describe(entry.id), " has another parent"));
    }
    committed.push_back(entry.id);
  }
  const bool found = catalog->outcome == Lineage::Outcome::kFound;
  if (found != !committed.empty() ||
      (found && catalog->entries[*catalog->newest].id != committed.back())) {
    return absl::DataLossError("the newest of the branch is not the newest that is committed");
  }
  return committed;
}

}  // namespace holdfast
