#include "cli/agents.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/config_file.h"
#include "agent/default_socket.h"
#include "agent/recovery/screen.h"
#include "agent/recovery/settings.h"
#include "hook/abi/private_agent_path.h"

namespace holdfast::cli {
namespace {

// Looked at in the state directory; beyond, those that were written last count.
constexpr size_t kPastJobsMax = 256;

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string StateDirectory(const JobChoice& choice) {
  if (!choice.state_directory.empty()) return choice.state_directory;
  return DefaultStateDirectory(
      geteuid(), [](const char* name) { return static_cast<const char*>(std::getenv(name)); });
}

// Nothing if it is none, or larger than one can be.
std::string ReadHistoryFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff bytes = file ? static_cast<std::streamoff>(file.tellg()) : 0;
  if (bytes <= 0 || static_cast<size_t>(bytes) > recovery::History::kBytesMax) return "";
  std::string text(static_cast<size_t>(bytes), '\0');
  file.seekg(0);
  if (!file.read(text.data(), bytes)) return "";
  return text;
}

}  // namespace

void AddJobChoice(CLI::App& verb, JobChoice& choice) {
  verb.add_option("--socket", choice.socket, "The agent's socket")->envname("HOLDFAST_SOCKET");
  verb.add_option("--job", choice.job, "The job, if there are several")->envname("HOLDFAST_JOB");
  verb.add_option("--state-directory", choice.state_directory,
                  "Where agents that are gone have left what happened")
      ->envname("HOLDFAST_STATE_DIRECTORY");
}

std::vector<std::string> AgentSockets(const JobChoice& choice) {
  if (!choice.socket.empty()) return {choice.socket};
  std::vector<std::string> sockets = {DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR"))};
  const std::string runtime = abi::RuntimeDirectory(Variable("HOLDFAST_RUNTIME_DIR"),
                                                    Variable("XDG_RUNTIME_DIR"), geteuid());
  const auto add = [&](const std::string& socket) {
    if (std::find(sockets.begin(), sockets.end(), socket) == sockets.end()) {
      sockets.push_back(socket);
    }
  };
  if (!choice.job.empty()) {
    add(absl::StrCat(runtime, "/", abi::JobDirectoryName(choice.job), "/", abi::kAgentSocketName));
    return sockets;
  }
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(runtime, error)) {
    const std::string socket = (entry.path() / abi::kAgentSocketName).string();
    if (access(socket.c_str(), F_OK) == 0) add(socket);
  }
  return sockets;
}

std::vector<PastJob> PastJobs(const JobChoice& choice) {
  std::vector<std::pair<absl::Time, std::string>> found;
  std::error_code error;
  for (const auto& entry :
       std::filesystem::directory_iterator(StateDirectory(choice) + "/jobs", error)) {
    const std::string path = (entry.path() / "history").string();
    struct stat info {};
    if (!choice.job.empty() && entry.path().filename() != choice.job) continue;
    if (stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
    found.emplace_back(absl::TimeFromTimespec(info.st_mtim), path);
  }
  std::sort(found.rbegin(), found.rend());
  if (found.size() > kPastJobsMax) found.resize(kPastJobsMax);
  std::vector<PastJob> jobs;
  for (const auto& [written, path] : found) {
    const std::string text = ReadHistoryFile(path);
    absl::StatusOr<recovery::History> history =
        recovery::DecodeHistory(std::as_bytes(std::span(text)));
    if (!history.ok()) continue;
    PastJob job;
    job.job = history->job;
    job.history = *std::move(history);
    job.age = std::max(absl::ZeroDuration(), absl::Now() - written);
    jobs.push_back(std::move(job));
  }
  return jobs;
}

std::string FirstLineOf(const PastJob& job) {
  if (job.history.phase == recovery::Phase::kOver) {
    // Of a run that is over nothing depends on the settings.
    return recovery::FirstLine(recovery::Settings(), job.history,
                               job.history.now - absl::Microseconds(job.history.clock_offset_us));
  }
  // The sidecar has left it: of its attempts it says nothing (agent/run/sidecar.h).
  if (job.history.phase == recovery::Phase::kIdle) {
    return "NO AGENT. Another launcher's job, for which no agent answers now. You: nothing.";
  }
  return absl::StrCat("NO AGENT. When last heard of it was ",
                      std::string(recovery::Name(job.history.state)),
                      "; no agent answers for it now. You: nothing.");
}

}  // namespace holdfast::cli
