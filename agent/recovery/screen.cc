#include "agent/recovery/screen.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/choice.h"
#include "agent/recovery/text.h"
#include "agent/recovery/trouble.h"

namespace holdfast::recovery {
namespace {

// Behind a command: which job it is for.
std::string OfJob(const std::string& job) {
  return job.empty() ? std::string() : absl::StrCat(" --job ", job);
}

std::string NewestText(const std::optional<CheckpointId>& newest) {
  return newest.has_value() ? absl::StrCat("step ", CountText(Value(newest->step))) : "none yet";
}

uint64_t GreatestStep(const History& history) {
  uint64_t step = 0;
  for (const RankRecord& rank : history.ranks) step = std::max(step, rank.step);
  return step;
}

class Painter {
 public:
  Painter(const Settings& settings, const History& history, absl::Duration now)
      : settings_(settings),
        h_(history),
        now_(std::max(history.now, now + absl::Microseconds(history.clock_offset_us))),
        trouble_(history.phase == Phase::kAlive ? FindTrouble(settings, history) : std::nullopt) {}

  std::string First() const {
    std::string line = absl::StrCat(
        absl::AsciiStrToUpper(std::string(Name(h_.state))),
        h_.state == State::kDone || h_.state == State::kGivenUp || h_.state == State::kIdle
            ? std::string()
            : absl::StrCat(" ", DurationText(now_ - std::min(now_, Since()))),
        ".");
    for (const std::string& sentence : {Suspicion(), Next(), Loss()}) {
      if (!sentence.empty()) absl::StrAppend(&line, " ", sentence, ".");
    }
    return absl::StrCat(line, " You: ", HumanStep(settings_, h_), ".");
  }

  std::vector<std::string> All() const {
    std::vector<std::string> lines = {First()};
    const std::string why = Why();
    if (!why.empty()) lines.push_back(absl::StrCat("Why: ", why));
    if (h_.proposal.has_value()) {
      lines.push_back(absl::StrFormat(
          "Asked: %s Yes: holdfast approve %s%s. No: holdfast veto %s%s.", h_.proposal->question,
          h_.proposal->id, OfJob(h_.job), h_.proposal->id, OfJob(h_.job)));
    }
    if (h_.hold_until.has_value() && *h_.hold_until > now_) {
      lines.push_back(absl::StrFormat("Held for %s more: %s", DurationText(*h_.hold_until - now_),
                                      h_.hold_reason));
    }
    lines.push_back(Attempts());
    lines.push_back(Sees());
    if (const std::string last = Last(); !last.empty()) lines.push_back(last);
    return lines;
  }

 private:
  // What is open, or what the newest attempt still recovers from.
  const Incident* Current() const {
    if (h_.incident.has_value()) return &*h_.incident;
    const bool recovering = h_.state == State::kStarting && !h_.past.empty() &&
                            h_.past.back().outcome == Outcome::kOpen;
    return recovering ? &h_.past.back() : nullptr;
  }

  absl::Duration Since() const {
    const Incident* const current = Current();
    if (current != nullptr && current->onset.has_value()) return *current->onset;
    return h_.state == State::kRunning ? h_.running_since.value_or(h_.state_since) : h_.state_since;
  }

  std::string Name_(const Incident::Suspect& suspect) const {
    const std::string gpu = recovery::Name(suspect.gpu, HomeOf(h_));
    if (suspect.peer == suspect.rank) {
      return absl::StrFormat("rank %d (%s)", Value(suspect.rank), gpu);
    }
    return absl::StrFormat("ranks %d to %d (%s)", Value(suspect.rank), Value(suspect.peer), gpu);
  }

