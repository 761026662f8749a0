#include "agent/file_store.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "checkpoint/publish.h"
#include "checkpoint/sealed_json.h"
#include "format/image.h"
#include "format/manifest.h"

namespace holdfast {
namespace {

constexpr char kStoreDirectoryName[] = "store";
constexpr size_t kNamesMax = 2'000'000;  // in a directory

std::string AttemptFileName(Attempt attempt) {
  return absl::StrFormat("attempt-%d.json", Value(attempt));
}

std::string RestoreFileName(Attempt attempt) {
  return absl::StrFormat("attempt-%d.restore.json", Value(attempt));
}

// n of "attempt-<n>.json"; empty for any other name.
std::optional<uint32_t> ParseAttemptFileName(const std::string& name) {
  constexpr std::string_view kPrefix = "attempt-";
  if (name.compare(0, kPrefix.size(), kPrefix) != 0) return std::nullopt;
  uint64_t number = 0;
  for (size_t i = kPrefix.size(); i < name.size() && name[i] >= '0' && name[i] <= '9'; ++i) {
    number = number * 10 + static_cast<uint64_t>(name[i] - '0');
    if (number > UINT32_MAX) return std::nullopt;
  }
  if (name != AttemptFileName(Attempt{static_cast<uint32_t>(number)})) return std::nullopt;
  return static_cast<uint32_t>(number);
}

// Members of a record, checked by name and type.
class RecordReader {
 public:
  static absl::StatusOr<RecordReader> Parse(const std::string& bytes, const std::string& where,
                                            std::initializer_list<std::string_view> members) {
    ASSIGN_OR_RETURN(std::unique_ptr<JsonDocument> document, UnsealJson(bytes, where));
    RecordReader reader(std::move(document), where);
    const absl::Status known = reader.document_->root().ExpectKeys(members);
    if (!known.ok()) return reader.Wrong(known);
    return reader;
  }

  absl::StatusOr<std::string> String(std::string_view key) const {
    absl::StatusOr<JsonValue> value = document_->root().Get(key);
    if (!value.ok()) return Wrong(value.status());
    absl::StatusOr<std::string_view> text = value->String();
    if (!text.ok()) return Wrong(text.status());
    return std::string(*text);
  }
  absl::StatusOr<uint64_t> Number(std::string_view key, uint64_t value_max) const {
    absl::StatusOr<JsonValue> value = document_->root().Get(key);
    if (!value.ok()) return Wrong(value.status());
    absl::StatusOr<uint64_t> number = value->Uint64();
    if (!number.ok()) return Wrong(number.status());
    if (*number > value_max) {
      return Wrong(value->Mismatch(absl::StrFormat("at most %d", value_max)));
    }
    return number;
  }
  bool Has(std::string_view key) const { return document_->root().Find(key).present(); }
  absl::Status Wrong(const absl::Status& status) const {
    return absl::DataLossError(absl::StrFormat("%s: %s", where_, status.message()));
  }

