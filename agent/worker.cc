#include "agent/worker.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/job_snapshots.h"
#include "agent/limits.h"
#include "agent/log.h"
#include "agent/process.h"
#include "agent/runtime_directory.h"
#include "agent/version.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/kill_point.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "format/image.h"
#include "io/errno_status.h"
#include "io/open_ring.h"
#include "io/posix_file_system.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

// Somebody has started a private agent because he needs it: that first client gets so long to
// connect, however short the linger time is, and however many workers died before he was told.
constexpr absl::Duration kFirstClientGrace = absl::Seconds(10);
// How often a draining worker looks whether it is done.
constexpr absl::Duration kDrainLook = absl::Milliseconds(20);
// How often a worker that cannot take over tries again.
constexpr absl::Duration kTakeOverRetry = absl::Seconds(1);

constexpr char kEndingText[] = "the agent is ending";
// So many lost saves are named in the log.
constexpr size_t kLostNamedMax = 20;

const char* NameOf(Caching caching) { return caching == Caching::kDirect ? "direct" : "buffered"; }

// Makes the last component of `path` if only that is missing: a root on a file system that is not
// mounted must not be made in the empty mount point's parent.
absl::Status MakeLastComponent(const std::string& path) {
  if (mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) {
    struct stat info {};
    if (stat(path.c_str(), &info) != 0) return ErrnoStatus(errno, "stat", path);
    if (!S_ISDIR(info.st_mode)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": expected a directory"));
    }
    return absl::OkStatus();
  }
  return ErrnoStatus(errno, "create directory", path);
}

absl::Status MakeAll(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return ErrnoStatus(error.value(), "create directory", path);
  return absl::OkStatus();
}

}  // namespace

Worker::Worker(AgentConfig config, Handover handover, const Clock& clock)
    : config_(std::move(config)),
      restart_count_(handover.restart_count),
      handover_(std::move(handover)),
      clock_(clock),
      service_manager_(config_.unit) {}

Worker::~Worker() {
  DescribeAtKillPoint(nullptr);
  if (loop_ != nullptr && signal_fd_) loop_->Unwatch(signal_fd_.get());
}

int Worker::Run() {
  KillPoint("worker.started");
  if (absl::Status made = MakeLoop(); !made.ok()) {
    // Only a death: the keeper starts another one.
    LogError(absl::StrCat("cannot start: ", std::string(made.message())));
    return 1;
  }
  WatchSignals();
  if (config_.unit.watchdog > absl::ZeroDuration()) TellWatchdog();
  StartHttp();
  TakeOver();
  loop_->Run();
  return exit_code_;
}

absl::Status Worker::MakeLoop() {
  ASSIGN_OR_RETURN(loop_, EpollLoop::Create(clock_));
  keeper_ = std::make_unique<KeeperLink>(std::move(handover_), KeeperLink::Limits{}, *loop_, clock_,
                                         &service_manager_);
  if (keeper_->Find(kListenerName) < 0) {
    return absl::InternalError("no listening socket was handed over");
  }
  return absl::OkStatus();
}

// A worker that finds the world broken (a root that does not answer, no room for a thread) must not
// take with it what the last one held: it holds everything itself until the world is whole again.
// It does not die of it either, because after enough deaths the keeper drops what it hands over.
void Worker::TakeOver() {
  const absl::Status built = BuildWorld();
  if (built.ok()) {
    if (draining_) server_->RefuseOpens(kEndingText);
    DescribeAtKillPoint([this] { return ImagesText(); });
    KillPoint("recover.begun");
    engine_->Recover(keeper_->EngineDescriptors(), [this] { Recovered(); });
    return;
  }
  DropWorld();
  const std::string why(built.message());
  if (!keeper_->holds_engine_descriptors() && (IsFirst() || config_.is_private)) {
    End(1, absl::StrCat("cannot start: ", why));
    return;
  }
  if (why != take_over_failure_) {
    LogError(absl::StrFormat(
        "cannot take over from the last worker: %s; nothing that it held is lost; trying again "
        "every %s",
        why, absl::FormatDuration(kTakeOverRetry)));
    service_manager_.Status(absl::StrCat("cannot take over from the last worker: ", why));
  }
  take_over_failure_ = why;
  loop_->RunAfter(kTakeOverRetry, [this] { TakeOver(); });
}

