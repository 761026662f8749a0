#include "agent/monitor/service.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/monitor/grid.h"
#include "agent/monitor/queries.h"
#include "monitor/finding_record.h"
#include "monitor/recording.h"

namespace holdfast {
namespace {

using monitor::FindingChange;
using monitor::FindingLog;
using monitor::FindingRecord;
using monitor::FindingState;
using nlohmann::ordered_json;

constexpr int kSchema = 1;
constexpr absl::Duration kForgetEvery = absl::Minutes(10);

// Names of nodes and sections are a stranger's text: a line of a log stays one line.
std::string Printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text;
}

bool IsOneOf(const std::string& name, std::initializer_list<const char*> names) {
  const std::string lower = absl::AsciiStrToLower(name);
  return std::find(names.begin(), names.end(), lower) != names.end();
}

bool SameMesh(const std::vector<MeshAxis>& a, const std::vector<MeshAxis>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.name == y.name && x.size == y.size;
  });
}

absl::Status NoSuchJob(const std::string& job, size_t count) {
  return absl::NotFoundError(absl::StrFormat(
      "job %s: expected one that reports, found none of this name among %d", job, count));
}

// Grey is not green: what nobody sees may be broken.
const char* LightOf(bool whole, const std::vector<const FindingRecord*>& open) {
  const bool verdict = std::any_of(open.begin(), open.end(), [](const FindingRecord* record) {
    return record->finding.grade == monitor::Grade::kVerdict;
  });
  if (verdict) return "red";
  if (!open.empty()) return "yellow";
  return whole ? "green" : "grey";
}

}  // namespace

std::vector<monitor::RankRole> RolesFromMesh(const std::vector<MeshAxis>& mesh,
                                             uint32_t world_size) {
  uint64_t ranks = 1;
  bool has_roles = false;
  for (const MeshAxis& axis : mesh) {
    ranks *= axis.size;
    if (ranks > monitor::kWorldSizeMax || ranks == 0) return {};
    has_roles = has_roles ||
                IsOneOf(axis.name, {"pp", "pipeline", "stage", "pipe", "tp", "tensor", "model"});
  }
  if (!has_roles || ranks != world_size) return {};
  std::vector<monitor::RankRole> roles(world_size);
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    uint32_t rest = rank;
    // The last axis varies fastest.
    for (auto axis = mesh.rbegin(); axis != mesh.rend(); ++axis) {
      const uint32_t coordinate = rest % axis->size;
      rest /= axis->size;
      monitor::RankRole& role = roles[rank];
      if (IsOneOf(axis->name, {"pp", "pipeline", "stage", "pipe"})) {
        role.stage = role.stage * axis->size + coordinate;
      } else if (IsOneOf(axis->name, {"tp", "tensor", "model"})) {
        role.tensor_position = role.tensor_position * axis->size + coordinate;
      }
    }
  }
  return roles;
}

std::string GroupFromMesh(const std::vector<MeshAxis>& mesh, const std::vector<int64_t>& members) {
  if (mesh.empty() || members.empty()) return "";
  std::vector<std::set<uint64_t>> coordinates(mesh.size());
  std::set<int64_t> distinct;
  for (const int64_t member : members) {
    if (member < 0 || !distinct.insert(member).second) return "";
    auto rest = static_cast<uint64_t>(member);
    // The last axis varies fastest.
    for (size_t axis = mesh.size(); axis-- > 0;) {
      if (mesh[axis].size == 0) return "";
      coordinates[axis].insert(rest % mesh[axis].size);
      rest /= mesh[axis].size;
    }
    if (rest != 0) return "";  // beyond the mesh
  }
  std::string name;
  uint64_t ranks = 1;
  for (size_t axis = 0; axis < mesh.size(); ++axis) {
    if (coordinates[axis].size() == 1 && mesh[axis].size != 1) continue;
    if (coordinates[axis].size() != mesh[axis].size) return "";
    ranks *= mesh[axis].size;
    if (ranks > members.size()) return "";
    if (mesh[axis].size > 1) absl::StrAppend(&name, name.empty() ? "" : "+", mesh[axis].name);
  }
  return ranks == members.size() ? name : "";
}

