// Lets somebody else act between two operations of whoever uses a FileSystem, or ends him there:
// what another process or a SIGKILL can do at any moment, at a moment of the test's choice.
//
// Model: operations are atomic; the action runs between two of them, whole. Of a process that was
// stopped no operation has any effect any more; that it goes on to run is the test's to prevent.
// Not modelled: anything in the middle of an operation (SimDisk's faults and power cuts do that).
#ifndef HOLDFAST_TESTS_SUPPORT_INTERRUPTING_FILE_SYSTEM_H_
#define HOLDFAST_TESTS_SUPPORT_INTERRUPTING_FILE_SYSTEM_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "io/file_system.h"

namespace holdfast {

// Threads: one. Lifetime: outlives the files it opened; the base outlives it.
class InterruptingFileSystem final : public FileSystem {
 public:
  explicit InterruptingFileSystem(FileSystem& base) : base_(base) {}

  // Runs `action` once, before the `index`-th operation from now (0: the next).
  void InterruptBefore(uint64_t index, std::function<void()> action) {
    countdown_ = index;
    action_ = std::move(action);
  }
  bool was_interrupted() const { return was_interrupted_; }

  // The process is killed before the `index`-th operation from now, until the next one starts.
  void StopBefore(uint64_t index) {
    InterruptBefore(index, [this] { stopped_ = true; });
  }
  bool is_stopped() const { return stopped_; }
  void StartAgain() { stopped_ = false; }

  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    absl::StatusOr<std::unique_ptr<WritableFile>> file = base_.CreateNew(path);
    if (!file.ok()) return file;
    return std::unique_ptr<WritableFile>(new Writable(*this, *std::move(file)));
  }
  absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path, uint64_t size_bytes,
                                                      Caching caching) override {
    RETURN_IF_ERROR(Begin());
    return base_.CreateSized(path, size_bytes, caching);
  }
  absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                      Caching caching) override {
    RETURN_IF_ERROR(Begin());
    return base_.OpenForRead(path, caching);
  }
  absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) override {
    RETURN_IF_ERROR(Begin());
    return base_.ReadSmallFile(path, bytes_max);
  }
  absl::Status Link(const std::string& from, const std::string& to) override {
    RETURN_IF_ERROR(Begin());
    return base_.Link(from, to);
  }
  absl::Status SyncFile(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.SyncFile(path);
  }
  absl::Status Unlink(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.Unlink(path);
  }
  absl::Status CreateDirectory(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.CreateDirectory(path);
  }
  absl::Status SyncDirectory(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.SyncDirectory(path);
  }
  absl::StatusOr<std::vector<std::string>> List(const std::string& path,
                                                size_t count_max) override {
    RETURN_IF_ERROR(Begin());
    return base_.List(path, count_max);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.Stat(path);
  }
  absl::StatusOr<Space> SpaceOf(const std::string& path) override {
    RETURN_IF_ERROR(Begin());
    return base_.SpaceOf(path);
  }

 private:
  class Writable final : public WritableFile {
   public:
    Writable(InterruptingFileSystem& owner, std::unique_ptr<WritableFile> file)
        : owner_(owner), file_(std::move(file)) {}
    absl::Status Append(std::span<const std::byte> data) override {
      RETURN_IF_ERROR(owner_.Begin());
      return file_->Append(data);
    }
    absl::Status Sync() override {
      RETURN_IF_ERROR(owner_.Begin());
      return file_->Sync();
    }

   private:
    InterruptingFileSystem& owner_;
    const std::unique_ptr<WritableFile> file_;
  };

  absl::Status Begin() {
    if (action_ != nullptr && countdown_-- == 0) {
      was_interrupted_ = true;
      std::exchange(action_, nullptr)();
    }
    return stopped_ ? absl::UnavailableError("this process is dead") : absl::OkStatus();
  }

  FileSystem& base_;
  uint64_t countdown_ = 0;
  std::function<void()> action_;
  bool was_interrupted_ = false;
  bool stopped_ = false;
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_INTERRUPTING_FILE_SYSTEM_H_
