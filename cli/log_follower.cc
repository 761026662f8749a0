#include "cli/log_follower.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <utility>

namespace holdfast::cli {
namespace {

constexpr size_t kReadBytes = size_t{64} << 10;

void WriteAll(int fd, const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t written = write(fd, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    // Dropped: the terminal has gone. The log has it all.
    if (written <= 0) return;
    done += static_cast<size_t>(written);
  }
}

}  // namespace

LogFollower::LogFollower(std::string path, std::string prefix, int sink)
    : path_(std::move(path)), prefix_(std::move(prefix)), sink_(sink) {}

bool LogFollower::ReadSome() {
  if (!file_) file_.Reset(open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file_) return false;
  std::array<char, kReadBytes> bytes;
  const ssize_t got = read(file_.get(), bytes.data(), bytes.size());
  if (got < 0 && errno == EINTR) return true;
  if (got > 0) {
    Show(bytes.data(), static_cast<size_t>(got));
    return true;
  }
  // At its end: is there another one under that name?
  struct stat mine {};
  struct stat named {};
  if (fstat(file_.get(), &mine) != 0 || stat(path_.c_str(), &named) != 0 ||
      (mine.st_ino == named.st_ino && mine.st_dev == named.st_dev)) {
    return false;
  }
  // What was written to it between the read above and its rotation: nothing comes after that.
  const ssize_t last = read(file_.get(), bytes.data(), bytes.size());
  if (last > 0) {
    Show(bytes.data(), static_cast<size_t>(last));
    return true;
  }
  file_.Reset();
  return true;
}

void LogFollower::Advance() {
  while (ReadSome()) continue;
}

void LogFollower::Finish() {
  Advance();
  if (partial_.empty()) return;
  WriteAll(sink_, prefix_ + std::exchange(partial_, "") + "\n");
}

void LogFollower::Show(const char* bytes, size_t count) {
  if (prefix_.empty()) return WriteAll(sink_, std::string(bytes, count));
  partial_.append(bytes, count);
  std::string text;
  size_t begin = 0;
  for (size_t end = 0; (end = partial_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    text += prefix_;
    text.append(partial_, begin, end + 1 - begin);
  }
  partial_.erase(0, begin);
  if (partial_.size() > kLineBytesMax) text += prefix_ + std::exchange(partial_, "") + "\n";
  WriteAll(sink_, text);
}

}  // namespace holdfast::cli
