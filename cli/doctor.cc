#include "cli/doctor.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "agent/version.h"
#include "agent/witness/helper.h"
#include "agent/witness/ras_client.h"
#include "cli/agent_client.h"
#include "io/open_ring.h"
#include "io/unique_fd.h"
#include "monitor/witness/gpu.h"

namespace holdfast::cli {
namespace {

using nlohmann::json;

constexpr absl::Duration kAgentDeadline = absl::Seconds(5);
constexpr absl::Duration kHelperDeadline = absl::Seconds(10);
constexpr absl::Duration kRasDeadline = absl::Seconds(3);
constexpr char kPlugin[] = "libnccl-profiler-holdfast.so";
// Of a node: 32 descriptors a session, and the agent's own (docs/OPERATING.md).
constexpr uint64_t kOpenFilesGood = 4096;
constexpr uint64_t kMemlockGood = uint64_t{64} << 20;
constexpr int kCudaVersionMin = 10010;  // docs/GPU.md

// The first line of a small file; nothing if it cannot be read.
std::optional<std::string> FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

Check Agent(const DoctorOptions& options, json& status) {
  Check check{"agent", Health::kBad, "", ""};
  const absl::StatusOr<std::string> text = QueryStatus(options.socket, kAgentDeadline);
  if (!text.ok()) {
    check.found = std::string(text.status().message());
    if (text.status().code() == absl::StatusCode::kPermissionDenied) {
      check.fix = "run this as the agent's user";
    } else if (text.status().code() == absl::StatusCode::kFailedPrecondition) {
      check.fix = "install agent and command from one release";
    } else {
      check.health = Health::kAbsent;
      check.fix = absl::StrCat("holdfastd --socket ", options.socket,
                               "  (a job without it starts a private agent)");
    }
    return check;
  }
  status = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  const json agent = status.is_object() ? status.value("agent", json::object()) : json::object();
  const std::string version = agent.value("version", "?");
  check.found = absl::StrFormat("%s agent, version %s, at %s", agent.value("mode", "?"), version,
                                options.socket);
  check.health = Health::kGood;
  if (version != kVersion) {
    check.health = Health::kLimited;
    absl::StrAppend(&check.found, "; this command is version ", kVersion);
    check.fix = "install agent and command from one release";
  }
  return check;
}

Check Boards(const json& status) {
  Check check{"boards", Health::kAbsent, "no agent was asked", ""};
  if (!status.is_object()) return check;
  size_t alive = 0;
  for (const json& board : status.value("monitor", json::array())) {
    if (board.is_object() && board.value("alive", false)) ++alive;
  }
  check.found = absl::StrFormat("%d monitor boards of living processes", alive);
  if (alive > 0) {
    check.health = Health::kGood;
  } else {
    check.fix = "NCCL_PROFILER_PLUGIN=holdfast in the job's environment, or the hook API's events";
  }
  return check;
}

Check Plugin(const DoctorOptions& options) {
  Check check{"plugin", Health::kBad, "", ""};
  const std::string asked = options.variable("NCCL_PROFILER_PLUGIN");
  // As NCCL does: the value itself, then the name that is made of it.
  std::vector<std::string> names = {kPlugin};
  if (!asked.empty() && asked != "holdfast") {
    names = {asked, absl::StrCat("libnccl-profiler-", asked, ".so")};
  }
  std::string trouble;
  for (const std::string& name : names) {
    // Only found, not called: it does nothing before NCCL calls it.
    void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      trouble = dlerror();
      continue;
    }
    const bool ours = dlsym(handle, "ncclProfiler_v4") != nullptr;
    dlclose(handle);
    if (!ours) {
      trouble = absl::StrCat(name, ": no NCCL profiler plugin");
      continue;
    }
    check.health = asked.empty() ? Health::kLimited : Health::kGood;
    check.found = absl::StrCat(name, " is found");
    if (asked.empty()) {
      absl::StrAppend(&check.found, "; NCCL_PROFILER_PLUGIN is not set here");
      check.fix = "NCCL_PROFILER_PLUGIN=holdfast in the job's environment";
    }
    return check;
  }
  check.found = trouble;
  check.fix = absl::StrCat("LD_LIBRARY_PATH with the directory of ", kPlugin,
                           ", or NCCL_PROFILER_PLUGIN with its path");
  return check;
}

Check Level(const DoctorOptions& options) {
  const std::string level = options.variable("HOLDFAST_MONITOR");
  if (level.empty()) return {"level", Health::kGood, "light (HOLDFAST_MONITOR is not set)", ""};
  if (level == "light" || level == "full") return {"level", Health::kGood, level, ""};
  if (level == "off") {
    return {"level", Health::kLimited, "off: nothing is watched", "unset HOLDFAST_MONITOR"};
  }
  return {"level", Health::kLimited,
          absl::StrFormat("HOLDFAST_MONITOR is \"%s\", and counts as light", level),
          "HOLDFAST_MONITOR=off, light or full"};
}

// Whether processes of the agent's user can be seen.
Check Proc(const DoctorOptions& options) {
  Check check{"proc", Health::kGood, "processes are visible", ""};
  std::ifstream mounts(absl::StrCat(options.proc, "/self/mounts"));
  std::string line;
  bool any = false;
  while (std::getline(mounts, line)) {
    const std::vector<std::string> fields = absl::StrSplit(line, ' ');
    if (fields.size() < 4 || fields[2] != "proc") continue;
    any = true;
    for (const std::string hidden :
         {"hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"}) {
      for (const absl::string_view mount_option : absl::StrSplit(fields[3], ',')) {
        if (mount_option != hidden) continue;
        check.health = Health::kLimited;
        check.found = absl::StrFormat("%s is mounted with %s: other users' processes are hidden",
                                      fields[1], hidden);
        check.fix = "run the agent as the jobs' user";
      }
    }
  }
  if (!any) return {"proc", Health::kBad, "/proc is not mounted", "mount -t proc proc /proc"};
  return check;
}

// A stack of this very process, through the helper: all that is needed for another of the same
// user.
Check Stacks(const DoctorOptions& options) {
  Check check{"stacks", Health::kGood, "", ""};
  const auto text = RunHelpers(options.helper, {{"stacks", absl::StrCat(getpid())}},
                               {kHelperDeadline, kHelperDeadline})
                        .front();
  const std::string scope =
      FirstLine(absl::StrCat(options.proc, "/sys/kernel/yama/ptrace_scope")).value_or("");
  if (text.ok()) {
    check.found = "native stacks can be taken";
    return check;
  }
  check.health = Health::kLimited;
  check.found = std::string(text.status().message());
  if (text.status().code() == absl::StatusCode::kUnavailable &&
      absl::StrContains(check.found, "No such file")) {
    check.health = Health::kBad;
    check.fix = "install holdfast-witness beside holdfastd";
  } else if (!scope.empty() && scope != "0") {
    absl::StrAppend(&check.found, " (ptrace_scope is ", scope, ")");
    check.fix = "sysctl kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE for the agent";
  } else {
    check.fix = "CAP_SYS_PTRACE for the agent (in a container: --cap-add SYS_PTRACE)";
  }
  return check;
}

Check KernelLogCheck(const DoctorOptions& options) {
  const UniqueFd fd(open(options.kernel_log.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  if (fd) {
    return {"kernel_log", Health::kGood, absl::StrCat(options.kernel_log, " is readable"), ""};
  }
  const int error = errno;
  const std::string found = absl::StrCat(options.kernel_log, ": ", strerror(error));
  if (error == ENOENT) {
    return {"kernel_log", Health::kLimited, found, "in a container: --device /dev/kmsg"};
  }
  return {"kernel_log", Health::kLimited, found,
          "AmbientCapabilities=CAP_SYSLOG for the agent's unit, and read permission"};
}

Check Nvml(const DoctorOptions& options) {
  const auto text =
      RunHelpers(options.helper, {{"gpus"}}, {kHelperDeadline, kHelperDeadline}).front();
  if (!text.ok()) {
    const bool none = text.status().code() == absl::StatusCode::kNotFound;
    return {"nvml", none ? Health::kAbsent : Health::kLimited, std::string(text.status().message()),
            none ? "" : "nvidia-smi, which says more"};
  }
  const auto gpus = monitor::ParseGpuReadings(*text);
  if (!gpus.ok()) {
    return {"nvml", Health::kBad, std::string(gpus.status().message()),
            "install agent and command from one release"};
  }
  Check check{"nvml", Health::kGood, absl::StrFormat("%d GPUs", gpus->size()), ""};
  const auto said = monitor::TestifyGpus(*gpus, [](const auto&) { return std::vector<Rank>(); });
  for (const monitor::Testimony& testimony : said) {
    check.health = Health::kLimited;
    absl::StrAppend(&check.found, "; ", testimony.sentence);
    check.fix = "nvidia-smi -q, which says more";
  }
  return check;
}

// What a training process will find that has tensors in device memory.
Check Cuda(const DoctorOptions& options) {
  const auto text =
      RunHelpers(options.helper, {{"devices"}}, {kHelperDeadline, kHelperDeadline}).front();
  if (!text.ok()) {
    const bool none = text.status().code() == absl::StatusCode::kNotFound;
    return {"cuda", none ? Health::kAbsent : Health::kBad, std::string(text.status().message()),
            none ? "" : "nvidia-smi, which says more"};
  }
  const json readings = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!readings.is_object()) {
    return {"cuda", Health::kBad, "the helper's answer is not understood",
            "install agent and command from one release"};
  }
  const int version = readings.value("version", 0);
  Check check{"cuda", Health::kGood, "", ""};
  std::vector<std::string> names;
  std::vector<std::string> troubles;
  for (const json& device : readings.value("devices", json::array())) {
    names.push_back(device.value("name", "?"));
    if (!device.contains("trouble")) continue;
    troubles.push_back(
        absl::StrFormat("device %d %s", device.value("index", 0), device.value("trouble", "?")));
  }
  check.found = absl::StrFormat("CUDA %d.%d; %d devices (%s)", version / 1000, version % 1000 / 10,
                                names.size(), absl::StrJoin(names, ", "));
  if (version < kCudaVersionMin) {
    check.health = Health::kBad;
    absl::StrAppend(&check.found, "; older than 10.1: tensors in device memory are not captured");
    check.fix = "a newer driver";
  } else if (!troubles.empty()) {
    check.health = Health::kLimited;
    absl::StrAppend(&check.found, "; ", absl::StrJoin(troubles, "; "));
    check.fix = "ulimit -l unlimited for the job; nvidia-smi -q, which says more";
  } else {
    absl::StrAppend(&check.found, "; each registers host memory");
  }
  return check;
}

Check Ras(const DoctorOptions& options) {
  const auto address = ParseRasAddress(options.ras);
  if (!address.ok()) {
    return {"ras", Health::kBad, std::string(address.status().message()),
            "NCCL_RAS_ADDR=host:port"};
  }
  const auto answer = AskRas(*address, kRasDeadline);
  if (answer.ok()) {
    return {"ras", Health::kGood, absl::StrCat("NCCL answers at ", options.ras), ""};
  }
  const bool none = answer.status().code() == absl::StatusCode::kNotFound;
  return {"ras", none ? Health::kAbsent : Health::kLimited, std::string(answer.status().message()),
          none ? "" : "another program has the port: NCCL_RAS_ADDR for the job"};
}

Check Uring() {
  RingOptions ring_options;
  ring_options.kind = RingOptions::Kind::kUring;
  const auto ring = OpenRing(ring_options);
  if (ring.ok()) return {"io_uring", Health::kGood, (*ring)->Describe(), ""};
  return {"io_uring", Health::kLimited,
          absl::StrCat("threads serve instead: ", std::string(ring.status().message())),
          "sysctl kernel.io_uring_disabled=0 (in a container: a seccomp profile that allows it)"};
}

std::string LimitText(rlim_t limit) {
  return limit == RLIM_INFINITY ? "unlimited" : absl::StrCat(limit);
}

struct LimitCheck {
  const char* name;
  __rlimit_resource resource;
  const char* kernel_name;  // in /proc/PID/limits
  uint64_t good;
  const char* fix;
};

// The hard limit of another process; nothing if it cannot be read.
std::optional<rlim_t> LimitOf(const std::string& proc, int64_t pid, const char* kernel_name) {
  std::ifstream file(absl::StrCat(proc, "/", pid, "/limits"));
  std::string line;
  while (std::getline(file, line)) {
    absl::string_view rest = line;
    if (!absl::ConsumePrefix(&rest, kernel_name)) continue;
    const std::vector<absl::string_view> words =
        absl::StrSplit(rest, ' ', absl::SkipWhitespace());  // soft, hard, unit
    rlim_t limit = RLIM_INFINITY;
    if (words.size() < 2 || (words[1] != "unlimited" && !absl::SimpleAtoi(words[1], &limit))) break;
    return limit;
  }
  return std::nullopt;
}

// Of the agent if there is one, else of this process, which the agent of a job may be like.
Check Limit(const DoctorOptions& options, const json& status, const LimitCheck& of) {
  rlimit own{};
  getrlimit(of.resource, &own);
  std::optional<rlim_t> agents;
  if (status.is_object()) {
    const int64_t worker = status.value("agent", json::object()).value("worker_pid", int64_t{0});
    if (worker > 0) agents = LimitOf(options.proc, worker, of.kernel_name);
  }
  // The agent raises the soft one itself.
  const rlim_t limit = agents.value_or(own.rlim_max);
  Check check{of.name, Health::kGood, LimitText(limit), ""};
  if (agents.has_value()) absl::StrAppend(&check.found, " (the agent's)");
  if (limit != RLIM_INFINITY && limit < of.good) {
    check.health = Health::kLimited;
    check.fix = of.fix;
  }
  return check;
}

Check HugePages(const DoctorOptions& options) {
  const std::string path =
      absl::StrCat(options.sys, "/kernel/mm/transparent_hugepage/shmem_enabled");
  const std::optional<std::string> line = FirstLine(path);
  if (!line.has_value()) {
    return {"huge_pages", Health::kLimited, "the kernel has none for shared memory", ""};
  }
  const size_t open_bracket = line->find('['), close_bracket = line->find(']');
  const std::string mode = open_bracket == std::string::npos || close_bracket == std::string::npos
                               ? *line
                               : line->substr(open_bracket + 1, close_bracket - open_bracket - 1);
  if (mode == "never" || mode == "deny") {
    return {"huge_pages", Health::kLimited, absl::StrCat("shmem_enabled is ", mode),
            absl::StrCat("echo advise > ", path)};
  }
  return {"huge_pages", Health::kGood, absl::StrCat("shmem_enabled is ", mode), ""};
}

// The agent's root if there is one, else what HOLDFAST_ROOT names.
Check Root(const DoctorOptions& options, const json& status) {
  std::string root = options.variable("HOLDFAST_ROOT");
  if (status.is_object()) {
    root = status.value("agent", json::object()).value("root", root);
  }
  if (root.empty()) {
    return {"root", Health::kAbsent, "neither an agent nor HOLDFAST_ROOT names one", ""};
  }
  if (access(root.c_str(), W_OK | X_OK) == 0) {
    return {"root", Health::kGood, absl::StrCat(root, " is writable"), ""};
  }
  return {"root", Health::kBad, absl::StrCat(root, ": ", strerror(errno)),
          errno == ENOENT ? absl::StrCat("mkdir -p ", root)
                          : absl::StrCat("chown ", geteuid(), " ", root)};
}

}  // namespace

const char* Name(Health health) {
  switch (health) {
    case Health::kGood:
      return "good";
    case Health::kAbsent:
      return "absent";
    case Health::kLimited:
      return "limited";
    case Health::kBad:
      return "bad";
  }
  return "bad";
}

std::vector<Check> Examine(const DoctorOptions& options) {
  json status;
  std::vector<Check> checks;
  checks.push_back(Agent(options, status));
  checks.push_back(Boards(status));
  checks.push_back(Plugin(options));
  checks.push_back(Level(options));
  checks.push_back(Proc(options));
  checks.push_back(Stacks(options));
  checks.push_back(KernelLogCheck(options));
  checks.push_back(Nvml(options));
  checks.push_back(Cuda(options));
  checks.push_back(Ras(options));
  checks.push_back(Uring());
  checks.push_back(Limit(options, status,
                         {"memlock", RLIMIT_MEMLOCK, "Max locked memory", kMemlockGood,
                          "LimitMEMLOCK=infinity in the agent's unit, or ulimit -l unlimited"}));
  checks.push_back(Limit(options, status,
                         {"open_files", RLIMIT_NOFILE, "Max open files", kOpenFilesGood,
                          "LimitNOFILE=1048576 in the agent's unit, or ulimit -n 1048576"}));
  checks.push_back(HugePages(options));
  checks.push_back(Root(options, status));
  return checks;
}

}  // namespace holdfast::cli
