// What the agent and a holdfast-shim say to each other, and what the agent finds of a shim on disk.
//
// A shim listens in the directory of its rank, which the agent made (mode 0700):
//
//   shim.sock   SOCK_SEQPACKET: ShimRequest one way, ShimState the other
//   exit        when the rank has ended: text, "name=value" lines (ExitRecord), under its final
//   name
//               only once it is whole; readable for whoever comes after both have died
//
// The shim listens and the agent connects, not the other way round: an agent that was restarted, or
// is a new one, finds every shim by looking into the directories, and a refused connection says
// that a shim is dead. A shim serves any number of connections one after another and
// kConnectionsMax at once, so that an agent that has not noticed its own death cannot lock out the
// next one.
//
// Plain data, std only. A change is a new kShimVersion; a shim of another version than the agent's
// is left alone until its rank ends, but for signals, which are the same in all versions.
#ifndef HOLDFAST_AGENT_RUN_SHIM_PROTOCOL_H_
#define HOLDFAST_AGENT_RUN_SHIM_PROTOCOL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast {

inline constexpr uint32_t kShimMagic = 0x53464c48;  // "HLFS" in memory
inline constexpr uint16_t kShimVersion = 1;

inline constexpr char kShimSocketName[] = "shim.sock";
inline constexpr char kExitRecordName[] = "exit";
inline constexpr char kShimProgramName[] = "holdfast-shim";

enum class ShimRequestType : uint16_t {
  // No more than what every connection gets: the state now, and again whenever it has changed.
  kWatch = 1,
  // `signal_number` to the rank's process group. A TERM for a stopped process is a KILL: it could
  // not act on it.
  kSignal = 2,
  // KILL to every process of the tree, until there is none.
  kKillTree = 3,
  // The agent has the exit. The shim ends the tree, if anything is left of it, and itself.
  kRelease = 4,
};

struct ShimRequest {
  uint32_t magic;
  uint16_t version;
  ShimRequestType type;
  int32_t signal_number;  // of kSignal
  uint32_t reserved;
};
static_assert(sizeof(ShimRequest) == 16);

struct ShimState {
  uint32_t magic;
  uint16_t version;
  uint16_t reserved0;
  uint32_t rank;
  int32_t rank_pid;        // 0: it could not be started
  int32_t wait_status;     // of the rank, as wait(2) gives it, when `has_ended`
  uint8_t has_ended;       // the rank's own process has; 0 or 1, as the next three
  uint8_t tree_has_ended;  // and every process below it
  uint8_t is_recorded;     // `exit` is on disk
  uint8_t reserved1;
  int32_t start_error;  // errno of what prevented the start; 0: none
  uint32_t reserved2;
  int64_t started_ns;             // CLOCK_MONOTONIC; 0: not yet, as the next
  int64_t ended_ns;               // when the shim reaped it
  uint64_t output_bytes;          // that the rank has written
  uint64_t output_bytes_dropped;  // of these: the log could not take them
};
static_assert(sizeof(ShimState) == 64);

struct ExitRecord {
  uint32_t rank = 0;
  int32_t rank_pid = 0;
  int32_t wait_status = 0;
  int32_t start_error = 0;
  int64_t started_ns = 0;
  int64_t ended_ns = 0;
};
std::string EncodeExitRecord(const ExitRecord& record);
// Nothing: it is none (not whole, or another's).
std::optional<ExitRecord> DecodeExitRecord(std::string_view text);

// What a shim is started with: a memfd, whose number is its only argument.
struct ShimSpec {
  uint32_t rank = 0;
  int listener = -1;  // a descriptor that it inherits: listens on shim.sock
  std::string directory;
  std::string log_directory;                    // made, with its parents, if it is not there
  uint64_t log_bytes_max = uint64_t{64} << 20;  // of a file, before it becomes FILE.1
  // How long a shim whose rank has ended and is recorded waits for somebody to take that.
  uint32_t linger_seconds = 600;
  std::string working_directory;
  uint32_t umask = 022;
  struct Limit {
    uint32_t resource = 0;
    uint64_t soft = 0;
  };
  std::vector<Limit> limits;
  std::vector<std::string> command;      // not empty; looked for in the PATH of `environment`
  std::vector<std::string> environment;  // "NAME=value": all of it
};
std::string EncodeShimSpec(const ShimSpec& spec);
std::optional<ShimSpec> DecodeShimSpec(std::string_view bytes);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SHIM_PROTOCOL_H_
