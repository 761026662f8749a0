#include "agent/run/run_service.h"

#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/log.h"
#include "agent/recovery/why.h"
#include "agent/run/monitor_told.h"
#include "agent/run/small_files.h"
#include "agent/run/state_files.h"
#include "base/status_macros.h"
#include "format/checkpoint_names.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

// Of a slip nothing would come, and nobody would say so.
absl::Status CheckGpu(const JobSupervisor& supervisor, const recovery::Gpu& gpu,
                      const std::string& lemons_path) {
  const recovery::History& history = supervisor.view().history;
  std::set<std::string> nodes = {supervisor.node()};
  for (const recovery::Gpu& its : history.gpus) {
    if (recovery::IsSame(its, gpu)) return absl::OkStatus();
    nodes.insert(its.node);
  }
  if (!nodes.contains(gpu.node)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("readmit: expected a node of the job (%s), found %s",
                        absl::StrJoin(nodes, ", "), gpu.node));
  }
  // Another job may have had it. What cannot be read may list it.
  const absl::StatusOr<recovery::LemonList> lemons = ReadLemons(lemons_path);
  if (!lemons.ok() || lemons->Find(gpu) != nullptr) return absl::OkStatus();
  constexpr size_t kNamedMax = 16;
  std::vector<std::string> names;
  for (const recovery::Gpu& its : history.gpus) {
    if (names.size() < kNamedMax) names.push_back(recovery::Name(its, recovery::HomeOf(history)));
  }
  if (names.size() < history.gpus.size()) names.push_back("...");
  return absl::InvalidArgumentError(absl::StrFormat(
      "readmit: expected one of the job's GPUs (%s), or one that was excluded, found %s",
      absl::StrJoin(names, ", "), recovery::Name(gpu, recovery::HomeOf(history))));
}

absl::Status CheckQuestion(const JobSupervisor& supervisor, const std::string& id) {
  const std::optional<recovery::Proposal>& asked = supervisor.view().history.proposal;
  if (asked.has_value() && asked->id == id) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "expected the ID of what is asked, %s, found '%s'",
      asked.has_value() ? absl::StrFormat("%s (%s)", asked->id, asked->question) : "now nothing",
      id));
}

}  // namespace

RunService::RunService(Options options, JobSupervisor::World world)
    : options_(std::move(options)), world_(std::move(world)) {}

RunService::~RunService() = default;

JobSupervisor::Options RunService::OptionsOf(const std::string& job) const {
  JobSupervisor::Options options;
  options.state_directory = absl::StrCat(options_.state_directory, "/jobs/", job);
  options.runtime_directory = absl::StrCat(options_.runtime_directory, "/runs/", job);
  options.lemons_path = absl::StrCat(options_.state_directory, "/lemons.json");
  options.socket = options_.socket;
  options.shim_program = options_.shim_program;
  return options;
}

void RunService::Recover() {
  std::error_code error;
  // The runtime directory is this agent's alone; several agents may share the state directory.
  for (const auto& entry : std::filesystem::directory_iterator(
           absl::StrCat(options_.runtime_directory, "/runs"), error)) {
    const std::string job = entry.path().filename().string();
    absl::StatusOr<std::unique_ptr<JobSupervisor>> supervisor =
        JobSupervisor::Recover(OptionsOf(job), world_, [this, job] { Changed(job); });
    if (supervisor.ok()) {
      jobs_[job].supervisor = *std::move(supervisor);
    } else if (!absl::IsNotFound(supervisor.status())) {
      LogError(absl::StrFormat("job %s: its run cannot be gone on with: %s", job,
                               supervisor.status().ToString()));
    }
  }
}

absl::StatusOr<RunService::Begun> RunService::Begin(std::string_view bytes, Owner owner,
                                                    std::function<void()> wake) {
  ASSIGN_OR_RETURN(RunSpec spec, DecodeRunSpec(bytes));
  spec.owner_pid = owner.process_id;
  spec.boot_id = BootId();
  const std::string name = spec.job;
  const auto known = jobs_.find(name);
  const bool is_known = known != jobs_.end() && known->second.supervisor != nullptr;
  const bool is_same = is_known && known->second.supervisor->view().spec.run_id == spec.run_id;
  if (is_known && !is_same && !known->second.supervisor->is_over()) {
    if (!known->second.supervisor->has_owner()) {
      known->second.supervisor->OwnerDied();
      return absl::UnavailableError(absl::StrFormat(
          "an earlier run of job %s, whose command has died, is being stopped", name));
    }
    return absl::AlreadyExistsError(
        absl::StrFormat("job %s runs already under this agent (run %s); `holdfast stop` ends it",
                        name, known->second.supervisor->view().spec.run_id));
  }
  if (!is_known && jobs_.size() >= kJobsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("this agent has run %d jobs already", kJobsMax));
  }
  if (!is_same) {
    JobSupervisor::Options options = OptionsOf(name);
    if (spec.log_directory.empty()) {
      spec.log_directory = absl::StrCat(options.state_directory, "/logs/", spec.run_id);
    }
    RETURN_IF_ERROR(MakeDirectories(options.state_directory));
    RETURN_IF_ERROR(MakeDirectories(options.runtime_directory));
    ASSIGN_OR_RETURN(std::unique_ptr<JobSupervisor> supervisor,
                     JobSupervisor::Begin(std::move(options), world_, std::move(spec),
                                          [this, name] { Changed(name); }));
    jobs_[name] = Job{std::move(supervisor), {}, false};
  }
  Job& job = jobs_.at(name);
  job.supervisor->SetOwner(std::move(owner.pidfd));
  auto stream = std::make_shared<MonitorStream>();
  stream->wake_ = std::move(wake);
  if (job.streams.size() >= kFollowersMax) job.streams.erase(job.streams.begin());
  job.streams.push_back(stream);
  return Begun{StateJson(*job.supervisor), std::move(stream)};
}