void Worker::DropWorld() {
  DescribeAtKillPoint(nullptr);
  server_.reset();
  auto_saves_.reset();
  sidecar_.reset();
  run_service_.reset();
  evidence_pool_.reset();
  witness_service_.reset();
  witness_pool_.reset();
  node_aggregator_.reset();
  monitor_service_.reset();
  monitor_boards_.reset();
  engine_.reset();
  store_.reset();
  pool_.reset();
  if (ring_ != nullptr) loop_->Unwatch(ring_->event_fd());
  ring_.reset();
  mount_probe_.reset();
  file_system_.reset();
}

absl::Status Worker::BuildWorld() {
  file_system_ = NewPosixFileSystem();
  RETURN_IF_ERROR(MakeDirectories());
  mount_probe_ = std::make_unique<MountProbe>(*file_system_, config_.state_directory);
  ASSIGN_OR_RETURN(mount_, mount_probe_->Probe(config_.root));
  RingOptions ring_options;
  ring_options.kind = config_.ring;
  ASSIGN_OR_RETURN(ring_, OpenRing(ring_options));
  loop_->Watch(ring_->event_fd(), EventLoop::FdEvents::kReadable,
               [this] { ring_->RunCompletions(); });
  ASSIGN_OR_RETURN(pool_, ThreadPool::Create(*loop_, static_cast<int>(config_.threads)));
  return BuildEngine();
}

absl::Status Worker::MakeDirectories() {
  RETURN_IF_ERROR(MakeAll(config_.state_directory));
  RETURN_IF_ERROR(MakeAll(absl::StrCat(config_.state_directory, "/scratch")));
  if (keeper_->holds_engine_descriptors()) {
    // Its jobs are in a root that was there. Another one in its place would be without them.
  } else if (config_.values.at("roots").origin == "default") {
    RETURN_IF_ERROR(MakeAll(config_.root));
  } else {
    RETURN_IF_ERROR(MakeLastComponent(config_.root));
  }
  // One spelling of the root, whatever links lead to it.
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(config_.root, error);
  if (error) return ErrnoStatus(error.value(), "resolve", config_.root);
  config_.root = real.string();
  if (!std::filesystem::is_directory(real, error)) {
    return absl::InvalidArgumentError(absl::StrCat(config_.root, ": expected a directory"));
  }
  return absl::OkStatus();
}

