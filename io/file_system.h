// The seam to stored files. All published bytes go through here or through an IoRing, so that crash
// enumeration sees every write. The real one is io/posix_file_system.cc; the simulated disk is
// tests/support/sim_disk.h.
//
// Two words: *visible* = a reader on this machine finds it now; *durable* = it survives a power
// cut.
//
// Errors of all calls: kNotFound (no such file), kAlreadyExists, kResourceExhausted (no space,
// quota, descriptors), kPermissionDenied (access, read-only mount), kUnavailable (a retry may
// help), kDataLoss (the device refused: EIO). The text names the operation, the path and errno.
#ifndef HOLDFAST_IO_FILE_SYSTEM_H_
#define HOLDFAST_IO_FILE_SYSTEM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// A new file being filled by synchronous appends: INDEX, MANIFEST, store records. Images are
// written through an IoRing instead.
//
// Threads: one at a time.
// Lifetime: must not outlive the FileSystem. Destroying it unclosed releases the descriptor and
//   promises nothing about the data.
class WritableFile {
 public:
  virtual ~WritableFile() = default;

  // Appends all of `data`, or fails. `data` is not referenced after the call. After OK the bytes
  // are visible but NOT durable. After any error the length of the file is unknown, and the only
  // valid call is the destructor.
  [[nodiscard]] virtual absl::Status Append(std::span<const std::byte> data) = 0;

  // After OK every byte appended so far is durable. Says nothing of the file's NAME: see
  // FileSystem::SyncDirectory. A failed Sync is final: the kernel may have dropped the dirty pages,
  // so it must not be retried.
  [[nodiscard]] virtual absl::Status Sync() = 0;
};

// Whether a file is opened so that transfers bypass the page cache. With kDirect every offset,
// length and address given to the IoRing is a multiple of the alignment that ProbeMount reports.
enum class Caching { kBuffered, kDirect };

// An open file for an IoRing. The number is a real descriptor in the real file system and an opaque
// handle in the simulated one.
//
// Threads: any. Lifetime: closes in the destructor; must not outlive the FileSystem, and no
//   operation on it may be in flight then.
class IoFile {
 public:
  virtual ~IoFile() = default;
  virtual int handle() const = 0;
  virtual uint64_t size_bytes() const = 0;  // at the time of opening; for CreateSized, as asked
};

// What a directory entry or file is.
struct FileInfo {
  enum class Kind { kFile, kDirectory, kOther };  // a symbolic link is kOther: never followed
  Kind kind = Kind::kOther;
  uint64_t size_bytes = 0;
  uint64_t allocated_bytes = 0;  // blocks really taken on the device
};

struct Space {
  uint64_t total_bytes = 0;
  uint64_t available_bytes = 0;  // to this user
};

// Threads: any.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // Creates `path`, which must not exist (O_EXCL, mode 0600), for appending.
  [[nodiscard]] virtual absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(
      const std::string& path) = 0;

  // Creates `path`, which must not exist (O_EXCL, mode 0600), with `size_bytes` allocated, so that
  // a full disk is known now and not at the last block. Contents are unspecified until written. If
  // the file system cannot do `caching`, kInvalidArgument; if it cannot allocate ahead, the file is
  // merely extended.
  [[nodiscard]] virtual absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path,
                                                                            uint64_t size_bytes,
                                                                            Caching caching) = 0;

  // Opens an existing regular file for reading; never follows a symbolic link in the last
  // component.
  [[nodiscard]] virtual absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                                            Caching caching) = 0;

  // All of a regular file, if it has at most `bytes_max`; else kResourceExhausted with both
  // numbers.
  [[nodiscard]] virtual absl::StatusOr<std::string> ReadSmallFile(const std::string& path,
                                                                  uint64_t bytes_max) = 0;

  // Gives `from` the additional name `to`; kAlreadyExists if `to` exists, which is the point: what
  // is published is never replaced. kUnimplemented where the file system has no links. Visible at
  // once, durable after SyncDirectory.
  [[nodiscard]] virtual absl::Status Link(const std::string& from, const std::string& to) = 0;

  // After OK the bytes of an existing regular file that are visible are durable, whoever wrote them
  // (he may have died before he could make sure).
  [[nodiscard]] virtual absl::Status SyncFile(const std::string& path) = 0;

  // Removes a file's name. Only for what was never published, and the *.partial.* of a publication.
  [[nodiscard]] virtual absl::Status Unlink(const std::string& path) = 0;

  // Creates a directory (mode 0700); kAlreadyExists if there is one.
  [[nodiscard]] virtual absl::Status CreateDirectory(const std::string& path) = 0;

  // After OK all names created, linked and removed in `path` so far are durable.
  [[nodiscard]] virtual absl::Status SyncDirectory(const std::string& path) = 0;

  // Names in `path` but . and .., sorted. At most `count_max`, else kResourceExhausted.
  [[nodiscard]] virtual absl::StatusOr<std::vector<std::string>> List(const std::string& path,
                                                                      size_t count_max) = 0;

  [[nodiscard]] virtual absl::StatusOr<FileInfo> Stat(const std::string& path) = 0;

  [[nodiscard]] virtual absl::StatusOr<Space> SpaceOf(const std::string& path) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_FILE_SYSTEM_H_
