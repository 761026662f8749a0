// What a person says to a job of `holdfast run`: `holdfast why`, `stop`, `save`, `approve`, `veto`,
// `hold`, `readmit`, `mark-bad`. The job's agent is found by its socket, or by the job's name, or
// because there is only one.
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "agent/config_values.h"
#include "agent/recovery/why.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "checkpoint/bad_marks.h"
#include "cli/agent_client.h"
#include "cli/agents.h"
#include "cli/output.h"
#include "cli/verb.h"
#include "nlohmann/json.hpp"

namespace holdfast::cli {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(10);

struct JobOptions {
  JobChoice choice;
  RunOrder order;
  std::string duration;
  std::string gpu;
};

// Jobs of another launcher can be explained, and nothing else.
enum class Jobs { kOfRuns, kAll };

// The one agent that has a job that is meant. Errors: kNotFound (none), kInvalidArgument (several:
// they are named), kFailedPrecondition (it is another launcher's), kUnavailable (the one that was
// named does not answer).
absl::StatusOr<std::string> FindAgent(const JobOptions& options, Jobs which) {
  std::vector<std::string> found;
  std::vector<std::string> jobs;
  absl::Status last = absl::NotFoundError("no run of this user is under way on this machine");
  for (const std::string& socket : AgentSockets(options.choice)) {
    const absl::StatusOr<std::string> state =
        OrderRun(socket, {abi::RunCommandKind::kView, options.choice.job, 0, ""}, kTimeout);
    if (!state.ok()) {
      const bool is_named = !options.choice.socket.empty();
      if (is_named || !absl::IsUnavailable(state.status())) last = state.status();
      continue;
    }
    const nlohmann::json view = nlohmann::json::parse(*state, nullptr, false);
    const std::string job = view.is_object() ? view.value("job", "") : "";
    if (which == Jobs::kOfRuns && view.is_object() && !view.value("supervised", true)) {
      last = absl::FailedPreconditionError(absl::StrFormat(
          "job %s was started by another launcher, which alone starts and stops it", job));
      continue;
    }
    found.push_back(socket);
    jobs.push_back(job);
  }
  if (found.size() == 1) return found.front();
  if (found.empty()) return last;
  return absl::InvalidArgumentError(
      absl::StrCat("several runs are under way: --job is one of ", absl::StrJoin(jobs, ", ")));
}

ExitCode Give(const JobOptions& options, bool as_json,
              const std::function<void(const nlohmann::json&)>& print) {
  const bool explains = options.order.kind == abi::RunCommandKind::kView;
  const absl::StatusOr<std::string> socket =
      FindAgent(options, explains ? Jobs::kAll : Jobs::kOfRuns);
  if (!socket.ok()) return Report(socket.status());
  RunOrder order = options.order;
  order.job = options.choice.job;
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

void PrintWhy(const nlohmann::json& view) {
  PrintLines(view, "downtime");
  PrintLines(view, "why");
}

// By the agent, or, where it is gone with its run, by what it has left on disk.
ExitCode Why(const JobOptions& options, bool as_json) {
  const absl::StatusOr<std::string> socket = FindAgent(options, Jobs::kAll);
  if (socket.ok()) {
    return Give(options, as_json, [](const nlohmann::json& view) {
      PrintState(view);
      PrintWhy(view);
      PrintLines(view, "lines");
    });
  }
  const std::vector<PastJob> past =
      options.choice.socket.empty() ? PastJobs(options.choice) : std::vector<PastJob>();
  if (!absl::IsNotFound(socket.status()) || past.empty()) return Report(socket.status());
  const Attempt of{static_cast<uint32_t>(options.order.number)};
  const recovery::History& history = past.front().history;
  nlohmann::ordered_json state = {{"schema_version", 1},
                                  {"job", history.job},
                                  {"state", std::string(recovery::Name(history.state))},
                                  {"over", history.phase == recovery::Phase::kOver},
                                  {"exit_code", history.exit_code}};
  state.update(recovery::WhyJson(history, of));
  if (as_json) {
    std::printf("%s\n", JsonText(state).c_str());
    return kExitOk;
  }
  std::printf("job %s: %s\n", Printable(history.job).c_str(),
              Printable(FirstLineOf(past.front())).c_str());
  PrintWhy(state);
  return kExitOk;
}

// "3" or, as screens name it, "n1/3".
absl::Status TakeGpu(const std::string& text, RunOrder& order) {
  const size_t slash = text.rfind('/');
  const std::string number = slash == std::string::npos ? text : text.substr(slash + 1);
  uint32_t gpu = 0;
  if (slash == 0 || !absl::SimpleAtoi(number, &gpu)) {
    return absl::InvalidArgumentError(
        absl::StrCat("GPU: expected its number, or NODE/NUMBER, found '", text, "'"));
  }
  order.number = gpu;
  order.text = slash == std::string::npos ? "" : text.substr(0, slash);
  return absl::OkStatus();
}

CLI::App* AddVerb(CLI::App& app, Invocation& invocation, const char* name, const char* help,
                  abi::RunCommandKind kind, const std::shared_ptr<JobOptions>& options,
                  std::function<void(const nlohmann::json&)> print = PrintState) {
  CLI::App* const verb = app.add_subcommand(name, help);
  options->order.kind = kind;
  AddJobChoice(*verb, options->choice);
  verb->callback([&invocation, options, print = std::move(print)] {
    invocation.run = [&invocation, options, print]() -> ExitCode {
      if (!options->duration.empty()) {
        const absl::StatusOr<absl::Duration> length = ParseDuration(options->duration);
        if (!length.ok()) return Report(length.status());
        options->order.number = static_cast<uint64_t>(absl::ToInt64Seconds(*length));
      }
      if (!options->gpu.empty()) {
        if (const absl::Status taken = TakeGpu(options->gpu, options->order); !taken.ok()) {
          return Report(taken);
        }
      }
      return Give(*options, invocation.json, print);
    };
  });
  return verb;
}

// ---- mark-bad

constexpr size_t kStepsNamedMax = 8;

struct MarkOptions {
  JobOptions job;
  std::string which;  // a checkpoint's directory, or a step of a running job
  std::string reason = "a person said so";
  bool undo = false;
};

// Of the checkpoints of that step that a run may go back to, the oldest first; there is one.
absl::StatusOr<std::vector<std::string>> DirectoriesOf(const JobOptions& job, uint64_t step) {
  const absl::StatusOr<std::string> socket = FindAgent(job, Jobs::kOfRuns);
  if (absl::IsFailedPrecondition(socket.status())) {
    return absl::FailedPreconditionError(
        absl::StrFormat("step %d: expected one of a job of `holdfast run`, or a checkpoint's "
                        "directory: %s",
                        step, std::string(socket.status().message())));
  }
  RETURN_IF_ERROR(socket.status());
  ASSIGN_OR_RETURN(
      const std::string state,
      OrderRun(*socket, {abi::RunCommandKind::kView, job.choice.job, 0, ""}, kTimeout));
  const nlohmann::json view = nlohmann::json::parse(state, nullptr, false);
  if (!view.is_object()) return absl::InternalError("the agent's answer is no JSON object");
  std::vector<std::string> directories;
  std::vector<std::string> steps;
  for (const nlohmann::json& one : view.value("checkpoints", nlohmann::json::array())) {
    const uint64_t its_step = one.value("step", uint64_t{0});
    if (its_step == step) directories.push_back(one.value("directory", ""));
    steps.push_back(absl::StrCat(its_step));
  }
  if (!directories.empty()) return directories;
  if (steps.size() > kStepsNamedMax) {
    steps.erase(steps.begin(), steps.end() - static_cast<std::ptrdiff_t>(kStepsNamedMax));
  }
  return absl::NotFoundError(absl::StrFormat(
      "job %s: expected a checkpoint of step %d, found %s", view.value("job", ""), step,
      steps.empty() ? "none" : absl::StrCat("as the newest ", absl::StrJoin(steps, ", "))));
}

// Of any job, whether it runs or not: agents look when an attempt begins.
absl::Status MarkDirectory(const MarkOptions& options, const std::string& named,
                           FileSystem& file_system) {
  ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(file_system, named));
  std::error_code error;
  // ROOT/JOB is its newest one elsewhere; here that would be a guess.
  if (!std::filesystem::equivalent(named, entry.directory, error)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected a checkpoint's directory, found a job's", named));
  }
  const std::filesystem::path directory(entry.directory);
  ASSIGN_OR_RETURN(const JobPath job, SplitJobPath(directory.parent_path().string()));
  const CheckpointPlace place{job.root, job.job, entry.id};
  if (options.undo) return UnmarkBad(file_system, place);
  return MarkBad(file_system, place,
                 {options.reason, absl::StrFormat("cli%016x", RandomBits()), absl::Now()});
}

absl::Status Mark(const MarkOptions& options, FileSystem& file_system) {
  uint64_t step = 0;
  if (!absl::SimpleAtoi(options.which, &step)) {
    return MarkDirectory(options, options.which, file_system);
  }
  ASSIGN_OR_RETURN(std::vector<std::string> directories, DirectoriesOf(options.job, step));
  // Several attempts may have come to that step: the newest is what would be restored.
  if (!options.undo) directories.erase(directories.begin(), directories.end() - 1);
  for (const std::string& directory : directories) {
    RETURN_IF_ERROR(MarkDirectory(options, directory, file_system));
  }
  return absl::OkStatus();
}

void AddMarkBad(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<MarkOptions>();
  CLI::App* const verb =
      app.add_subcommand("mark-bad", "Never restore a checkpoint, until that is taken back");
  verb->add_option("WHICH", options->which,
                   "A step of a running job; or of any job a checkpoint's directory, "
                   "ROOT/JOB/sSTEP.aATTEMPT")
      ->required();
  AddJobChoice(*verb, options->job.choice);
  verb->add_option("--reason", options->reason, "Why")->capture_default_str();
  verb->add_flag("--undo", options->undo, "Take all marks against it back");
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options]() -> ExitCode {
      if (const absl::Status marked = Mark(*options, invocation.file_system); !marked.ok()) {
        return Report(marked);
      }
      std::printf("%s: %s\n", Printable(options->which).c_str(),
                  options->undo ? "no mark is against it any more" : "marked bad");
      return kExitOk;
    };
  });
}

}  // namespace

void AddJobVerbs(CLI::App& app, Invocation& invocation) {
  const auto make = [] { return std::make_shared<JobOptions>(); };
  using Kind = abi::RunCommandKind;
  auto why = make();
  CLI::App* const why_verb =
      AddVerb(app, invocation, "why", "Say what happened to a job, and where the time went",
              Kind::kView, why);
  why_verb->add_option("ATTEMPT", why->order.number, "Only what happened to this attempt")
      ->check(CLI::Range(uint64_t{1}, uint64_t{UINT32_MAX}));
  why_verb->callback([&invocation, why] {
    invocation.run = [&invocation, why] { return Why(*why, invocation.json); };
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
      ->add_option("GPU", readmit->gpu, "Its number, or NODE/NUMBER")
      ->required();
  AddMarkBad(app, invocation);
}

}  // namespace holdfast::cli
