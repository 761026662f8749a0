#include "agent/run/rank_output.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#include "base/check.h"

namespace holdfast {
namespace {

constexpr size_t kPieceBytes = size_t{64} << 10;

}  // namespace

RotatedFile::RotatedFile(std::string path, uint64_t bytes_max)
    : path_(std::move(path)), bytes_max_(bytes_max) {}

bool RotatedFile::Open() {
  file_.Reset(open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0644));
  struct stat info {};
  if (!file_ || fstat(file_.get(), &info) != 0) return false;
  bytes_ = static_cast<uint64_t>(info.st_size);
  return true;
}

bool RotatedFile::Append(const char* bytes, size_t count) {
  if (!file_ && !Open()) return false;
  if (bytes_ > 0 && bytes_ + count > bytes_max_) {
    // Where that fails the file goes on growing: rather too much of a log than none.
    if (rename(path_.c_str(), (path_ + ".1").c_str()) == 0 && !Open()) return false;
  }
  while (count > 0) {
    const ssize_t written = write(file_.get(), bytes, count);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes += written;
    count -= static_cast<size_t>(written);
    bytes_ += static_cast<uint64_t>(written);
  }
  return true;
}

RankOutput::RankOutput(const std::string& log_directory, uint64_t log_bytes_max)
    : progress_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      files_{RotatedFile(log_directory + "/" + kLogNames[0], log_bytes_max),
             RotatedFile(log_directory + "/" + kLogNames[1], log_bytes_max)} {
  CHECK(progress_);
}

RankOutput::~RankOutput() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    ends_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void RankOutput::Start() {
  CHECK(!thread_.joinable());
  thread_ = std::thread([this] { Write(); });
}

size_t RankOutput::Room(int64_t now_ns) {
  MutexLock lock(mutex_);
  if (waiting_bytes_ < kBufferBytesMax) {
    full_since_ns_ = 0;
    is_stalled_ = false;
    return kBufferBytesMax - waiting_bytes_;
  }
  if (full_since_ns_ == 0) full_since_ns_ = now_ns;
  is_stalled_ = now_ns - full_since_ns_ >= kStallMaxNs;
  return is_stalled_ ? kBufferBytesMax : 0;
}

void RankOutput::Put(Stream stream, const char* bytes, size_t count) {
  bytes_ += count;
  uint64_t& unsaid = dropped_unsaid_[static_cast<size_t>(stream)];
  MutexLock lock(mutex_);
  const size_t bytes_max = kBufferBytesMax + (is_stalled_ ? 0 : kLastWordsBytesMax);
  if (waiting_bytes_ + count > bytes_max) {
    unsaid += count;
    dropped_bytes_ += count;
    return;
  }
  waiting_bytes_ += count;
  // One piece for many small writes: the buffer's limit is one of memory, too.
  if (!pieces_.empty() && pieces_.back().stream == stream && unsaid == 0 &&
      pieces_.back().bytes.size() < kPieceBytes) {
    pieces_.back().bytes.append(bytes, count);
  } else {
    pieces_.push_back({stream, std::string(bytes, count), std::exchange(unsaid, 0)});
  }
  changed_.Signal();
}

void RankOutput::DrainProgress() {
  uint64_t value = 0;
  // Nothing to read is what is wanted.
  [[maybe_unused]] const ssize_t got = read(progress_.get(), &value, sizeof(value));
}

size_t RankOutput::waiting_bytes() {
  MutexLock lock(mutex_);
  return waiting_bytes_;
}

uint64_t RankOutput::dropped_bytes() {
  MutexLock lock(mutex_);
  return dropped_bytes_;
}

void RankOutput::Write() {
  for (;;) {
    Piece piece;
    {
      MutexLock lock(mutex_);
      while (pieces_.empty() && !ends_) changed_.Wait(mutex_);
      if (ends_) return;
      piece = std::move(pieces_.front());
      pieces_.pop_front();
    }
    RotatedFile& file = files_[static_cast<size_t>(piece.stream)];
    if (piece.dropped_before > 0) {
      char note[128];
      const int length = std::snprintf(note, sizeof(note),
                                       "\n[holdfast: %llu bytes of output are missing here: the "
                                       "log could not take them]\n",
                                       static_cast<unsigned long long>(piece.dropped_before));
      file.Append(note, static_cast<size_t>(length));
    }
    const bool written = file.Append(piece.bytes.data(), piece.bytes.size());
    {
      MutexLock lock(mutex_);
      waiting_bytes_ -= piece.bytes.size();
      if (!written) dropped_bytes_ += piece.bytes.size();
    }
    const uint64_t one = 1;
    // EAGAIN is the full counter, which is readable all the same.
    [[maybe_unused]] const ssize_t rung = ::write(progress_.get(), &one, sizeof(one));
  }
}

}  // namespace holdfast
