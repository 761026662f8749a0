// systemd, as the service manager that runs the agent as a unit (docs/OPERATING.md): what it tells
// a process that it starts, what it is told while the agent lives (sd_notify(3)), and its store of
// descriptors. The protocols are spoken here: they are three variables and one datagram.
//
// The store: what the keeper holds, systemd holds as well (FDSTORE=1), and gives it to the next
// process that it starts for the unit ($LISTEN_FDS, sd_listen_fds(3)). So images and sessions live
// on when keeper and worker die at once. Descriptors of one life of the agent (the lock, whoever
// waits for its start) are not kept.
//
// Invariant: at any instant the store, with what lies in systemd's queue, holds what Keep() was
// called for and Drop() was not, in the order of the calls, up to some call: whoever is given that
// is where a worker that died a moment earlier would have left its successor. Therefore:
//   1. KeeperLink keeps in the keeper first, then here, and drops here first: a worker that dies in
//      between leaves to the next one what is missing here, because
//   2. a worker that starts keeps everything that it was given; systemd ignores what it has.
//   3. systemd knows by its number whose message it reads. So the keeper reaps a dead worker only
//      when all that it had said was read (AwaitAllRead).
//   4. A worker dies with its keeper (DieWithParent), which is the unit's main process: systemd
//      starts the next one with the store as it was then, and nobody has added to it since.
//   5. Where the store is full, nothing newer is kept before what is waiting, in its order. One
//      place is left free, so that the next is in the store before what makes room for it goes.
#ifndef HOLDFAST_AGENT_SERVICE_MANAGER_H_
#define HOLDFAST_AGENT_SERVICE_MANAGER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "checkpoint/descriptor_keeper.h"
#include "io/unique_fd.h"

namespace holdfast {

// What the unit offers and asks for.
struct ServiceUnit {
  // $NOTIFY_SOCKET: a path, or '@' and an abstract name. Empty: the agent runs in no unit that
  // wants to hear of it.
  std::string notify_socket;
  uint32_t descriptors_max = 0;  // in its store ($FDSTORE); 0: it has none
  absl::Duration watchdog{};     // wants to hear so often, or kills; zero: does not ask
};

// What a process was given at its start.
struct ServiceStart {
  struct Refusal {
    std::string name;  // of a descriptor; empty: of none
    std::string why;   // names it, says what was expected and what was found
  };
  ServiceUnit unit;
  // Each name once; a name of ours and of that kind of file (a pidfd, a memfd, a socket that
  // listens). What is IN them is checked by whoever opens them, as after each death of a worker.
  std::vector<KeptDescriptor> descriptors;
  std::vector<Refusal> refusals;
};

// Reads what systemd has put into the environment of this very process, takes it out of there, so
// that nothing that the agent starts speaks in its name, and takes the descriptors. Call once, from
// main, before any thread and before any other descriptor is opened.
ServiceStart TakeServiceStart();

// More bytes of names (each with a colon) than the kernel takes as one variable ($LISTEN_FDNAMES,
// MAX_ARG_STRLEN of 128 KiB) would keep systemd from starting the unit ever again.
inline constexpr size_t kKeptNamesBytesMax = size_t{120} << 10;

// Without a unit, or what it does not offer, nothing happens. A service manager that cannot be
// told is in the log, once each time; nothing fails for it, and nobody waits for it again until it
// has read.
//
// Threads: one.
class ServiceManager {
 public:
  explicit ServiceManager(ServiceUnit unit) : unit_(std::move(unit)) {}

  const ServiceUnit& unit() const { return unit_; }
  bool keeps_descriptors() const { return unit_.descriptors_max > 0; }

  // `status`: one line for people.
  void Ready(const std::string& status);
  void Status(const std::string& status);
  void Stopping();
  void Watchdog();

  // Keeps a duplicate. If the store is full (its last place is not used), or if others wait, it
  // waits until those before it have been dropped or kept; that is in the log, once.
  void Keep(const std::string& name, int fd);
  // The descriptor that was kept as `name`, borrowed; -1: there is none any more.
  using Lookup = std::function<int(const std::string& name)>;
  // `lookup`: for those that have waited for the room.
  void Drop(const std::string& name, const Lookup& lookup = nullptr);
  // Returns when everything that any process of the agent has said was read, or at a deadline.
  void AwaitAllRead();

 private:
  bool HasRoomFor(const std::string& name) const;
  void Store(const std::string& name, int fd);
  void Say(const std::string& text, int fd = -1);
  absl::Status Send(const std::string& text, int fd, absl::Duration deadline);

  const ServiceUnit unit_;
  UniqueFd socket_;
  bool is_deaf_ = false;  // the last message could not be sent
  std::set<std::string> kept_;
  size_t kept_names_bytes_ = 0;
  std::deque<std::string> waiting_;  // for room, the oldest first
  bool told_full_ = false;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_SERVICE_MANAGER_H_
