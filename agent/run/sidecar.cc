#include "agent/run/sidecar.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/monitor/engine_pause.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/process.h"
#include "agent/recovery/history.h"
#include "agent/recovery/incident_json.h"
#include "agent/recovery/policy.h"
#include "agent/recovery/trouble.h"
#include "agent/run/monitor_told.h"
#include "agent/run/silence_watch.h"
#include "agent/run/small_files.h"
#include "io/unique_fd.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

recovery::Settings SettingsFor(const Sidecar::Options& options) {
  recovery::Settings settings = options.settings;
  settings.mode =
      options.mode == SidecarMode::kAct ? recovery::Mode::kAct : recovery::Mode::kObserve;
  // When the next attempt begins, where, and with how many ranks is the launcher's to say.
  settings.pause_first = settings.pause_max = absl::ZeroDuration();
  settings.max_restarts = std::numeric_limits<uint32_t>::max();  // those are counted here
  settings.slow = recovery::SlowPolicy::kReport;
  settings.hangs_to_exclude = std::numeric_limits<uint32_t>::max();
  settings.layouts.clear();
  return settings;
}

}  // namespace

// A job, and the attempt of it that is watched: one of which every rank lives.
struct Sidecar::Job {
  Job(const EvidenceWorld& evidence, const std::string& its_name,
      const recovery::Settings& settings)
      : name(its_name),
        collector(evidence, its_name),
        silence(monitor::Thresholds(), settings.hang_timeout) {}

  bool lives() const { return !ranks.empty(); }
  // Nothing more is done about this attempt.
  bool is_settled() const { return killed.has_value() || is_left_alone; }

  const std::string name;
  EvidenceCollector collector;
  SilenceWatch silence;
  EnginePause engine_pause;
  recovery::History history;
  std::optional<recovery::Sight> sight;          // as last told
  std::map<uint32_t, uint64_t> heartbeats_told;  // by rank: their count, with the last step

  std::string attempt_key;
  struct RankProcess {
    uint32_t process_id = 0;
    UniqueFd pidfd;
  };
  std::map<uint32_t, RankProcess> ranks;  // all, or none
  std::optional<uint32_t> killed;         // the rank
  bool is_left_alone = false;
  // Attempts that were watched while the next one began, as long as they live.
  std::set<std::string> former_keys;

  absl::Duration left{};  // when its last attempt was over

  uint32_t kills = 0;
  uint32_t kills_in_a_row = 0;
  std::string last_said;
};

Sidecar::Sidecar(Options options, World world)
    : options_(std::move(options)), world_(std::move(world)), settings_(SettingsFor(options_)) {}

Sidecar::~Sidecar() {
  world_.loop.CancelTimer(timer_);
  for (const auto& [name, job] : jobs_) Leave(*job);
}

void Sidecar::Start() {
  if (options_.mode == SidecarMode::kOff) return;
  timer_ = world_.loop.RunAfter(absl::ZeroDuration(), [this] { Look(); });
}

// ---- Attempts

void Sidecar::Look() {
  timer_ = world_.loop.RunAfter(options_.look_every, [this] { Look(); });
  std::map<std::string, std::map<std::string, Processes>> attempts;  // by job and key
  for (MonitorBoards::Process& process : world_.processes()) {
    const std::string name = NodeAggregator::JobNamed(process.job);
    const std::string key = NodeAggregator::KeyNamed(process.attempt_key);
    if (process.rank == UINT32_MAX || world_.is_run_here(name, key)) continue;
    attempts[name][key].push_back(std::move(process));
  }
  for (const auto& [name, keys] : attempts) {
    for (const auto& [key, processes] : keys) {
      // Whole, and on this node alone.
      const uint32_t world_size = processes.front().world_size;
      if (world_size == 0 || processes.size() != world_size) continue;
      Job* const job = Place(name);
      if (job == nullptr) break;
      const bool is_known =
          (job->lives() && job->attempt_key == key) || job->former_keys.contains(key);
      if (!is_known) Begin(*job, key, processes);
    }
  }
  const absl::Duration now = world_.clock.Elapsed();
  std::erase_if(jobs_, [now](const auto& entry) {
    return !entry.second->lives() && now - entry.second->left >= kForgottenAfter;
  });
  for (const auto& [name, job] : jobs_) {
    const std::map<std::string, Processes>& its = attempts[name];
    std::erase_if(job->former_keys, [&](const std::string& key) { return !its.contains(key); });
    if (job->lives()) LookAt(*job);
  }
}

