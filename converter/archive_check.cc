#include "converter/archive_check.h"

#include <cstdint>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "converter/byte_source.h"
#include "converter/dcp_metadata.h"
#include "converter/dcp_names.h"
#include "converter/sandbox.h"
#include "converter/zip_reader.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kMetadataBytesMax = uint64_t{4} << 30;
// Of processor time: a checkpoint may have terabytes.
constexpr uint64_t kSecondsMax = 24 * 3600;
constexpr size_t kResultBytesMax = size_t{16} << 20;
// Between the findings of the process: no name in a zip has it.
constexpr char kSeparator = '\0';

class ArchiveChecker {
 public:
  ArchiveChecker(const ForeignFolder& folder, const ForeignIndex& index) : folder_(folder) {
    for (const Extent& extent : index.extents) {
      if (extent.file != kInline && extent.stored_bytes > 0) files_.insert(extent.file);
    }
    for (const uint32_t file : files_) item_bytes_max_ += folder.files()[file].bytes;
  }

  absl::StatusOr<std::vector<std::string>> Run() {
    for (uint32_t number = 0; number < folder_.files().size(); ++number) {
      const FolderFile& file = folder_.files()[number];
      const std::string_view name = std::string_view(file.path).substr(file.path.rfind('/') + 1);
      if (IsDcpMetadataName(name)) RETURN_IF_ERROR(CheckItems(number));
    }
    for (const uint32_t file : files_) {
      if (of_items_.contains(file)) continue;
      RETURN_IF_ERROR(Check(FolderSource(folder_, file)));
    }
    return std::move(damaged_);
  }

 private:
  // Of a DCP file, which is archive after archive.
  absl::Status CheckItems(uint32_t number) {
    const std::string& path = folder_.files()[number].path;
    ASSIGN_OR_RETURN(std::string text, folder_.ReadAll(number, kMetadataBytesMax));
    const absl::StatusOr<DcpMetadata> metadata = ParseDcpMetadata(std::move(text), path);
    if (!metadata.ok())
      return absl::OkStatus();  // another file of this name; or its reader says so
    const size_t slash = path.rfind('/');
    const std::string directory = slash == std::string::npos ? "" : path.substr(0, slash);
    for (const DcpItem& item : metadata->items) {
      const absl::StatusOr<uint32_t> file =
          folder_.Resolve(directory, metadata->files[item.file], path);
      if (!file.ok() || !files_.contains(*file)) continue;
      of_items_.insert(*file);
      const uint64_t bytes = folder_.files()[*file].bytes;
      if (item.offset_bytes > bytes || item.stored_bytes > bytes - item.offset_bytes ||
          !metadata->transforms[item.transforms].empty() ||
          !items_.emplace(*file, item.offset_bytes, item.stored_bytes).second) {
        continue;
      }
      if (item.stored_bytes > item_bytes_max_) {  // or reading might never end
        damaged_.push_back(path + ": items of its files overlap");
        return absl::OkStatus();
      }
      item_bytes_max_ -= item.stored_bytes;
      RETURN_IF_ERROR(Check(FolderSource(folder_, *file, item.offset_bytes, item.stored_bytes)));
    }
    return absl::OkStatus();
  }

  absl::Status Check(const FolderSource& source) {
    const absl::StatusOr<ZipDirectory> directory = ZipDirectory::Read(source);
    if (!directory.ok()) return absl::OkStatus();  // no archive: its reader knows what it is
    for (const ZipEntry& entry : directory->entries()) {
      if (entry.crc32 == 0 || entry.method != ZipEntry::Method::kStored) continue;
      const absl::Status status = CheckZipCrc32(source, entry);
      if (status.ok()) continue;
      if (!absl::IsDataLoss(status)) return status;
      if (damaged_.size() < kProofFindingsMax) damaged_.emplace_back(status.message());
    }
    return absl::OkStatus();
  }

  const ForeignFolder& folder_;
  std::set<uint32_t> files_;     // those that the index takes bytes from
  std::set<uint32_t> of_items_;  // of them, those that are checked item by item
  std::set<std::tuple<uint32_t, uint64_t, uint64_t>> items_;
  uint64_t item_bytes_max_ = 0;  // of items that are still to come
  std::vector<std::string> damaged_;
};

}  // namespace

absl::StatusOr<std::vector<std::string>> DamagedEntries(const ForeignFolder& folder,
                                                        const ForeignIndex& index) {
  return ArchiveChecker(folder, index).Run();
}

absl::Status ProveArchives(const ForeignFolder& folder, const ForeignIndex& index,
                           ProofReport& report) {
  SandboxLimits limits;
  limits.cpu_seconds = kSecondsMax;
  limits.result_bytes = kResultBytesMax;
  const auto check = [&]() -> absl::StatusOr<std::string> {
    ASSIGN_OR_RETURN(const std::vector<std::string> entries, DamagedEntries(folder, index));
    return absl::StrJoin(entries, std::string(1, kSeparator));
  };
  SandboxReport sandbox;  // whoever opened the folder has said what this system does not grant
  ASSIGN_OR_RETURN(const std::string damaged, RunSandboxed(folder.root(), limits, check, &sandbox));
  if (damaged.empty()) return absl::OkStatus();
  report.soundness = Soundness::kLost;
  const std::vector<std::string> texts = absl::StrSplit(damaged, kSeparator);
  for (const std::string& text : texts) {
    ++report.finding_count;
    if (report.findings.size() < kProofFindingsMax) {
      report.findings.push_back({ProofFinding::Kind::kChecksum, text});
    }
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
