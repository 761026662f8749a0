#include "agent/recovery/trouble.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/recovery/choice.h"
#include "agent/recovery/text.h"
#include "monitor/witness/xid.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;
using monitor::FaultClass;
using monitor::Grade;
using monitor::Syndrome;

bool IsAlive(const RankRecord& rank) {
  return rank.phase != RankPhase::kEnded && rank.phase != RankPhase::kStuck;
}

Incident::Suspect SuspectOf(const History& history, Rank rank, Rank peer) {
  Incident::Suspect suspect{rank, peer, {}};
  if (Value(rank) < history.placement.gpus.size()) {
    suspect.gpu = history.placement.gpus[Value(rank)];
  }
  return suspect;
}

std::string ExitText(const Exit& exit) {
  switch (exit.kind) {
    case ExitKind::kError:
      return absl::StrCat("exited with status ", exit.value);
    case ExitKind::kKilled:
    case ExitKind::kFault:
    case ExitKind::kAborted:
    case ExitKind::kTerminated:
      return absl::StrCat("ended by signal ", exit.value);
    case ExitKind::kNone:
    case ExitKind::kClean:
    case ExitKind::kUnknown:
      break;
  }
  return "has gone, and nobody saw how";
}

// The one that explains the others: in a cascade the strongest kind of exit is the cause, never the
// earliest (monitor/summary.h orders them).
void FindDead(const Settings& settings, const History& history, std::vector<Trouble>& out) {
  std::vector<uint32_t> dead;
  for (uint32_t r = 0; r < history.ranks.size(); ++r) {
    const RankRecord& rank = history.ranks[r];
    if (rank.phase != RankPhase::kEnded || rank.told_to_end || rank.exit.kind == ExitKind::kClean) {
      continue;
    }
    dead.push_back(r);
  }
  if (dead.empty()) return;
  std::stable_sort(dead.begin(), dead.end(), [&](uint32_t a, uint32_t b) {
    return history.ranks[a].exit.kind > history.ranks[b].exit.kind;
  });
  const auto usage = std::find_if(dead.begin(), dead.end(), [&](uint32_t r) {
    const Exit& exit = history.ranks[r].exit;
    return exit.kind == ExitKind::kError &&
           std::find(settings.no_restart_codes.begin(), settings.no_restart_codes.end(),
                     exit.value) != settings.no_restart_codes.end();
  });
  Trouble trouble;
  trouble.cause = usage != dead.end() ? Cause::kUsage : Cause::kProcessDead;
  if (usage != dead.end()) std::rotate(dead.begin(), usage, usage + 1);
  for (const uint32_t r : dead) {
    if (trouble.suspects.size() < History::kSuspectsMax) {
      trouble.suspects.push_back(SuspectOf(history, Rank{r}, Rank{r}));
    }
  }
  trouble.what =
      absl::StrFormat("rank %d %s", dead.front(), ExitText(history.ranks[dead.front()].exit));
  trouble.sentence = dead.size() == 1 ? absl::StrCat("R", trouble.what.substr(1), ".")
                                      : absl::StrFormat("R%s; %d more have ended with an error.",
                                                        trouble.what.substr(1), dead.size() - 1);
  trouble.act_at = history.now;
  trouble.onset = history.now;
  out.push_back(std::move(trouble));
}

void FindGpuFaults(const History& history, std::vector<Trouble>& out) {
  for (const GpuFault& fault : history.gpu_faults) {
    if (!fault.drain) continue;
    Trouble trouble;
    trouble.cause = Cause::kGpuFault;
    for (uint32_t r = 0; r < history.placement.gpus.size(); ++r) {
      if (IsSame(history.placement.gpus[r], fault.gpu)) {
        trouble.suspects.push_back(SuspectOf(history, Rank{r}, Rank{r}));
        break;
      }
    }
    const monitor::XidMeaning* const meaning = monitor::MeaningOfXid(fault.code);
    trouble.what = absl::StrFormat("Xid %d on %s", fault.code, Name(fault.gpu, HomeOf(history)));
    trouble.sentence =
        absl::StrCat(trouble.what,
                     meaning == nullptr ? "" : absl::StrCat(": ", std::string(meaning->text)), ".");
    trouble.blames_gpu = true;
    trouble.act_at = fault.at;
    trouble.onset = fault.at;
    out.push_back(std::move(trouble));
    return;
  }
}