// Null: there are too many.
Sidecar::Job* Sidecar::Place(const std::string& name) {
  const auto found = jobs_.find(name);
  if (found != jobs_.end()) return found->second.get();
  if (jobs_.size() >= kJobsMax) {
    const auto over = std::find_if(jobs_.begin(), jobs_.end(),
                                   [](const auto& one) { return !one.second->lives(); });
    if (over == jobs_.end()) return nullptr;
    jobs_.erase(over);
  }
  auto job = std::make_unique<Job>(world_.evidence, name, settings_);
  // What an earlier worker has collected is not written over.
  job->history.job = name;
  job->history.incident_count =
      NewestIncident(absl::StrCat(options_.state_directory, "/jobs/", name, "/incidents"));
  return (jobs_[name] = std::move(job)).get();
}

// A run of the policy of which the first start has happened already.
void Sidecar::Begin(Job& job, const std::string& attempt_key, const Processes& processes) {
  std::map<uint32_t, Job::RankProcess> ranks;
  for (const MonitorBoards::Process& process : processes) {
    absl::StatusOr<UniqueFd> pidfd = OpenPidfd(static_cast<pid_t>(process.process_id));
    // One that is gone, or two that say they are the same: looked at again.
    if (!pidfd.ok() || process.rank >= processes.size() || ranks.contains(process.rank)) return;
    ranks[process.rank] = {process.process_id, *std::move(pidfd)};
  }
  if (job.lives()) {
    NoteHealth(job);
    job.former_keys.insert(job.attempt_key);
    Leave(job);
  }
  job.attempt_key = attempt_key;
  job.ranks = std::move(ranks);
  job.killed.reset();
  job.is_left_alone = false;
  job.sight.reset();
  job.heartbeats_told.clear();
  job.silence.BeginLaunch();
  job.engine_pause = EnginePause();
  recovery::RunBegun begun;
  begun.job = job.name;
  begun.world_size = static_cast<uint32_t>(job.ranks.size());
  for (const auto& [rank, process] : job.ranks) begun.gpus.push_back({"", rank, ""});
  Push(job, std::move(begun));
  for (const auto& [rank, process] : job.ranks) {
    Push(job, recovery::RankStarted{job.history.launch, Rank{rank}});
    world_.loop.Watch(process.pidfd.get(), EventLoop::FdEvents::kReadable,
                      [this, &job] { Ended(job); });
  }
  Say(job, absl::StrFormat("attempt %s of %d ranks is watched", attempt_key, job.ranks.size()));
}

// How far the ranks are, and whether one is silent.
void Sidecar::LookAt(Job& job) {
  if (job.is_settled()) return;
  const absl::Duration now = world_.clock.Elapsed();
  const recovery::Launch launch = job.history.launch;
  const std::vector<Engine::RankProgress> ranks = world_.progress(job.name, job.attempt_key);
  for (const Engine::RankProgress& rank : ranks) {
    // A heartbeat may stand at a step's beginning: with the second one a step is done. Told once:
    // it is a sign of life.
    uint64_t& told = job.heartbeats_told[Value(rank.rank)];
    if (rank.heartbeat_count < 2 || rank.heartbeat_count == told) continue;
    told = rank.heartbeat_count;
    Push(job, recovery::StepDone{launch, rank.rank, rank.step});
  }
  const bool works = job.engine_pause.Holds(world_.activity(job.name, job.attempt_key), now);
  for (const SilenceWatch::Said& said :
       job.silence.Look(now, OpenRanks(ranks),
                        works ? SilenceWatch::Engine::kWorks : SilenceWatch::Engine::kIdle,
                        MonitorOf(job.sight))) {
    Say(job, SentenceOf(said));
    Push(job, ToldOf(said, launch));
  }
  Push(job, recovery::Tick{});
}

// With the first end the attempt is over for us: what comes of it the launcher decides. It may
// start the next one, under another key, before the last of this one has gone.
void Sidecar::Ended(Job& job) {
  NoteHealth(job);
  const recovery::Launch launch = job.history.launch;
  // The policy remembers what it has restarted for once it has started again.
  const auto size = static_cast<uint32_t>(job.killed.has_value() ? job.ranks.size() : 0);
  Leave(job);
  for (uint32_t rank = 0; rank < size; ++rank) {
    Push(job, recovery::RankExited{launch, Rank{rank}, {monitor::ExitKind::kKilled, SIGKILL}});
  }
  if (size > 0 && !job.history.past.empty()) WriteIncident(job, job.history.past.back());
}

