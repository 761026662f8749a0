// What a person says to a job of `holdfast run`: `holdfast why`, `stop`, `save`, `approve`, `veto`,
// `hold`, `readmit`, `mark-bad`. The job's agent is found by its socket, or by the job's name, or
// because there is only one.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "agent/config_values.h"
#include "agent/default_socket.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "checkpoint/bad_marks.h"
#include "cli/agent_client.h"
#include "cli/output.h"
#include "cli/verb.h"
#include "hook/abi/private_agent_path.h"
#include "nlohmann/json.hpp"

namespace holdfast::cli {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);

struct JobOptions {
  std::string socket;
  std::string job;
  RunOrder order;
  std::string duration;
};

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string RuntimeDirectory() {
  return abi::RuntimeDirectory(Variable("HOLDFAST_RUNTIME_DIR"), Variable("XDG_RUNTIME_DIR"),
                               geteuid());
}

// Where an agent of this user may listen: the named one, or the job's private one, or any.
std::vector<std::string> Sockets(const JobOptions& options) {
  if (!options.socket.empty()) return {options.socket};
  std::vector<std::string> sockets = {DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR"))};
  const std::string runtime = RuntimeDirectory();
  if (!options.job.empty()) {
    sockets.push_back(
        absl::StrCat(runtime, "/", abi::JobDirectoryName(options.job), "/", abi::kAgentSocketName));
    return sockets;
  }
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(runtime, error)) {
    const std::string socket = (entry.path() / abi::kAgentSocketName).string();
    if (access(socket.c_str(), F_OK) == 0) sockets.push_back(socket);
  }
  return sockets;
}

// The one agent that has a run that is meant. Errors: kNotFound (none; several: they are named),
// kUnavailable (the one that was named does not answer).
absl::StatusOr<std::string> FindAgent(const JobOptions& options) {
  std::vector<std::string> found;
  std::vector<std::string> jobs;
  absl::Status last = absl::NotFoundError("no run of this user is under way on this machine");
  for (const std::string& socket : Sockets(options)) {
    const absl::StatusOr<std::string> state =
        OrderRun(socket, {abi::RunCommandKind::kView, options.job, 0, ""}, kTimeout);
    if (!state.ok()) {
      if (!absl::IsUnavailable(state.status()) || !options.socket.empty()) last = state.status();
      continue;
    }
    const nlohmann::json view = nlohmann::json::parse(*state, nullptr, false);
    found.push_back(socket);
    if (view.is_object()) jobs.push_back(view.value("job", ""));
  }
  if (found.size() == 1) return found.front();
  if (found.empty()) return last;
  return absl::NotFoundError(
      absl::StrCat("several runs are under way: --job is one of ", absl::StrJoin(jobs, ", ")));
}

ExitCode Give(const JobOptions& options, bool as_json,
              const std::function<void(const nlohmann::json&)>& print) {
  const absl::StatusOr<std::string> socket = FindAgent(options);
  if (!socket.ok()) return Report(socket.status());
  RunOrder order = options.order;
  order.job = options.job;
  const absl::StatusOr<std::string> state = OrderRun(*socket, order, kTimeout);
  if (!state.ok()) return Report(state.status());
  if (as_json) {
    std::printf("%s\n", state->c_str());
    return kExitOk;
  }
  const nlohmann::json view = nlohmann::json::parse(*state, nullptr, false);
  if (view.is_object()) print(view);
  return kExitOk;
}

void PrintLines(const nlohmann::json& view, const char* member) {
  for (const nlohmann::json& line : view.value(member, nlohmann::json::array())) {
    const std::string text = line.is_object()   ? line.value("text", "")
                             : line.is_string() ? line.get<std::string>()
                                                : "";
    std::printf("%s\n", Printable(text).c_str());
  }
}

void PrintState(const nlohmann::json& view) {
  std::printf("job %s: %s\n", Printable(view.value("job", "")).c_str(),
              Printable(view.value("state", "")).c_str());
}

