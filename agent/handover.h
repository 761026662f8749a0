// What keeper and worker say to each other, and what one inherits when the other starts it.
//
// Two ways, because they have different needs:
//
//  * At a start, by inheritance: whoever starts the other process lets it inherit every descriptor
//    and writes a table of their names and numbers into a sealed memfd. There is no message to lose
//    and no half of a hand-over: once exec has succeeded the new process holds everything.
//  * While both live, by messages on a SOCK_SEQPACKET pair with SCM_RIGHTS, worker -> keeper only.
//    A message that sendmsg(2) has accepted lies in the KEEPER's receive queue, descriptor
//    included: the kernel holds a reference to the open file, and drops it only when the keeper
//    has closed its end of the pair. So from the moment that sendmsg returns, the worker may die:
//    the keeper reads the queue to its end before it starts the next worker. If the keeper dies
//    instead, the worker still has the descriptor, and gives everything to the next keeper.
#ifndef HOLDFAST_AGENT_HANDOVER_H_
#define HOLDFAST_AGENT_HANDOVER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "agent/process.h"
#include "checkpoint/descriptor_keeper.h"
#include "io/unique_fd.h"

namespace holdfast {

// Names of the agent's own descriptors; all that do not begin with "agent/" are the engine's.
inline constexpr char kListenerName[] = "agent/listener";  // the listening socket
inline constexpr char kLockName[] = "agent/lock";      // flock of the socket's name, while either
                                                       // process lives
inline constexpr char kConfigName[] = "agent/config";  // sealed memfd: AgentConfig::Serialize()
inline constexpr char kReadyName[] = "agent/ready";    // pipe to the process that started the agent

// Monitor boards and their processes: agent/monitor/boards.h names them.
inline constexpr char kMonitorPrefix[] = "agent/monitor/";

// More are refused by the server before they are made (see LocalServer), so this is a CHECK.
inline constexpr size_t kKeptDescriptorsMax = 65536;
inline constexpr size_t kDescriptorNameBytesMax = 64;

// Whether `name` is [a-z0-9./-]{1,64}.
bool IsDescriptorName(std::string_view name);
// CHECKs that: names are made by our own code only.
void CheckDescriptorName(std::string_view name);

// The other process to start.
enum class Role { kKeeper, kWorker };

// What a started process finds.
struct Handover {
  UniqueFd channel;            // its end of the SEQPACKET pair
  UniqueFd peer_pidfd;         // of the process that started it
  std::string kill_plan;       // for ParseKillPlan; empty: none
  uint32_t restart_count = 0;  // how often the worker (or keeper) was restarted before
  std::vector<KeptDescriptor> descriptors;
};

struct NamedFd {
  std::string name;
  int fd = -1;
};

struct StartRequest {
  Role role = Role::kWorker;
  std::string kill_plan;
  uint32_t restart_count = 0;
  std::vector<NamedFd> descriptors;  // borrowed
};

struct StartedPeer {
  UniqueFd pidfd;
  UniqueFd channel;  // our end
};

// Starts the other process with everything. After OK it holds duplicates of all descriptors,
// whatever becomes of us.
absl::StatusOr<StartedPeer> StartPeer(const StartRequest& request);

// In the started process: `fd` is the number given behind --handover. Its descriptors are
// close-on-exec afterwards. kInvalidArgument if it is no handover: a person typed the flag.
absl::StatusOr<Handover> TakeHandover(int fd);

// Sends one message on a connected SEQPACKET or datagram socket, with a duplicate of `fd` (-1: of
// none). After OK the kernel holds both. Waits at most `deadline` for room in the peer's queue.
// Errors: kUnavailable: the peer is gone or does not read.
absl::Status SendOnSocket(int socket, std::span<const std::byte> message, int fd,
                          absl::Duration deadline);

// One message of the channel.
struct ChannelMessage {
  enum class Type : uint32_t { kKeep = 1, kDrop = 2, kFinished = 3 };
  Type type{};
  std::string name;   // kKeep, kDrop
  UniqueFd fd;        // kKeep
  int exit_code = 0;  // kFinished: the worker ends for good, and so shall the keeper
};

// As SendOnSocket.
absl::Status SendKeep(int channel, const std::string& name, int fd, absl::Duration deadline);
absl::Status SendDrop(int channel, const std::string& name, absl::Duration deadline);
absl::Status SendFinished(int channel, int exit_code, absl::Duration deadline);

// The next message; nothing if none waits now or the peer has gone and all is read. Never waits.
// kDataLoss: a message that is none, or whose descriptor the kernel could not give us (limit).
absl::StatusOr<std::optional<ChannelMessage>> ReceiveMessage(int channel);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_HANDOVER_H_
