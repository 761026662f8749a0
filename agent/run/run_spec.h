// What `holdfast run` was asked for, as the agent gets and keeps it, and what its ranks are started
// with: torchrun's environment for one node, and ours.
#ifndef HOLDFAST_AGENT_RUN_RUN_SPEC_H_
#define HOLDFAST_AGENT_RUN_RUN_SPEC_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "agent/recovery/actions.h"
#include "agent/run/shim_protocol.h"

namespace holdfast {

struct RunSpec {
  static constexpr uint32_t kRanksMax = 1024;  // of a node
  static constexpr uint32_t kStopWaitSecondsMax = 24 * 3600;

  std::string run_id;   // of this run: never used by another one
  std::string job;      // as HOLDFAST_JOB
  std::string rdzv_id;  // TORCHELASTIC_RUN_ID
  std::vector<std::string> command;
  std::vector<std::string> environment;  // of whoever started the run: "NAME=value"
  std::string working_directory;         // absolute
  uint32_t umask = 022;
  std::vector<ShimSpec::Limit> limits;
  uint32_t ranks = 1;
  std::string role = "default";
  std::string master_address = "127.0.0.1";
  uint32_t master_port = 0;   // of the first attempt, and of every one; 0: a new one for each
  std::string log_directory;  // absolute; empty: the agent chooses
  uint64_t log_bytes_max = uint64_t{64} << 20;
  std::string recovery_toml;  // the tables [recovery] and [elastic]; empty: none
  // Nothing: as recovery_toml or its default says; so is the next (`stop_wait`).
  std::optional<uint32_t> max_restarts;
  std::optional<uint32_t> stop_wait_seconds;
  // What CUDA_VISIBLE_DEVICES of the ranks is made of: numbers or UUIDs; empty: a job without GPUs.
  // At least `ranks`; those behind are spare.
  std::vector<std::string> gpus;
  uint32_t owner_pid = 0;  // of `holdfast run`, in the agent's pid namespace; 0: not known
  std::string boot_id;     // of the machine, when the run began: after another boot it is over
  // recovery::History::run_count once the policy was told of this run; while that is smaller, it
  // was not.
  uint32_t run_number = 0;
};

std::string EncodeRunSpec(const RunSpec& spec);
// Of hostile bytes, too. kInvalidArgument: names the field.
absl::StatusOr<RunSpec> DecodeRunSpec(std::string_view bytes);

// HOLDFAST_NODE of its ranks, else the host's name: exits are matched to their boards by it.
std::string NodeOf(const RunSpec& spec);

// /proc/sys/kernel/random/boot_id; empty where it cannot be read.
std::string BootId();

// The attempt key of a launch: no other launch of any run has it.
std::string AttemptKeyOf(const RunSpec& spec, recovery::Launch launch);

// LOG_DIRECTORY/attempt_N/LOCAL_RANK, as torchrun names them.
std::string LogDirectoryOf(const RunSpec& spec, uint32_t restart_count, uint32_t rank);
inline constexpr char kErrorFileName[] = "error.json";

struct RankStart {
  const RunSpec& spec;
  const recovery::StartRanks& start;
  uint32_t rank = 0;
  uint32_t port = 0;
  std::string socket;  // of this agent
  uint32_t max_restarts = 0;
};
// All variables of the rank: those of the run, without what another launcher or agent has left in
// them, and then what makes it a rank.
std::vector<std::string> EnvironmentOf(const RankStart& start);

// A port of this machine on which nobody listens now, for `address`. Not one of those that the
// kernel gives away by itself (ip_local_port_range), so that nobody is likely to take it before
// rank 0 listens there. kResourceExhausted: none was found.
absl::StatusOr<uint32_t> FindPort(const std::string& address);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_RUN_SPEC_H_
