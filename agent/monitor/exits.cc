#include "agent/monitor/exits.h"

#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <utility>

namespace holdfast {
namespace {

using monitor::ExitKind;

ExitKind KindOfSignal(int number) {
  switch (number) {
    case SIGTERM:
    case SIGINT:
    case SIGHUP:
    case SIGQUIT:
      return ExitKind::kTerminated;
    case SIGABRT:
      return ExitKind::kAborted;
    case SIGKILL:
    case SIGXCPU:  // a limit's, as are the next
    case SIGXFSZ:
      return ExitKind::kKilled;
    case SIGSEGV:
    case SIGBUS:
    case SIGILL:
    case SIGFPE:
    case SIGSYS:
    case SIGTRAP:
      return ExitKind::kFault;
    default:
      return ExitKind::kError;  // one that it did not handle
  }
}

}  // namespace

ExitOutcome OutcomeOf(const RankExit& exit) {
  ExitOutcome outcome{ExitKind::kUnknown, 0};
  if (WIFEXITED(exit.wait_status)) {
    outcome.value = WEXITSTATUS(exit.wait_status);
    outcome.kind = outcome.value == 0 ? ExitKind::kClean : ExitKind::kError;
  } else if (WIFSIGNALED(exit.wait_status)) {
    outcome.value = WTERMSIG(exit.wait_status);
    outcome.kind = KindOfSignal(outcome.value);
  }
  if (exit.stopped && outcome.kind != ExitKind::kClean && outcome.kind != ExitKind::kFault) {
    outcome.kind = ExitKind::kTerminated;
  }
  return outcome;
}

void Exits::Add(RankExit exit, uint64_t serial, absl::Duration now) {
  std::erase_if(entries_, [&](const Entry& entry) {
    return entry.exit.rank == exit.rank && entry.exit.job == exit.job &&
           entry.exit.attempt_key == exit.attempt_key && entry.exit.node == exit.node;
  });
  if (entries_.size() == kKeptMax) entries_.pop_front();
  entries_.push_back({std::move(exit), serial, now});
}

const Exits::Entry* Exits::Find(const Process& process) const {
  const Entry* found = nullptr;
  for (const Entry& entry : entries_) {
    const RankExit& exit = entry.exit;
    if (exit.rank != process.rank || exit.job != process.job ||
        exit.attempt_key != process.attempt_key) {
      continue;
    }
    const bool its_number = exit.process_id != 0 && (exit.process_id == process.process_id ||
                                                     exit.process_id == process.own_process_id);
    if (its_number) return &entry;
    if (entry.serial > process.seen_serial) found = &entry;
  }
  return found;
}

void Exits::EraseIf(const std::function<bool(const Entry&)>& is_over) {
  std::erase_if(entries_, is_over);
}

}  // namespace holdfast