std::optional<MonitorStream::Item> MonitorStream::Take() {
  if (waiting_.empty()) return std::nullopt;
  Item item = std::move(waiting_.front());
  waiting_.pop_front();
  waiting_bytes_ -= item.text.size();
  return item;
}

// False if it was lost.
bool MonitorStream::Push(std::string text) {
  if (waiting_.size() >= kWaitingMax || waiting_bytes_ + text.size() > kWaitingBytesMax) {
    ++lost_;
    return false;
  }
  waiting_bytes_ += text.size();
  waiting_.push_back({std::move(text), std::exchange(lost_, 0)});
  wake_();
  return true;
}

struct MonitorService::Job {
  Job(const monitor::Thresholds& thresholds, const std::string& name)
      : analysis(thresholds, name) {}

  struct Task {
    std::function<void()> work;  // on the pool: may touch `analysis` and `last`
    std::function<void()> done;  // on the loop
  };
  // Touched by the pool while `busy`, by the loop otherwise.
  monitor::JobAnalysis analysis;
  monitor::Analysis last;  // of the newest step

  // The loop's.
  std::deque<Task> tasks;
  bool busy = false;
  bool stepping = false;
  std::vector<monitor::NodeReport> pending;
  size_t pending_bytes = 0;
  std::vector<monitor::Testimony> testimonies;
  absl::Duration heard;                   // when something came
  std::optional<absl::Duration> stepped;  // when the newest step was taken
  absl::Duration first_stepped;
  bool ended = false;
  bool gave_up_unwatched = false;
  std::vector<MeshAxis> mesh;
  std::vector<monitor::RankRole> roles;  // as last given to the analysis
};

// The answers of several jobs to one question.
struct MonitorService::Gathering {
  Question question;
  size_t missing = 0;
  std::map<std::string, ordered_json> answers;
  std::function<void(absl::StatusOr<std::string>)> answer;
};

MonitorService::MonitorService(Options options, FileSystem& file_system, EventLoop& loop,
                               WorkPool& pool, const Clock& clock)
    : options_(std::move(options)),
      loop_(loop),
      pool_(pool),
      clock_(clock),
      store_({options_.directory, [this] { return log_.Records(); }, options_.warn}, file_system,
             pool) {
  if (!options_.on_verdict.empty()) {
    VerdictCommand::Options command;
    command.command = options_.on_verdict;
    command.warn = options_.warn;
    command_ = std::make_unique<VerdictCommand>(std::move(command), loop);
  }
}

MonitorService::~MonitorService() {
  if (timer_ != 0) loop_.CancelTimer(timer_);
}

void MonitorService::Start() {
  for (FindingRecord& record : store_.Load()) log_.Restore(std::move(record));
  log_.Forget(clock_.WallTime() - options_.verdicts_keep);
  forgotten_ = clock_.Elapsed();
  next_step_ = NextOnGrid(forgotten_, kStepEvery, absl::ZeroDuration());
  timer_ = loop_.RunAfter(next_step_ - forgotten_, [this] { StepAll(); });
}

FindingLog::When MonitorService::Now(absl::Duration elapsed) const {
  return {elapsed, clock_.WallTime()};
}

void MonitorService::Deliver(monitor::NodeReport report) {
  if (absl::Status checked = monitor::CheckReport(report); !checked.ok()) {
    ++reports_dropped_;
    return;
  }
  auto found = jobs_.find(report.job);
  if (found == jobs_.end()) {
    if (jobs_.size() >= kJobsMax) {
      const std::string silent = SilentestJob();
      if (silent.empty()) {
        ++reports_dropped_;
        if (!std::exchange(jobs_full_, true) && options_.warn) {
          options_.warn(
              absl::StrFormat("monitor: job %s is not watched: %d jobs are, and all of them report",
                              Printable(report.job), kJobsMax));
        }
        return;
      }
      EndJob(jobs_.at(silent), clock_.Elapsed());
      jobs_.erase(silent);
    }
    found = jobs_.emplace(report.job, std::make_shared<Job>(options_.thresholds, report.job)).first;
  }
  Job& job = *found->second;
  job.heard = clock_.Elapsed();
  const size_t bytes = report.summary.size();
  if (job.pending.size() >= kPendingReportsMax || bytes > monitor::kSummaryBytesMax ||
      job.pending_bytes + bytes > kPendingBytesMax) {
    ++reports_dropped_;
    return;
  }
  job.pending_bytes += bytes;
  job.pending.push_back(std::move(report));
}