 private:
  RecordReader(std::unique_ptr<JsonDocument> document, std::string where)
      : document_(std::move(document)), where_(std::move(where)) {}
  std::unique_ptr<JsonDocument> document_;
  std::string where_;
};

// "1" of a record's version member is checked like every other value.
absl::Status CheckVersion(const RecordReader& reader) {
  ASSIGN_OR_RETURN(const uint64_t version, reader.Number("holdfast_store", UINT64_MAX));
  if (version == 1) return absl::OkStatus();
  return reader.Wrong(
      absl::DataLossError(absl::StrFormat("version: expected 1, found %d", version)));
}

absl::StatusOr<AttemptRecord> DecodeAttempt(const std::string& bytes, const std::string& where,
                                            Attempt attempt) {
  ASSIGN_OR_RETURN(const RecordReader reader,
                   RecordReader::Parse(bytes, where,
                                       {"holdfast_store", "attempt", "key", "world_size",
                                        "restore_from", "crc32c"}));
  RETURN_IF_ERROR(CheckVersion(reader));
  AttemptRecord record;
  ASSIGN_OR_RETURN(const uint64_t number, reader.Number("attempt", UINT32_MAX));
  record.attempt = Attempt{static_cast<uint32_t>(number)};
  if (record.attempt != attempt) {
    return reader.Wrong(absl::DataLossError(
        absl::StrFormat("attempt: expected %d, found %d", Value(attempt), number)));
  }
  ASSIGN_OR_RETURN(record.key, reader.String("key"));
  ASSIGN_OR_RETURN(const uint64_t world_size, reader.Number("world_size", UINT32_MAX));
  record.world_size = static_cast<uint32_t>(world_size);
  if (reader.Has("restore_from")) {
    ASSIGN_OR_RETURN(record.restore_from, reader.String("restore_from"));
  }
  return record;
}

absl::StatusOr<RestorePoint> DecodeRestorePoint(const std::string& bytes, const std::string& where,
                                                Attempt attempt) {
  ASSIGN_OR_RETURN(const RecordReader reader,
                   RecordReader::Parse(bytes, where,
                                       {"holdfast_store", "attempt", "from_attempt", "from_step",
                                        "from_directory", "from_job", "from_job_uuid", "crc32c"}));
  RETURN_IF_ERROR(CheckVersion(reader));
  ASSIGN_OR_RETURN(const uint64_t number, reader.Number("attempt", UINT32_MAX));
  if (number != Value(attempt)) {
    return reader.Wrong(absl::DataLossError(
        absl::StrFormat("attempt: expected %d, found %d", Value(attempt), number)));
  }
  RestorePoint point;
  const bool is_foreign = reader.Has("from_directory");
  if (!is_foreign && !reader.Has("from_attempt") && !reader.Has("from_step")) return point;
  ASSIGN_OR_RETURN(const uint64_t from_attempt, reader.Number("from_attempt", UINT32_MAX));
  ASSIGN_OR_RETURN(const uint64_t from_step, reader.Number("from_step", UINT64_MAX));
  const CheckpointId from{Attempt{static_cast<uint32_t>(from_attempt)}, Step{from_step}};
  if (!is_foreign) {
    point.checkpoint = from;
    return point;
  }
  point.foreign.emplace();
  point.foreign->checkpoint = from;
  ASSIGN_OR_RETURN(point.foreign->directory, reader.String("from_directory"));
  ASSIGN_OR_RETURN(point.foreign->job, reader.String("from_job"));
  ASSIGN_OR_RETURN(point.foreign->job_uuid, reader.String("from_job_uuid"));
  return point;
}

std::string EncodeAttempt(const AttemptRecord& record) {
  std::vector<std::string> members = {"\"holdfast_store\": 1",
                                      absl::StrFormat("\"attempt\": %d", Value(record.attempt)),
                                      absl::StrCat("\"key\": ", JsonString(record.key)),
                                      absl::StrFormat("\"world_size\": %d", record.world_size)};
  if (!record.restore_from.empty()) {
    members.push_back(absl::StrCat("\"restore_from\": ", JsonString(record.restore_from)));
  }
  return SealJson(members);
}

std::string EncodeRestorePoint(Attempt attempt, const RestorePoint& point) {
  std::vector<std::string> members = {"\"holdfast_store\": 1",
                                      absl::StrFormat("\"attempt\": %d", Value(attempt))};
  CHECK(!point.checkpoint.has_value() || !point.foreign.has_value());
  if (!point.is_beginning()) {
    const CheckpointId from = point.foreign ? point.foreign->checkpoint : *point.checkpoint;
    members.push_back(absl::StrFormat("\"from_attempt\": %d", Value(from.attempt)));
    members.push_back(absl::StrFormat("\"from_step\": %d", Value(from.step)));
  }
  if (point.foreign.has_value()) {
    members.push_back(absl::StrCat("\"from_directory\": ", JsonString(point.foreign->directory)));
    members.push_back(absl::StrCat("\"from_job\": ", JsonString(point.foreign->job)));
    members.push_back(absl::StrCat("\"from_job_uuid\": ", JsonString(point.foreign->job_uuid)));
  }
  return SealJson(members);
}

}  // namespace

FileStore::FileStore(FileSystem& file_system, const Clock& clock, Options options)
    : file_system_(file_system), clock_(clock), options_(std::move(options)) {
  CHECK(!options_.root.empty() && !options_.writer.empty() && options_.make_uuid);
}

std::string FileStore::JobDirectory(const std::string& job) const {
  return absl::StrCat(options_.root, "/", job);
}

std::string FileStore::StoreDirectory(const std::string& job) const {
  return absl::StrCat(JobDirectory(job), "/", kStoreDirectoryName);
}

absl::Status FileStore::Publish(const std::string& directory, const std::string& name,
                                const std::string& bytes,
                                std::function<bool(const std::string&)> is_whole) {
  RETURN_IF_ERROR(PublishFile(file_system_, directory, name, bytes,
                              {.writer = options_.writer,
                               .on_visible = nullptr,
                               .on_durable = nullptr,
                               .is_whole = std::move(is_whole),
                               .bytes_max = kSmallRecordBytesMax}));
  return file_system_.SyncDirectory(directory);
}

// Whether nothing can have been made under JOB.json yet: no checkpoint, no attempt.
absl::StatusOr<bool> FileStore::HasOnlyBegun(const std::string& job) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system_.List(JobDirectory(job), kNamesMax));
  for (const std::string& name : names) {
    if (ParseCheckpointDirectoryName(name).has_value()) return false;
  }
  ASSIGN_OR_RETURN(const std::optional<Attempt> greatest, GreatestAttempt(job));
  return !greatest.has_value();
}

