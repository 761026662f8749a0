#include "agent/monitor/verdict_store.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "monitor/finding_record.h"

namespace holdfast {
namespace {

using monitor::FindingRecord;

constexpr std::string_view kPrefix = "findings-";
constexpr std::string_view kSuffix = ".jsonl";
constexpr size_t kChecksumDigits = 8;
constexpr size_t kLineValuesMax = 4096;

std::string ChecksumOf(std::string_view json) {
  return absl::StrFormat("%08x", Crc32c(std::as_bytes(std::span(json))));
}

std::string LineOf(const FindingRecord& record) {
  const std::string json = monitor::OneLine(monitor::FindingRecordObject(record));
  return absl::StrCat(ChecksumOf(json), " ", json, "\n");
}

std::optional<uint64_t> NumberOf(std::string_view name) {
  if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  name.remove_suffix(kSuffix.size());
  uint64_t number = 0;
  const std::string digits(name);
  if (digits.find_first_not_of("0123456789") != std::string::npos ||
      !absl::SimpleAtoi(digits, &number) || number == 0) {
    return std::nullopt;
  }
  return number;
}

absl::StatusOr<FindingRecord> ParseLine(std::string_view line) {
  const std::string_view json =
      line.size() > kChecksumDigits ? line.substr(kChecksumDigits + 1) : "";
  if (line.size() <= kChecksumDigits || line[kChecksumDigits] != ' ' ||
      line.substr(0, kChecksumDigits) != ChecksumOf(json)) {
    return absl::DataLossError("another checksum");
  }
  JsonLimits limits;
  limits.values_max = kLineValuesMax;
  ASSIGN_OR_RETURN(const auto document, JsonDocument::Parse(std::string(json), limits));
  return monitor::ParseFindingRecord(document->root());
}

}  // namespace

struct VerdictStore::Disk {
  Disk(FileSystem& disk, std::string path) : file_system(disk), directory(std::move(path)) {}

  std::string PathOf(uint64_t of) const {
    return absl::StrCat(directory, "/", std::string(kPrefix), of, std::string(kSuffix));
  }

  absl::Status Begin(const std::string& text) {
    file.reset();
    const absl::Status made = file_system.CreateDirectory(directory);
    if (!made.ok() && made.code() != absl::StatusCode::kAlreadyExists) return made;
    // Also if it was there: whoever made it may have died before this.
    RETURN_IF_ERROR(file_system.SyncDirectory(directory.substr(0, directory.rfind('/'))));
    ASSIGN_OR_RETURN(file, file_system.CreateNew(PathOf(++number)));
    files.push_back(number);
    bytes = 0;
    RETURN_IF_ERROR(Append(text));
    begun_bytes = bytes;
    if (absl::Status synced = file_system.SyncDirectory(directory); !synced.ok()) {
      file.reset();
      return synced;
    }
    files.pop_back();
    for (const uint64_t older : files) {
      // Dropped: one that is left behind is read once more, and is overruled by this one.
      (void)file_system.Unlink(PathOf(older));
    }
    files = {number};
    return absl::OkStatus();
  }

  absl::Status Append(const std::string& text) {
    absl::Status status = file->Append(std::as_bytes(std::span(text)));
    if (status.ok()) status = file->Sync();
    if (!status.ok()) file.reset();
    bytes += text.size();
    return status;
  }

  FileSystem& file_system;
  const std::string directory;
  std::unique_ptr<WritableFile> file;
  uint64_t bytes = 0;           // of the file
  uint64_t begun_bytes = 0;     // it began with
  uint64_t number = 0;          // the greatest that was ever tried
  std::vector<uint64_t> files;  // that the next new one replaces
};

VerdictStore::VerdictStore(Options options, FileSystem& file_system, WorkPool& pool)
    : options_(std::move(options)),
      file_system_(file_system),
      pool_(pool),
      disk_(std::make_shared<Disk>(file_system, options_.directory)) {}

VerdictStore::~VerdictStore() = default;

std::vector<FindingRecord> VerdictStore::Load() {
  const auto warn = [&](const std::string& text) {
    if (options_.warn) options_.warn(absl::StrCat("monitor: stored findings: ", text));
  };
  const auto names = file_system_.List(options_.directory, kFilesMax);
  if (!names.ok()) {
    if (names.status().code() != absl::StatusCode::kNotFound) {
      warn(std::string(names.status().message()));
    }
    return {};
  }
  for (const std::string& name : *names) {
    if (const auto number = NumberOf(name)) disk_->files.push_back(*number);
  }
  std::sort(disk_->files.begin(), disk_->files.end());
  if (!disk_->files.empty()) disk_->number = disk_->files.back();

  std::vector<std::string> order;  // ids, as they came first
  std::map<std::string, FindingRecord> records;
  for (const uint64_t number : disk_->files) {
    const std::string path = disk_->PathOf(number);
    const absl::StatusOr<std::string> text = file_system_.ReadSmallFile(path, kFileBytesMax);
    if (!text.ok()) {
      warn(std::string(text.status().message()));
      continue;
    }
    size_t damaged = 0;
    std::string why;
    for (size_t at = 0; at < text->size();) {
      const size_t end = text->find('\n', at);
      if (end == std::string::npos) {
        warn(absl::StrFormat("%s: the last %d bytes are no whole line: ignored", path,
                             text->size() - at));
        break;
      }
      absl::StatusOr<FindingRecord> record =
          ParseLine(std::string_view(*text).substr(at, end - at));
      at = end + 1;
      if (!record.ok()) {
        ++damaged;
        why = std::string(record.status().message());
        continue;
      }
      if (!records.contains(record->finding.id)) order.push_back(record->finding.id);
      records[record->finding.id] = *std::move(record);
    }
    if (damaged > 0) {
      warn(absl::StrFormat("%s: %d damaged lines ignored (the last: %s)", path, damaged, why));
    }
  }
  std::vector<FindingRecord> loaded;
  for (const std::string& id : order) loaded.push_back(std::move(records.at(id)));
  return loaded;
}

void VerdictStore::Put(const FindingRecord& record) {
  dirty_ = true;
  if (!new_file_) waiting_.push_back(LineOf(record));
  // With a new file all records are written anyway.
  if (waiting_.size() > kWaitingMax) new_file_ = true;
  if (!writing_) WriteNext();
}

void VerdictStore::WriteNext() {
  dirty_ = false;
  std::string text;
  const bool begins = std::exchange(new_file_, false);
  if (begins) {
    for (const FindingRecord* record : options_.records()) text += LineOf(*record);
  } else {
    for (const std::string& line : waiting_) text += line;
  }
  waiting_.clear();
  writing_ = true;
  auto status = std::make_shared<absl::Status>();
  pool_.Run([disk = disk_, begins, text = std::move(text),
             status] { *status = begins ? disk->Begin(text) : disk->Append(text); },
            [this, alive = std::weak_ptr<bool>(alive_), status] {
              if (!alive.expired()) Written(*status);
            });
}

void VerdictStore::Written(const absl::Status& status) {
  writing_ = false;
  if (!status.ok()) {
    ++failure_count_;
    new_file_ = true;
    if (!std::exchange(failed_, true) && options_.warn) {
      options_.warn(
          absl::StrCat("monitor: findings cannot be stored: ", std::string(status.message()),
                       "; trying again with the next one"));
    }
    return;
  }
  failed_ = false;
  if (disk_->bytes > std::max<uint64_t>(kFileBytes, 2 * disk_->begun_bytes)) new_file_ = true;
  if (dirty_) WriteNext();
}

}  // namespace holdfast
