// The worker: everything that the agent does, on one event loop. It builds the world, lets the
// engine take over what the last worker held, and serves until it is told to end or, as a private
// agent, until nobody needs it. A world that cannot be built ends the agent at its first start
// only; later it is tried again until it can, because somebody's images may be held.
#ifndef HOLDFAST_AGENT_WORKER_H_
#define HOLDFAST_AGENT_WORKER_H_

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/auto_saves.h"
#include "agent/config.h"
#include "agent/file_store.h"
#include "agent/handover.h"
#include "agent/http_server.h"
#include "agent/job_snapshots.h"
#include "agent/keeper_link.h"
#include "agent/local_server.h"
#include "agent/monitor/boards.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/service.h"
#include "agent/run/run_service.h"
#include "agent/run/sidecar.h"
#include "agent/service_manager.h"
#include "agent/witness/service.h"
#include "base/clock.h"
#include "checkpoint/engine.h"
#include "io/epoll_loop.h"
#include "io/file_system.h"
#include "io/io_ring.h"
#include "io/mount_probe.h"
#include "io/thread_pool.h"
#include "io/unique_fd.h"

namespace holdfast {

// What the process that started the agent wants to hear: sent once over the descriptor kReadyName.
inline constexpr char kReadyText[] = "ready\n";

// The agent has ended with saves that were only in memory; the log names them. docs/OPERATING.md.
inline constexpr int kExitSavesLost = 7;

// Threads: one; it starts the pool's and the ring's.
class Worker {
 public:
  Worker(AgentConfig config, Handover handover, const Clock& clock);
  ~Worker();

  // Until the end. The exit code of the agent: 0, kExitSavesLost, or 1 if it could not start (then
  // the reason was logged and sent to the process that waits for it). Before the keeper was told so
  // (Finish), any return is a death of this worker only.
  int Run();

 private:
  absl::Status MakeLoop();
  void TakeOver();
  absl::Status BuildWorld();
  void DropWorld();
  absl::Status MakeDirectories();
  absl::Status BuildEngine();
  MonitorService::Options MonitorOptions() const;
  absl::Status AddWitnesses(LocalServer::Options& server_options);
  absl::Status MakeRunService();
  absl::Status MakeSidecar();
  std::vector<Sidecar::Process> RankProcesses() const;
  EvidenceWorld EvidenceSources();
  void Recovered();
  void WatchSignals();
  void TellWatchdog();
  void OnSignal();
  void CheckIdle();
  void CheckDrained(absl::Duration deadline);
  // Ends the agent with 0, or kExitSavesLost if anything that it holds is lost by that.
  void EndServing(const std::string& why);
  void End(int exit_code, const std::string& why);
  const char* UnlessRestarted() const;
  bool IsFirst() const;  // whether nobody was served yet
  void TellStarter(const std::string& text);
  nlohmann::json EngineStatus() const;
  JobSources JobSourcesOf(const nlohmann::json& engine_status) const;
  std::string StatusText() const;
  std::string ImagesText() const;

  // ---- worker_http.cc
  void StartHttp();
  std::vector<HttpServer::Page> HttpPages();
  HttpServer::Answer Readiness() const;
  std::string MetricsNow() const;

  AgentConfig config_;
  const uint32_t restart_count_;
  Handover handover_;
  const Clock& clock_;

  ServiceManager service_manager_;

  // In the order in which they depend on one another.
  std::unique_ptr<EpollLoop> loop_;
  std::unique_ptr<KeeperLink> keeper_;
  std::unique_ptr<FileSystem> file_system_;
  std::unique_ptr<MountProbe> mount_probe_;
  MountFacts mount_;
  std::unique_ptr<IoRing> ring_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<FileStore> store_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<MonitorBoards> monitor_boards_;
  std::unique_ptr<MonitorService> monitor_service_;
  std::unique_ptr<NodeAggregator> node_aggregator_;
  std::unique_ptr<ThreadPool> witness_pool_;
  std::unique_ptr<WitnessService> witness_service_;
  std::unique_ptr<ThreadPool> evidence_pool_;
  std::unique_ptr<RunService> run_service_;
  std::unique_ptr<AutoSaves> auto_saves_;
  std::unique_ptr<Sidecar> sidecar_;
  std::unique_ptr<LocalServer> server_;
  // Serves while the world is being built, too.
  std::unique_ptr<HttpServer> http_;
  std::string http_problem_;  // why it does not; empty: it does, or is off

  UniqueFd signal_fd_;
  Caching flush_caching_ = Caching::kDirect;
  Caching restore_caching_ = Caching::kDirect;
  std::string take_over_failure_;  // the last one that was logged
  bool recovered_ = false;         // the engine knows what the last worker held
  bool draining_ = false;
  absl::Duration idle_since_{};  // meaningful in private mode, as the next
  uint64_t accepted_ = 0;        // LocalServer::accepted_count() when last looked at
  int exit_code_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WORKER_H_