absl::Status Worker::BuildEngine() {
  const std::string refusal = mount_.DirectRefusal(config_.block_bytes);
  if (config_.direct == DirectIo::kOn && !refusal.empty()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("direct = on, but %s refuses direct transfers: %s", config_.root, refusal));
  }
  if (config_.direct != DirectIo::kOff && mount_.direct_supported && !refusal.empty()) {
    LogWarning(absl::StrFormat("%s: through the page cache: %s", config_.root, refusal));
  }
  FileStore::Options store_options;
  store_options.root = config_.root;
  store_options.writer = absl::StrFormat("%016x", RandomBits());
  store_options.make_uuid = RandomUuid;
  store_ = std::make_unique<FileStore>(*file_system_, clock_, std::move(store_options));

  EngineOptions options;
  options.root = config_.root;
  options.scratch_directory = absl::StrCat(config_.state_directory, "/scratch");
  options.host_memory_bytes_max = config_.host_memory_bytes;
  options.block_bytes = config_.block_bytes;
  options.images_per_rank_max = config_.images_in_memory;
  options.due_every_steps = config_.due_every_steps;
  options.flush_writes_in_flight_max = config_.flush_writes_in_flight;
  options.on_warning = LogWarning;
  options.user_id = geteuid();
  if (config_.direct == DirectIo::kOff || !refusal.empty()) {
    flush_caching_ = Caching::kBuffered;
  }
  // What is restored may have been written with the smallest blocks that there are.
  if (config_.direct == DirectIo::kOff || !mount_.DirectRefusal(kBlockBytesMin).empty()) {
    restore_caching_ = Caching::kBuffered;
  }
  options.flush_caching = flush_caching_;
  options.restore_caching = restore_caching_;
  const EngineWorld world{*file_system_, *ring_, *loop_, *pool_, clock_, *store_, *keeper_};
  ASSIGN_OR_RETURN(engine_, Engine::Create(std::move(options), world));

  LocalServer::Options server_options;
  server_options.user_id = geteuid();
  server_options.root = config_.root;
  server_options.block_bytes = config_.block_bytes;
  server_options.sessions_max = LocalServer::SessionsFor(OpenFilesLimit());
  server_options.connections_max = LocalServer::ConnectionsFor(OpenFilesLimit());
  monitor_boards_ = std::make_unique<MonitorBoards>(*loop_, clock_, *keeper_);
  monitor_boards_->Recover(keeper_->FindAll(kMonitorPrefix));
  server_options.monitor_boards = monitor_boards_.get();
  monitor_service_ =
      std::make_unique<MonitorService>(MonitorOptions(), *file_system_, *loop_, *pool_, clock_);
  server_options.monitor_service = monitor_service_.get();
  // The time since the machine's start: greater than that of the worker before this one.
  node_aggregator_ = std::make_unique<NodeAggregator>(
      *monitor_boards_, *loop_, clock_,
      [this](const std::string& job, const std::string& key) {
        return engine_->ActivityOf(job, key);
      },
      static_cast<uint64_t>(absl::ToInt64Microseconds(clock_.Elapsed())), *monitor_service_);
  server_options.take_exit = [this](RankExit exit) { node_aggregator_->TakeExit(std::move(exit)); };
  RETURN_IF_ERROR(AddWitnesses(server_options));
  RETURN_IF_ERROR(MakeRunService());
  RETURN_IF_ERROR(MakeSidecar());
  server_options.run_service = run_service_.get();
  server_options.sidecar = sidecar_.get();
  auto_saves_ = std::make_unique<AutoSaves>(
      AutoSaves::World{*loop_, clock_, [this] { return JobsNow(JobSourcesOf(EngineStatus())); },
                       [this](const std::string& job, const std::string& key) {
                         return engine_->ProgressOf(job, key);
                       },
                       [this](const std::string& job, const std::string& key) {
                         return engine_->MakeDue(job, key);
                       }});
  server_ = std::make_unique<LocalServer>(std::move(server_options), keeper_->Find(kListenerName),
                                          *engine_, *loop_, [this] { return StatusText(); });
  return absl::OkStatus();
}

absl::Status Worker::AddWitnesses(LocalServer::Options& server_options) {
  WitnessService::Options options;
  options.kernel_log = config_.kernel_log;
  options.warn = LogWarning;
  options.on_xid = [this](const XidSighting& sighting) {
    if (run_service_ != nullptr) run_service_->TakeXid(sighting);
  };
  if (!config_.ras_address.empty()) {
    ASSIGN_OR_RETURN(options.ras, ParseRasAddress(config_.ras_address));
  }
  ASSIGN_OR_RETURN(witness_pool_, ThreadPool::Create(*loop_, Witnesses::kPoolThreads));
  witness_service_ = std::make_unique<WitnessService>(std::move(options), *loop_, *witness_pool_,
                                                      clock_, *monitor_boards_);
  witness_service_->Listen([this](const Witnesses::Hearing& hearing) {
    std::vector<monitor::Testimony> said = hearing.testimonies;
    said.push_back(ToTestimony(hearing.witness));
    monitor_service_->Deliver(hearing.job, said);
  });
  server_options.waiting_processes = &witness_service_->waiting();
  server_options.ask_witnesses = [this](std::function<void(std::string)> done) {
    witness_service_->AskAll(std::move(done));
  };
  return absl::OkStatus();
}