void MonitorService::Deliver(const std::string& job,
                             std::span<const monitor::Testimony> testimonies) {
  const auto found = jobs_.find(job);
  if (found == jobs_.end()) return;
  constexpr size_t kPerStepMax = monitor::kTestimoniesPerStepMax * monitor::kTestimoniesMax;
  std::vector<monitor::Testimony>& waiting = found->second->testimonies;
  if (waiting.size() + testimonies.size() > kPerStepMax) {
    ++reports_dropped_;
    return;
  }
  waiting.insert(waiting.end(), testimonies.begin(), testimonies.end());
}

// Of those that are silent; empty if none is.
std::string MonitorService::SilentestJob() const {
  const auto silentest = std::min_element(
      jobs_.begin(), jobs_.end(),
      [](const auto& a, const auto& b) { return a.second->heard < b.second->heard; });
  if (clock_.Elapsed() - silentest->second->heard < options_.thresholds.node_silent) return "";
  return silentest->first;
}

void MonitorService::StepAll() {
  const absl::Duration now = absl::Trunc(clock_.Elapsed(), absl::Microseconds(1));
  next_step_ += kStepEvery;
  if (next_step_ <= now) next_step_ = NextOnGrid(now, kStepEvery, absl::ZeroDuration());
  timer_ = loop_.RunAfter(next_step_ - now, [this] { StepAll(); });
  for (auto at = jobs_.begin(); at != jobs_.end();) {
    const std::shared_ptr<Job> job = at->second;
    ++at;
    if (now - job->heard >= kSilentJob) {
      EndJob(job, now);
      jobs_.erase(job->analysis.job());
      jobs_full_ = false;
    } else if (!job->stepping) {
      StepJob(job, now);
    }
  }
  if (now - forgotten_ >= kForgetEvery) {
    forgotten_ = now;
    log_.Forget(clock_.WallTime() - options_.verdicts_keep);
    GiveUpUnheard(now);
  }
}

// Findings of an earlier worker, of jobs that nothing was heard of since.
void MonitorService::GiveUpUnheard(absl::Duration now) {
  std::set<std::string> unheard;
  for (const FindingRecord* record : log_.Records()) {
    if (record->state == FindingState::kUnwatched && !jobs_.contains(record->job)) {
      unheard.insert(record->job);
    }
  }
  for (const std::string& job : unheard) Tell(log_.GiveUpUnwatched(job, Now(now)));
}

void MonitorService::UpdateRoles(Job& job, monitor::JobStep& step) {
  if (!options_.mesh_of) return;
  std::vector<MeshAxis> mesh = options_.mesh_of(job.analysis.job());
  const bool given = job.roles.size() == job.analysis.world_size();
  if (mesh.empty() || (given && SameMesh(mesh, job.mesh))) return;
  std::vector<monitor::RankRole> roles = RolesFromMesh(mesh, job.analysis.world_size());
  if (roles.empty()) return;
  job.mesh = std::move(mesh);
  job.roles = roles;
  step.roles = std::move(roles);
}

// While nothing of the job is on the pool.
void MonitorService::NameGroups(const Job& job, std::vector<monitor::Finding>& findings) const {
  if (findings.empty() || !options_.mesh_of || job.analysis.analyzer() == nullptr) return;
  const std::vector<MeshAxis> mesh = options_.mesh_of(job.analysis.job());
  const auto& known = job.analysis.analyzer()->state().communicators();
  for (monitor::Finding& finding : findings) {
    const auto communicator = known.find(finding.communicator);
    if (communicator == known.end()) continue;
    finding.group = GroupFromMesh(mesh, communicator->second.members);
  }
}

