#include "io/posix_file_system.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

constexpr mode_t kFileMode = 0600;
constexpr mode_t kDirectoryMode = 0700;
// The kernel moves at most about 2 GiB per call; smaller pieces cost nothing.
constexpr size_t kPieceBytesMax = size_t{1} << 30;

// Calls `call` again as long as a signal interrupts it; the result is -1 with errno, or not.
template <typename Call>
auto RetryOnSignal(Call call) {
  while (true) {
    const auto result = call();
    if (result != -1 || errno != EINTR) return result;
  }
}

absl::Status SyncFd(int fd, const std::string& path) {
  // A signal during fsync says nothing about the pages: as final as any other failure.
  if (fsync(fd) != 0) return ErrnoStatus(errno, "sync", path);
  return absl::OkStatus();
}

class PosixWritableFile final : public WritableFile {
 public:
  PosixWritableFile(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  absl::Status Append(std::span<const std::byte> data) override {
    RETURN_IF_ERROR(CheckUsable("append to"));
    failed_ = true;
    while (!data.empty()) {
      const ssize_t written = RetryOnSignal(
          [&] { return write(fd_.get(), data.data(), std::min(data.size(), kPieceBytesMax)); });
      if (written < 0) return ErrnoStatus(errno, "append to", path_);
      if (written == 0) {
        return absl::UnavailableError(
            absl::StrFormat("append to %s: the kernel took none of %d bytes", path_, data.size()));
      }
      data = data.subspan(static_cast<size_t>(written));
    }
    failed_ = false;
    return absl::OkStatus();
  }

  absl::Status Sync() override {
    RETURN_IF_ERROR(CheckUsable("sync"));
    const absl::Status status = SyncFd(fd_.get(), path_);
    failed_ = !status.ok();
    return status;
  }

 private:
  absl::Status CheckUsable(const char* verb) const {
    if (!failed_) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrFormat("%s %s: an earlier call on this file failed", verb, path_));
  }

  const std::string path_;
  const UniqueFd fd_;
  bool failed_ = false;
};

class PosixIoFile final : public IoFile {
 public:
  PosixIoFile(UniqueFd fd, uint64_t size_bytes) : fd_(std::move(fd)), size_bytes_(size_bytes) {}
  int handle() const override { return fd_.get(); }
  uint64_t size_bytes() const override { return size_bytes_; }

 private:
  const UniqueFd fd_;
  const uint64_t size_bytes_;
};

absl::StatusOr<UniqueFd> CreateExclusive(const std::string& path, int access) {
  const int fd = RetryOnSignal([&] {
    return open(path.c_str(), access | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, kFileMode);
  });
  if (fd < 0) return ErrnoStatus(errno, "create", path);
  return UniqueFd(fd);
}

// Sets the file's status flags. O_DIRECT is set here and not at open, because an open that creates
// and then refuses O_DIRECT leaves the new name behind without saying that it is ours.
absl::Status SetCaching(int fd, Caching caching, const std::string& path) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return ErrnoStatus(errno, "open", path);
  const int wanted = (flags & ~O_NONBLOCK) | (caching == Caching::kDirect ? O_DIRECT : 0);
  if (wanted == flags || fcntl(fd, F_SETFL, wanted) == 0) return absl::OkStatus();
  if (errno != EINVAL) return ErrnoStatus(errno, "open", path);
  return absl::InvalidArgumentError(
      absl::StrFormat("open %s: the file system does not do O_DIRECT (EINVAL)", path));
}

absl::Status Allocate(int fd, uint64_t size_bytes, const std::string& path) {
  if (size_bytes == 0) return absl::OkStatus();
  const off_t size = static_cast<off_t>(size_bytes);
  if (size < 0) return ErrnoStatus(EFBIG, "allocate", path);
  if (RetryOnSignal([&] { return fallocate(fd, 0, 0, size); }) == 0) return absl::OkStatus();
  if (errno != EOPNOTSUPP) return ErrnoStatus(errno, "allocate", path);
  if (RetryOnSignal([&] { return ftruncate(fd, size); }) == 0) return absl::OkStatus();
  return ErrnoStatus(errno, "extend", path);
}

struct OpenedFile {
  UniqueFd fd;
  uint64_t size_bytes = 0;
};

absl::StatusOr<OpenedFile> OpenRegular(const std::string& path) {
  // O_NONBLOCK: the open of a FIFO put in our way must not wait for its writer.
  const int fd = RetryOnSignal(
      [&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); });
  if (fd < 0) return ErrnoStatus(errno, "open", path);
  OpenedFile file{UniqueFd(fd)};
  struct stat info {};
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "open", path);
  if (S_ISDIR(info.st_mode)) return ErrnoStatus(EISDIR, "open", path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("open %s: not a regular file (type %o)", path, info.st_mode & S_IFMT));
  }
  file.size_bytes = static_cast<uint64_t>(info.st_size);
  return file;
}

struct CloseDirectory {
  void operator()(DIR* directory) const { closedir(directory); }
};

class PosixFileSystem final : public FileSystem {
 public:
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override {
    ASSIGN_OR_RETURN(UniqueFd fd, CreateExclusive(path, O_WRONLY));
    return std::make_unique<PosixWritableFile>(path, std::move(fd));
  }

  absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path, uint64_t size_bytes,
                                                      Caching caching) override {
    ASSIGN_OR_RETURN(UniqueFd fd, CreateExclusive(path, O_RDWR));
    absl::Status status = SetCaching(fd.get(), caching, path);
    if (status.ok()) status = Allocate(fd.get(), size_bytes, path);
    if (!status.ok()) {
      // Ours, empty, never shown to anybody. If this fails too, the name stays: harmless, and the
      // first error is the one to report.
      unlink(path.c_str());
      return status;
    }
    return std::make_unique<PosixIoFile>(std::move(fd), size_bytes);
  }

  absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                      Caching caching) override {
    ASSIGN_OR_RETURN(OpenedFile file, OpenRegular(path));
    RETURN_IF_ERROR(SetCaching(file.fd.get(), caching, path));
    return std::make_unique<PosixIoFile>(std::move(file.fd), file.size_bytes);
  }

  absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) override {
    ASSIGN_OR_RETURN(const OpenedFile file, OpenRegular(path));
    if (file.size_bytes > bytes_max) return TooLong(path, file.size_bytes, bytes_max);
    std::string bytes(file.size_bytes, '\0');
    size_t length = 0;
    while (true) {
      // One byte more than known, so that the end is seen and a growing file is noticed.
      if (length == bytes.size()) bytes.resize(length + 1);
      const ssize_t found = RetryOnSignal([&] {
        return read(file.fd.get(), bytes.data() + length,
                    std::min(bytes.size() - length, kPieceBytesMax));
      });
      if (found < 0) return ErrnoStatus(errno, "read", path);
      if (found == 0) break;
      length += static_cast<size_t>(found);
      if (length > bytes_max) return TooLong(path, length, bytes_max);
    }
    bytes.resize(length);
    return bytes;
  }

  absl::Status Link(const std::string& from, const std::string& to) override {
    if (link(from.c_str(), to.c_str()) == 0) return absl::OkStatus();
    // EPERM is link(2)'s word for a file system without links.
    return ErrnoStatus(errno == EPERM ? EOPNOTSUPP : errno, "link", to);
  }

  absl::Status Unlink(const std::string& path) override {
    if (unlink(path.c_str()) == 0) return absl::OkStatus();
    return ErrnoStatus(errno, "unlink", path);
  }

  absl::Status CreateDirectory(const std::string& path) override {
    if (mkdir(path.c_str(), kDirectoryMode) == 0) return absl::OkStatus();
    return ErrnoStatus(errno, "create directory", path);
  }

  absl::Status SyncDirectory(const std::string& path) override {
    const UniqueFd fd(
        RetryOnSignal([&] { return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (!fd) return ErrnoStatus(errno, "sync directory", path);
    return SyncFd(fd.get(), path);
  }

  absl::Status SyncFile(const std::string& path) override {
    ASSIGN_OR_RETURN(const OpenedFile file, OpenRegular(path));
    return SyncFd(file.fd.get(), path);
  }

  absl::StatusOr<std::vector<std::string>> List(const std::string& path,
                                                size_t count_max) override {
    const std::unique_ptr<DIR, CloseDirectory> directory(opendir(path.c_str()));
    if (directory == nullptr) return ErrnoStatus(errno, "list", path);
    std::vector<std::string> names;
    while (true) {
      errno = 0;
      const dirent* entry = readdir(directory.get());
      if (entry == nullptr) break;
      std::string name = entry->d_name;
      if (name == "." || name == "..") continue;
      if (names.size() == count_max) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("list %s: more than the %d names that are allowed", path, count_max));
      }
      names.push_back(std::move(name));
    }
    if (errno != 0) return ErrnoStatus(errno, "list", path);
    std::sort(names.begin(), names.end());
    return names;
  }

  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    struct stat found {};
    if (lstat(path.c_str(), &found) != 0) return ErrnoStatus(errno, "stat", path);
    FileInfo info;
    if (S_ISREG(found.st_mode)) info.kind = FileInfo::Kind::kFile;
    if (S_ISDIR(found.st_mode)) info.kind = FileInfo::Kind::kDirectory;
    info.size_bytes = static_cast<uint64_t>(found.st_size);
    info.allocated_bytes = static_cast<uint64_t>(found.st_blocks) * 512;  // POSIX's unit
    return info;
  }

  absl::StatusOr<Space> SpaceOf(const std::string& path) override {
    struct statvfs found {};
    if (RetryOnSignal([&] { return statvfs(path.c_str(), &found); }) != 0) {
      return ErrnoStatus(errno, "space of", path);
    }
    return Space{.total_bytes = uint64_t{found.f_frsize} * found.f_blocks,
                 .available_bytes = uint64_t{found.f_frsize} * found.f_bavail};
  }

 private:
  static absl::Status TooLong(const std::string& path, uint64_t bytes, uint64_t bytes_max) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "read %s: the file has %d bytes, at most %d are allowed", path, bytes, bytes_max));
  }
};

}  // namespace

std::unique_ptr<FileSystem> NewPosixFileSystem() { return std::make_unique<PosixFileSystem>(); }

}  // namespace holdfast
