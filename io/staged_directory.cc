#include "io/staged_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/transfer.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

absl::Status SyncDirectory(const std::string& path) {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return ErrnoStatus(errno, "open", path);
  return SyncAll(fd.get());
}

}  // namespace

absl::StatusOr<std::unique_ptr<StagedDirectory>> StagedDirectory::Create(
    const std::string& final_path, const std::string& unique, Existing existing, Result result) {
  const std::filesystem::path whole = std::filesystem::absolute(final_path).lexically_normal();
  const std::filesystem::path named = whole.has_filename() ? whole : whole.parent_path();
  struct stat info {};
  if (lstat(named.c_str(), &info) == 0) {
    if (existing == Existing::kRefuse) {
      return absl::AlreadyExistsError(absl::StrFormat("%s is there already", final_path));
    }
    const bool fits = result == Result::kFile ? S_ISREG(info.st_mode) : S_ISDIR(info.st_mode);
    if (!fits) {
      return absl::AlreadyExistsError(
          absl::StrFormat("%s is there already, and is no %s", final_path,
                          result == Result::kFile ? "file" : "directory"));
    }
  } else if (errno != ENOENT) {
    return ErrnoStatus(errno, "look at", final_path);
  }
  const std::filesystem::path staged =
      named.parent_path() / absl::StrFormat(".%s.partial.%s", named.filename().string(), unique);
  if (mkdir(staged.c_str(), 0700) != 0) return ErrnoStatus(errno, "create", staged.string());
  return std::unique_ptr<StagedDirectory>(
      new StagedDirectory(named.string(), staged.string(), existing, result));
}

StagedDirectory::~StagedDirectory() {
  std::error_code gone;  // after Publish there is nothing, and what cannot be removed stays
  std::filesystem::remove_all(staged_path_, gone);
}

absl::Status StagedDirectory::Publish() {
  RETURN_IF_ERROR(SyncDirectory(staged_path_));
  const std::filesystem::path final_path = final_path_;
  const std::string from =
      result_ == Result::kFile
          ? (std::filesystem::path(staged_path_) / final_path.filename()).string()
          : staged_path_;
  if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, final_path_.c_str(), RENAME_NOREPLACE) == 0) {
    return SyncDirectory(final_path.parent_path().string());
  }
  if (errno != EEXIST || existing_ == Existing::kRefuse) {
    return ErrnoStatus(errno, "publish", final_path_);
  }
  // The two change places; then the staged name has what was there before, and the destructor
  // removes it.
  if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, final_path_.c_str(), RENAME_EXCHANGE) != 0) {
    return ErrnoStatus(errno, "publish", final_path_);
  }
  return SyncDirectory(final_path.parent_path().string());
}

}  // namespace holdfast
