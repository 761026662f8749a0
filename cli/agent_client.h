// Asks a running agent over its local socket (hook/abi/messages.h: kQuery, kMonitor...).
#ifndef HOLDFAST_CLI_AGENT_CLIENT_H_
#define HOLDFAST_CLI_AGENT_CLIENT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "hook/abi/messages.h"
#include "io/unique_fd.h"

namespace holdfast::cli {

// What all witnesses of all jobs say when they are asked now, as JSON text (docs/MONITOR.md).
// Blocks for `timeout` at most; errors as QueryStatus.
absl::StatusOr<std::string> QueryWitnesses(const std::string& socket_path, absl::Duration timeout);

// The agent's status as JSON text (docs/OPERATING.md). Blocks for `timeout` at most.
// Errors: kUnavailable (nobody listens at `socket_path`, or no answer in time), kPermissionDenied
// (another user's agent), kFailedPrecondition (it speaks another protocol version; both are named).
absl::StatusOr<std::string> QueryStatus(const std::string& socket_path, absl::Duration timeout);

// What the processes of a rank record for `length`, as JSON lines (docs/MONITOR.md). Blocks for
// `length` and then for `timeout` at most. Errors: as above, and kNotFound (no such rank there),
// kInvalidArgument (length), kResourceExhausted (too many at once).
absl::StatusOr<std::string> QueryMonitorWindow(const std::string& socket_path,
                                               const std::string& job, uint32_t rank,
                                               absl::Duration length, absl::Duration timeout);

struct MonitorQuestion {
  abi::MonitorQueryKind kind{};
  std::string job;            // empty: all
  std::string finding;        // of kExplain
  uint64_t communicator = 0;  // of kMatrix; 0: all
};

// The answer as JSON text (docs/MONITOR.md). Errors: as above, kNotFound (no such job or finding),
// kUnimplemented (an agent without analysis), kResourceExhausted (too many ask).
absl::StatusOr<std::string> QueryMonitor(const std::string& socket_path,
                                         const MonitorQuestion& question, absl::Duration timeout);

// Asks for a run's state, or orders something of it (abi::RunCommandKind). `job` empty: the only
// one that runs. The answer is the state as JSON text (docs/RUN.md). Errors: as above, kNotFound
// (no such run), kInvalidArgument.
struct RunOrder {
  abi::RunCommandKind kind{};
  std::string job;
  uint64_t number = 0;
  std::string text;
};
absl::StatusOr<std::string> OrderRun(const std::string& socket_path, const RunOrder& order,
                                     absl::Duration timeout);

// What an agent tells of its own accord: kFollow and kRecord, and the state of a run.
//
// Threads: one.
class AgentEvents {
 public:
  // Begins a run, or comes back to it, as its owner. `spec`: EncodeRunSpec. Errors: as above,
  // kAlreadyExists (another run of the job), kInvalidArgument.
  static absl::StatusOr<std::unique_ptr<AgentEvents>> OpenRun(const std::string& socket_path,
                                                              const std::string& spec,
                                                              absl::Duration timeout);
  // Errors: as above.
  static absl::StatusOr<std::unique_ptr<AgentEvents>> Open(const std::string& socket_path,
                                                           const MonitorQuestion& question,
                                                           absl::Duration timeout);

  struct Event {
    std::string text;
    uint64_t lost = 0;  // before this one: we were too slow
  };
  // The next event, or nothing if the agent has ended the connection. To be called when fd() is
  // readable; blocks for the timeout of Open at most.
  absl::StatusOr<std::optional<Event>> Receive();

  const std::string& first() const { return first_; }  // the answer to the question
  int fd() const { return fd_.get(); }

 private:
  AgentEvents(std::string socket_path, UniqueFd fd, std::string first)
      : socket_path_(std::move(socket_path)), fd_(std::move(fd)), first_(std::move(first)) {}

  const std::string socket_path_;
  const UniqueFd fd_;
  const std::string first_;
};

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_AGENT_CLIENT_H_
