// The command line of `holdfast run`: torchrun's flags, in both spellings and as $PET_*, for one
// node; and what of it goes to the agent.
#ifndef HOLDFAST_CLI_RUN_FLAGS_H_
#define HOLDFAST_CLI_RUN_FLAGS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "agent/run/run_spec.h"

namespace CLI {
class App;
}

namespace holdfast::cli {

struct RunFlags {
  // torchrun's, as they were given.
  std::string nnodes = "1";
  std::string nproc_per_node = "1";
  std::optional<uint32_t> max_restarts;
  std::string rdzv_backend;
  std::string rdzv_endpoint;
  std::string rdzv_id;
  std::string rdzv_conf;
  std::string monitor_interval;
  std::string start_method;
  std::string role = "default";
  std::string log_dir;
  std::string redirects = "0";
  std::string tee = "0";
  std::string local_ranks_filter;
  std::string local_addr;
  std::string node_rank = "0";
  std::string master_addr;
  uint32_t master_port = 0;
  bool standalone = false;
  bool module = false;
  bool no_python = false;
  std::optional<uint32_t> shutdown_timeout;  // seconds
  std::string event_log_handler;
  // Of torchrun's flags that are refused, what was given.
  std::map<std::string, std::string> not_offered;
  std::map<std::string, bool> switches_not_offered;
  // Ours.
  std::string job;
  std::string config;
  std::string socket;
  std::string every;
};

// Adds the options to the verb, and says that everything from the first word that is none is the
// command.
void AddRunFlags(CLI::App& verb, RunFlags& flags);

// Which of a rank's streams the terminal shows, and how.
struct StreamView {
  bool is_shown = true;
  bool has_prefix = false;  // whole lines, with "[role0]:" in front
};
struct RankView {
  StreamView output;
  StreamView error;
};

struct RunPlan {
  RunSpec spec;
  std::function<RankView(uint32_t local_rank)> view_of;
  std::string prefix;  // of the role
};

// What the process that asks for the run has.
struct RunContext {
  std::vector<std::string> words;        // what stands behind the flags, "--" included
  std::vector<std::string> environment;  // "NAME=value"
  std::string working_directory;
  uint32_t umask = 022;
  std::vector<ShimSpec::Limit> limits;
  uint32_t processors = 1;        // of this machine that may be used
  std::vector<std::string> gpus;  // that may be used: numbers or UUIDs
  std::string host;               // this machine's name
};

// Errors: kInvalidArgument: the flag, what was expected (one node) and found.
absl::StatusOr<RunPlan> PlanRun(const RunFlags& flags, const RunContext& context);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_RUN_FLAGS_H_