void FindGoneNodes(const History& history, std::vector<Trouble>& out) {
  Trouble trouble;
  for (uint32_t r = 0; r < history.placement.gpus.size(); ++r) {
    const Gpu& gpu = history.placement.gpus[r];
    if (std::find(history.nodes_gone.begin(), history.nodes_gone.end(), gpu.node) ==
        history.nodes_gone.end()) {
      continue;
    }
    if (trouble.suspects.size() < History::kSuspectsMax) {
      trouble.suspects.push_back(SuspectOf(history, Rank{r}, Rank{r}));
    }
  }
  if (trouble.suspects.empty()) return;
  trouble.cause = Cause::kNodeGone;
  trouble.what = absl::StrCat("node ", trouble.suspects.front().gpu.node, " is gone");
  trouble.sentence = absl::StrCat("N", trouble.what.substr(1), ".");
  trouble.act_at = history.now;
  trouble.onset = history.now;
  out.push_back(std::move(trouble));
}

std::string KindOf(const OpenFinding& finding) {
  std::string kind;
  switch (finding.fault) {
    case FaultClass::kMismatch:
      kind = "mismatch of the program";
      break;
    case FaultClass::kDeadlock:
      kind = "deadlock of the program";
      break;
    case FaultClass::kDead:
      kind = "process dead";
      break;
    case FaultClass::kGpuFault:
      kind = "GPU fault";
      break;
    default:
      switch (finding.syndrome) {
        case Syndrome::kCommunicationHang:
          kind = "comm hang";
          break;
        case Syndrome::kNonCommunicationHang:
          kind = "non-comm hang";
          break;
        case Syndrome::kCommunicationSlow:
          kind = "comm slow";
          break;
        case Syndrome::kNonCommunicationSlow:
          kind = "non-comm slow";
          break;
        case Syndrome::kEnded:
          kind = "node silent";
          break;
        case Syndrome::kStartUp:
          kind = "never joined";
          break;
      }
  }
  return finding.group.empty() ? kind : absl::StrCat(kind, " in ", finding.group);
}

// The same mismatch in the next attempt has the same signature: numbers of operations, ranks and
// times may differ.
std::string SignatureOf(const OpenFinding& finding) {
  std::string text;
  for (const char c : finding.sentence) {
    if (!absl::ascii_isdigit(static_cast<unsigned char>(c))) {
      text += c;
    } else if (text.empty() || text.back() != '#') {
      text += '#';
    }
  }
  return CutText(absl::StrCat(std::string(monitor::Name(finding.fault)), ": ", text), 256);
}

Trouble TroubleOf(const History& history, const OpenFinding& finding) {
  Trouble trouble;
  for (const monitor::Suspect& suspect : finding.suspects) {
    trouble.suspects.push_back(SuspectOf(history, suspect.rank, suspect.peer));
  }
  trouble.finding = finding.id;
  trouble.what = KindOf(finding);
  trouble.sentence = finding.sentence;
  trouble.confidence_permille = finding.confidence_permille;
  trouble.onset = finding.since;
  return trouble;
}

