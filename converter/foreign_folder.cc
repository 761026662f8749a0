#include "converter/foreign_folder.h"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/transfer.h"

namespace holdfast::converter {
namespace {

constexpr size_t kOpenFilesMax = 64;

std::string Join(std::string_view directory, std::string_view name) {
  return directory.empty() ? std::string(name) : absl::StrFormat("%s/%s", directory, name);
}

bool IsInside(const std::string& root, const std::string& path) {
  return root == "/" ||
         (absl::StartsWith(path, root) && path.size() > root.size() && path[root.size()] == '/');
}

}  // namespace

ForeignFolder::~ForeignFolder() = default;

absl::StatusOr<std::unique_ptr<ForeignFolder>> ForeignFolder::Open(FileSystem& file_system,
                                                                   const std::string& path) {
  std::error_code error;
  const std::filesystem::path whole = std::filesystem::canonical(path, error);
  if (error) return absl::NotFoundError(absl::StrFormat("%s: %s", path, error.message()));
  ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(whole.string()));
  if (info.kind == FileInfo::Kind::kFile) {
    std::unique_ptr<ForeignFolder> folder(
        new ForeignFolder(file_system, whole.parent_path().string()));
    folder->single_file_ = true;
    folder->files_.push_back({whole.filename().string(), info.size_bytes});
    return folder;
  }
  if (info.kind != FileInfo::Kind::kDirectory) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected a file or a directory, found something else", path));
  }
  std::unique_ptr<ForeignFolder> folder(new ForeignFolder(file_system, whole.string()));
  RETURN_IF_ERROR(folder->AddDirectory("", 0));
  std::sort(folder->files_.begin(), folder->files_.end(),
            [](const FolderFile& a, const FolderFile& b) { return a.path < b.path; });
  std::sort(folder->directories_.begin(), folder->directories_.end());
  return folder;
}

absl::Status ForeignFolder::AddDirectory(const std::string& relative, size_t depth) {
  if (depth > kFolderDepthMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: %s: expected at most %d directories in one another", root_, relative,
                        kFolderDepthMax));
  }
  const std::string directory = Join(root_, relative);
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system_.List(relative.empty() ? root_ : directory, kFolderFilesMax));
  for (const std::string& name : names) {
    const std::string path = Join(relative, name);
    const absl::StatusOr<FileInfo> info = file_system_.Stat(Join(root_, path));
    if (absl::IsNotFound(info.status())) continue;  // gone since List
    RETURN_IF_ERROR(info.status());
    if (path.size() > kPathBytesMax) {
      refused_.push_back(absl::StrFormat("%s...: a path of more than %d bytes", path.substr(0, 64),
                                         kPathBytesMax));
    } else if (info->kind == FileInfo::Kind::kFile) {
      files_.push_back({path, info->size_bytes});
    } else if (info->kind == FileInfo::Kind::kDirectory) {
      directories_.push_back(path);
      RETURN_IF_ERROR(AddDirectory(path, depth + 1));
    } else {
      AddLink(path);
    }
    if (files_.size() + directories_.size() > kFolderFilesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: expected at most %d files and directories", root_, kFolderFilesMax));
    }
  }
  return absl::OkStatus();
}

// A link is read as the file that it leads to. The file is reached by its own name, so that a link
// that changes later leads nowhere else.
void ForeignFolder::AddLink(const std::string& relative) {
  std::error_code error;
  const std::filesystem::path target = std::filesystem::canonical(Join(root_, relative), error);
  if (error) {
    refused_.push_back(absl::StrFormat("%s: %s", relative, error.message()));
    return;
  }
  if (!IsInside(root_, target.string())) {
    refused_.push_back(
        absl::StrFormat("%s: a symbolic link out of the folder, to %s", relative, target.string()));
    return;
  }
  const absl::StatusOr<FileInfo> info = file_system_.Stat(target.string());
  if (!info.ok() || info->kind != FileInfo::Kind::kFile) {
    refused_.push_back(absl::StrFormat("%s: not a regular file, nor a link to one", relative));
    return;
  }
  files_.push_back({relative, info->size_bytes});
}

std::optional<uint32_t> ForeignFolder::Find(std::string_view path) const {
  const auto found = std::lower_bound(
      files_.begin(), files_.end(), path,
      [](const FolderFile& file, std::string_view wanted) { return file.path < wanted; });
  if (found == files_.end() || found->path != path) return std::nullopt;
  return static_cast<uint32_t>(found - files_.begin());
}