absl::StatusOr<RunService::Job*> RunService::Find(const std::string& job) {
  std::vector<std::string> names;
  for (auto& [name, entry] : jobs_) {
    if (name == job) return &entry;
    names.push_back(name);
  }
  if (job.empty() && jobs_.size() == 1) return &jobs_.begin()->second;
  if (job.empty() && !names.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("several runs are under way: the job is one of ", absl::StrJoin(names, ", ")));
  }
  return absl::NotFoundError(absl::StrFormat(
      "%s; this agent runs %s", job.empty() ? "no job was named" : absl::StrCat("no run of ", job),
      names.empty() ? "none" : absl::StrJoin(names, ", ")));
}

absl::StatusOr<std::string> RunService::Command(abi::RunCommandKind kind, const std::string& job,
                                                uint64_t number, const std::string& text) {
  ASSIGN_OR_RETURN(Job * found, Find(job));
  JobSupervisor& supervisor = *found->supervisor;
  using Kind = abi::RunCommandKind;
  switch (kind) {
    case Kind::kView:
      return StateJson(supervisor,
                       Attempt{static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX))});
    case Kind::kSignal:
      if (number != SIGINT && number != SIGTERM && number != SIGUSR1) {
        return absl::InvalidArgumentError(absl::StrFormat("signal: expected %d, %d or %d, found %d",
                                                          SIGINT, SIGTERM, SIGUSR1, number));
      }
      supervisor.Take(recovery::SignalCame{number == SIGINT ? recovery::EndSignal::kInterrupt
                                           : number == SIGTERM
                                               ? recovery::EndSignal::kTerminate
                                               : recovery::EndSignal::kAllocationEnds});
      break;
    case Kind::kStop:
      supervisor.Take(recovery::Stop{});
      break;
    case Kind::kSave:
      supervisor.Take(recovery::Save{});
      break;
    case Kind::kApprove:
      RETURN_IF_ERROR(CheckQuestion(supervisor, text));
      supervisor.Take(recovery::Approve{text});
      break;
    case Kind::kVeto:
      RETURN_IF_ERROR(CheckQuestion(supervisor, text));
      supervisor.Take(recovery::Veto{text});
      break;
    case Kind::kHold:
      if (number > static_cast<uint64_t>(absl::ToInt64Seconds(recovery::kHoldMax))) {
        return absl::InvalidArgumentError(absl::StrFormat("hold: expected at most %s, found %d s",
                                                          absl::FormatDuration(recovery::kHoldMax),
                                                          number));
      }
      supervisor.Take(recovery::Hold{absl::Seconds(number), text});
      break;
    case Kind::kReadmit: {
      recovery::Readmit readmit;
      readmit.gpu.node = text.empty() ? supervisor.node() : text;
      readmit.gpu.index = static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX));
      RETURN_IF_ERROR(CheckGpu(supervisor, readmit.gpu,
                               absl::StrCat(options_.state_directory, "/lemons.json")));
      supervisor.Take(std::move(readmit));
      break;
    }
    default:
      return absl::InvalidArgumentError(absl::StrFormat(
          "run command: expected a kind from 1 to 8, found %d", static_cast<uint32_t>(kind)));
  }
  return StateJson(supervisor);
}

void RunService::TakeFinding(const monitor::FindingRecord& record, monitor::FindingChange change) {
  const auto found = jobs_.find(record.job);
  if (found == jobs_.end() || found->second.supervisor->is_over()) return;
  JobSupervisor& supervisor = *found->second.supervisor;
  if (change == monitor::FindingChange::kWithdrawn || change == monitor::FindingChange::kEnded) {
    supervisor.Take(recovery::FindingWithdrawn{record.finding.id});
    return;
  }
  const std::optional<recovery::Launch> launch = supervisor.LaunchOf(record.attempt_key);
  if (!launch.has_value()) return;
  supervisor.Take(ToldOf(record, *launch, world_.clock.Elapsed()));
}

