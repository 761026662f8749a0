#include "cli/run_flags.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <string_view>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "hook/abi/messages.h"
#include "hook/abi/private_agent_path.h"

namespace holdfast::cli {
namespace {

constexpr char kNameCharacters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";

// "--nproc-per-node,--nproc_per_node"; more names of the same in front.
std::string BothSpellings(const std::string& name, const std::string& also = "") {
  std::string other = name;
  std::replace(other.begin() + 2, other.end(), '-', '_');
  std::string names = also.empty() ? name : absl::StrCat(also, ",", name);
  return other == name ? names : absl::StrCat(names, ",", other);
}

// "PET_NPROC_PER_NODE".
std::string PetVariable(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return absl::StrCat("PET_", name.substr(2));
}

template <typename T>
CLI::Option* Add(CLI::App& verb, const std::string& name, T& value, const std::string& help,
                 const std::string& also = "") {
  return verb.add_option(BothSpellings(name, also), value, help)
      ->envname(PetVariable(name))
      ->capture_default_str();
}

void AddSwitch(CLI::App& verb, const std::string& name, bool& value, const std::string& help,
               const std::string& also = "") {
  verb.add_flag(BothSpellings(name, also), value, help)->envname(PetVariable(name));
}

absl::Status Expected(const std::string& flag, const std::string& expected,
                      const std::string& found) {
  return absl::InvalidArgumentError(
      absl::StrCat(flag, ": expected ", expected, ", found '", found, "'"));
}

// torchrun's Std: 0 none, 1 output, 2 error, 3 both; for all ranks, or "0:3,1:1" for some of them.
class StreamChoice {
 public:
  static absl::StatusOr<StreamChoice> Parse(const std::string& flag, const std::string& text) {
    constexpr char kForm[] = "0 to 3, or LOCAL_RANK:0 to 3, with commas between them";
    StreamChoice choice;
    for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
      const std::vector<std::string> pair = absl::StrSplit(part, ':');
      uint32_t rank = 0;
      uint32_t streams = 0;
      if (pair.size() > 2 || !absl::SimpleAtoi(pair.back(), &streams) || streams > 3 ||
          (pair.size() == 2 && !absl::SimpleAtoi(pair.front(), &rank))) {
        return Expected(flag, kForm, text);
      }
      if (pair.size() == 2) {
        choice.of_rank_[rank] = streams;
      } else {
        choice.of_all_ = streams;
      }
    }
    return choice;
  }
  uint32_t Of(uint32_t rank) const {
    const auto found = of_rank_.find(rank);
    return found == of_rank_.end() ? of_all_ : found->second;
  }

 private:
  uint32_t of_all_ = 0;
  std::map<uint32_t, uint32_t> of_rank_;
};

absl::StatusOr<std::set<uint32_t>> ParseFilter(const std::string& text) {
  std::set<uint32_t> ranks;
  if (text.empty()) return ranks;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    uint32_t rank = 0;
    if (!absl::SimpleAtoi(part, &rank)) {
      return Expected("--local-ranks-filter", "local ranks with commas between them", text);
    }
    ranks.insert(rank);
  }
  return ranks;
}

absl::StatusOr<uint32_t> RanksOf(const std::string& text, const RunContext& context) {
  const uint32_t gpus = static_cast<uint32_t>(context.gpus.size());
  uint32_t ranks = 0;
  if (text == "gpu") {
    ranks = gpus;
  } else if (text == "cpu") {
    ranks = context.processors;
  } else if (text == "auto") {
    ranks = gpus > 0 ? gpus : context.processors;
  } else if (!absl::SimpleAtoi(text, &ranks)) {
    return Expected("--nproc-per-node", "a number, gpu, cpu or auto", text);
  }
  if (ranks < 1 || ranks > RunSpec::kRanksMax) {
    return Expected("--nproc-per-node", absl::StrFormat("1 to %d ranks", RunSpec::kRanksMax),
                    absl::StrFormat("%s (%d)", text, ranks));
  }
  return ranks;
}

bool IsThisMachine(const std::string& host, const RunContext& context) {
  return host == "localhost" || host == "127.0.0.1" || host == "::1" || host == "0.0.0.0" ||
         host == context.host;
}

