#include "io/transfer_errors.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>

#include "absl/strings/str_format.h"
#include "io/errno_status.h"

namespace holdfast {

std::string PathOfDescriptor(int fd) {
  char path[PATH_MAX];
  const ssize_t length =
      readlink(absl::StrFormat("/proc/self/fd/%d", fd).c_str(), path, sizeof(path));
  if (length <= 0) return absl::StrFormat("fd %d", fd);
  return std::string(path, static_cast<size_t>(length));
}

absl::Status TransferError(int error_number, const char* verb, int fd) {
  return ErrnoStatus(error_number, verb, PathOfDescriptor(fd));
}

absl::Status CheckNotTruncated(int fd, const ShortRead& read) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return TransferError(errno, "read", fd);
  if (static_cast<uint64_t>(info.st_size) > read.offset_bytes + read.found_bytes) {
    return absl::OkStatus();
  }
  return absl::DataLossError(
      absl::StrFormat("read %s: truncated: expected %d bytes at offset %d, found %d",
                      PathOfDescriptor(fd), read.asked_bytes, read.offset_bytes, read.found_bytes));
}

}  // namespace holdfast