absl::StatusOr<uint32_t> ForeignFolder::Resolve(std::string_view directory, std::string_view name,
                                                std::string_view where) const {
  std::vector<std::string_view> components;
  bool outside = name.starts_with('/') || name.find('\0') != std::string_view::npos;
  const std::string joined = Join(directory, name);
  const std::vector<std::string> parts = absl::StrSplit(joined, '/');
  for (std::string_view component : parts) {
    if (component.empty() || component == ".") continue;
    outside = outside || component == "..";
    components.push_back(component);
  }
  if (outside || name.size() > kPathBytesMax) {
    return absl::PermissionDeniedError(
        absl::StrFormat("%s names the file \"%s\", which leads out of the folder", where,
                        name.substr(0, kPathBytesMax)));
  }
  std::string path;
  for (std::string_view component : components) path = Join(path, component);
  const std::optional<uint32_t> found = Find(path);
  if (found.has_value()) return *found;
  for (const std::string& refused : refused_) {
    if (absl::StartsWith(refused, absl::StrCat(path, ": "))) {
      return absl::PermissionDeniedError(
          absl::StrFormat("%s names the file \"%s\", which is refused: %s", where, name, refused));
    }
  }
  return absl::NotFoundError(
      absl::StrFormat("%s names the file \"%s\", which is not there", where, name));
}

std::vector<uint32_t> ForeignFolder::FilesIn(std::string_view directory) const {
  std::vector<uint32_t> found;
  const std::string prefix = directory.empty() ? std::string() : absl::StrFormat("%s/", directory);
  auto file = std::lower_bound(
      files_.begin(), files_.end(), prefix,
      [](const FolderFile& each, const std::string& wanted) { return each.path < wanted; });
  for (; file != files_.end() && absl::StartsWith(file->path, prefix); ++file) {
    if (file->path.find('/', prefix.size()) != std::string::npos) continue;
    found.push_back(static_cast<uint32_t>(file - files_.begin()));
  }
  return found;
}

absl::StatusOr<std::shared_ptr<IoFile>> ForeignFolder::Handle(uint32_t file) const {
  CHECK(file < files_.size());
  const MutexLock lock(mutex_);
  const auto found = open_.find(file);
  if (found != open_.end()) {
    recent_.splice(recent_.begin(), recent_, found->second.place);
    return found->second.file;
  }
  std::error_code error;
  const std::filesystem::path target =
      std::filesystem::canonical(Join(root_, files_[file].path), error);
  if (error) {
    return absl::NotFoundError(absl::StrFormat("%s: %s", files_[file].path, error.message()));
  }
  if (!IsInside(root_, target.string())) {
    return absl::PermissionDeniedError(absl::StrFormat("%s: leads out of the folder now, to %s",
                                                       files_[file].path, target.string()));
  }
  absl::StatusOr<std::unique_ptr<IoFile>> file_or =
      file_system_.OpenForRead(target.string(), Caching::kBuffered);
  // kPermissionDenied is for what the checkpoint may not do; this is what the user may not.
  if (absl::IsPermissionDenied(file_or.status())) {
    return absl::FailedPreconditionError(file_or.status().message());
  }
  RETURN_IF_ERROR(file_or.status());
  const std::shared_ptr<IoFile> opened = *std::move(file_or);
  if (open_.size() >= kOpenFilesMax) {
    open_.erase(recent_.back());
    recent_.pop_back();
  }
  recent_.push_front(file);
  open_[file] = {opened, recent_.begin()};
  return opened;
}

absl::Status ForeignFolder::ReadAt(uint32_t file, uint64_t offset_bytes,
                                   std::span<std::byte> out) const {
  if (out.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::shared_ptr<IoFile> handle, Handle(file));
  const absl::Status status = holdfast::ReadAll(handle->handle(), offset_bytes, out);
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrFormat("%s: %s", files_[file].path, status.message()));
}

absl::StatusOr<std::string> ForeignFolder::ReadAll(uint32_t file, uint64_t bytes_max) const {
  CHECK(file < files_.size());
  if (files_[file].bytes > bytes_max) {
    return absl::ResourceExhaustedError(absl::StrFormat("%s: expected at most %d bytes, found %d",
                                                        files_[file].path, bytes_max,
                                                        files_[file].bytes));
  }
  return ReadHead(file, bytes_max);
}

absl::StatusOr<std::string> ForeignFolder::ReadHead(uint32_t file, uint64_t bytes_max) const {
  CHECK(file < files_.size());
  std::string text(std::min(files_[file].bytes, bytes_max), '\0');
  RETURN_IF_ERROR(ReadAt(file, 0, std::as_writable_bytes(std::span(text))));
  return text;
}

}  // namespace holdfast::converter
