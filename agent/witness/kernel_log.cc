#include "agent/witness/kernel_log.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <vector>

#include "absl/strings/str_cat.h"

namespace holdfast {
namespace {

// Records of the device in one turn.
constexpr int kRecordsPerTurn = 64;
constexpr size_t kReadBytes = size_t{64} << 10;

absl::Status OpenError(int error, const std::string& path) {
  const std::string text = absl::StrCat(path, ": ", strerror(error));
  switch (error) {
    case EPERM:
    case EACCES:
      return absl::PermissionDeniedError(
          path == KernelLog::kDevice
              ? absl::StrCat(text,
                             "; it needs CAP_SYSLOG, or kernel.dmesg_restrict = 0 and a "
                             "readable /dev/kmsg; or kernel_log = a file that its lines are "
                             "appended to")
              : text);
    case ENOENT:
      return absl::NotFoundError(text);
    default:
      return absl::UnavailableError(text);
  }
}

}  // namespace

std::string_view TextOfKernelRecord(std::string_view record) {
  const size_t head = record.find(';');
  if (head == std::string_view::npos) return {};
  record.remove_prefix(head + 1);
  return record.substr(0, record.find('\n'));
}

KernelLog::~KernelLog() {
  if (watched_) loop_.Unwatch(fd_.get());
  if (timer_ != 0) loop_.CancelTimer(timer_);
}

void KernelLog::Start() {
  Open(From::kEnd);
  if (!watched_) timer_ = loop_.RunAfter(kLookEvery, [this] { Look(); });
}

void KernelLog::Open(From from) {
  // Not blocked by a pipe that nobody writes to.
  UniqueFd fd(open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY));
  struct stat info {};
  if (!fd || fstat(fd.get(), &info) != 0) {
    state_ = OpenError(errno, path_);
    return;
  }
  if (!S_ISREG(info.st_mode) && !S_ISCHR(info.st_mode)) {
    state_ = absl::InvalidArgumentError(
        absl::StrCat(path_, ": expected /dev/kmsg or a file, found neither"));
    return;
  }
  if (S_ISCHR(info.st_mode)) {
    if (lseek(fd.get(), 0, SEEK_END) < 0) {
      state_ = OpenError(errno, path_);
      return;
    }
    watched_ = true;
  }
  fd_ = std::move(fd);
  offset_bytes_ = from == From::kEnd ? static_cast<uint64_t>(info.st_size) : 0;
  line_.clear();
  state_ = absl::OkStatus();
  if (watched_) {
    loop_.Watch(fd_.get(), EventLoop::FdEvents::kReadable, [this] { ReadDevice(); });
  }
}

void KernelLog::ReadDevice() {
  char record[kLineBytesMax];
  for (int i = 0; i < kRecordsPerTurn; ++i) {
    const ssize_t got = read(fd_.get(), record, sizeof(record));
    if (got > 0) {
      const std::string_view text =
          TextOfKernelRecord(std::string_view(record, static_cast<size_t>(got)));
      if (!text.empty()) on_line_(text);
      continue;
    }
    // EPIPE: records were overwritten before we came; the next read goes on behind the gap.
    if (got < 0 && (errno == EPIPE || errno == EINTR)) continue;
    if (got < 0 && errno == EAGAIN) return;
    // It will never give more.
    state_ = absl::UnavailableError(
        absl::StrCat(path_, ": ", got == 0 ? "it has ended" : strerror(errno)));
    loop_.Unwatch(fd_.get());
    watched_ = false;
    fd_.Reset();
    return;
  }
}

bool KernelLog::IsReplaced() const {
  struct stat ours {
  }, named{};
  return fstat(fd_.get(), &ours) == 0 && stat(path_.c_str(), &named) == 0 &&
         (ours.st_dev != named.st_dev || ours.st_ino != named.st_ino);
}

void KernelLog::Look() {
  if (!fd_ || (ReadFile() && IsReplaced())) Open(From::kBeginning);
  timer_ = watched_ ? 0 : loop_.RunAfter(kLookEvery, [this] { Look(); });
}

// Whether all of it has been read.
bool KernelLog::ReadFile() {
  struct stat info {};
  if (fstat(fd_.get(), &info) != 0) return true;
  if (static_cast<uint64_t>(info.st_size) < offset_bytes_) {  // cut
    offset_bytes_ = 0;
    line_.clear();
  }
  std::vector<char> buffer(kReadBytes);
  for (size_t taken = 0; taken < kBytesPerTurnMax;) {
    const ssize_t got =
        pread(fd_.get(), buffer.data(), buffer.size(), static_cast<off_t>(offset_bytes_));
    if (got <= 0) {
      state_ = got == 0 ? absl::OkStatus() : OpenError(errno, path_);
      return true;
    }
    offset_bytes_ += static_cast<uint64_t>(got);
    taken += static_cast<size_t>(got);
    TakeText(std::string_view(buffer.data(), static_cast<size_t>(got)));
  }
  return false;
}

void KernelLog::TakeText(std::string_view text) {
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view part = text.substr(0, end);
    line_.append(part.substr(0, kLineBytesMax - line_.size()));
    if (end == std::string_view::npos) return;
    if (!line_.empty()) on_line_(line_);
    line_.clear();
    text.remove_prefix(end + 1);
  }
}

}  // namespace holdfast
