#include "hook/process_monitor.h"

#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "hook/abi/messages.h"
#include "hook/annotations.h"
#include "hook/monitor_board.h"
#include "hook/monitor_offer.h"

namespace holdfast::hook {
namespace {

// Of the process by nature: events come without a job.
std::atomic<MonitorEvents*> process_events{nullptr};
constinit Mutex make_mutex;
constinit Mutex section_mutex;  // of the board's stack of sections
// In place: nothing of ours runs, and nothing is lost, when the library is unloaded.
struct JobIdentity {
  bool known;
  char job[abi::kJobNameBytesMax + 1];
  char attempt_key[abi::kAttemptKeyBytesMax + 1];
  uint32_t rank;
  uint32_t world_size;
  uint32_t local_rank;
  char socket_path[abi::kPathBytesMax + 1];
};
JobIdentity job_identity HOOK_GUARDED_BY(make_mutex);
pthread_once_t fork_once = PTHREAD_ONCE_INIT;

void ForgetInChild() { process_events.store(nullptr, std::memory_order_relaxed); }
void InstallForkHandler() { pthread_atfork(nullptr, nullptr, &ForgetInChild); }

}  // namespace

MonitorEvents* ProcessMonitor() { return process_events.load(std::memory_order_acquire); }

void BeginMonitorSection(MonitorEvents& events, const char* name) {
  MutexLock lock(section_mutex);
  const MonitorBoard& board = events.board();
  board.SetSection(board.header().section_depth.load(std::memory_order_relaxed), name);
}

void EndMonitorSection(MonitorEvents& events) {
  MutexLock lock(section_mutex);
  const MonitorBoard& board = events.board();
  const uint32_t depth = board.header().section_depth.load(std::memory_order_relaxed);
  if (depth > 0) board.SetSectionDepth(depth - 1);
}

void OfferProcessMonitor() {
  const MonitorEvents* const events = ProcessMonitor();
  if (events == nullptr) return;
  std::string socket_path;
  {
    MutexLock lock(make_mutex);
    if (job_identity.known) socket_path = job_identity.socket_path;
  }
  if (socket_path.empty()) socket_path = MonitorSocketPath();
  // Dropped: without an agent the board goes on alone.
  [[maybe_unused]] const Error error =
      OfferMonitorBoard(events->board(), socket_path, Deadline::After(kMonitorOfferNs));
}

void SetMonitorIdentity(const Settings& settings) {
  MutexLock lock(make_mutex);
  // Their lengths were checked when the settings were read.
  std::snprintf(job_identity.job, sizeof(job_identity.job), "%s", settings.job.c_str());
  std::snprintf(job_identity.attempt_key, sizeof(job_identity.attempt_key), "%s",
                settings.attempt_key.c_str());
  job_identity.rank = settings.rank;
  job_identity.world_size = settings.world_size;
  job_identity.local_rank = settings.local_rank;
  std::snprintf(job_identity.socket_path, sizeof(job_identity.socket_path), "%s",
                settings.socket_path.c_str());
  job_identity.known = true;
}

MonitorEvents* MakeProcessMonitor() {
  MonitorEvents* const existing = ProcessMonitor();
  if (existing != nullptr) return existing;
  const Result<abi::MonitorLevel> level = ReadMonitorLevel();
  // A level that is none is light, as in the plugin.
  const abi::MonitorLevel taken = level.ok() ? level.value() : abi::MonitorLevel::kLight;
  if (taken == abi::MonitorLevel::kOff) return nullptr;
  MutexLock lock(make_mutex);
  if (ProcessMonitor() != nullptr) return ProcessMonitor();
  MonitorIdentity identity = ReadMonitorIdentity();
  if (job_identity.known) {
    identity.job = job_identity.job;
    identity.attempt_key = job_identity.attempt_key;
    identity.rank = job_identity.rank;
    identity.world_size = job_identity.world_size;
    identity.local_rank = job_identity.local_rank;
  }
  Result<std::unique_ptr<MonitorBoard>> board =
      MonitorBoard::Create(abi::BoardWriter::kHookApi, taken, identity, MonitorBoard::Clock::kBest);
  if (!board.ok()) return nullptr;
  Result<std::unique_ptr<MonitorEvents>> events = MonitorEvents::Create(std::move(board.value()));
  if (!events.ok()) return nullptr;
  pthread_once(&fork_once, &InstallForkHandler);
  process_events.store(events.value().release(), std::memory_order_release);
  return ProcessMonitor();
}

}  // namespace holdfast::hook
