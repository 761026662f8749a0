#include "agent/runtime_directory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// Connections that wait while a worker is being restarted.
constexpr int kBacklog = 512;

// A socket's address. sockaddr_un holds 107 bytes; a longer path is named by a descriptor of its
// directory, which the kernel follows like a link.
struct Address {
  sockaddr_un name{};
  UniqueFd directory;  // must be open while `name` is used

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

absl::StatusOr<Address> AddressOf(const std::string& socket) {
  Address address;
  address.name.sun_family = AF_UNIX;
  std::string path = socket;
  if (path.size() >= sizeof(address.name.sun_path)) {
    const std::filesystem::path whole(socket);
    const std::string directory = whole.parent_path().string();
    address.directory.Reset(open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!address.directory) return ErrnoStatus(errno, "open directory", directory);
    path = absl::StrCat("/proc/self/fd/", address.directory.get(), "/", whole.filename().string());
  }
  CHECK(path.size() < sizeof(address.name.sun_path));  // AgentConfig has checked the file name
  std::memcpy(address.name.sun_path, path.c_str(), path.size() + 1);
  return address;
}

}  // namespace

absl::Status PrepareDirectoryOf(const std::string& path) {
  const std::string directory = std::filesystem::path(path).parent_path().string();
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoStatus(errno, "create directory", directory);
  }
  struct stat info {};
  if (stat(directory.c_str(), &info) != 0) return ErrnoStatus(errno, "stat", directory);
  const bool sticky = (info.st_mode & S_ISVTX) != 0;  // /tmp: others cannot replace our file
  if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid() ||
      ((info.st_mode & 0022) != 0 && !sticky)) {
    return absl::PermissionDeniedError(
        absl::StrFormat("%s: expected a directory of user %d that nobody else may write to, found "
                        "user %d, mode %04o",
                        directory, geteuid(), info.st_uid, info.st_mode & 07777));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<UniqueFd>> TryLockSocket(const std::string& socket) {
  const std::string path = absl::StrCat(socket, ".lock");
  UniqueFd lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) return ErrnoStatus(errno, "open", path);
  if (flock(lock.get(), LOCK_EX | LOCK_NB) == 0) return std::optional<UniqueFd>(std::move(lock));
  if (errno == EWOULDBLOCK || errno == EINTR) return std::optional<UniqueFd>();
  return ErrnoStatus(errno, "lock", path);
}

bool HoldsSocket(const std::string& socket, int lock) {
  struct stat ours {};
  struct stat found {};
  const std::string path = absl::StrCat(socket, ".lock");
  return fstat(lock, &ours) == 0 && lstat(path.c_str(), &found) == 0 &&
         ours.st_dev == found.st_dev && ours.st_ino == found.st_ino;
}

absl::StatusOr<UniqueFd> Listen(const std::string& socket) {
  UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener) return ErrnoStatus(errno, "socket", socket);
  if (unlink(socket.c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, "remove", socket);
  ASSIGN_OR_RETURN(const Address address, AddressOf(socket));
  // The umask is 077 (main), so the socket is 0600 from the first moment.
  if (bind(listener.get(), address.get(), sizeof(address.name)) != 0) {
    return ErrnoStatus(errno, "bind", socket);
  }
  if (chmod(socket.c_str(), 0600) != 0) return ErrnoStatus(errno, "chmod", socket);
  if (listen(listener.get(), kBacklog) != 0) return ErrnoStatus(errno, "listen", socket);
  return listener;
}

bool ListensOn(int listener, const std::string& socket) {
  int type = 0;
  socklen_t type_bytes = sizeof(type);
  if (getsockopt(listener, SOL_SOCKET, SO_TYPE, &type, &type_bytes) != 0) return false;
  sockaddr_un name{};  // one byte more than is asked for: ends with NUL
  socklen_t name_bytes = sizeof(name) - 1;
  if (getsockname(listener, reinterpret_cast<sockaddr*>(&name), &name_bytes) != 0) return false;
  struct stat file {};
  return type == SOCK_SEQPACKET && name.sun_family == AF_UNIX && socket == name.sun_path &&
         lstat(socket.c_str(), &file) == 0 && S_ISSOCK(file.st_mode);
}

absl::StatusOr<UniqueFd> ConnectTo(const std::string& socket) {
  UniqueFd connection(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!connection) return ErrnoStatus(errno, "socket", socket);
  ASSIGN_OR_RETURN(const Address address, AddressOf(socket));
  if (connect(connection.get(), address.get(), sizeof(address.name)) == 0) return connection;
  if (errno == ECONNREFUSED) {
    return absl::UnavailableError(absl::StrCat("nobody listens on ", socket));
  }
  if (errno == EAGAIN) {
    return absl::ResourceExhaustedError(absl::StrCat(socket, ": too many wait to be accepted"));
  }
  return ErrnoStatus(errno, "connect", socket);
}

bool SomebodyListens(const std::string& socket) {
  const absl::Status connected = ConnectTo(socket).status();
  // A full queue is somebody's.
  return connected.ok() || absl::IsResourceExhausted(connected);
}

}  // namespace holdfast
