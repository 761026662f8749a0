// The protocol. Nothing is removed or replaced that was there before; nothing but the manifest's
// name, published last, makes a checkpoint.
//
//   1. The target is looked at: the root holds no such job, or only what a run of the same source
//      left behind that failed before it had any image.
//   2. The plan is proven (source and target cover every tensor once), and there is room for it.
//   3. <root>/<job>/ and JOB.json, which names the source: contents, name by link, directory.
//   4. The checkpoint's directory, then every image: created O_EXCL with all its bytes allocated,
//      its head written.
//   5. Every unit: copied from verified blocks, checksummed, added to the fingerprints of its
//      tensors, written once. The bytes that are checksummed are those that are written.
//   6. Every image is synced.
//   7. The fingerprint of every tensor state is that of the source's INDEX.
//   8. The commit (commit.cc): INDEX, directory, read back, MANIFEST.json by link, directory.
//
// A crash before the link of step 8 leaves a directory without a manifest, which no reader sees; a
// next run says that it is there. A failure before step 8 removes the images again, which are this
// run's own: it has created them, and nobody can have published them. A failure in step 8 removes
// them, and INDEX, only where no name of a manifest is in the directory, not even a partial one
// that a link under way could still publish. Two runs at once: O_EXCL
// stops the second at its first image. An agent that opens the job meanwhile fences the checkpoint
// (commit.h), and step 8 fails.
#include "checkpoint/reshard.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/ids.h"
#include "base/status_macros.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/catalog.h"
#include "checkpoint/commit.h"
#include "checkpoint/describe.h"
#include "checkpoint/publish.h"
#include "checkpoint/reshard_writer.h"
#include "io/transfer.h"

