#include "agent/service_manager.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "agent/handover.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// The first of $LISTEN_FDS.
constexpr int kFirstListenFd = 3;
// The other half of what the keeper can hold is for what comes.
constexpr size_t kGivenMax = kKeptDescriptorsMax / 2;
// systemd reads at once, unless it is in trouble itself. The worker's loop stands still so long.
constexpr absl::Duration kSendDeadline = absl::Seconds(2);
constexpr absl::Duration kReadDeadline = absl::Seconds(2);

// Takes a variable out of the environment.
std::string Take(const char* name) {
  const char* const value = getenv(name);
  std::string text = value == nullptr ? "" : value;
  unsetenv(name);
  return text;
}

bool IsOneLine(std::string_view text) {
  return std::none_of(text.begin(), text.end(),
                      [](char c) { return absl::ascii_iscntrl(static_cast<unsigned char>(c)); });
}

// What outlives both processes of an agent.
bool IsForServiceManager(const std::string& name) {
  return name.starts_with("session/") || name.starts_with("memory/") ||
         name.starts_with(kMonitorPrefix) || name == kListenerName || name == kConfigName;
}

std::string FileKind(int fd) {
  struct stat info {};
  return fstat(fd, &info) == 0 ? absl::StrFormat("mode %o", static_cast<unsigned>(info.st_mode))
                               : ErrnoName(errno);
}

// Whether a descriptor may be what its name says.
absl::Status CheckKept(const std::string& name, int fd) {
  if (!IsDescriptorName(name) || !IsForServiceManager(name)) {
    return absl::InvalidArgumentError("nothing that the agent keeps is called so");
  }
  const char* expected = nullptr;
  const std::string_view part = std::string_view(name).substr(name.rfind('/') + 1);
  if (name == kListenerName) {
    int listens = 0;
    socklen_t bytes = sizeof(listens);
    const bool is_socket = getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0;
    if (!is_socket || listens == 0) expected = "a socket that listens";
  } else if (part.starts_with("process")) {
    if (!IsPidfd(fd)) expected = "a pidfd";
  } else if (fcntl(fd, F_GET_SEALS) < 0) {
    expected = "a memfd";
  }
  if (expected == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("expected %s, found %s", expected, FileKind(fd)));
}

void TakeDescriptors(const std::string& count_text, const std::string& names_text,
                     ServiceStart& start) {
  size_t count = 0;
  if (!absl::SimpleAtoi(count_text, &count) || count > kGivenMax) {
    start.refusals.push_back(
        {"", absl::StrFormat("$LISTEN_FDS: expected a number up to %d, found \"%s\"", kGivenMax,
                             absl::CHexEscape(count_text))});
    return;
  }
  std::vector<std::string> names = absl::StrSplit(names_text, ':');
  if (names.size() != count) {
    if (count > 0) {
      start.refusals.push_back({"", absl::StrFormat("$LISTEN_FDNAMES: expected %d names, found %d",
                                                    count, names_text.empty() ? 0 : names.size())});
    }
    names.assign(count, "");
  }
  std::set<std::string> known;
  for (size_t i = 0; i < count; ++i) {
    const int number = kFirstListenFd + static_cast<int>(i);
    const std::string& name = names[i];
    absl::Status fits;
    UniqueFd fd;
    if (fcntl(number, F_SETFD, FD_CLOEXEC) != 0) {
      fits = absl::InvalidArgumentError("it is not open");
    } else {
      fd.Reset(number);
      fits = CheckKept(name, number);
    }
    if (fits.ok() && !known.insert(name).second) {
      fits = absl::InvalidArgumentError("another one is called so");
    }
    if (fits.ok()) {
      start.descriptors.push_back({name, std::move(fd)});
    } else {
      start.refusals.push_back(
          {name, absl::StrFormat("descriptor %d, \"%s\": %s", number, absl::CHexEscape(name),
                                 std::string(fits.message()))});
    }
  }
  // systemd gives the newest first; after a daemon-reload the other way round, which matters where
  // the store is full only, and shows nowhere.
  std::reverse(start.descriptors.begin(), start.descriptors.end());
}

absl::StatusOr<UniqueFd> ConnectToManager(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());  // TakeServiceStart has checked it
  if (path[0] == '@') address.sun_path[0] = '\0';           // abstract; its length counts
  const auto bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!socket || connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), bytes) != 0) {
    return ErrnoStatus(errno, "connect", path);
  }
  return socket;
}

}  // namespace