  std::string Suspicion() const {
    const Incident* const current = Current();
    if (current != nullptr) {
      std::string text = current->suspects.empty()
                             ? "Nobody is named"
                             : absl::StrCat("Suspect ", Name_(current->suspects.front()));
      absl::StrAppend(&text, ", ", current->what);
      if (current->confidence_permille > 0) {
        absl::StrAppendFormat(&text, ", confidence %.2f", current->confidence_permille / 1000.0);
      }
      return text;
    }
    if (h_.state != State::kSuspected || h_.findings.empty()) return "";
    const OpenFinding& finding = h_.findings.front();
    std::string text = finding.suspects.empty() ? "Nobody is named" : "Suspect ";
    if (!finding.suspects.empty()) {
      const Rank rank = finding.suspects.front().rank;
      Incident::Suspect suspect{rank, finding.suspects.front().peer, {}};
      if (Value(rank) < h_.placement.gpus.size()) suspect.gpu = h_.placement.gpus[Value(rank)];
      absl::StrAppend(&text, Name_(suspect));
    }
    absl::StrAppend(&text, ", ", std::string(monitor::Name(finding.fault)));
    absl::StrAppendFormat(&text, ", confidence %.2f", finding.confidence_permille / 1000.0);
    return text;
  }

  // How long stopping has taken, by the median of what was measured.
  absl::Duration StopTime() const {
    std::vector<absl::Duration> stops;
    for (const Incident& incident : h_.past) {
      if (const auto stop = PhasesOf(incident).stop; stop.has_value()) stops.push_back(*stop);
    }
    if (stops.empty()) return settings_.stop_wait;
    std::nth_element(stops.begin(), stops.begin() + static_cast<ptrdiff_t>(stops.size() / 2),
                     stops.end());
    return stops[stops.size() / 2];
  }

  // Until the first new step, from a moment that is `before` away.
  std::string Left(absl::Duration before, bool stop, bool start) const {
    if (start && !h_.start_time.has_value()) return ", time left not known yet";
    absl::Duration left = std::max(absl::ZeroDuration(), before);
    if (stop) left += StopTime();
    if (start) left += *h_.start_time;
    return absl::StrFormat(", about %s left", DurationText(left));
  }

  // "restart in place" as what is being done, with the time that is left: "Restarting in place,
  // about 38 s left".
  std::string Doing(absl::Duration before, bool stop) const {
    std::string action = h_.incident.has_value() ? h_.incident->action : "";
    if (action.empty()) action = "restart in place";
    const size_t verb = action.find(' ');
    if (action.substr(0, verb) == "end") return absl::StrCat("Ending", action.substr(verb));
    return absl::StrCat(action.substr(0, verb) == "go" ? "Going" : "Restarting",
                        action.substr(verb), Left(before, stop, true));
  }

  std::string Next() const {
    switch (h_.state) {
      case State::kIdle:
        return "No run has begun";
      case State::kStarting: {
        std::string from = "from the newest checkpoint";
        if (h_.restore_rule.kind == RestoreRule::Kind::kNothing) from = "from nothing";
        if (h_.restore_rule.checkpoint.has_value()) {
          from = absl::StrCat("from step ", CountText(Value(h_.restore_rule.checkpoint->step)));
        }
        const std::string left = h_.start_time.has_value()
                                     ? Left(h_.launched_at - now_ + *h_.start_time, false, false)
                                     : ", time left not known yet";
        return absl::StrFormat("Starting %d ranks %s%s", h_.placement.world_size(), from, left);
      }
      case State::kRunning:
      case State::kSuspected: {
        const std::string step = absl::StrCat("Step ", CountText(GreatestStep(h_)));
        return h_.state == State::kRunning
                   ? step
                   : absl::StrCat(step, ", watching: nothing is stopped on a suspicion");
      }
      case State::kStalled:
        return Waiting();
      case State::kCollecting:
        if (settings_.mode == Mode::kObserve) return "Nothing is done: mode = observe";
        return Doing(h_.evidence_deadline - now_, true);
      case State::kWaitingForApproval:
        return absl::StrCat("Waiting for you since ",
                            DurationText(now_ - std::min(now_, h_.state_since)));
      case State::kHolding:
        return absl::StrFormat("Held for %s more",
                               DurationText(h_.hold_until.value_or(now_) - now_));
      case State::kSaving:
        return absl::StrCat("Saving before the ranks are stopped",
                            Left(h_.save_deadline - now_, false, false));
      case State::kStopping:
        if (h_.end.has_value()) return absl::StrCat("Ending: ", h_.end->why);
        return Doing(StopTime() - (now_ - h_.state_since), false);
      case State::kDeciding:
        return Doing(h_.resume_at.value_or(now_) - now_, false);
      case State::kWaitingForCapacity:
        return absl::StrFormat("Waiting for GPUs: %s; ends with 75 in %s",
                               ChoosePlacement(settings_, h_).why_not,
                               DurationText(h_.capacity_deadline.value_or(now_) - now_));
      case State::kDone:
      case State::kGivenUp:
        return absl::StrFormat("Exit code %d: %s", h_.exit_code, h_.exit_why);
    }
    return "";
  }