// Whether a checkpoint of the attempt has been published: then its restore point was decided.
absl::StatusOr<bool> FileStore::HasPublished(const std::string& job, Attempt attempt) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system_.List(JobDirectory(job), kNamesMax));
  for (const std::string& name : names) {
    const std::optional<CheckpointId> id = ParseCheckpointDirectoryName(name);
    if (!id.has_value() || id->attempt != attempt) continue;
    const absl::Status manifest =
        file_system_.Stat(absl::StrCat(JobDirectory(job), "/", name, "/", kManifestFileName))
            .status();
    if (manifest.ok()) return true;
    if (manifest.code() != absl::StatusCode::kNotFound) return manifest;
  }
  return false;
}

absl::StatusOr<std::string> FileStore::ReadUuid(const std::string& job) {
  const std::string path = absl::StrCat(JobDirectory(job), "/", kJobFileName);
  ASSIGN_OR_RETURN(const std::string bytes, file_system_.ReadSmallFile(path, kSmallRecordBytesMax));
  ASSIGN_OR_RETURN(const JobRecord record, DecodeJobRecord(bytes, path));
  if (record.job != job) {
    return absl::DataLossError(
        absl::StrFormat("%s: job: expected %s, found %s", path, job, record.job));
  }
  return record.job_uuid;
}

absl::StatusOr<std::string> FileStore::JobUuid(const std::string& job) {
  RETURN_IF_ERROR(CheckJobName(job));
  absl::StatusOr<std::string> uuid = ReadUuid(job);
  if (uuid.status().code() == absl::StatusCode::kDataLoss) {
    // Torn while it was published, so nobody has used it: it makes room. But where something was
    // made under it, it was whole once, and its loss is damage that no new uuid mends.
    ASSIGN_OR_RETURN(const bool was_cut_off,
                     PublicationWasCutOff(file_system_, JobDirectory(job), kJobFileName));
    ASSIGN_OR_RETURN(const bool has_only_begun, HasOnlyBegun(job));
    if (was_cut_off && has_only_begun) uuid = absl::NotFoundError("torn");
  }
  if (uuid.status().code() == absl::StatusCode::kNotFound) {
    RETURN_IF_ERROR(EnsureDirectory(file_system_, options_.root, job));
    JobRecord record;
    record.job = job;
    record.job_uuid = options_.make_uuid();
    record.created_by = std::string(WriterVersion());
    record.created_at = absl::FromUnixSeconds(absl::ToUnixSeconds(clock_.WallTime()));
    const absl::Status published =
        Publish(JobDirectory(job), kJobFileName, EncodeJobRecord(record),
                [](const std::string& bytes) { return DecodeJobRecord(bytes, "").ok(); });
    if (!published.ok() && published.code() != absl::StatusCode::kAlreadyExists) return published;
    uuid = ReadUuid(job);  // ours, or that of whoever came first
  }
  RETURN_IF_ERROR(uuid.status());
  RETURN_IF_ERROR(RemoveMarkers(file_system_, JobDirectory(job), kJobFileName));
  // In any case: whoever made these names may have died before they were durable.
  RETURN_IF_ERROR(file_system_.SyncDirectory(options_.root));
  RETURN_IF_ERROR(EnsureDirectory(file_system_, JobDirectory(job), kStoreDirectoryName));
  return uuid;
}

absl::StatusOr<std::optional<Attempt>> FileStore::GreatestAttempt(const std::string& job) {
  absl::StatusOr<std::vector<std::string>> names =
      file_system_.List(StoreDirectory(job), kNamesMax);
  if (names.status().code() == absl::StatusCode::kNotFound) return std::optional<Attempt>();
  RETURN_IF_ERROR(names.status());
  std::optional<Attempt> greatest;
  for (const std::string& name : *names) {
    const std::optional<uint32_t> number = ParseAttemptFileName(name);
    if (number.has_value()) greatest = std::max(greatest, std::optional(Attempt{*number}));
  }
  return greatest;
}