namespace holdfast {
namespace {

constexpr char kStoreDirectoryName[] = "store";

CheckpointId TargetId(const Index& source) { return {Attempt{0}, source.checkpoint.step}; }

JobSource SourceOf(const ReshardRequest& request, const Index& source) {
  return {.job = source.job,
          .job_uuid = source.job_uuid,
          .checkpoint = source.checkpoint,
          .directory = absl::Utf8SafeCEscape(request.source_directory)};
}

std::string Describe(const JobSource& source) {
  return absl::StrFormat("%s of job %s (uuid %s)", holdfast::Describe(source.checkpoint),
                         source.job, source.job_uuid);
}

// Whether both name the same checkpoint, wherever it lies.
bool IsSameSource(const JobSource& a, const JobSource& b) {
  return a.job == b.job && a.job_uuid == b.job_uuid && a.checkpoint == b.checkpoint;
}

// Step 1, for a job that is there. OK: only a run of the same source was here, and left no image.
absl::Status CheckLeftBehind(FileSystem& file_system, const std::string& directory,
                             const JobRecord& record, const JobSource& source, CheckpointId id) {
  const auto taken = [&](const std::string& why) {
    return absl::AlreadyExistsError(
        absl::StrFormat("%s: %s; choose another root or --job", directory, why));
  };
  if (!record.source.has_value()) return taken("holds a job of its own");
  if (!IsSameSource(*record.source, source)) {
    return taken(absl::StrCat("holds a job that was made from ", Describe(*record.source)));
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system.List(directory, 2 * kCheckpointsMax));
  for (const std::string& name : names) {
    if (name == kStoreDirectoryName) return taken("an agent has opened this job");
    const std::optional<CheckpointId> found = ParseCheckpointDirectoryName(name);
    if (!found.has_value()) continue;
    if (*found != id) return taken("holds checkpoints of its own");
    ASSIGN_OR_RETURN(const CatalogEntry entry,
                     ReadCatalogEntry(file_system, directory, record.job, record.job_uuid, id));
    if (entry.state != CatalogEntry::State::kIncomplete) {
      return taken("holds this very checkpoint, made before");
    }
    ASSIGN_OR_RETURN(const std::vector<std::string> files,
                     file_system.List(entry.directory, kCheckpointFilesMax));
    const bool is_begun = std::ranges::any_of(files, [](const std::string& file) {
      return file == kIndexFileName || ParseImageFileName(file).has_value();
    });
    if (is_begun) {
      return absl::AlreadyExistsError(absl::StrFormat(
          "%s: the same reshard was begun here and never ended (or is running now); if none is "
          "running, remove %s and try again",
          entry.directory, directory));
    }
  }
  return absl::OkStatus();
}

// Empty if there is no such directory.
absl::StatusOr<std::vector<std::string>> NamesIn(FileSystem& file_system,
                                                 const std::string& directory) {
  absl::StatusOr<std::vector<std::string>> names = file_system.List(directory, 2 * kCheckpointsMax);
  if (names.status().code() == absl::StatusCode::kNotFound) return std::vector<std::string>();
  return names;
}

// Step 1. The uuid of the job that a run has left behind; empty: there is no job.
absl::StatusOr<std::optional<std::string>> LookAtTarget(FileSystem& file_system,
                                                        const ReshardRequest& request,
                                                        const Index& source) {
  const std::string directory = absl::StrCat(request.root, "/", request.job);
  const absl::StatusOr<JobRecord> record = ReadJobRecord(file_system, request.root, request.job);
  if (record.ok()) {
    RETURN_IF_ERROR(CheckLeftBehind(file_system, directory, *record, SourceOf(request, source),
                                    TargetId(source)));
    return std::optional(record->job_uuid);
  }
  const bool is_damaged = record.status().code() == absl::StatusCode::kDataLoss;
  if (!is_damaged && record.status().code() != absl::StatusCode::kNotFound) return record.status();
  ASSIGN_OR_RETURN(const std::vector<std::string> names, NamesIn(file_system, directory));
  if (is_damaged && !PublicationWasCutOff(names, kJobFileName)) {
    return absl::AlreadyExistsError(
        absl::StrFormat("%s: holds a damaged job: %s", directory, record.status().message()));
  }
  // No job, or one that was torn while it was published: then nothing was made under it.
  for (const std::string& name : names) {
    if (name == kStoreDirectoryName || ParseCheckpointDirectoryName(name).has_value()) {
      return absl::AlreadyExistsError(
          absl::StrFormat("%s: holds %s and no whole %s", directory, name, kJobFileName));
    }
  }
  return std::optional<std::string>();
}

absl::Status CheckRoom(FileSystem& file_system, const std::string& root, uint64_t bytes) {
  ASSIGN_OR_RETURN(const Space space, file_system.SpaceOf(root));
  if (space.available_bytes >= bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrFormat("%s: expected room for %d bytes, found %d",
                                                      root, bytes, space.available_bytes));
}

// Step 3.
absl::Status PublishJob(FileSystem& file_system, const ReshardRequest& request,
                        const ReshardPlan& plan) {
  RETURN_IF_ERROR(EnsureDirectory(file_system, request.root, request.job));
  const std::string directory = absl::StrCat(request.root, "/", request.job);
  JobRecord record;
  record.job = request.job;
  record.job_uuid = plan.target().job_uuid;
  record.created_by = std::string(WriterVersion());
  record.created_at = request.created_at;
  record.source = SourceOf(request, plan.source());
  const absl::Status published = PublishFile(
      file_system, directory, kJobFileName, EncodeJobRecord(record),
      {.writer = request.writer,
       .on_visible = nullptr,
       .on_durable = nullptr,
       .is_whole = [](const std::string& bytes) { return DecodeJobRecord(bytes, "").ok(); },
       .bytes_max = kSmallRecordBytesMax});
  if (published.code() == absl::StatusCode::kAlreadyExists) {
    // What was left behind, or of another run that has begun since it was looked at.
    ASSIGN_OR_RETURN(const JobRecord found, ReadJobRecord(file_system, request.root, request.job));
    if (found.job_uuid != record.job_uuid) {
      return absl::AlreadyExistsError(absl::StrFormat(
          "%s: another job, of uuid %s, was made here meanwhile", directory, found.job_uuid));
    }
  } else if (!published.ok()) {
    return published;
  }
  RETURN_IF_ERROR(RemoveMarkers(file_system, directory, kJobFileName));
  return file_system.SyncDirectory(directory);
}

// Step 7.
absl::Status CompareFingerprints(const Index& source, const Index& target, ReshardReport& report) {
  for (size_t i = 0; i < target.tensor_states.size(); ++i) {
    const TensorState& state = target.tensor_states[i];
    // Both are sorted, and of the same tensor states.
    CHECK(source.tensor_states[i].tensor == state.tensor &&
          source.tensor_states[i].state == state.state);
    const std::optional<Fingerprint>& expected = source.facts[i].fingerprint;
    if (!expected.has_value()) {
      ++report.fingerprints_not_computed;
      continue;
    }
    if (*expected != *target.facts[i].fingerprint) {
      return absl::DataLossError(absl::StrFormat(
          "%s: expected fingerprint %s, as the source's INDEX says, found %s in what was written, "
          "though every block that was read has its checksum; nothing was published",
          holdfast::Describe(state), expected->Hex(), target.facts[i].fingerprint->Hex()));
    }
    ++report.fingerprints_equal;
  }
  return absl::OkStatus();
}

// After a commit of `index` has failed. Images and INDEX are this run's own; they go unless a
// manifest is there, or may come.
void RemoveUncommitted(FileSystem& file_system, const std::string& directory, const Index& index) {
  const absl::StatusOr<std::vector<std::string>> names =
      file_system.List(directory, kCheckpointFilesMax);
  if (!names.ok()) return;
  const auto is_of_manifest = [](const std::string& name) {
    return name.starts_with(kManifestFileName);
  };
  if (std::ranges::any_of(*names, is_of_manifest)) return;
  // Dropped on purpose, as in ReshardWriter::RemoveImages.
  for (const IndexImage& image : index.images) {
    file_system.Unlink(absl::StrCat(directory, "/", image.file)).IgnoreError();
  }
  file_system.Unlink(absl::StrCat(directory, "/", kIndexFileName)).IgnoreError();
}

}  // namespace

ReshardStorage RealReshardStorage(FileSystem& file_system) {
  return {file_system, PlainReadAt(),
          [](IoFile& file, uint64_t offset, std::span<const std::byte> data) {
            return WriteAll(file.handle(), offset, data);
          },
          [](IoFile& file) { return SyncAll(file.handle()); }};
}

absl::StatusOr<std::unique_ptr<const ReshardPlan>> PlanReshard(FileSystem& file_system,
                                                               const ReshardRequest& request,
                                                               const Index& source) {
  RETURN_IF_ERROR(CheckJobName(request.job));
  ASSIGN_OR_RETURN(const std::optional<std::string> left_behind,
                   LookAtTarget(file_system, request, source));
  return ReshardPlan::Create(source, {.job = request.job,
                                      .job_uuid = left_behind.value_or(request.new_job_uuid),
                                      .layout_json = request.layout_json,
                                      .scratch_directory = request.scratch_directory,
                                      .alignment_bytes = request.alignment_bytes});
}

absl::StatusOr<ReshardReport> RunReshard(const ReshardStorage& storage,
                                         const ReshardRequest& request,
                                         std::shared_ptr<const ReshardPlan> plan,
                                         ReshardSchedule schedule, const ReshardOptions& options) {
  FileSystem& file_system = storage.file_system;
  const CheckpointId id = TargetId(plan->source());
  const std::string job_directory = absl::StrCat(request.root, "/", request.job);
  ReshardReport report;
  report.directory = absl::StrCat(job_directory, "/", CheckpointDirectoryName(id));
  report.job_uuid = plan->target().job_uuid;
  report.bytes_written = plan->image_bytes();

  RETURN_IF_ERROR(CheckRoom(file_system, request.root, plan->image_bytes()));  // step 2
  ASSIGN_OR_RETURN(const std::unique_ptr<BlockReader> reader,
                   BlockReader::Open(file_system, storage.read_at, request.source_directory,
                                     plan->source(), options.source_caching));
  RETURN_IF_ERROR(PublishJob(file_system, request, *plan));
  RETURN_IF_ERROR(EnsureDirectory(file_system, job_directory, CheckpointDirectoryName(id)));

  auto writer = std::make_unique<ReshardWriter>(storage, *plan, schedule, *reader, report.directory,
                                                id, options);
  absl::Status written = writer->Run();  // steps 4 to 6
  std::optional<Index> index;
  if (written.ok()) {
    writer->Close();
    index = plan->MakeIndex(id, writer->TakeChecksums(), writer->sums());
    written = CompareFingerprints(plan->source(), *index, report);
  }
  if (!written.ok()) {
    writer->RemoveImages();
    return written;
  }
  report.bytes_read = writer->bytes_read();
  writer.reset();
  schedule = {};
  plan.reset();
  const absl::Status committed = CommitCheckpoint(file_system,
                                                  {.job_directory = job_directory,
                                                   .writer = request.writer,
                                                   .parent = std::nullopt,
                                                   .created_at = request.created_at},
                                                  *index);
  if (!committed.ok()) {
    RemoveUncommitted(file_system, report.directory, *index);
    return committed;
  }
  return report;
}

}  // namespace holdfast