absl::Status Worker::MakeSidecar() {
  Sidecar::Options options;
  options.mode = config_.sidecar;
  ASSIGN_OR_RETURN(options.settings,
                   recovery::ParseSettings(config_.recovery_toml, "configuration"));
  options.state_directory = config_.state_directory;
  sidecar_ = std::make_unique<Sidecar>(
      std::move(options), Sidecar::World{*loop_, clock_, [this] { return RankProcesses(); },
                                         [this](const std::string& job, const std::string& key) {
                                           return run_service_->Runs(job, key);
                                         },
                                         [this](const std::string& job, const std::string& key) {
                                           return engine_->ProgressOf(job, key);
                                         },
                                         [this](const std::string& job, const std::string& key) {
                                           return engine_->ActivityOf(job, key);
                                         },
                                         EvidenceSources()});
  return absl::OkStatus();
}

// Those that have a board, and those that have only opened a job: their heartbeats are seen.
std::vector<Sidecar::Process> Worker::RankProcesses() const {
  // Of whoever connected. A number that is another one's by now is not that one's any more.
  std::map<uint32_t, int> pidfds;
  for (const SessionId session : engine_->sessions()) {
    const int pidfd = engine_->process_fd(session);
    if (const pid_t number = PidOf(pidfd); number > 0) {
      pidfds[static_cast<uint32_t>(number)] = pidfd;
    }
  }
  for (const auto& board : monitor_boards_->boards()) {
    if (board->alive) pidfds[board->offer.process_id] = board->offer.process.get();
  }
  std::vector<Sidecar::Process> processes;
  std::set<uint32_t> known;
  const auto add = [&](const std::string& job, const std::string& attempt_key, uint32_t rank,
                       uint32_t world_size, uint32_t process_id) {
    const auto pidfd = pidfds.find(process_id);
    if (pidfd == pidfds.end() || !known.insert(process_id).second) return;
    processes.push_back({job, attempt_key, rank, world_size, process_id, pidfd->second});
  };
  for (const MonitorBoards::Process& process : monitor_boards_->Processes()) {
    add(process.job, process.attempt_key, process.rank, process.world_size, process.process_id);
  }
  for (const Engine::OpenSession& session : engine_->open_sessions()) {
    add(session.job, session.attempt_key, Value(session.rank), session.world_size,
        session.process_id);
  }
  return processes;
}

EvidenceWorld Worker::EvidenceSources() {
  return EvidenceWorld{*evidence_pool_,
                       [this] { return StatusText(); },
                       monitor_service_.get(),
                       &witness_service_->waiting(),
                       [this] { witness_service_->ReadKernelLog(); },
                       config_.kernel_log};
}

absl::Status Worker::MakeRunService() {
  ASSIGN_OR_RETURN(evidence_pool_, ThreadPool::Create(*loop_, EvidenceWorld::kThreads));
  RunService::Options options;
  options.state_directory = config_.state_directory;
  options.runtime_directory = std::filesystem::path(config_.socket).parent_path().string();
  options.socket = config_.socket;
  options.shim_program = ShimPath();
  options.root = config_.root;
  run_service_ = std::make_unique<RunService>(
      std::move(options),
      JobSupervisor::World{*loop_, *pool_, clock_, *engine_,
                           [this](RankExit exit) { node_aggregator_->TakeExit(std::move(exit)); },
                           EvidenceSources()});
  return absl::OkStatus();
}

