#include "agent/witness/kernel_log.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace holdfast {
namespace {

// Records of the device in one turn.
constexpr int kRecordsPerTurn = 64;
constexpr size_t kReadBytes = size_t{64} << 10;
// More than the kernel keeps; a device that never ends is left then.
constexpr int kRecordsMax = 1 << 20;

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

struct Opened {
  UniqueFd fd;
  struct stat info {};
};

absl::StatusOr<Opened> OpenLog(const std::string& path) {
  Opened opened;
  // Not blocked by a pipe that nobody writes to.
  opened.fd.Reset(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY));
  if (!opened.fd || fstat(opened.fd.get(), &opened.info) != 0) return OpenError(errno, path);
  if (!S_ISREG(opened.info.st_mode) && !S_ISCHR(opened.info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": expected /dev/kmsg or a file, found neither"));
  }
  return opened;
}

// "priority,sequence,microseconds,...;text": "[   12.345678] text", as dmesg shows it.
std::string LineOfRecord(std::string_view record) {
  const std::string text(TextOfKernelRecord(record));
  if (text.empty()) return "";
  const std::vector<absl::string_view> head =
      absl::StrSplit(absl::string_view(record.data(), record.find(';')), absl::MaxSplits(',', 3));
  uint64_t microseconds = 0;
  if (head.size() < 3 || !absl::SimpleAtoi(head[2], &microseconds)) {
    return absl::StrCat(text, "\n");
  }
  return absl::StrFormat("[%5d.%06d] %s\n", microseconds / 1'000'000, microseconds % 1'000'000,
                         text);
}

}  // namespace

absl::StatusOr<std::string> LastOfKernelLog(const std::string& path, size_t bytes_max) {
  absl::StatusOr<Opened> opened = OpenLog(path);
  if (!opened.ok()) return opened.status();
  const int fd = opened->fd.get();
  std::string last;
  if (S_ISREG(opened->info.st_mode)) {
    const auto size = static_cast<uint64_t>(opened->info.st_size);
    last.resize(std::min<uint64_t>(size, bytes_max));
    const ssize_t got = pread(fd, last.data(), last.size(), static_cast<off_t>(size - last.size()));
    if (got < 0) return OpenError(errno, path);
    last.resize(static_cast<size_t>(got));
    return last;
  }
  char record[KernelLog::kLineBytesMax];
  for (int i = 0; i < kRecordsMax; ++i) {
    const ssize_t got = read(fd, record, sizeof(record));
    if (got < 0 && (errno == EPIPE || errno == EINTR)) continue;
    if (got <= 0) break;
    last += LineOfRecord(std::string_view(record, static_cast<size_t>(got)));
    if (last.size() > 2 * bytes_max) last.erase(0, last.size() - bytes_max);
  }
  if (last.size() > bytes_max) last.erase(0, last.size() - bytes_max);
  return last;
}

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

void KernelLog::ReadNow() {
  if (watched_) return ReadDevice();
  if (!fd_) {
    if (timer_ == 0) return;  // the device has ended
    Open(From::kBeginning);
  }
  if (fd_ && !watched_) ReadFile();
}

void KernelLog::Open(From from) {
  absl::StatusOr<Opened> opened = OpenLog(path_);
  if (!opened.ok()) {
    state_ = opened.status();
    return;
  }
  auto& [fd, info] = *opened;
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