// An attempt that was not killed, and lived well to its end, ends a row of kills.
void Sidecar::NoteHealth(Job& job) const {
  if (!job.killed.has_value() &&
      recovery::IsHealthyFor(job.history, settings_.healthy_after, world_.clock.Elapsed())) {
    job.kills_in_a_row = 0;
  }
}

void Sidecar::Leave(Job& job) {
  for (const auto& [rank, process] : job.ranks) world_.loop.Unwatch(process.pidfd.get());
  if (job.lives()) job.left = world_.clock.Elapsed();
  job.ranks.clear();
}

// ---- Events and decisions

void Sidecar::Push(Job& job, decltype(recovery::Event::what) what) {
  const recovery::Event event{world_.clock.Elapsed(), world_.clock.WallTime(), std::move(what)};
  for (const recovery::Action& action : recovery::Decide(settings_, event, job.history)) {
    if (const auto* collect = std::get_if<recovery::CollectEvidence>(&action)) {
      CarryOut(job, *collect);
    } else if (std::holds_alternative<recovery::StopRanks>(action)) {
      Stop(job);
    } else if (const auto* notice = std::get_if<recovery::Notice>(&action)) {
      Say(job, notice->text);
    }
    // Starts and ends are the launcher's, and so is which GPU is used.
  }
}

void Sidecar::TakeFinding(const monitor::FindingRecord& record, monitor::FindingChange change) {
  const auto found = jobs_.find(record.job);
  if (found == jobs_.end()) return;
  Job& job = *found->second;
  if (!job.lives() || job.is_settled() || record.attempt_key != job.attempt_key) return;
  if (change == monitor::FindingChange::kWithdrawn || change == monitor::FindingChange::kEnded) {
    return Push(job, recovery::FindingWithdrawn{record.finding.id});
  }
  // What has ended the launcher has seen, too.
  if (record.finding.fault == monitor::FaultClass::kDead) return;
  Push(job, ToldOf(record, job.history.launch, world_.clock.Elapsed()));
}

void Sidecar::TakeSight(const std::string& name, const std::string& attempt_key,
                        const monitor::Sight& sight) {
  const auto found = jobs_.find(name);
  if (found == jobs_.end()) return;
  Job& job = *found->second;
  const recovery::Sight seen = SightOf(sight);
  if (!job.lives() || job.is_settled() || attempt_key != job.attempt_key || job.sight == seen) {
    return;
  }
  job.sight = seen;
  Push(job, recovery::SightChanged{seen});
}

void Sidecar::CarryOut(Job& job, const recovery::CollectEvidence& action) {
  Evidence evidence;
  evidence.directory = IncidentDirectory(job, action.incident);
  evidence.summary = absl::StrFormat(
      "Incident %d of job %s, %s.\n%s\nAttempt %s, which another launcher has started.\n",
      action.incident, job.name,
      absl::FormatTime(absl::RFC3339_sec, world_.clock.WallTime(), absl::UTCTimeZone()), action.why,
      job.attempt_key);
  for (const Rank suspect : action.suspects) {
    absl::StrAppend(&evidence.summary, "Suspect: rank ", Value(suspect), ".\n");
  }
  for (const auto& [rank, process] : job.ranks) {
    evidence.ranks.push_back({rank, "", static_cast<pid_t>(process.process_id)});
    absl::StrAppendFormat(&evidence.summary, "Rank %d: process %d.\n", rank, process.process_id);
  }
  job.collector.Collect(std::move(evidence), job.attempt_key,
                        [this, &job, incident = action.incident](absl::Status collected) {
                          if (!collected.ok()) {
                            LogWarning(absl::StrFormat("sidecar: job %s: evidence: %s", job.name,
                                                       collected.ToString()));
                          }
                          Push(job, recovery::EvidenceCollected{incident});
                        });
  if (job.history.incident.has_value()) WriteIncident(job, *job.history.incident);
}

std::string Sidecar::IncidentDirectory(const Job& job, uint32_t number) const {
  return absl::StrCat(options_.state_directory, "/jobs/", job.name, "/incidents/", number);
}