MonitorService::Options Worker::MonitorOptions() const {
  MonitorService::Options options;
  // Of this agent alone: several agents of one user may share the state directory.
  options.directory = absl::StrFormat("%s/monitor-%08x", config_.state_directory,
                                      Crc32c(std::as_bytes(std::span(config_.socket))));
  options.verdicts_keep = config_.verdicts_keep;
  options.on_verdict = config_.on_verdict;
  options.topology = config_.topology_document;
  options.mesh_of = [this](const std::string& job) { return engine_->MeshOf(job); };
  options.on_change = [this](const monitor::FindingRecord& record, monitor::FindingChange change) {
    if (run_service_ != nullptr) run_service_->TakeFinding(record, change);
    if (sidecar_ != nullptr) sidecar_->TakeFinding(record, change);
  };
  options.on_sight = [this](const std::string& job, const std::string& key,
                            const monitor::Sight& sight) {
    if (run_service_ != nullptr) run_service_->TakeSight(job, key, sight);
    if (sidecar_ != nullptr) sidecar_->TakeSight(job, key, sight);
  };
  options.log = LogInfo;
  options.warn = LogWarning;
  options.on_finding = [this](const monitor::FindingRecord& record) {
    witness_service_->OnFinding(record);
  };
  return options;
}

void Worker::Recovered() {
  KillPoint("worker.recovered");
  recovered_ = true;
  monitor_service_->Start();
  witness_service_->Start();
  run_service_->Recover();
  if (config_.every_is_auto) auto_saves_->Start();
  sidecar_->Start();
  if (draining_) run_service_->Terminate();
  server_->Start();
  idle_since_ = clock_.Elapsed();
  if (IsFirst()) {
    idle_since_ += std::max(kFirstClientGrace - config_.linger, absl::ZeroDuration());
  }
  LogInfo(absl::StrFormat("serving %s on %s (start %d; %d sessions taken over); %s; %s; %s",
                          config_.root, config_.socket, restart_count_ + 1,
                          engine_->sessions().size(), ring_->Describe(), mount_.Describe(),
                          SharedPages()));
  TellStarter(kReadyText);
  service_manager_.Ready(
      absl::StrFormat("Serving; %d sessions taken over", engine_->sessions().size()));
  if (config_.is_private) CheckIdle();
}

void Worker::WatchSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  CHECK(sigprocmask(SIG_BLOCK, &signals, nullptr) == 0);
  signal_fd_.Reset(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  CHECK(signal_fd_);
  loop_->Watch(signal_fd_.get(), EventLoop::FdEvents::kReadable, [this] { OnSignal(); });
}

void Worker::TellWatchdog() {
  service_manager_.Watchdog();
  loop_->RunAfter(config_.unit.watchdog / 3, [this] { TellWatchdog(); });
}

void Worker::OnSignal() {
  signalfd_siginfo info{};
  if (read(signal_fd_.get(), &info, sizeof(info)) != static_cast<ssize_t>(sizeof(info))) return;
  if (draining_) return;
  draining_ = true;
  service_manager_.Stopping();
  if (server_ != nullptr) server_->RefuseOpens(kEndingText);
  LogInfo(absl::StrFormat("signal %d: ending; %s", info.ssi_signo,
                          recovered_ ? absl::StrFormat("%d images are still to be flushed",
                                                       engine_->pending_image_count())
                                     : "what the last worker held is still to be taken over"));
  const absl::Duration deadline = clock_.Elapsed() + config_.drain_deadline;
  if (!recovered_) return CheckDrained(deadline);
  run_service_->Terminate();
  // What trainers have begun until now counts; the engine hears of it in the next turns.
  for (const SessionId session : engine_->sessions()) engine_->Doorbell(session);
  loop_->RunAfter(kDrainLook, [this, deadline] { CheckDrained(deadline); });
}