void MonitorService::StepJob(const std::shared_ptr<Job>& job, absl::Duration now) {
  monitor::JobStep step;
  step.elapsed = now;
  if (job->stepped.has_value()) {
    step.receiver_gap = std::max(absl::ZeroDuration(), now - *job->stepped - kStepEvery);
  } else {
    job->first_stepped = now;
    step.topology = options_.topology;
  }
  job->stepped = now;
  step.reports = std::exchange(job->pending, {});
  job->pending_bytes = 0;
  // As bytes: a recording must hold exactly what the analysis was told.
  const std::vector<monitor::Testimony> said = std::exchange(job->testimonies, {});
  for (size_t at = 0; at < said.size(); at += monitor::kTestimoniesMax) {
    step.testimonies.push_back(monitor::EncodeTestimonies(
        std::span(said).subspan(at, std::min(monitor::kTestimoniesMax, said.size() - at))));
  }
  // Whether a question is on the pool or not, nothing changes what a rank is called meanwhile.
  if (!job->busy) UpdateRoles(*job, step);
  Record(*job, step);
  job->stepping = true;
  struct Outcome {
    monitor::JobAnalysis::Result result;
    absl::Duration took;
  };
  auto outcome = std::make_shared<Outcome>();
  const std::weak_ptr<bool> alive(alive_);
  job->tasks.push_back(
      {[job = job.get(), outcome, step = std::move(step), &clock = clock_]() mutable {
         const absl::Duration begun = clock.Elapsed();
         outcome->result = job->analysis.Step(std::move(step));
         job->last = outcome->result.analysis;
         outcome->took = clock.Elapsed() - begun;
       },
       [this, job, outcome, now] {
         last_step_ = outcome->took;
         slowest_step_ = std::max(slowest_step_, last_step_);
         StepDone(job, std::move(outcome->result), now);
       }});
  RunNext(job);
}

void MonitorService::RunNext(const std::shared_ptr<Job>& job) {
  if (job->busy || job->tasks.empty()) return;
  job->busy = true;
  auto task = std::make_shared<Job::Task>(std::move(job->tasks.front()));
  job->tasks.pop_front();
  // The pool holds the job: it may be over for us before its work is.
  pool_.Run([job, task] { task->work(); },
            [this, alive = std::weak_ptr<bool>(alive_), job, task] {
              if (alive.expired()) return;
              job->busy = false;
              task->done();
              RunNext(job);
            });
}

void MonitorService::StepDone(const std::shared_ptr<Job>& job, monitor::JobAnalysis::Result result,
                              absl::Duration now) {
  job->stepping = false;
  // One that has silently gone meanwhile was told so.
  const auto found = jobs_.find(job->analysis.job());
  if (found == jobs_.end() || found->second != job) return;
  const FindingLog::When when = Now(now);
  if (result.new_attempt) job->roles.clear();
  job->ended = result.ended;
  NameGroups(*job, result.analysis.findings);
  if (options_.on_sight) {
    options_.on_sight(job->analysis.job(), job->analysis.attempt_key(), result.analysis.sight);
  }
  Tell(log_.Take(job->analysis, result, when));
  if (!job->gave_up_unwatched && now - job->first_stepped >= kUnwatchedFor) {
    job->gave_up_unwatched = true;
    Tell(log_.GiveUpUnwatched(job->analysis.job(), when));
  }
}

void MonitorService::EndJob(const std::shared_ptr<Job>& job, absl::Duration now) {
  job->ended = true;
  Tell(log_.End(job->analysis.job(), Now(now)));
}

void MonitorService::Tell(const std::vector<FindingLog::Told>& told) {
  for (const FindingLog::Told& one : told) {
    const FindingRecord& record = *one.record;
    if (options_.log) options_.log(Printable(absl::StrCat("monitor: ", Line(record, one.event))));
    store_.Put(record);
    ForEachStream(MonitorStream::Kind::kFindings, record.job, [&](MonitorStream& stream) {
      const ordered_json event = {{"schema_version", kSchema},
                                  {"change", Name(one.event.change)},
                                  {"finding", monitor::FindingRecordObject(record)}};
      if (!stream.Push(monitor::OneLine(event))) ++lost_;
    });
    const FindingChange change = one.event.change;
    if (options_.on_change) options_.on_change(record, change);
    if (command_ != nullptr && record.finding.grade == monitor::Grade::kVerdict) {
      command_->Run(record, one.event);
    }
    if (options_.on_finding &&
        (change == FindingChange::kSuspicion || change == FindingChange::kVerdict ||
         change == FindingChange::kReopened)) {
      options_.on_finding(record);
    }
  }
}