  std::string Waiting() const {
    if (settings_.mode == Mode::kObserve) return "Nothing is done: mode = observe";
    if (trouble_.has_value() && trouble_->act_at > now_) {
      return absl::StrCat("Restarting at the time-out, in ", DurationText(trouble_->act_at - now_),
                          Left(trouble_->act_at - now_, true, true));
    }
    return "Nothing is done: a person said no";
  }

  std::string Loss() const {
    const bool over = h_.state == State::kDone || h_.state == State::kGivenUp;
    const Incident* const current = Current();
    if (over || current == nullptr || h_.end.has_value()) return "";
    if (current->action.substr(0, 4) == "end ") return "";
    LostWork lost{current->lost_steps, current->lost_work};
    RestoreRule rule = h_.restore_rule;
    if (h_.incident.has_value()) {
      const RestoreChoice choice = ChooseRestore(settings_, h_);
      if (!choice.rule.has_value()) return "Loses: no checkpoint can be used";
      rule = *choice.rule;
      lost = LostWorkOf(h_, rule, current->onset.value_or(h_.now));
    }
    const std::string from = rule.checkpoint.has_value()
                                 ? absl::StrCat("step ", CountText(Value(rule.checkpoint->step)))
                                 : "from nothing";
    if (lost.time.has_value()) {
      return absl::StrFormat("Loses %s (%s)", DurationText(*lost.time), from);
    }
    if (lost.steps.has_value()) {
      return absl::StrFormat("Loses %s steps (%s)", CountText(*lost.steps), from);
    }
    return absl::StrFormat("Loses what came after the restore point (%s)", from);
  }

  std::string Why() const {
    const Incident* const current = Current();
    if (current != nullptr) return current->sentence;
    if (h_.state == State::kSuspected && !h_.findings.empty()) return h_.findings.front().sentence;
    return "";
  }

  std::string Attempts() const {
    std::optional<CheckpointId> newest;
    if (!h_.checkpoints.empty()) newest = h_.checkpoints.back().facts.id;
    return absl::StrFormat(
        "Attempt %s, %d of %d ranks, step %s; newest checkpoint: %s; restarts %d of %d, %d in all.",
        Value(h_.attempt) == 0 ? "-" : absl::StrCat(Value(h_.attempt)), h_.placement.world_size(),
        h_.world_size, CountText(GreatestStep(h_)), NewestText(newest), h_.restarts_charged,
        settings_.max_restarts, h_.restart_count);
  }

  std::string Sees() const {
    const std::string mode =
        absl::StrCat("Mode ", std::string(recovery::Name(settings_.mode)), ". ");
    if (!h_.sight.has_value() || *h_.sight == Sight::kBlind) {
      return absl::StrCat(mode, "The monitor is blind: exit codes and heartbeats only.");
    }
    return absl::StrCat(mode, *h_.sight == Sight::kWhole ? "The monitor sees every rank."
                                                         : "The monitor does not see every rank.");
  }

  std::string Last() const {
    if (h_.past.empty() || &h_.past.back() == Current()) return "";
    const Incident& last = h_.past.back();
    return absl::StrFormat("Last: %s, %s ago: %s.", last.what,
                           DurationText(now_ - std::min(now_, last.detected.value_or(now_))),
                           std::string(recovery::Name(last.outcome)));
  }

