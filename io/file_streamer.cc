#include "io/file_streamer.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/transfer.h"
#include "io/transfer_errors.h"

namespace holdfast {
namespace {

// What direct transfers are multiples of; a device that wants more refuses them, and is written
// through the page cache.
constexpr size_t kAlignmentBytes = 4096;

absl::Status SetDirect(int fd, bool direct) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags >= 0 && fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0) {
    return absl::OkStatus();
  }
  return TransferError(errno, "set O_DIRECT of", fd);
}

}  // namespace

void FileStreamer::FreeMemory::operator()(std::byte* memory) const { std::free(memory); }

FileStreamer::FileStreamer(FileSystem& file_system) : file_system_(file_system) {
  for (Buffer& buffer : buffers_) free_.push_back(&buffer);
}

FileStreamer::~FileStreamer() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

absl::Status FileStreamer::Open(const std::string& path) {
  CHECK(file_ == nullptr);
  auto file = std::make_shared<File>();
  ASSIGN_OR_RETURN(file->io, file_system_.CreateSized(path, 0, Caching::kBuffered));
  file->direct = SetDirect(file->io->handle(), true).ok();
  file_ = std::move(file);
  return absl::OkStatus();
}

absl::Status FileStreamer::Append(std::span<const std::byte> bytes) {
  CHECK(file_ != nullptr);
  while (!bytes.empty()) {
    if (filling_ == nullptr) RETURN_IF_ERROR(TakeBuffer());
    const size_t count = std::min(bytes.size(), kBufferBytes - filling_->used_bytes);
    std::memcpy(filling_->memory.get() + filling_->used_bytes, bytes.data(), count);
    filling_->used_bytes += count;
    bytes = bytes.subspan(count);
    if (filling_->used_bytes == kBufferBytes) RETURN_IF_ERROR(Submit(/*is_last=*/false));
  }
  return absl::OkStatus();
}

absl::Status FileStreamer::Close() {
  CHECK(file_ != nullptr);
  const absl::Status status = Submit(/*is_last=*/true);
  file_.reset();
  return status;
}

absl::Status FileStreamer::Finish() {
  CHECK(file_ == nullptr);
  MutexLock lock(mutex_);
  while (!jobs_.empty()) changed_.Wait(mutex_);
  return status_;
}

absl::Status FileStreamer::TakeBuffer() {
  {
    MutexLock lock(mutex_);
    while (free_.empty()) changed_.Wait(mutex_);
    RETURN_IF_ERROR(status_);
    filling_ = free_.front();
    free_.pop_front();
  }
  filling_->used_bytes = 0;
  if (filling_->memory == nullptr) {
    filling_->memory.reset(
        static_cast<std::byte*>(std::aligned_alloc(kAlignmentBytes, kBufferBytes)));
  }
  if (filling_->memory != nullptr) return absl::OkStatus();
  MutexLock lock(mutex_);
  free_.push_back(std::exchange(filling_, nullptr));
  return absl::ResourceExhaustedError(absl::StrCat("no memory for ", kBufferBytes, " bytes"));
}

absl::Status FileStreamer::Submit(bool is_last) {
  if (!thread_.joinable()) {
    try {
      thread_ = std::thread([this] { RunThread(); });
    } catch (const std::system_error& error) {
      return absl::ResourceExhaustedError(
          absl::StrCat("start a thread that writes: ", error.what()));
    }
  }
  MutexLock lock(mutex_);
  jobs_.push_back({file_, std::exchange(filling_, nullptr), is_last});
  changed_.SignalAll();
  return status_;
}

void FileStreamer::RunThread() {
  while (true) {
    Job job;
    bool failed = false;
    {
      MutexLock lock(mutex_);
      while (jobs_.empty() && !stopping_) changed_.Wait(mutex_);
      if (jobs_.empty()) return;
      job = jobs_.front();
      failed = !status_.ok();
    }
    const absl::Status status = failed ? absl::OkStatus() : RunJob(job);
    MutexLock lock(mutex_);
    if (!status.ok()) status_ = status;
    if (job.buffer != nullptr) free_.push_back(job.buffer);
    jobs_.pop_front();
    changed_.SignalAll();
  }
}

absl::Status FileStreamer::RunJob(const Job& job) {
  if (job.buffer != nullptr) {
    RETURN_IF_ERROR(Write(*job.file, {job.buffer->memory.get(), job.buffer->used_bytes}));
  }
  return job.is_last ? SyncAll(job.file->io->handle()) : absl::OkStatus();
}

absl::Status FileStreamer::Write(File& file, std::span<const std::byte> bytes) {
  const int fd = file.io->handle();
  if (file.direct) {
    // Whole blocks; only the last buffer of a file has more.
    const auto blocks = bytes.first(bytes.size() / kAlignmentBytes * kAlignmentBytes);
    const absl::Status status = WriteAll(fd, file.written_bytes, blocks);
    if (status.ok()) {
      file.written_bytes += blocks.size();
      bytes = bytes.subspan(blocks.size());
    } else if (!absl::IsInvalidArgument(status)) {
      return status;
    }
    if (bytes.empty()) return absl::OkStatus();
    RETURN_IF_ERROR(SetDirect(fd, false));
    file.direct = false;
  }
  RETURN_IF_ERROR(WriteAll(fd, file.written_bytes, bytes));
  file.written_bytes += bytes.size();
  return absl::OkStatus();
}

}  // namespace holdfast