CLI::App* AddVerb(CLI::App& app, Invocation& invocation, const char* name, const char* help,
                  abi::RunCommandKind kind, const std::shared_ptr<JobOptions>& options,
                  std::function<void(const nlohmann::json&)> print = PrintState) {
  CLI::App* const verb = app.add_subcommand(name, help);
  options->order.kind = kind;
  verb->add_option("--socket", options->socket, "The agent's socket")->envname("HOLDFAST_SOCKET");
  verb->add_option("--job", options->job, "The job, if there are several")->envname("HOLDFAST_JOB");
  verb->callback([&invocation, options, print = std::move(print)] {
    invocation.run = [&invocation, options, print]() -> ExitCode {
      if (!options->duration.empty()) {
        const absl::StatusOr<absl::Duration> length = ParseDuration(options->duration);
        if (!length.ok()) return Report(length.status());
        options->order.number = static_cast<uint64_t>(absl::ToInt64Seconds(*length));
      }
      return Give(*options, invocation.json, print);
    };
  });
  return verb;
}

// ---- mark-bad

struct MarkOptions {
  std::string directory;  // of the checkpoint
  std::string reason = "a person said so";
  bool undo = false;
};

// Of any job, whether it runs or not: agents look when an attempt begins.
absl::Status Mark(const MarkOptions& options, FileSystem& file_system) {
  ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(file_system, options.directory));
  std::error_code error;
  // ROOT/JOB is its newest one elsewhere; here that would be a guess.
  if (!std::filesystem::equivalent(options.directory, entry.directory, error)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected a checkpoint's directory, found a job's", options.directory));
  }
  const std::filesystem::path directory(entry.directory);
  ASSIGN_OR_RETURN(const JobPath job, SplitJobPath(directory.parent_path().string()));
  const CheckpointPlace place{job.root, job.job, entry.id};
  if (options.undo) return UnmarkBad(file_system, place);
  return MarkBad(file_system, place,
                 {options.reason, absl::StrFormat("cli%016x", RandomBits()), absl::Now()});
}

void AddMarkBad(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<MarkOptions>();
  CLI::App* const verb =
      app.add_subcommand("mark-bad", "Never restore a checkpoint, until that is taken back");
  verb->add_option("DIRECTORY", options->directory, "Of the checkpoint: ROOT/JOB/sSTEP.aATTEMPT")
      ->required();
  verb->add_option("--reason", options->reason, "Why")->capture_default_str();
  verb->add_flag("--undo", options->undo, "Take all marks against it back");
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options]() -> ExitCode {
      if (const absl::Status marked = Mark(*options, invocation.file_system); !marked.ok()) {
        return Report(marked);
      }
      std::printf("%s: %s\n", Printable(options->directory).c_str(),
                  options->undo ? "no mark is against it any more" : "marked bad");
      return kExitOk;
    };
  });
}

}  // namespace

void AddJobVerbs(CLI::App& app, Invocation& invocation) {
  const auto make = [] { return std::make_shared<JobOptions>(); };
  using Kind = abi::RunCommandKind;
  AddVerb(app, invocation, "why", "Say what happened to a running job, and where the time went",
          Kind::kView, make(), [](const nlohmann::json& view) {
            PrintState(view);
            PrintLines(view, "downtime");
            PrintLines(view, "lines");
          });
  AddVerb(app, invocation, "stop", "Save and stop a running job (its command ends with 75)",
          Kind::kStop, make());
  AddVerb(app, invocation, "save", "Ask a running job for a save", Kind::kSave, make());
  for (const auto& [name, help, kind] :
       {std::tuple{"approve", "Let recovery do what it has proposed", Kind::kApprove},
        std::tuple{"veto", "Do not let recovery do what it has proposed", Kind::kVeto}}) {
    auto options = make();
    AddVerb(app, invocation, name, help, kind, options)
        ->add_option("ID", options->order.text, "Of the proposal")
        ->required();
  }
  auto hold = make();
  CLI::App* const hold_verb =
      AddVerb(app, invocation, "hold", "Nothing is stopped or started for so long; 0s ends it",
              Kind::kHold, hold);
  hold_verb->add_option("DURATION", hold->duration, "As 2h or 90s")->required();
  hold_verb->add_option("--reason", hold->order.text, "Why");
  auto readmit = make();
  AddVerb(app, invocation, "readmit", "Use a GPU again that was excluded", Kind::kReadmit, readmit)
      ->add_option("GPU", readmit->order.number, "Its number")
      ->required();
  AddMarkBad(app, invocation);
}

}  // namespace holdfast::cli