  const Settings& settings_;
  const History& h_;
  const absl::Duration now_;
  const std::optional<Trouble> trouble_;
};

}  // namespace

std::string HumanStep(const Settings& settings, const History& history) {
  const std::string of_job = OfJob(history.job);
  if (history.proposal.has_value()) {
    return absl::StrCat("holdfast approve ", history.proposal->id, of_job);
  }
  switch (history.state) {
    case State::kStalled: {
      const std::optional<Trouble> trouble = FindTrouble(settings, history);
      const bool waits =
          settings.mode != Mode::kObserve && trouble.has_value() && trouble->act_at > history.now;
      return waits ? "nothing" : absl::StrCat("holdfast stop", of_job);
    }
    case State::kHolding:
      return absl::StrCat("holdfast hold 0", of_job);
    case State::kWaitingForCapacity:
      for (const Gpu& gpu : history.gpus) {
        if (history.lemons.ExclusionOf(gpu, history.wall) == nullptr) continue;
        return gpu.node == HomeOf(history)
                   ? absl::StrCat("holdfast readmit ", gpu.index, of_job)
                   : absl::StrFormat("holdfast readmit %s/%d%s", gpu.node, gpu.index, of_job);
      }
      return "nothing";
    case State::kGivenUp:
      return history.exit_code == 75 ? "nothing" : absl::StrCat("holdfast why", of_job);
    default:
      return "nothing";
  }
}

std::string FirstLine(const Settings& settings, const History& history, absl::Duration now) {
  return Painter(settings, history, now).First();
}

std::vector<std::string> Screen(const Settings& settings, const History& history,
                                absl::Duration now) {
  return Painter(settings, history, now).All();
}

// ---- Jobs of other launchers

std::string_view StateOf(const WatchedJob& job) {
  if (job.open_ranks == 0) return "not running";
  if (!job.trouble.empty()) return "stalled";
  return job.finding.has_value() ? "suspected" : "running";
}

std::string HumanStep(const WatchedJob& job) {
  const bool is_verdict = job.open_ranks > 0 && !job.is_handled && job.finding.has_value() &&
                          job.finding->grade == monitor::Grade::kVerdict;
  return is_verdict ? absl::StrCat("holdfast monitor explain ", job.finding->id) : "nothing";
}

std::vector<std::string> Screen(const WatchedJob& job, absl::Duration now) {
  const bool is_running = job.open_ranks > 0;
  std::string first = absl::AsciiStrToUpper(std::string(StateOf(job)));
  if (is_running && job.finding.has_value()) {
    const monitor::Finding& finding = *job.finding;
    std::string who = "Nobody is named";
    if (!finding.suspects.empty()) {
      const monitor::Suspect& suspect = finding.suspects.front();
      who =
          suspect.rank == suspect.peer
              ? absl::StrFormat("Suspect rank %d", Value(suspect.rank))
              : absl::StrFormat("Suspect ranks %d to %d", Value(suspect.rank), Value(suspect.peer));
    }
    absl::StrAppendFormat(&first, " %s. %s, %s (%s), confidence %.2f",
                          DurationText(now - std::min(now, finding.since)), who,
                          std::string(monitor::Name(finding.syndrome)),
                          std::string(monitor::Name(finding.fault)), finding.confidence);
  }
  if (is_running && job.step > 0) absl::StrAppend(&first, ". Step ", CountText(job.step));
  const std::string next = job.next.empty() ? "Its own launcher restarts it" : job.next;
  absl::StrAppend(&first, ". ", is_running ? next : "No rank is open", ". You: ", HumanStep(job),
                  ".");
  std::vector<std::string> lines = {std::move(first)};
  if (is_running && job.finding.has_value()) {
    lines.push_back(absl::StrCat("Why: ", job.finding->sentence));
  } else if (is_running && !job.trouble.empty()) {
    lines.push_back(absl::StrCat("Why: ", job.trouble));
  }
  lines.push_back(absl::StrFormat("Attempt %s, %d of %d ranks open here; newest checkpoint: %s.",
                                  Value(job.attempt) == 0 ? "-" : absl::StrCat(Value(job.attempt)),
                                  job.open_ranks, job.world_size, NewestText(job.newest)));
  if (is_running) {
    lines.push_back(job.watched_ranks == 0
                        ? "The monitor is blind: no rank has telemetry (holdfast doctor)."
                        : absl::StrFormat("The monitor sees %d ranks.", job.watched_ranks));
  }
  return lines;
}

}  // namespace holdfast::recovery