// Verdicts other than of slowness. The strongest of several is chosen by the caller.
void FindHangs(const Settings& settings, const History& history, std::vector<Trouble>& out) {
  for (const OpenFinding& finding : history.findings) {
    if (finding.grade != Grade::kVerdict) continue;
    if (finding.syndrome == Syndrome::kCommunicationSlow ||
        finding.syndrome == Syndrome::kNonCommunicationSlow) {
      continue;
    }
    Trouble trouble = TroubleOf(history, finding);
    trouble.act_at = history.now;
    // The last sign of health is the last step, where steps are told.
    if (history.stepped) trouble.onset = std::min(trouble.onset, history.last_progress);
    switch (finding.fault) {
      case FaultClass::kMismatch:
      case FaultClass::kDeadlock:
        trouble.cause = Cause::kProgram;
        trouble.signature = SignatureOf(finding);
        break;
      case FaultClass::kDead:
        trouble.cause = Cause::kProcessDead;
        break;
      case FaultClass::kGpuFault:
        trouble.cause = Cause::kGpuFault;
        trouble.blames_gpu = true;
        break;
      default: {
        // A silent node alone is no lost one: its lease must have lapsed, too (NodeGone).
        const bool named = finding.sources >= 2 && !finding.busy && !finding.suspects.empty() &&
                           finding.fault != FaultClass::kUnknown &&
                           finding.fault != FaultClass::kNodeSilent;
        trouble.cause = named ? Cause::kHangNamed : Cause::kHang;
        trouble.blames_gpu = named && finding.fault != FaultClass::kStopped &&
                             finding.fault != FaultClass::kStarvedProxy;
        if (named) break;
        // Of a busy suspect, and of a hang that nothing explains, the monitor gives no verdict
        // before the time-out that it has learned (docs/MONITOR_ANALYSIS.md).
        const bool is_timeout = finding.busy || finding.fault == FaultClass::kUnknown;
        if (finding.timeout.has_value() || !is_timeout) {
          trouble.act_at = finding.since + finding.timeout.value_or(settings.hang_timeout);
        }
      }
    }
    out.push_back(std::move(trouble));
  }
}

// Heartbeats and the start: they name nobody, because one rank that stands makes all of them
// silent.
void FindTimeouts(const Settings& settings, const History& history, std::vector<Trouble>& out) {
  std::vector<uint32_t> silent;
  absl::Duration since = history.now;
  bool steps = history.start_time.has_value();
  std::vector<uint32_t> late;
  size_t living = 0;
  for (uint32_t r = 0; r < history.ranks.size(); ++r) {
    const RankRecord& rank = history.ranks[r];
    steps = steps || rank.phase == RankPhase::kStepping;
    if (!IsAlive(rank)) continue;
    ++living;
    if (rank.phase != RankPhase::kStepping) late.push_back(r);
    if (!rank.silent_since.has_value()) continue;
    silent.push_back(r);
    since = std::min(since, *rank.silent_since);
  }
  const auto names = [](const std::vector<uint32_t>& ranks) {
    const size_t shown = std::min<size_t>(ranks.size(), 8);
    return absl::StrCat(
        ranks.size() == 1 ? "rank " : "ranks ",
        absl::StrJoin(ranks.begin(), ranks.begin() + static_cast<ptrdiff_t>(shown), ", "),
        shown < ranks.size() ? ", ..." : "");
  };
  Trouble trouble;
  trouble.cause = Cause::kHang;
  if (!silent.empty()) {
    if (silent.size() == living && living > 1) {
      trouble.what = "all ranks silent";
      trouble.sentence = absl::StrFormat(
          "All ranks are silent: no sign of life from any of %d within the time-out.", living);
    } else {
      trouble.what = "no heartbeat within the time-out";
      trouble.sentence =
          absl::StrCat("No sign of life from ", names(silent), " within the time-out.");
    }
    trouble.act_at = history.now;
    trouble.onset = since;
    // One that is silent while the others go on (RankTimedOut) is the one.
    if (silent.size() == 1 && history.ranks.size() > 1) {
      trouble.suspects.push_back(SuspectOf(history, Rank{silent[0]}, Rank{silent[0]}));
    }
    out.push_back(trouble);
  }
  // Who never tells of steps is not expected to: blindness is no reason to act.
  if (steps && !history.running_since.has_value() && !late.empty()) {
    trouble.suspects.clear();
    trouble.what = "no first step within start_wait";
    trouble.sentence = absl::StrFormat("%s: no first step within %s.", names(late),
                                       DurationText(settings.start_wait));
    trouble.onset = history.last_progress;
    trouble.act_at = history.launched_at + settings.start_wait;
    if (trouble.act_at <= history.now) out.push_back(std::move(trouble));
  }
}

