#include "checkpoint/bad_marks.h"

#include <cstdint>
#include <set>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/utf8.h"
#include "checkpoint/catalog.h"
#include "checkpoint/describe.h"
#include "checkpoint/publish.h"
#include "format/checkpoint_names.h"
#include "format/image.h"
#include "format/manifest.h"

namespace holdfast {
namespace {

// Each try loses its number to another writer.
constexpr int kTries = 16;

absl::StatusOr<CatalogEntry> Find(FileSystem& file_system, const CheckpointPlace& place,
                                  const std::string& uuid) {
  return ReadCatalogEntry(file_system, absl::StrCat(place.root, "/", place.job), place.job, uuid,
                          place.checkpoint);
}

}  // namespace

absl::Status MarkBad(FileSystem& file_system, const CheckpointPlace& place,
                     const MarkRequest& request) {
  if (!IsUtf8(request.reason) || request.reason.size() > kReasonBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("reason of a mark: expected UTF-8 of at most %d bytes, found %d bytes",
                        kReasonBytesMax, request.reason.size()));
  }
  ASSIGN_OR_RETURN(const JobRecord job, ReadJobRecord(file_system, place.root, place.job));
  BadMark mark;
  mark.job_uuid = job.job_uuid;
  mark.checkpoint = place.checkpoint;
  mark.reason = request.reason;
  mark.created_by = std::string(WriterVersion());
  mark.created_at = absl::FromUnixSeconds(absl::ToUnixSeconds(request.created_at));
  for (int i = 0; i < kTries; ++i) {
    ASSIGN_OR_RETURN(const CatalogEntry entry, Find(file_system, place, job.job_uuid));
    std::set<uint32_t> numbers;
    bool is_there = false;
    for (const BadMark& other : entry.bad_marks) {
      numbers.insert(other.number);
      is_there = is_there || other.reason == mark.reason;
    }
    mark.number = 1;
    while (numbers.contains(mark.number)) ++mark.number;
    if (!is_there) {
      if (entry.bad_marks.size() >= kMarksMax) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("%s has %d marks, the limit", entry.directory, kMarksMax));
      }
      PublishOptions options;
      options.writer = request.writer;
      const absl::Status published = PublishFile(
          file_system, entry.directory, BadFileName(mark.number), EncodeBadMark(mark), options);
      if (absl::IsAlreadyExists(published) || absl::IsUnavailable(published)) continue;
      RETURN_IF_ERROR(published);
    }
    return file_system.SyncDirectory(entry.directory);
  }
  return absl::UnavailableError(absl::StrFormat("%s of job %s: others mark it at the same time",
                                                Describe(place.checkpoint), place.job));
}

absl::Status UnmarkBad(FileSystem& file_system, const CheckpointPlace& place) {
  ASSIGN_OR_RETURN(const JobRecord job, ReadJobRecord(file_system, place.root, place.job));
  ASSIGN_OR_RETURN(const CatalogEntry entry, Find(file_system, place, job.job_uuid));
  for (const BadMark& mark : entry.bad_marks) {
    const absl::Status removed =
        file_system.Unlink(absl::StrCat(entry.directory, "/", BadFileName(mark.number)));
    // Somebody else takes it back, too.
    if (!removed.ok() && !absl::IsNotFound(removed)) return removed;
  }
  return file_system.SyncDirectory(entry.directory);
}

}  // namespace holdfast
