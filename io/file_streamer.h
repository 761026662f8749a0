// New files, one after the other, each written once from its begin to its end: the output of a
// conversion. Past the page cache where the file system can, from memory that is used again and
// again: on a virtual machine a fresh page of the cache can cost more than the disk
// (docs/decisions/0011-output-past-the-page-cache.md). A thread of its own writes and syncs what
// has been appended while the caller makes the next bytes.
#ifndef HOLDFAST_IO_FILE_STREAMER_H_
#define HOLDFAST_IO_FILE_STREAMER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "base/mutex.h"
#include "io/file_system.h"

namespace holdfast {

// Threads: all calls on one thread; one is started by the first byte that is written.
// Errors: as in io/file_system.h, with the path. They are told by the first call after them, which
//   may be about another file, and by all later ones.
// Lifetime: the FileSystem, whose handles are descriptors, outlives it. The destructor waits for
//   what has been handed over, and promises nothing about a file that was not closed.
class FileStreamer {
 public:
  explicit FileStreamer(FileSystem& file_system);
  ~FileStreamer();
  FileStreamer(const FileStreamer&) = delete;
  FileStreamer& operator=(const FileStreamer&) = delete;

  // Creates `path`, which must not exist. CHECKs that none is open.
  absl::Status Open(const std::string& path);
  // `bytes` are not referenced after the call.
  absl::Status Append(std::span<const std::byte> bytes);
  // The file that is open is whole; after a Finish it is durable.
  absl::Status Close();
  // Waits. After OK every file that was closed is durable; not its name. CHECKs that none is open.
  absl::Status Finish();

 private:
  // Two: one is filled while the other is written.
  static constexpr size_t kBufferCount = 2;
  static constexpr size_t kBufferBytes = size_t{4} << 20;

  struct FreeMemory {
    void operator()(std::byte* memory) const;
  };
  struct Buffer {
    std::unique_ptr<std::byte[], FreeMemory> memory;
    size_t used_bytes = 0;
  };
  struct File {
    std::unique_ptr<IoFile> io;
    uint64_t written_bytes = 0;
    bool direct = false;
  };
  struct Job {
    std::shared_ptr<File> file;
    Buffer* buffer = nullptr;  // null: nothing is left to write
    bool is_last = false;
  };

  absl::Status Submit(bool is_last);
  absl::Status TakeBuffer();
  void RunThread();
  static absl::Status RunJob(const Job& job);
  static absl::Status Write(File& file, std::span<const std::byte> bytes);

  FileSystem& file_system_;
  std::shared_ptr<File> file_;  // that is open
  Buffer* filling_ = nullptr;   // of `buffers_`
  std::array<Buffer, kBufferCount> buffers_;
  std::thread thread_;

  Mutex mutex_;
  CondVar changed_;
  std::deque<Buffer*> free_ ABSL_GUARDED_BY(mutex_);
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);  // the first one is under way
  absl::Status status_ ABSL_GUARDED_BY(mutex_);   // the first error
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_FILE_STREAMER_H_