// What is about several nodes, and does not mean this one alone.
absl::Status CheckOneNode(const RunFlags& flags, const RunContext& context) {
  if (flags.nnodes != "1" && flags.nnodes != "1:1") {
    return Expected("--nnodes", "1 (jobs of several nodes are not offered yet)", flags.nnodes);
  }
  if (flags.node_rank != "0") return Expected("--node-rank", "0, of one node", flags.node_rank);
  if (!flags.rdzv_backend.empty() && flags.rdzv_backend != "c10d" &&
      flags.rdzv_backend != "static") {
    return Expected("--rdzv-backend", "c10d or static, which mean the same on one node",
                    flags.rdzv_backend);
  }
  if (!flags.rdzv_endpoint.empty()) {
    const std::string host = flags.rdzv_endpoint.substr(0, flags.rdzv_endpoint.rfind(':'));
    if (!IsThisMachine(host, context)) {
      return Expected("--rdzv-endpoint", absl::StrCat("this machine (", context.host, ")"),
                      flags.rdzv_endpoint);
    }
  }
  if (!flags.master_addr.empty() && !IsThisMachine(flags.master_addr, context)) {
    return Expected("--master-addr", absl::StrCat("this machine (", context.host, ")"),
                    flags.master_addr);
  }
  return absl::OkStatus();
}

// Flags of torchrun's that this has not. Named, because their variables would be passed over.
struct NotOffered {
  const char* name;
  bool is_switch;
  const char* why;
};
constexpr NotOffered kNotOffered[] = {
    {"--run-path", true, "it would run the script inside of a Python program of torchrun's"},
    {"--virtual-local-rank", true, "LOCAL_RANK is the number of the rank"},
    {"--numa-binding", false, "begin the command with numactl"},
    {"--signals-to-handle", false, "INT, TERM, HUP and USR1 save and stop the job"},
    {"--logs-specs", false, "logs are files below --log-dir"},
    {"--duplicate-stdout-filters", false, "the logs have everything"},
    {"--duplicate-stderr-filters", false, "the logs have everything"},
};

absl::Status CheckOffered(const RunFlags& flags) {
  for (const NotOffered& flag : kNotOffered) {
    const auto given = flags.not_offered.find(flag.name);
    const auto given_switch = flags.switches_not_offered.find(flag.name);
    if ((given != flags.not_offered.end() && !given->second.empty()) ||
        (given_switch != flags.switches_not_offered.end() && given_switch->second)) {
      return absl::InvalidArgumentError(absl::StrCat(flag.name, ": not offered: ", flag.why));
    }
  }
  return absl::OkStatus();
}

std::string VariableOf(const std::vector<std::string>& environment, std::string_view name) {
  for (const std::string& variable : environment) {
    if (variable.size() > name.size() && variable.starts_with(name) &&
        variable[name.size()] == '=') {
      return variable.substr(name.size() + 1);
    }
  }
  return "";
}

// As torchrun starts it: a module or a script by the interpreter, unbuffered, or any program as it
// is.
absl::StatusOr<std::vector<std::string>> CommandOf(const RunFlags& flags,
                                                   const RunContext& context) {
  std::vector<std::string> words = context.words;
  const bool is_marked = !words.empty() && words.front() == "--";
  if (is_marked) words.erase(words.begin());
  if (words.empty()) {
    return absl::InvalidArgumentError("no command: holdfast run [flags] -- CMD ...");
  }
  if (words.front().starts_with("-") && !is_marked) {
    return absl::InvalidArgumentError(
        absl::StrCat("unknown flag ", words.front(), " (a command that begins so goes behind --)"));
  }
  if (flags.module && flags.no_python) {
    return absl::InvalidArgumentError("-m and --no-python: expected one of them, found both");
  }
  const bool is_script = words.front().ends_with(".py") && !flags.no_python;
  if (!is_script && !flags.module) return words;
  std::string interpreter = VariableOf(context.environment, "PYTHON_EXEC");
  if (interpreter.empty()) interpreter = "python3";
  std::vector<std::string> command = {interpreter, "-u"};
  if (flags.module) command.push_back("-m");
  command.insert(command.end(), words.begin(), words.end());
  return command;
}

