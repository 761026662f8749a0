#include "agent/run/small_files.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "io/errno_status.h"
#include "io/unique_fd.h"

namespace holdfast {

absl::Status ReplaceFile(const std::string& path, std::string_view contents) {
  const std::string partial = absl::StrCat(path, ".partial");
  const UniqueFd file(open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file) return ErrnoStatus(errno, "create", partial);
  while (!contents.empty()) {
    const ssize_t written = write(file.get(), contents.data(), contents.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return ErrnoStatus(written < 0 ? errno : EIO, "write", partial);
    contents.remove_prefix(static_cast<size_t>(written));
  }
  if (rename(partial.c_str(), path.c_str()) != 0) return ErrnoStatus(errno, "rename", partial);
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!file) return ErrnoStatus(errno, "open", path);
  return ReadAll(file.get(), bytes_max);
}

absl::Status MakeDirectories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);  // the umask is 077 (main)
  return error ? ErrnoStatus(error.value(), "create directory", path) : absl::OkStatus();
}

}  // namespace holdfast