ServiceStart TakeServiceStart() {
  const std::string self = absl::StrCat(getpid());
  const std::string started = Take("SYSTEMD_EXEC_PID");
  const std::string notify_socket = Take("NOTIFY_SOCKET");
  const std::string store = Take("FDSTORE");
  const std::string watchdog_pid = Take("WATCHDOG_PID");
  const std::string watchdog = Take("WATCHDOG_USEC");
  const std::string listen_pid = Take("LISTEN_PID");
  const std::string listen_fds = Take("LISTEN_FDS");
  const std::string listen_names = Take("LISTEN_FDNAMES");
  ServiceStart start;
  // Before anything is opened: the descriptors have their numbers already.
  if (listen_pid == self) TakeDescriptors(listen_fds, listen_names, start);
  // A process of another unit has inherited that one's variables.
  if (started != self || notify_socket.empty()) return start;
  const bool is_address = (notify_socket[0] == '/' || notify_socket[0] == '@') &&
                          notify_socket.size() < sizeof(sockaddr_un::sun_path);
  if (!is_address) {
    start.refusals.push_back(
        {"", absl::StrFormat("$NOTIFY_SOCKET: expected a path or '@' and a name, found \"%s\"",
                             absl::CHexEscape(notify_socket))});
    return start;
  }
  start.unit.notify_socket = notify_socket;
  if (!store.empty() && !absl::SimpleAtoi(store, &start.unit.descriptors_max)) {
    start.unit.descriptors_max = 0;
    start.refusals.push_back({"", absl::StrFormat("$FDSTORE: expected a number, found \"%s\"",
                                                  absl::CHexEscape(store))});
  }
  int64_t watchdog_us = 0;
  if ((watchdog_pid.empty() || watchdog_pid == self) && absl::SimpleAtoi(watchdog, &watchdog_us) &&
      watchdog_us > 0) {
    start.unit.watchdog = absl::Microseconds(watchdog_us);
  }
  return start;
}

void ServiceManager::Ready(const std::string& status) {
  Say("READY=1");
  Status(status);
}

void ServiceManager::Status(const std::string& status) {
  std::string line = status;
  std::replace_if(line.begin(), line.end(), absl::ascii_iscntrl, ' ');
  Say(absl::StrCat("STATUS=", line));
}

void ServiceManager::Stopping() { Say("STOPPING=1"); }

void ServiceManager::Watchdog() { Say("WATCHDOG=1"); }

void ServiceManager::Keep(const std::string& name, int fd) {
  if (!keeps_descriptors() || !IsForServiceManager(name)) return;
  if (kept_.contains(name)) return Store(name, fd);
  if (waiting_.empty() && HasRoomFor(name)) return Store(name, fd);
  waiting_.push_back(name);
  if (!std::exchange(told_full_, true)) {
    LogWarning(absl::StrFormat(
        "systemd keeps %d descriptors for this unit (FileDescriptorStoreMax) with names of %d "
        "bytes at most: from %s on they are lost if keeper and worker die at once, before others "
        "make room",
        unit_.descriptors_max, kKeptNamesBytesMax, name));
  }
}

void ServiceManager::Drop(const std::string& name, const Lookup& lookup) {
  if (!keeps_descriptors() || name.empty() || !IsOneLine(name)) return;
  if (kept_.erase(name) > 0) {
    kept_names_bytes_ -= name.size() + 1;
    for (; !waiting_.empty() && HasRoomFor(waiting_.front()); waiting_.pop_front()) {
      const int fd = lookup ? lookup(waiting_.front()) : -1;
      if (fd >= 0) Store(waiting_.front(), fd);
    }
  } else {
    std::erase(waiting_, name);
  }
  // Also of what we do not know: it may be there from an earlier life.
  Say(absl::StrCat("FDSTOREREMOVE=1\nFDNAME=", name));
}

bool ServiceManager::HasRoomFor(const std::string& name) const {
  return kept_.size() + 1 < unit_.descriptors_max &&
         kept_names_bytes_ + name.size() + 1 <= kKeptNamesBytesMax;
}

void ServiceManager::Store(const std::string& name, int fd) {
  if (kept_.insert(name).second) kept_names_bytes_ += name.size() + 1;
  // Without FDPOLL=0 systemd would close a pipe or socket whose other end is gone.
  Say(absl::StrCat("FDSTORE=1\nFDPOLL=0\nFDNAME=", name), fd);
}

void ServiceManager::AwaitAllRead() {
  if (!keeps_descriptors()) return;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return;
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  // systemd closes it when it has come to it in its queue.
  Say("BARRIER=1", write_end.get());
  write_end.Reset();
  pollfd entry{read_end.get(), 0, 0};
  if (poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(kReadDeadline))) == 0) {
    LogWarning("systemd does not read what it is told; going on");
  }
}

void ServiceManager::Say(const std::string& text, int fd) {
  if (unit_.notify_socket.empty()) return;
  const absl::Status sent = Send(text, fd, is_deaf_ ? absl::ZeroDuration() : kSendDeadline);
  if (!sent.ok() && !is_deaf_) {
    LogWarning(absl::StrFormat("systemd cannot be told %s: %s", absl::CHexEscape(text),
                               std::string(sent.message())));
  }
  is_deaf_ = !sent.ok();
}

absl::Status ServiceManager::Send(const std::string& text, int fd, absl::Duration deadline) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(text));
  if (socket_) {
    if (SendOnSocket(socket_.get(), bytes, fd, deadline).ok()) return absl::OkStatus();
    // systemd may have been started anew, with another socket there.
    deadline = absl::ZeroDuration();
  }
  ASSIGN_OR_RETURN(socket_, ConnectToManager(unit_.notify_socket));
  return SendOnSocket(socket_.get(), bytes, fd, deadline);
}

}  // namespace holdfast
