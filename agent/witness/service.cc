#include "agent/witness/service.h"

#include <limits.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/witness/helper.h"

namespace holdfast {
namespace {

using monitor::Syndrome;
using nlohmann::json;

// Of all communicators together whose members are looked up: boards may claim any number.
constexpr size_t kMembersMax = 1 << 20;

json ToJson(const monitor::Testimony& testimony) {
  json ranks = json::array();
  for (const Rank rank : testimony.ranks) ranks.push_back(Value(rank));
  json object = {{"source", Name(testimony.source)},
                 {"claim", Name(testimony.claim)},
                 {"ranks", std::move(ranks)},
                 {"node", testimony.node},
                 {"group", testimony.group},
                 {"operation", testimony.operation},
                 {"code", testimony.code},
                 {"age_seconds", absl::ToDoubleSeconds(testimony.age)},
                 {"standing_seconds", absl::ToDoubleSeconds(testimony.standing)},
                 {"certainty", testimony.certainty},
                 {"sentence", testimony.sentence}};
  if (testimony.normal.has_value()) {
    object["normal_seconds"] = absl::ToDoubleSeconds(*testimony.normal);
  }
  return object;
}

json ToJson(const monitor::WitnessState& state) {
  return {{"source", Name(state.source)},
          {"node", state.node},
          {"heard", state.heard},
          {"why", state.why}};
}

std::string HostName() {
  char name[HOST_NAME_MAX + 1] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

std::string Text(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// A job that is slow goes on: its processes are not looked at from outside.
Witnesses::Depth DepthFor(const monitor::Finding& finding) {
  const bool slow = finding.syndrome == Syndrome::kCommunicationSlow ||
                    finding.syndrome == Syndrome::kNonCommunicationSlow;
  return slow ? Witnesses::Depth::kGpus : Witnesses::Depth::kAll;
}

bool IsOfAttempt(const std::string& key, const std::string& asked) {
  return key.empty() || asked.empty() || key == asked;
}

}  // namespace

// What is said while it runs, by job.
struct WitnessService::Collection {
  struct Said {
    json witnesses = json::array();
    json testimonies = json::array();
  };
  std::map<std::string, Said> jobs;
  size_t pending = 0;
  std::function<void(std::string)> done;
};

WitnessService::WitnessService(Options options, EventLoop& loop, WorkPool& pool, const Clock& clock,
                               const MonitorBoards& boards)
    : loop_(loop), clock_(clock), boards_(boards), waiting_(loop) {
  Witnesses::Options asked;
  asked.node = options.node.empty() ? HostName() : std::move(options.node);
  asked.helper_path = options.helper_path.empty() ? HelperPath() : std::move(options.helper_path);
  asked.ras = std::move(options.ras);
  asked.kernel_log = std::move(options.kernel_log);
  asked.warn = std::move(options.warn);
  asked.on_xid = std::move(options.on_xid);
  witnesses_ = std::make_unique<Witnesses>(
      std::move(asked),
      Witnesses::World{loop, pool, clock, waiting_, [this] { return Processes(); },
                       [this](Witnesses::Hearing hearing) { Heard(std::move(hearing)); }});
}

WitnessService::~WitnessService() {
  if (timer_ != 0) loop_.CancelTimer(timer_);
}

void WitnessService::Start() {
  witnesses_->Start();
  timer_ = loop_.RunAfter(Witnesses::kRoundInterval, [this] { Look(); });
}

std::vector<MonitorBoards::Process> WitnessService::BoardProcesses() const {
  std::vector<MonitorBoards::Process> processes = boards_.Processes();
  for (MonitorBoards::Process& process : processes) {
    process.job = NodeAggregator::JobNamed(process.job);
    process.attempt_key = NodeAggregator::KeyNamed(process.attempt_key);
  }
  return processes;
}

std::vector<Witnesses::Process> WitnessService::Processes() const {
  std::map<uint32_t, Witnesses::Process> by_id;
  for (const WaitingProcesses::Process& process : waiting_.processes()) {
    by_id[process.process_id] = {process.job, process.attempt_key, process.rank,
                                 process.process_id};
  }
  for (const MonitorBoards::Process& process : BoardProcesses()) {
    by_id[process.process_id] = {process.job, process.attempt_key, process.rank,
                                 process.process_id};
  }
  std::vector<Witnesses::Process> all;
  for (auto& [id, process] : by_id) all.push_back(std::move(process));
  return all;
}

void WitnessService::Look() {
  timer_ = loop_.RunAfter(Witnesses::kRoundInterval, [this] { Look(); });
  std::erase_if(wanted_, [this](const auto& one) {
    const auto& [job, wanted] = one;
    return witnesses_->Ask(QuestionAbout(job, wanted.attempt_key, wanted.depth), nullptr);
  });
  LookAtBlindJobs();
  const absl::Duration now = clock_.Elapsed();
  const bool changed = gpus_read_at_ != boards_.changes();
  if (boards_.alive_count() > 0 && now - gpus_read_ >= (changed ? kGpusEvery : kGpusAtLeastEvery)) {
    gpus_read_at_ = boards_.changes();
    gpus_read_ = now;
    witnesses_->LookAtGpus();
  }
}

void WitnessService::LookAtBlindJobs() {
  std::map<std::string, std::string> attempts;  // by job
  for (const WaitingProcesses::Process& process : waiting_.processes()) {
    attempts[process.job] = process.attempt_key;
  }
  if (attempts.empty()) return;
  for (const MonitorBoards::Process& process : BoardProcesses()) {
    if (!process.memberships.empty()) attempts.erase(process.job);
  }
  for (const auto& [job, attempt_key] : attempts) {
    witnesses_->Ask(QuestionAbout(job, attempt_key, Witnesses::Depth::kRecords), nullptr);
  }
}

void WitnessService::OnFinding(const monitor::FindingRecord& record) {
  const Witnesses::Depth depth = DepthFor(record.finding);
  if (witnesses_->Ask(QuestionAbout(record.job, record.attempt_key, depth), nullptr)) return;
  Wanted& wanted = wanted_[record.job];
  wanted = {record.attempt_key, std::max(wanted.depth, depth)};
}

Witnesses::Question WitnessService::QuestionAbout(const std::string& job,
                                                  const std::string& attempt_key,
                                                  Witnesses::Depth depth) const {
  Witnesses::Question question;
  question.job = job;
  question.attempt_key = attempt_key;
  question.depth = depth;
  for (Witnesses::Process& process : Processes()) {
    if (process.job == job && process.rank != UINT32_MAX &&
        IsOfAttempt(process.attempt_key, attempt_key)) {
      question.processes.push_back(std::move(process));
    }
  }
  size_t room = kMembersMax;
  for (const MonitorBoards::Process& process : BoardProcesses()) {
    if (process.job != job || !IsOfAttempt(process.attempt_key, attempt_key)) continue;
    question.world_size = std::max(question.world_size, process.world_size);
    for (const MonitorBoards::Process::Membership& membership : process.memberships) {
      std::vector<int64_t>& members = question.members[membership.communicator];
      const size_t more = membership.ranks - std::min<size_t>(members.size(), membership.ranks);
      if (more > room) continue;
      room -= more;
      members.resize(members.size() + more, -1);
      if (process.rank != UINT32_MAX) members[membership.index] = process.rank;
    }
  }
  return question;
}

void WitnessService::Heard(Witnesses::Hearing hearing) {
  for (const std::weak_ptr<Collection>& weak : collections_) {
    const std::shared_ptr<Collection> collection = weak.lock();
    if (collection == nullptr || !collection->jobs.contains(hearing.job)) continue;
    Collection::Said& said = collection->jobs[hearing.job];
    said.witnesses.push_back(ToJson(hearing.witness));
    for (const monitor::Testimony& testimony : hearing.testimonies) {
      said.testimonies.push_back(ToJson(testimony));
    }
  }
  if (listener_) listener_(hearing);
}

void WitnessService::AskAll(std::function<void(std::string)> done) {
  std::erase_if(collections_, [](const auto& weak) { return weak.expired(); });
  auto collection = std::make_shared<Collection>();
  collection->done = std::move(done);
  collections_.push_back(collection);
  const auto finish = [collection] {
    if (--collection->pending > 0) return;
    json answer = {{"schema_version", 1}, {"jobs", json::array()}};
    for (auto& [job, said] : collection->jobs) {
      answer["jobs"].push_back({{"job", job},
                                {"witnesses", std::move(said.witnesses)},
                                {"testimonies", std::move(said.testimonies)}});
    }
    collection->done(Text(answer));
  };
  std::set<std::string> jobs;
  for (const Witnesses::Process& process : Processes()) jobs.insert(process.job);
  for (const std::string& job : jobs) collection->jobs[job];
  collection->pending = jobs.size() + 1;
  for (const std::string& job : jobs) {
    if (!witnesses_->Ask(QuestionAbout(job, "", Witnesses::Depth::kAll), finish)) {
      collection->jobs[job].witnesses.push_back(
          {{"why", absl::StrCat("asked less than ", absl::FormatDuration(Witnesses::kRoundInterval),
                                " ago")}});
      finish();
    }
  }
  finish();
}

std::string WitnessService::StatusJson() const {
  json all = json::array();
  for (const monitor::WitnessState& state : witnesses_->states()) all.push_back(ToJson(state));
  return Text(all);
}

}  // namespace holdfast