void Sidecar::WriteIncident(const Job& job, const recovery::Incident& incident) const {
  const std::string directory = IncidentDirectory(job, incident.number);
  if (access(directory.c_str(), F_OK) != 0) return;
  const std::string text = recovery::IncidentJson(incident).dump(
      1, ' ', false, nlohmann::json::error_handler_t::replace);
  const absl::Status written =
      ReplaceFile(absl::StrCat(directory, "/", kIncidentFile), text + "\n");
  if (!written.ok()) {
    LogWarning(absl::StrFormat("sidecar: job %s: %s", job.name, written.ToString()));
  }
}

// ---- What is done

// The policy wants the ranks stopped: once an attempt.
void Sidecar::Stop(Job& job) {
  if (job.is_settled() || !job.lives() || !job.history.incident.has_value()) return;
  const recovery::Incident& incident = *job.history.incident;
  const bool was_healthy = recovery::IsHealthyFor(job.history, settings_.healthy_after,
                                                  incident.onset.value_or(job.history.now));
  if (was_healthy) job.kills_in_a_row = 0;
  // Else it would end the job.
  if (!incident.action.starts_with("restart")) {
    job.is_left_alone = true;
    Say(job, absl::StrFormat("%s: a restart cannot help, so nothing is done", incident.what));
  } else if (job.kills_in_a_row >= options_.settings.max_restarts) {
    job.is_left_alone = true;
    Say(job, absl::StrFormat("%s: %d attempts in a row had a rank killed, none of them was "
                             "healthy; nothing is done any more",
                             incident.what, job.kills_in_a_row));
  } else {
    Kill(job, incident);
  }
  WriteIncident(job, incident);
}

// One of the ranks, the likeliest suspect. It may be stopped or stuck so that nothing but KILL ends
// it; the launcher ends the others.
void Sidecar::Kill(Job& job, const recovery::Incident& incident) {
  auto victim = job.ranks.begin();
  if (!incident.suspects.empty()) {
    const auto suspect = job.ranks.find(Value(incident.suspects.front().rank));
    if (suspect != job.ranks.end()) victim = suspect;
  }
  const auto& [rank, process] = *victim;
  job.killed = rank;
  ++job.kills;
  ++job.kills_in_a_row;
  Say(job, absl::StrFormat("%s: rank %d (process %d) is killed, so that its launcher restarts the "
                           "job; this costs one of its restarts. %s",
                           incident.what, rank, process.process_id, incident.sentence));
  // ESRCH: it has died meanwhile, which is as good.
  if (syscall(SYS_pidfd_send_signal, process.pidfd.get(), SIGKILL, nullptr, 0) != 0 &&
      errno != ESRCH) {
    const int error = errno;
    Say(job, absl::StrFormat("rank %d (process %d) cannot be killed: %s", rank, process.process_id,
                             strerror(error)));
  }
}

// ---- What is shown

void Sidecar::Say(Job& job, const std::string& text) {
  job.last_said = text;
  LogInfo(absl::StrFormat("sidecar: job %s: %s", job.name, text));
}

Sidecar::Word Sidecar::WordOf(const std::string& name) const {
  const auto found = jobs_.find(name);
  if (found == jobs_.end() || !found->second->lives()) return {};
  const Job& job = *found->second;
  Word word;
  if (job.history.incident.has_value()) word.trouble = job.history.incident->sentence;
  word.is_handled =
      options_.mode == SidecarMode::kAct && !word.trouble.empty() && !job.is_left_alone;
  if (job.killed.has_value()) {
    word.next =
        absl::StrFormat("Rank %d was killed, so that its launcher restarts it", *job.killed);
  } else if (job.is_left_alone) {
    word.next = "The sidecar leaves it alone";
  } else if (options_.mode == SidecarMode::kObserve) {
    word.next = "Its own launcher restarts it; sidecar = observe";
  } else if (word.trouble.empty()) {
    word.next = "Its own launcher restarts it, after a hang because a rank is killed";
  } else {
    word.next = "A rank will be killed, so that its launcher restarts it";
  }
  return word;
}

std::string Sidecar::StatusJson() const {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const auto& [name, job] : jobs_) {
    std::string state(recovery::Name(job->history.state));
    if (!job->lives()) state = "not running";
    if (job->lives() && job->killed.has_value()) state = "killed";
    if (job->lives() && job->is_left_alone) state = "left alone";
    all.push_back({{"job", name},
                   {"attempt_key", job->lives() ? job->attempt_key : ""},
                   {"ranks", job->ranks.size()},
                   {"state", state},
                   {"incidents", job->history.incident_count},
                   {"kills", job->kills},
                   {"kills_in_a_row", job->kills_in_a_row},
                   {"said", job->last_said}});
  }
  return all.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace holdfast
