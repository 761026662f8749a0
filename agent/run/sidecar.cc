#include "agent/run/sidecar.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <set>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/log.h"
#include "agent/monitor/engine_pause.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/process.h"
#include "agent/recovery/history.h"
#include "agent/recovery/incident_json.h"
#include "agent/recovery/policy.h"
#include "agent/recovery/trouble.h"
#include "agent/recovery/why.h"
#include "agent/run/monitor_told.h"
#include "agent/run/process_start.h"
#include "agent/run/progress_watch.h"
#include "agent/run/silence_watch.h"
#include "agent/run/small_files.h"
#include "agent/run/state_files.h"
#include "io/unique_fd.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

// What /proc rounds the start of a process down to.
constexpr absl::Duration kStartTick = absl::Milliseconds(10);
// An attempt that has come to no new step by then is looked at as seldom as any other.
constexpr absl::Duration kFollowedFor = absl::Minutes(10);

recovery::Settings SettingsFor(const Sidecar::Options& options) {
  recovery::Settings settings = options.settings;
  settings.mode =
      options.mode == SidecarMode::kAct ? recovery::Mode::kAct : recovery::Mode::kObserve;
  settings.launcher = recovery::Launcher::kOther;
  settings.max_restarts = std::numeric_limits<uint32_t>::max();  // those are counted here
  settings.slow = recovery::SlowPolicy::kReport;
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
  // The one that a rank was killed of is followed until the next has come to a new step.
  bool is_followed(absl::Duration now) const {
    return !history.past.empty() && history.past.back().outcome == recovery::Outcome::kOpen &&
           (lives() ? now - begun < kFollowedFor : now - left < kForgottenAfter);
  }
  // Of what happened before, what outlives a run.
  void Take(const recovery::History& before) {
    history = recovery::Outliving(before, name);
    written = recovery::IncidentsOf(history, Attempt{});
  }
  // Nothing more is done about this attempt.
  bool is_settled() const { return killed.has_value() || is_left_alone; }

  const std::string name;
  EvidenceCollector collector;
  SilenceWatch silence;
  EnginePause engine_pause;
  ProgressWatch progress;
  recovery::History history;
  std::vector<recovery::Incident> written;  // of the history, as it is on disk
  std::optional<recovery::Sight> sight;     // as last told

  std::string attempt_key;
  struct RankProcess {
    uint32_t process_id = 0;
    UniqueFd pidfd;
  };
  std::map<uint32_t, RankProcess> ranks;  // all, or none
  std::optional<uint32_t> killed;         // the rank
  bool is_left_alone = false;
  // Of the attempt that is over because one of them was killed: those that still live, by rank.
  std::map<uint32_t, UniqueFd> ending;
  std::optional<absl::Duration> killed_at;
  // Attempts that were watched while the next one began, as long as they live.
  std::set<std::string> former_keys;

  absl::Duration begun{};  // when the attempt that is watched was first seen
  absl::Duration left{};   // when its last attempt was over

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
  std::map<std::string, std::map<std::string, Processes>> attempts;  // by job and key
  for (Process& process : world_.processes()) {
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
  for (auto at = jobs_.begin(); at != jobs_.end();) {
    const bool is_old = !at->second->lives() && now - at->second->left >= kForgottenAfter;
    at = is_old ? Forget(at) : std::next(at);
  }
  for (const auto& [name, job] : jobs_) {
    const std::map<std::string, Processes>& its = attempts[name];
    std::erase_if(job->former_keys, [&](const std::string& key) { return !its.contains(key); });
    if (job->lives()) LookAt(*job);
  }
  timer_ = world_.loop.RunAfter(LookEvery(), [this] { Look(); });
}

absl::Duration Sidecar::LookEvery() const {
  const absl::Duration now = world_.clock.Elapsed();
  const bool follows = std::any_of(jobs_.begin(), jobs_.end(),
                                   [now](const auto& one) { return one.second->is_followed(now); });
  return follows ? std::min(options_.look_every, kLookStarting) : options_.look_every;
}

// One of which no attempt lives. Returns the next.
Sidecar::Jobs::iterator Sidecar::Forget(Jobs::iterator job) {
  Leave(*job->second);
  Close(*job->second);
  return jobs_.erase(job);
}

// Null: there are too many.
Sidecar::Job* Sidecar::Place(const std::string& name) {
  const auto found = jobs_.find(name);
  if (found != jobs_.end()) return found->second.get();
  if (jobs_.size() >= kJobsMax) {
    const auto over = std::find_if(jobs_.begin(), jobs_.end(),
                                   [](const auto& one) { return !one.second->lives(); });
    if (over == jobs_.end()) return nullptr;
    Forget(over);
  }
  auto job = std::make_unique<Job>(world_.evidence, name, settings_);
  absl::StatusOr<recovery::History> before = ReadHistory(JobDirectory(*job));
  if (!before.ok()) {
    LogWarning(absl::StrFormat("sidecar: job %s: what happened before is lost: %s", name,
                               before.status().ToString()));
    before = recovery::History();
  }
  job->Take(*before);
  // Evidence is not written over, whatever became of the history.
  job->history.incident_count = std::max(
      job->history.incident_count, NewestIncident(absl::StrCat(JobDirectory(*job), "/incidents")));
  return (jobs_[name] = std::move(job)).get();
}

void Sidecar::Begin(Job& job, const std::string& attempt_key, const Processes& processes) {
  std::map<uint32_t, Job::RankProcess> ranks;
  std::optional<absl::Duration> started;  // the first of them, by the launcher
  bool all_started = true;
  for (const Process& process : processes) {
    UniqueFd pidfd = process.pidfd < 0 ? UniqueFd() : Duplicate(process.pidfd);
    // One that is gone, or two that say they are the same: looked at again.
    if (!pidfd || IsDead(pidfd.get()) || process.rank >= processes.size() ||
        ranks.contains(process.rank)) {
      return;
    }
    const std::optional<absl::Duration> its = StartOf(pidfd.get());
    all_started = all_started && its.has_value();
    if (its.has_value()) started = std::min(started.value_or(*its), *its);
    ranks[process.rank] = {process.process_id, std::move(pidfd)};
  }
  if (job.lives()) {
    job.former_keys.insert(job.attempt_key);
    Ended(job);
  }
  while (!job.ending.empty()) Gone(job, job.ending.begin()->first);
  job.attempt_key = attempt_key;
  job.begun = world_.clock.Elapsed();
  job.ranks = std::move(ranks);
  job.killed.reset();
  job.is_left_alone = false;
  job.sight.reset();
  job.silence.BeginLaunch();
  job.engine_pause = EnginePause();
  // Another run of the job may have been here since.
  const absl::StatusOr<recovery::History> there = ReadHistory(JobDirectory(job));
  const bool overtaken = there.ok() && there->incident_count > job.history.incident_count;
  if (overtaken) job.Take(*there);
  const bool follows = job.history.phase == recovery::Phase::kAlive && !job.history.past.empty() &&
                       job.history.ranks.size() == job.ranks.size();
  if (follows) {
    // The policy took the last one's end for the start. Who was started before the kill is one that
    // its launcher had ready: when it was told to begin is not known.
    recovery::Incident& last = job.history.past.back();
    const bool is_known = all_started && *started + kStartTick >= job.killed_at.value_or(*started);
    if (is_known) {
      last.starting = std::max(*started + absl::Microseconds(job.history.clock_offset_us),
                               last.stopped.value_or(absl::ZeroDuration()));
    } else {
      last.starting.reset();
    }
  } else {
    BeginRun(job);
  }
  job.killed_at.reset();
  const recovery::Launch launch = job.history.launch;
  job.progress.BeginLaunch(launch);
  for (const auto& [rank, process] : job.ranks) {
    Push(job, recovery::RankStarted{launch, Rank{rank}});
    world_.loop.Watch(process.pidfd.get(), EventLoop::FdEvents::kReadable,
                      [this, &job] { Ended(job); });
  }
  Say(job, absl::StrFormat("attempt %s of %d ranks is watched", attempt_key, job.ranks.size()));
}

// Of the policy: its first start has happened already.
void Sidecar::BeginRun(Job& job) {
  recovery::RunBegun begun;
  begun.job = job.name;
  begun.world_size = static_cast<uint32_t>(job.ranks.size());
  for (const auto& [rank, process] : job.ranks) begun.gpus.push_back({"", rank, ""});
  for (const recovery::CheckpointRecord& record : job.history.checkpoints) {
    begun.checkpoints.push_back(record.facts);
  }
  Push(job, std::move(begun));
}

// How far the ranks are, and whether one is silent.
void Sidecar::LookAt(Job& job) {
  if (job.is_settled()) return;
  const absl::Duration now = world_.clock.Elapsed();
  const recovery::Launch launch = job.history.launch;
  const std::vector<Engine::RankProgress> ranks = world_.progress(job.name, job.attempt_key);
  for (const Engine::RankProgress& rank : ranks) {
    for (ProgressWatch::Told& told : job.progress.Look(rank, now)) Push(job, std::move(told));
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
  std::map<uint32_t, Job::RankProcess> ranks = std::exchange(job.ranks, {});
  job.left = world_.clock.Elapsed();
  for (const auto& [rank, process] : ranks) world_.loop.Unwatch(process.pidfd.get());
  if (!job.killed.has_value()) return Close(job);
  // The policy comes to its next launch when all have ended.
  for (auto& [rank, process] : ranks) {
    const int pidfd = (job.ending[rank] = std::move(process.pidfd)).get();
    world_.loop.Watch(pidfd, EventLoop::FdEvents::kReadable,
                      [this, &job, ended = rank] { Gone(job, ended); });
  }
}

// No attempt follows, as far as we know. Whatever was wrong has ended with the last one.
void Sidecar::Close(Job& job) {
  job.history = recovery::Outliving(job.history, job.name);
  for (recovery::Incident& incident : job.history.past) {
    if (incident.outcome == recovery::Outcome::kOpen) incident.outcome = recovery::Outcome::kEnded;
  }
  Remember(job);
}

// One of an attempt that is ending has, or is taken for ended because the next has begun.
void Sidecar::Gone(Job& job, uint32_t rank) {
  const auto found = job.ending.find(rank);
  world_.loop.Unwatch(found->second.get());
  job.ending.erase(found);
  Push(job,
       recovery::RankExited{job.history.launch, Rank{rank}, {monitor::ExitKind::kKilled, SIGKILL}});
}

// An attempt that was not killed, and lived well to its end, ends a row of kills.
void Sidecar::NoteHealth(Job& job) const {
  if (!job.killed.has_value() &&
      recovery::IsHealthyFor(job.history, settings_.healthy_after, world_.clock.Elapsed())) {
    job.kills_in_a_row = 0;
  }
}

void Sidecar::Leave(const Job& job) {
  for (const auto& [rank, process] : job.ranks) world_.loop.Unwatch(process.pidfd.get());
  for (const auto& [rank, pidfd] : job.ending) world_.loop.Unwatch(pidfd.get());
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
  Remember(job);
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
    // By the number that it has now: 0 if it is gone.
    evidence.ranks.push_back({rank, "", std::max(PidOf(process.pidfd.get()), 0)});
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
}

std::string Sidecar::JobDirectory(const Job& job) const {
  return absl::StrCat(options_.state_directory, "/jobs/", job.name);
}

std::string Sidecar::IncidentDirectory(const Job& job, uint32_t number) const {
  return absl::StrCat(JobDirectory(job), "/incidents/", number);
}

// What has changed of incidents, on disk: beside the evidence, where some was collected, and for
// `holdfast why` once the agent has gone.
void Sidecar::Remember(Job& job) {
  std::vector<recovery::Incident> incidents = recovery::IncidentsOf(job.history, Attempt{});
  if (incidents == job.written) return;
  absl::Status written = MakeDirectories(JobDirectory(job));
  for (const recovery::Incident& incident : incidents) {
    const std::string directory = IncidentDirectory(job, incident.number);
    const bool is_known =
        std::find(job.written.begin(), job.written.end(), incident) != job.written.end();
    if (is_known || access(directory.c_str(), F_OK) != 0) continue;
    const std::string text = recovery::IncidentJson(incident).dump(
        1, ' ', false, nlohmann::json::error_handler_t::replace);
    written.Update(ReplaceFile(absl::StrCat(directory, "/", kIncidentFile), text + "\n"));
  }
  job.written = std::move(incidents);
  if (!IsOurs(job)) return;
  written.Update(ReplaceFile(HistoryPath(JobDirectory(job)),
                             recovery::Encode(recovery::Outliving(job.history, job.name))));
  if (!written.ok()) {
    LogWarning(absl::StrFormat("sidecar: job %s: %s", job.name, written.ToString()));
  }
}

// Whether nobody has gone on with the history since: a `holdfast run` of that name, of this agent
// or of another one with the same state directory, has its own in the same place.
bool Sidecar::IsOurs(const Job& job) const {
  const absl::StatusOr<recovery::History> there = ReadHistory(JobDirectory(job));
  if (!there.ok()) return true;
  const bool runs =
      there->phase != recovery::Phase::kIdle && there->phase != recovery::Phase::kOver;
  return !runs && there->incident_count <= job.history.incident_count;
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
  job.killed_at = world_.clock.Elapsed();
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

absl::StatusOr<std::string> Sidecar::WhyJson(const std::string& name, Attempt of) const {
  auto found = jobs_.find(name);
  if (name.empty() && jobs_.size() == 1) found = jobs_.begin();
  if (found == jobs_.end()) {
    std::vector<std::string> names;
    for (const auto& [one, job] : jobs_) names.push_back(one);
    if (name.empty() && !names.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("several jobs are watched: the job is one of ", absl::StrJoin(names, ", ")));
    }
    return absl::NotFoundError(absl::StrFormat("job %s is not watched", name));
  }
  const Job& job = *found->second;
  nlohmann::ordered_json state = {{"schema_version", 1},
                                  {"job", job.name},
                                  {"supervised", false},
                                  {"state", StateOf(job)},
                                  {"attempt", Value(job.history.attempt)},
                                  {"ranks", job.ranks.size()},
                                  {"lines", nlohmann::ordered_json::array()}};
  if (!job.last_said.empty()) state["lines"].push_back({{"number", 1}, {"text", job.last_said}});
  state.update(recovery::WhyJson(job.history, of));
  return state.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string Sidecar::StateOf(const Job& job) {
  if (!job.lives()) return "not running";
  if (job.killed.has_value()) return "killed";
  if (job.is_left_alone) return "left alone";
  return std::string(recovery::Name(job.history.state));
}

std::string Sidecar::StatusJson() const {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const auto& [name, job] : jobs_) {
    all.push_back({{"job", name},
                   {"attempt_key", job->lives() ? job->attempt_key : ""},
                   {"ranks", job->ranks.size()},
                   {"state", StateOf(*job)},
                   {"incidents", job->history.incident_count},
                   {"kills", job->kills},
                   {"kills_in_a_row", job->kills_in_a_row},
                   {"said", job->last_said}});
  }
  return all.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace holdfast