// The same for the same command in the same directory, so that it goes on where it was; and another
// for any other, so that it never goes on from somebody else's checkpoints.
std::string JobNameOf(const std::vector<std::string>& command, const RunContext& context) {
  std::string program = command.front();
  for (const std::string& word : command) {
    if (word.ends_with(".py")) program = word;
  }
  std::string name = std::filesystem::path(program).stem().string();
  for (char& c : name) {
    if (std::string_view(kNameCharacters).find(c) == std::string_view::npos) c = '_';
  }
  while (name.starts_with('.')) name.erase(name.begin());
  if (name.empty()) name = "job";
  name.resize(std::min<size_t>(name.size(), 64));
  std::string what = context.working_directory;
  for (const std::string& word : command) {
    what += '\0';
    what += word;
  }
  return absl::StrCat(name, "-", abi::JobDirectoryName(what).substr(0, 8));
}

absl::StatusOr<std::string> JobOf(const RunFlags& flags, const std::vector<std::string>& command,
                                  const RunContext& context) {
  std::string job = flags.job;
  if (job.empty()) job = VariableOf(context.environment, "HOLDFAST_JOB");
  if (job.empty()) return JobNameOf(command, context);
  if (job.size() > abi::kJobNameBytesMax || job.front() == '.' ||
      job.find_first_not_of(kNameCharacters) != std::string::npos) {
    return Expected("--job", "1 to 128 of [A-Za-z0-9._-] without a leading dot", job);
  }
  return job;
}

std::string AbsolutePath(const std::string& path, const std::string& directory) {
  return (std::filesystem::path(directory) / path).lexically_normal().string();
}

}  // namespace

void AddRunFlags(CLI::App& verb, RunFlags& flags) {
  verb.prefix_command();
  verb.fallthrough(false);  // else the command's words would be looked at as flags of the program
  Add(verb, "--nproc-per-node", flags.nproc_per_node, "Ranks: a number, gpu, cpu or auto");
  verb.add_option(BothSpellings("--max-restarts"), flags.max_restarts,
                  "Restarts before the job is given up (default: [recovery] max_restarts, 5)")
      ->envname(PetVariable("--max-restarts"));
  Add(verb, "--nnodes", flags.nnodes, "1: jobs of several nodes are not offered yet");
  AddSwitch(verb, "--standalone", flags.standalone, "One node: as without it");
  Add(verb, "--rdzv-backend", flags.rdzv_backend, "c10d or static: the same on one node");
  Add(verb, "--rdzv-endpoint", flags.rdzv_endpoint, "HOST[:PORT] of this machine");
  Add(verb, "--rdzv-id", flags.rdzv_id, "TORCHELASTIC_RUN_ID (default: a new one)");
  Add(verb, "--rdzv-conf", flags.rdzv_conf, "Accepted; there is no rendezvous on one node");
  Add(verb, "--monitor-interval", flags.monitor_interval, "Accepted; an end is seen at once");
  Add(verb, "--start-method", flags.start_method, "Accepted; ranks are always started anew");
  Add(verb, "--role", flags.role, "ROLE_NAME, and the prefix of lines that are shown with --tee");
  AddSwitch(verb, "--module", flags.module, "The command is a Python module", "-m");
  AddSwitch(verb, "--no-python", flags.no_python,
            "The command is no Python script, whatever its name");
  for (const NotOffered& flag : kNotOffered) {
    if (flag.is_switch) {
      AddSwitch(verb, flag.name, flags.switches_not_offered[flag.name], "Not offered");
    } else {
      Add(verb, flag.name, flags.not_offered[flag.name], "Not offered");
    }
  }
  verb.add_option(BothSpellings("--shutdown-timeout"), flags.shutdown_timeout,
                  "Seconds from TERM to KILL (default: [recovery] stop_wait, 5)")
      ->envname(PetVariable("--shutdown-timeout"));
  Add(verb, "--event-log-handler", flags.event_log_handler,
      "Accepted; events are what the agent logs");
  Add(verb, "--log-dir", flags.log_dir, "Where the logs of ranks go (default: the agent's)");
  Add(verb, "--redirects", flags.redirects,
      "Streams that are not shown: 0 none, 1 output, 2 error, 3 both, or RANK:STREAMS,...", "-r");
  Add(verb, "--tee", flags.tee, "Streams that are shown with a prefix, as --redirects", "-t");
  Add(verb, "--local-ranks-filter", flags.local_ranks_filter, "Only these ranks are shown: 0,2");
  Add(verb, "--node-rank", flags.node_rank, "0");
  Add(verb, "--master-addr", flags.master_addr, "MASTER_ADDR (default: 127.0.0.1)");
  Add(verb, "--master-port", flags.master_port,
      "MASTER_PORT (default: a new one for each attempt)");
  Add(verb, "--local-addr", flags.local_addr, "Accepted; of no meaning on one node");
  verb.add_option("--job", flags.job,
                  "The job's name (default: $HOLDFAST_JOB, or made of command and directory)");
  verb.add_option("--config", flags.config,
                  "Configuration: the agent's keys, [recovery] and [elastic]");
  verb.add_option("--every", flags.every,
                  "A save is due every so many steps, or auto (the agent's key `every`)");
  verb.add_option(
      "--socket", flags.socket,
      "Use the agent that listens there (default: $HOLDFAST_SOCKET, or one of its own)");
}