void MonitorService::ForEachStream(MonitorStream::Kind kind, const std::string& job,
                                   const std::function<void(MonitorStream&)>& visit) {
  std::erase_if(streams_, [](const auto& stream) { return stream.expired(); });
  // A copy: a wake may end streams.
  const std::vector<std::weak_ptr<MonitorStream>> streams = streams_;
  for (const std::weak_ptr<MonitorStream>& weak : streams) {
    const std::shared_ptr<MonitorStream> stream = weak.lock();
    if (stream == nullptr || stream->kind_ != kind) continue;
    if (stream->job_.empty() || stream->job_ == job) visit(*stream);
  }
}

void MonitorService::Record(const Job& job, const monitor::JobStep& step) {
  const std::string& name = job.analysis.job();
  ForEachStream(MonitorStream::Kind::kSteps, name, [&](MonitorStream& stream) {
    monitor::RecordedStep recorded{name, step};
    // One that comes later must know what the analysis was told before.
    if (!stream.begun_.contains(name)) {
      if (step.roles.empty()) recorded.step.roles = job.roles;
      recorded.step.topology = options_.topology;
    }
    if (!stream.Push(monitor::EncodeRecorded(std::move(recorded)))) {
      ++lost_;
    } else {
      stream.begun_.insert(name);
    }
  });
}

absl::StatusOr<std::shared_ptr<MonitorStream>> MonitorService::Subscribe(
    abi::MonitorQueryKind kind, const std::string& job, std::function<void()> wake) {
  std::erase_if(streams_, [](const auto& stream) { return stream.expired(); });
  if (streams_.size() >= kStreamsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%d clients follow or record already, the limit", kStreamsMax));
  }
  auto stream = std::make_shared<MonitorStream>();
  stream->kind_ = kind == abi::MonitorQueryKind::kRecord ? MonitorStream::Kind::kSteps
                                                         : MonitorStream::Kind::kFindings;
  stream->job_ = job;
  stream->wake_ = std::move(wake);
  streams_.push_back(stream);
  return stream;
}

void MonitorService::Ask(Question question,
                         std::function<void(absl::StatusOr<std::string>)> answer) {
  using Kind = abi::MonitorQueryKind;
  absl::StatusOr<std::string> text = "";
  switch (question.kind) {
    case Kind::kStatus:
    case Kind::kWaits:
    case Kind::kMatrix:
      return Gather(question, std::move(answer));
    case Kind::kFindings:
      // A name that was mistyped must not look like a job in which nothing is wrong.
      if (!question.job.empty() && !jobs_.contains(question.job) &&
          log_.Records(question.job).empty()) {
        text = NoSuchJob(question.job, jobs_.size());
        break;
      }
      [[fallthrough]];
    case Kind::kFollow:  // may begin before its job
      text = FindingsJson(question.job);
      break;
    case Kind::kExplain:
      text = ExplainJson(question.finding, question.job);
      break;
    case Kind::kRecord:
      break;
    default:
      text = absl::InvalidArgumentError(absl::StrFormat("question of kind %d: expected 1 to 7",
                                                        static_cast<uint32_t>(question.kind)));
  }
  loop_.Post(
      [answer = std::move(answer), text = std::move(text)]() mutable { answer(std::move(text)); });
}

absl::StatusOr<std::string> MonitorService::FindingsJson(const std::string& job) const {
  ordered_json json = {{"schema_version", kSchema}, {"findings", ordered_json::array()}};
  const std::vector<const FindingRecord*> records = log_.Records(job);
  for (auto record = records.rbegin(); record != records.rend(); ++record) {
    json["findings"].push_back(monitor::FindingRecordObject(**record));
  }
  return monitor::OneLine(json);
}

absl::StatusOr<std::string> MonitorService::ExplainJson(const std::string& finding,
                                                        const std::string& job) const {
  const FindingRecord* record = log_.Find(finding);
  if (record != nullptr && !job.empty() && record->job != job) {
    return absl::NotFoundError(absl::StrFormat(
        "finding \"%s\": expected one of job %s, found one of job %s", finding, job, record->job));
  }
  if (record == nullptr) {
    return absl::NotFoundError(absl::StrFormat(
        "finding \"%s\": expected one of the %d that are kept, found none", finding, log_.size()));
  }
  return monitor::OneLine(
      {{"schema_version", kSchema}, {"finding", monitor::FindingRecordObject(*record)}});
}