void RunService::TakeSight(const std::string& job, const std::string& attempt_key,
                           const monitor::Sight& sight) {
  const auto found = jobs_.find(job);
  if (found == jobs_.end() || found->second.supervisor->is_over() ||
      !found->second.supervisor->LaunchOf(attempt_key).has_value()) {
    return;
  }
  found->second.supervisor->TakeSight(sight);
}

void RunService::TakeXid(const XidSighting& sighting) {
  for (auto& [name, job] : jobs_) {
    if (!job.supervisor->is_over()) job.supervisor->TakeXid(sighting);
  }
}

void RunService::Terminate() {
  for (auto& [name, job] : jobs_) {
    if (!job.supervisor->is_over()) {
      job.supervisor->Take(recovery::SignalCame{recovery::EndSignal::kTerminate});
    }
  }
}

void RunService::Kill() {
  for (auto& [name, job] : jobs_) job.supervisor->Kill();
}

bool RunService::Runs(const std::string& job, const std::string& attempt_key) const {
  return std::any_of(jobs_.begin(), jobs_.end(), [&](const auto& one) {
    const JobSupervisor& supervisor = *one.second.supervisor;
    return !supervisor.is_over() &&
           (one.first == job || supervisor.LaunchOf(attempt_key).has_value());
  });
}

size_t RunService::active_count() const {
  return static_cast<size_t>(std::count_if(jobs_.begin(), jobs_.end(), [](const auto& job) {
    return !job.second.supervisor->is_over();
  }));
}

// Once a turn of the loop, however much has changed in it.
void RunService::Changed(const std::string& name) {
  const auto found = jobs_.find(name);
  if (found == jobs_.end() || std::exchange(found->second.tells, true)) return;
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_), name] {
    if (!alive.expired()) Tell(name);
  });
}

void RunService::Tell(const std::string& name) {
  Job& job = jobs_.at(name);
  job.tells = false;
  // Who has gone holds no stream any more.
  std::erase_if(job.streams, [](const auto& stream) { return stream.use_count() == 1; });
  if (job.streams.empty()) return;
  const std::string state = StateJson(*job.supervisor);
  for (const std::shared_ptr<MonitorStream>& stream : job.streams) {
    // A state is whole: what a slow one has not read yet is of no use any more.
    stream->waiting_.clear();
    stream->waiting_bytes_ = 0;
    stream->Push(state);
    if (stream->wake_) stream->wake_();
  }
}

std::string RunService::StateJson(const JobSupervisor& supervisor, Attempt of) const {
  const JobSupervisor::View view = supervisor.view();
  const recovery::History& history = view.history;
  nlohmann::ordered_json state = {
      {"schema_version", 1},
      {"job", view.spec.job},
      {"run_id", view.spec.run_id},
      {"state", std::string(recovery::Name(history.state))},
      {"launch", Value(history.launch)},
      {"attempt", Value(history.attempt)},
      {"restart_count", history.restart_count},
      {"max_restarts", view.settings.max_restarts},
      {"ranks", history.placement.world_size()},
      {"layout", history.placement.layout},
      {"gpus", nlohmann::ordered_json::array()},
      {"port", view.port},
      {"log_directory", view.spec.log_directory},
      {"over", view.is_over},
      {"exit_code",
       view.is_over ? nlohmann::ordered_json(view.exit_code) : nlohmann::ordered_json()},
      {"lines", nlohmann::ordered_json::array()}};
  state["checkpoints"] = nlohmann::ordered_json::array();
  for (const recovery::CheckpointRecord& record : history.checkpoints) {
    state["checkpoints"].push_back(
        {{"attempt", Value(record.facts.id.attempt)},
         {"step", Value(record.facts.id.step)},
         {"directory", absl::StrCat(options_.root, "/", view.spec.job, "/",
                                    CheckpointDirectoryName(record.facts.id))},
         {"marked_bad", record.facts.marked_bad},
         {"under_anomaly", record.facts.under_anomaly},
         {"crashes", record.crashes}});
  }
  state["timeouts"] = nlohmann::ordered_json::array();
  for (const SilenceWatch::Timeout& timeout : view.timeouts) {
    state["timeouts"].push_back(
        {{"of", timeout.section.empty() ? "heartbeat" : absl::StrCat("section ", timeout.section)},
         {"seconds", absl::ToDoubleSeconds(timeout.timeout)},
         {"learned", timeout.is_learned},
         {"longest_seconds", absl::ToDoubleSeconds(timeout.longest)},
         {"seen", timeout.seen}});
  }
  for (const JobSupervisor::Line& line : view.lines) {
    state["lines"].push_back({{"number", line.number}, {"text", line.text}});
  }
  for (const recovery::Gpu& gpu : history.placement.gpus) {
    state["gpus"].push_back(recovery::Name(gpu, recovery::HomeOf(history)));
  }
  state.update(recovery::WhyJson(history, of));
  return state.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::vector<JobSupervisor::View> RunService::views() const {
  std::vector<JobSupervisor::View> views;
  for (const auto& [name, job] : jobs_) views.push_back(job.supervisor->view());
  return views;
}

}  // namespace holdfast