absl::StatusOr<RunPlan> PlanRun(const RunFlags& flags, const RunContext& context) {
  RETURN_IF_ERROR(CheckOneNode(flags, context));
  RETURN_IF_ERROR(CheckOffered(flags));
  RunPlan plan;
  RunSpec& spec = plan.spec;
  ASSIGN_OR_RETURN(spec.ranks, RanksOf(flags.nproc_per_node, context));
  ASSIGN_OR_RETURN(spec.command, CommandOf(flags, context));
  ASSIGN_OR_RETURN(spec.job, JobOf(flags, spec.command, context));
  spec.run_id = absl::StrFormat("%s-%08x",
                                absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::UTCTimeZone()),
                                static_cast<uint32_t>(RandomBits()));
  spec.rdzv_id = flags.rdzv_id.empty() ? spec.run_id : flags.rdzv_id;
  spec.environment = context.environment;
  spec.working_directory = context.working_directory;
  spec.umask = context.umask;
  spec.limits = context.limits;
  spec.role = flags.role;
  spec.max_restarts = flags.max_restarts;
  if (flags.shutdown_timeout.value_or(0) > RunSpec::kStopWaitSecondsMax) {
    return Expected("--shutdown-timeout",
                    absl::StrFormat("0 to %d seconds", RunSpec::kStopWaitSecondsMax),
                    absl::StrCat(*flags.shutdown_timeout));
  }
  spec.stop_wait_seconds = flags.shutdown_timeout;
  if (context.gpus.size() >= spec.ranks) spec.gpus = context.gpus;
  if (!flags.master_addr.empty()) spec.master_address = flags.master_addr;
  if (flags.master_port > 65'535) {
    return Expected("--master-port", "0 to 65535", absl::StrCat(flags.master_port));
  }
  spec.master_port = flags.master_port;
  if (!flags.log_dir.empty()) {
    spec.log_directory =
        absl::StrCat(AbsolutePath(flags.log_dir, context.working_directory), "/", spec.run_id);
  }
  ASSIGN_OR_RETURN(const StreamChoice redirects,
                   StreamChoice::Parse("--redirects", flags.redirects));
  ASSIGN_OR_RETURN(const StreamChoice tee, StreamChoice::Parse("--tee", flags.tee));
  ASSIGN_OR_RETURN(const std::set<uint32_t> filter, ParseFilter(flags.local_ranks_filter));
  plan.prefix = spec.role;
  plan.view_of = [redirects, tee, filter](uint32_t rank) {
    const bool is_wanted = filter.empty() || filter.count(rank) > 0;
    const auto view = [&](uint32_t bit) {
      StreamView stream;
      stream.has_prefix = (tee.Of(rank) & bit) != 0;
      stream.is_shown = is_wanted && (stream.has_prefix || (redirects.Of(rank) & bit) == 0);
      return stream;
    };
    return RankView{view(1), view(2)};
  };
  return plan;
}

}  // namespace holdfast::cli