absl::StatusOr<AttemptRecord> FileStore::NewestAttempt(const std::string& job) {
  RETURN_IF_ERROR(CheckJobName(job));
  ASSIGN_OR_RETURN(const std::optional<Attempt> greatest, GreatestAttempt(job));
  if (!greatest.has_value()) {
    return absl::NotFoundError(absl::StrFormat("job %s has had no attempt", job));
  }
  const std::string name = AttemptFileName(*greatest);
  const std::string path = absl::StrCat(StoreDirectory(job), "/", name);
  ASSIGN_OR_RETURN(const std::string bytes, file_system_.ReadSmallFile(path, kSmallRecordBytesMax));
  absl::StatusOr<AttemptRecord> record = DecodeAttempt(bytes, path, *greatest);
  if (record.status().code() == absl::StatusCode::kDataLoss) {
    ASSIGN_OR_RETURN(const bool was_cut_off,
                     PublicationWasCutOff(file_system_, StoreDirectory(job), name));
    // Torn while it was published: nobody was ever told of this attempt, but its number is taken.
    if (was_cut_off) return AttemptRecord{*greatest, "", 0};
  }
  return record;
}

absl::Status FileStore::BeginAttempt(const std::string& job, const AttemptRecord& record) {
  RETURN_IF_ERROR(CheckJobName(job));
  CHECK(record.attempt != Attempt{0});
  ASSIGN_OR_RETURN(const std::optional<Attempt> greatest, GreatestAttempt(job));
  if (greatest.has_value() && *greatest >= record.attempt) {
    return absl::AlreadyExistsError(
        absl::StrFormat("job %s: attempt %d has begun; attempt %d is too late", job,
                        Value(*greatest), Value(record.attempt)));
  }
  return Publish(StoreDirectory(job), AttemptFileName(record.attempt), EncodeAttempt(record),
                 nullptr);
}

absl::StatusOr<RestorePoint> FileStore::DecideRestorePoint(const std::string& job, Attempt attempt,
                                                           const RestorePoint& proposed) {
  RETURN_IF_ERROR(CheckJobName(job));
  const absl::Status published = Publish(
      StoreDirectory(job), RestoreFileName(attempt), EncodeRestorePoint(attempt, proposed),
      [attempt](const std::string& bytes) { return DecodeRestorePoint(bytes, "", attempt).ok(); });
  if (published.ok()) return proposed;
  if (published.code() != absl::StatusCode::kAlreadyExists) return published;
  absl::StatusOr<RestorePoint> recorded = GetRestorePoint(job, attempt);
  if (recorded.status().code() == absl::StatusCode::kNotFound) {
    return absl::UnavailableError(absl::StrFormat(
        "job %s: another agent is deciding what attempt %d starts from", job, Value(attempt)));
  }
  return recorded;
}

absl::StatusOr<RestorePoint> FileStore::GetRestorePoint(const std::string& job, Attempt attempt) {
  RETURN_IF_ERROR(CheckJobName(job));
  const std::string path = absl::StrCat(StoreDirectory(job), "/", RestoreFileName(attempt));
  ASSIGN_OR_RETURN(const std::string bytes, file_system_.ReadSmallFile(path, kSmallRecordBytesMax));
  const absl::StatusOr<RestorePoint> point = DecodeRestorePoint(bytes, path, attempt);
  if (point.status().code() == absl::StatusCode::kDataLoss) {
    // Torn while it was published: nobody was told of it, unless something came of it.
    ASSIGN_OR_RETURN(const bool was_cut_off, PublicationWasCutOff(file_system_, StoreDirectory(job),
                                                                  RestoreFileName(attempt)));
    ASSIGN_OR_RETURN(const bool has_published, HasPublished(job, attempt));
    if (was_cut_off && !has_published) {
      return absl::NotFoundError(
          absl::StrFormat("torn while it was published: %s", point.status().message()));
    }
  }
  RETURN_IF_ERROR(point.status());
  RETURN_IF_ERROR(RemoveMarkers(file_system_, StoreDirectory(job), RestoreFileName(attempt)));
  // Whoever linked it may have died before the name was durable.
  RETURN_IF_ERROR(file_system_.SyncDirectory(StoreDirectory(job)));
  return point;
}

}  // namespace holdfast