void Worker::CheckDrained(absl::Duration deadline) {
  const bool knows = recovered_ || !keeper_->holds_engine_descriptors();
  const size_t pending = recovered_ ? engine_->pending_image_count() : 0;
  const size_t runs = recovered_ ? run_service_->active_count() : 0;
  if (knows && pending == 0 && runs == 0) return EndServing("nothing is left to be flushed");
  if (clock_.Elapsed() >= deadline) {
    if (runs > 0) run_service_->Kill();
    const std::string within = absl::FormatDuration(config_.drain_deadline);
    if (knows) {
      return EndServing(absl::StrFormat("%d images are not flushed within %s", pending, within));
    }
    return End(kExitSavesLost, absl::StrFormat("what the last worker held could not be taken over "
                                               "within %s and is lost%s",
                                               within, UnlessRestarted()));
  }
  loop_->RunAfter(kDrainLook, [this, deadline] { CheckDrained(deadline); });
}

void Worker::CheckIdle() {
  const absl::Duration now = clock_.Elapsed();
  // A connection counts too: its client may be about to open, or its kOpen be pending.
  const bool busy = engine_->open_session_count() > 0 || engine_->pending_image_count() > 0 ||
                    server_->connection_count() > server_->waiting_count() ||
                    server_->accepted_count() != accepted_ || run_service_->active_count() > 0;
  // Of `holdfast run`: with the run it has no reason to be any more.
  if (run_service_->is_done()) config_.linger = absl::ZeroDuration();
  accepted_ = server_->accepted_count();
  if (busy) idle_since_ = now;
  const absl::Duration left = idle_since_ + config_.linger - now;
  if (!busy && left <= absl::ZeroDuration()) {
    if (!draining_) EndServing("nobody has needed this agent for its linger time");
    return;
  }
  // Soon enough to notice within a tenth of the linger time, and once a second at most.
  const absl::Duration look =
      std::clamp(config_.linger / 10, absl::Milliseconds(5), absl::Seconds(1));
  loop_->RunAfter(busy ? look : std::min(left, absl::Seconds(1)), [this] { CheckIdle(); });
}

void Worker::EndServing(const std::string& why) {
  std::vector<std::string> lost;
  if (recovered_) {
    for (const Engine::UncommittedSave& save : engine_->uncommitted_saves()) {
      lost.push_back(absl::StrFormat("step %d of attempt %d of job %s", Value(save.checkpoint.step),
                                     Value(save.checkpoint.attempt), save.job));
    }
  }
  if (lost.empty()) return End(0, why);
  const size_t count = lost.size();
  if (count > kLostNamedMax) lost.resize(kLostNamedMax);
  End(kExitSavesLost,
      absl::StrFormat("ending: %s; %d saves were only in memory and are lost%s: %s%s", why, count,
                      UnlessRestarted(), absl::StrJoin(lost, ", "),
                      count > kLostNamedMax ? ", ..." : ""));
}

const char* Worker::UnlessRestarted() const {
  return service_manager_.keeps_descriptors()
             ? " (unless systemd starts the unit again: it has kept them)"
             : "";
}

void Worker::End(int exit_code, const std::string& why) {
  if (exit_code == 0) {
    LogInfo(absl::StrCat("ending: ", why));
  } else {
    LogError(why);
    TellStarter(absl::StrCat(why, "\n"));
  }
  exit_code_ = exit_code;
  if (service_manager_.keeps_descriptors()) {
    // Everything stays with systemd, the socket too: if this is a restart, whoever connects waits
    // for the next agent, which goes on with images and sessions. A stop throws all of it away.
  } else if (!HoldsSocket(config_.socket, keeper_->Find(kLockName))) {
    LogWarning(
        absl::StrCat(config_.socket, ": the directory was replaced; what is there now stays"));
  } else if (unlink(config_.socket.c_str()) != 0 && errno != ENOENT) {
    // The name first: a trainer that comes now finds nobody and starts another agent, which waits
    // for our lock. What has connected already sees its connection end and tries again.
    LogWarning(absl::StrCat("cannot remove ", config_.socket, ": ", ErrnoName(errno)));
  }
  keeper_->Finish(exit_code);
  loop_->Stop();
}

