#include "io/transfer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/transfer_errors.h"

namespace holdfast {
namespace {

// A transfer that makes no progress this often is given up.
constexpr int kRetriesMax = 64;

// Calls `transfer(done_bytes)` until `length` bytes are done. It returns what a system call does.
template <typename Transfer>
absl::Status TransferAll(const char* verb, int fd, size_t length, Transfer transfer,
                         size_t& done_bytes) {
  int retries = 0;
  while (done_bytes < length) {
    const ssize_t moved = transfer(done_bytes);
    if (moved > 0) {
      done_bytes += static_cast<size_t>(moved);
      retries = 0;
    } else if (moved == 0) {
      return absl::OkStatus();  // the caller sees that it is short
    } else if ((errno != EINTR && errno != EAGAIN) || ++retries > kRetriesMax) {
      return TransferError(errno, verb, fd);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteAll(int fd, uint64_t offset_bytes, std::span<const std::byte> data,
                      size_t piece_bytes) {
  size_t done_bytes = 0;
  RETURN_IF_ERROR(TransferAll(
      "write", fd, data.size(),
      [&](size_t begin) {
        return pwrite(fd, data.data() + begin, std::min(data.size() - begin, piece_bytes),
                      static_cast<off_t>(offset_bytes + begin));
      },
      done_bytes));
  if (done_bytes == data.size()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrFormat("write %s: the kernel took %d of %d bytes",
                                                PathOfDescriptor(fd), done_bytes, data.size()));
}

absl::Status ReadAll(int fd, uint64_t offset_bytes, std::span<std::byte> data, size_t piece_bytes) {
  size_t done_bytes = 0;
  absl::Status truncated;
  RETURN_IF_ERROR(TransferAll(
      "read", fd, data.size(),
      [&](size_t begin) -> ssize_t {
        // A direct read behind the end of the file would be refused as unaligned: look first.
        if (begin > 0) {
          truncated = CheckNotTruncated(fd, {offset_bytes, data.size(), begin});
          if (!truncated.ok()) return 0;
        }
        return pread(fd, data.data() + begin, std::min(data.size() - begin, piece_bytes),
                     static_cast<off_t>(offset_bytes + begin));
      },
      done_bytes));
  RETURN_IF_ERROR(truncated);
  if (done_bytes == data.size()) return absl::OkStatus();
  RETURN_IF_ERROR(CheckNotTruncated(fd, {offset_bytes, data.size(), done_bytes}));
  return absl::UnavailableError(absl::StrFormat("read %s: the kernel gave %d of %d bytes",
                                                PathOfDescriptor(fd), done_bytes, data.size()));
}

absl::Status SyncAll(int fd) {
  if (fsync(fd) == 0) return absl::OkStatus();
  return TransferError(errno, "sync", fd);
}

}  // namespace holdfast