// To leave the slow one out is worth its price: what is lost until the horizon is more than what
// a restart was measured to cost, and with what is left the job is faster than now.
bool ReplacingPays(const Settings& settings, const History& history, const OpenFinding& finding) {
  if (finding.slow_permille <= 1000 || !history.start_time.has_value()) return false;
  std::vector<Gpu> without;
  for (const monitor::Suspect& suspect : finding.suspects) {
    if (Value(suspect.rank) < history.placement.gpus.size()) {
      without.push_back(history.placement.gpus[Value(suspect.rank)]);
    }
  }
  if (without.empty()) return false;
  const PlacementChoice choice = ChoosePlacement(settings, history, without);
  if (!choice.placement.has_value()) return false;
  const double speed_then =
      static_cast<double>(choice.placement->world_size()) /
      static_cast<double>(std::max<uint32_t>(1, history.placement.world_size()));
  const double speed_now = 1000.0 / finding.slow_permille;
  const absl::Duration gain = settings.slow_horizon * (std::min(speed_then, 1.0) - speed_now);
  return gain > *history.start_time + settings.stop_wait;
}

void FindPlanned(const Settings& settings, const History& history, std::vector<Trouble>& out) {
  if (!history.running_since.has_value()) return;
  if (settings.slow == SlowPolicy::kReplaceAtCheckpoint) {
    for (const OpenFinding& finding : history.findings) {
      const bool slow = finding.syndrome == Syndrome::kCommunicationSlow ||
                        finding.syndrome == Syndrome::kNonCommunicationSlow;
      if (finding.grade != Grade::kVerdict || !slow || finding.busy) continue;
      if (!ReplacingPays(settings, history, finding)) continue;
      Trouble trouble = TroubleOf(history, finding);
      trouble.cause = Cause::kSlow;
      trouble.blames_gpu = true;
      trouble.act_at = history.now;
      out.push_back(std::move(trouble));
    }
  }
  if (history.grow) {
    const PlacementChoice choice = ChoosePlacement(settings, history);
    if (choice.placement.has_value() &&
        choice.placement->world_size() > history.placement.world_size()) {
      Trouble trouble;
      trouble.cause = Cause::kGrow;
      trouble.what = absl::StrFormat("%d ranks instead of %d", choice.placement->world_size(),
                                     history.placement.world_size());
      trouble.sentence = absl::StrCat("GPUs are there for ", trouble.what, ".");
      trouble.act_at = history.now;
      trouble.onset = history.now;
      out.push_back(std::move(trouble));
    }
  }
}

}  // namespace

std::optional<Trouble> FindTrouble(const Settings& settings, const History& history) {
  std::vector<Trouble> all;
  FindDead(settings, history, all);
  FindGpuFaults(history, all);
  FindGoneNodes(history, all);
  FindHangs(settings, history, all);
  FindTimeouts(settings, history, all);
  FindPlanned(settings, history, all);
  if (all.empty()) return std::nullopt;
  // The strongest; of those that are alike the one that may be acted on first. If the time-out of
  // one is over it is over for all: another that is named explains it.
  const auto best =
      std::min_element(all.begin(), all.end(), [](const Trouble& a, const Trouble& b) {
        if (a.cause != b.cause) return a.cause > b.cause;
        return a.act_at < b.act_at;
      });
  return *best;
}

bool IsHealthyFor(const History& history, absl::Duration healthy_after, absl::Duration at) {
  return history.running_since.has_value() && at - *history.running_since >= healthy_after;
}

bool IsUnderAnomaly(const History& history, absl::Duration at) {
  const bool faulty = std::any_of(history.gpu_faults.begin(), history.gpu_faults.end(),
                                  [&](const GpuFault& fault) { return at >= fault.at; });
  return faulty || std::any_of(history.findings.begin(), history.findings.end(),
                               [&](const OpenFinding& finding) {
                                 return finding.grade == Grade::kVerdict && at >= finding.since &&
                                        (finding.fault == FaultClass::kGpuFault ||
                                         finding.fault == FaultClass::kGpuHang);
                               });
}

bool AllEnded(const History& history) {
  return std::none_of(history.ranks.begin(), history.ranks.end(), IsAlive);
}

bool AllClean(const History& history) {
  return std::all_of(history.ranks.begin(), history.ranks.end(), [](const RankRecord& rank) {
    return rank.phase == RankPhase::kEnded && rank.exit.kind == ExitKind::kClean;
  });
}

}  // namespace holdfast::recovery