void MonitorService::Gather(const Question& question,
                            std::function<void(absl::StatusOr<std::string>)> answer) {
  auto gathering = std::make_shared<Gathering>();
  gathering->question = question;
  gathering->answer = std::move(answer);
  std::vector<std::shared_ptr<Job>> jobs;
  absl::Status refusal;
  for (const auto& [name, job] : jobs_) {
    if (!question.job.empty() && question.job != name) continue;
    if (job->tasks.size() >= kTasksMax) {
      refusal = absl::ResourceExhaustedError(
          absl::StrFormat("job %s: %d questions wait already", name, job->tasks.size()));
    }
    jobs.push_back(job);
  }
  if (!question.job.empty() && jobs.empty()) refusal = NoSuchJob(question.job, jobs_.size());
  if (!refusal.ok() || jobs.empty()) {
    loop_.Post([this, alive = std::weak_ptr<bool>(alive_), gathering, refusal] {
      if (alive.expired()) return;
      gathering->answer(refusal.ok() ? GatheredText(*gathering)
                                     : absl::StatusOr<std::string>(refusal));
    });
    return;
  }
  gathering->missing = jobs.size();
  for (const std::shared_ptr<Job>& job : jobs) {
    auto part = std::make_shared<ordered_json>();
    const absl::Duration now = job->stepped.value_or(absl::ZeroDuration());
    job->tasks.push_back({[job = job.get(), part, question, now] {
                            *part = question.kind == abi::MonitorQueryKind::kStatus
                                        ? StatusOf(job->analysis, job->last, now)
                                    : question.kind == abi::MonitorQueryKind::kWaits
                                        ? WaitsOf(job->analysis)
                                        : MatrixOf(job->analysis, question.communicator);
                          },
                          [this, name = job->analysis.job(), gathering, part] {
                            gathering->answers[name] = std::move(*part);
                            if (--gathering->missing == 0)
                              gathering->answer(GatheredText(*gathering));
                          }});
    RunNext(job);
  }
}

std::string MonitorService::GatheredText(const Gathering& gathering) const {
  ordered_json json = {{"schema_version", kSchema}};
  const bool status = gathering.question.kind == abi::MonitorQueryKind::kStatus;
  if (status) {
    const auto streams = std::count_if(streams_.begin(), streams_.end(),
                                       [](const auto& stream) { return !stream.expired(); });
    json["agent"] = {{"findings_kept", log_.size()},
                     {"findings_not_stored", store_.waiting_count()},
                     {"store_failures", store_.failure_count()},
                     {"reports_dropped", reports_dropped_},
                     {"subscribers", streams},
                     {"subscribers_lost", lost_},
                     {"on_verdict_runs", command_ == nullptr ? 0 : command_->run_count()},
                     {"on_verdict_failures", command_ == nullptr ? 0 : command_->failure_count()},
                     {"on_verdict_dropped", command_ == nullptr ? 0 : command_->dropped_count()},
                     {"last_step_ms", absl::ToDoubleMilliseconds(last_step_)},
                     {"slowest_step_ms", absl::ToDoubleMilliseconds(slowest_step_)}};
  }
  json["jobs"] = ordered_json::array();
  for (const auto& [name, answer] : gathering.answers) {
    ordered_json one = answer;
    if (status) {
      std::vector<const FindingRecord*> open = log_.Records(name);
      std::erase_if(
          open, [](const FindingRecord* record) { return record->state != FindingState::kOpen; });
      const auto job = jobs_.find(name);
      one["state"] = job == jobs_.end() || job->second->ended ? "ended" : "running";
      // An end that nobody saw may have been a good one.
      const bool whole = one["sight"]["whole"] && one["ranks_ended_unseen"] == 0;
      one["light"] = LightOf(whole, open);
      one["findings"] = ordered_json::array();
      for (const FindingRecord* record : open) {
        one["findings"].push_back(monitor::FindingRecordObject(*record));
      }
    }
    json["jobs"].push_back(std::move(one));
  }
  return monitor::OneLine(json);
}

}  // namespace holdfast