// Whoever has started the agent waits (kReadyName) until somebody is served, by this worker or,
// where workers died, by a later one.
bool Worker::IsFirst() const { return restart_count_ == 0 || keeper_->Find(kReadyName) >= 0; }

void Worker::TellStarter(const std::string& text) {
  const int ready = keeper_->Find(kReadyName);
  if (ready < 0) return;
  // Dropped: it may not wait any more.
  [[maybe_unused]] const ssize_t written = write(ready, text.data(), text.size());
  keeper_->Drop(kReadyName);
}

nlohmann::json Worker::EngineStatus() const {
  nlohmann::json status = nlohmann::json::parse(engine_->StatusJson(), nullptr, false);
  if (!status.is_object()) status = {{"engine_status", "damaged"}};
  return status;
}

JobSources Worker::JobSourcesOf(const nlohmann::json& engine_status) const {
  return {
      *engine_,     engine_status, *run_service_, *monitor_boards_, monitor_service_->findings(),
      *auto_saves_, *sidecar_};
}

std::string Worker::StatusText() const {
  nlohmann::json status = EngineStatus();
  status["screens"] = ScreensJson(JobsNow(JobSourcesOf(status)), clock_.Elapsed());
  for (nlohmann::json& job : status["jobs"]) {
    const std::string saves = auto_saves_->SentenceOf(job.value("job", ""));
    if (!saves.empty()) job["every"] = saves;
  }
  status["monitor"] = nlohmann::json::parse(monitor_boards_->StatusJson());
  status["monitor_reports"] = nlohmann::json::parse(node_aggregator_->StatusJson());
  status["witnesses"] = nlohmann::json::parse(witness_service_->StatusJson());
  status["runs_active"] = run_service_->active_count();
  status["sidecar"] = nlohmann::json::parse(sidecar_->StatusJson());
  nlohmann::json& agent = status["agent"];
  agent = {{"version", kVersion},
           {"protocol", abi::kProtocolVersion},
           {"mode", config_.is_private ? "private" : "system"},
           {"job", config_.job},
           {"keeper_pid", keeper_->keeper_pid()},
           {"worker_pid", getpid()},
           {"worker_restarts", restart_count_},
           {"keeper_restarts", keeper_->keeper_restart_count()},
           {"draining", draining_},
           {"root", config_.root},
           {"socket", config_.socket},
           {"ring", ring_->Describe()},
           {"mount", mount_.Describe()},
           {"flush", NameOf(flush_caching_)},
           {"restore", NameOf(restore_caching_)},
           {"open_sessions", engine_->open_session_count()},
           {"pending_images", engine_->pending_image_count()},
           {"connections", server_->connection_count()},
           {"waiting_processes", server_->waiting_count()},
           {"garbage_messages", server_->garbage_count()},
           {"open_files_max", OpenFilesLimit()}};
  agent["http"] = http_ != nullptr ? http_->at().ToString() : "off";
  if (!http_problem_.empty()) agent["http_problem"] = http_problem_;
  for (const auto& [key, value] : config_.values) {
    agent["config"][key] = {{"value", value.text}, {"origin", value.origin}};
  }
  return status.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// For drills: every image of a save, with its counters, as an array in one line.
std::string Worker::ImagesText() const {
  using nlohmann::json;
  const json status = json::parse(engine_->StatusJson(), nullptr, false);
  json images = json::array();
  if (!status.is_object()) return images.dump();
  for (const json& session : status.value("sessions", json::array())) {
    for (json image : session.value("images", json::array())) {
      if (!image.contains("step")) continue;
      image["rank"] = session.value("rank", json());
      image["attempt"] = session.value("attempt", json());
      images.push_back(std::move(image));
    }
  }
  return images.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
