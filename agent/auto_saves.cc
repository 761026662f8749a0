#include "agent/auto_saves.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/recovery/settings.h"

namespace holdfast {

AutoSaves::AutoSaves(World world) : world_(std::move(world)) {}

AutoSaves::~AutoSaves() { world_.loop.CancelTimer(timer_); }

void AutoSaves::Start() {
  next_look_ = world_.clock.Elapsed();
  Poll();
}

std::string AutoSaves::SentenceOf(const std::string& job) const {
  const auto known = jobs_.find(job);
  return known == jobs_.end() ? "" : known->second.sentence;
}

void AutoSaves::Poll() {
  const absl::Duration now = world_.clock.Elapsed();
  for (auto& [job, known] : jobs_) {
    if (known.is_open) TakeProgress(known, world_.progress(job, known.attempt_key), now);
  }
  if (now >= next_look_) {
    next_look_ = now + kLookEvery;
    Look();
  }
  const bool is_any_open =
      std::any_of(jobs_.begin(), jobs_.end(), [](const auto& one) { return one.second.is_open; });
  timer_ = world_.loop.RunAfter(is_any_open ? kPollEvery : kLookEvery, [this] { Poll(); });
}

void AutoSaves::TakeProgress(Known& known, std::span<const Engine::RankProgress> ranks,
                             absl::Duration now) {
  if (ranks.empty()) return;
  uint64_t step = UINT64_MAX;  // that all have told
  for (const Engine::RankProgress& rank : ranks) {
    step = rank.heartbeat_count == 0 ? 0 : std::min(step, Value(rank.step));
    if (step == 0) return;
    if (!rank.committed.has_value()) continue;
    if (known.captured.has_value() && *known.captured >= *rank.committed) continue;
    known.captured = rank.committed;
    known.captured_begun = rank.committed_begun.value_or(now);
    known.last_save =
        std::max(known.last_save.value_or(known.captured_begun), known.captured_begun);
    known.cost.Captured(Value(*rank.committed));
  }
  if (!known.last_save.has_value()) known.last_save = now;
  known.cost.Reached(step, now);
}

void AutoSaves::Look() {
  const absl::Duration now = world_.clock.Elapsed();
  for (const JobSnapshot& job : world_.jobs()) {
    // Of one that is over, what was said last stays.
    const auto known = jobs_.find(job.job);
    if (known != jobs_.end()) known->second.is_open = job.open_ranks > 0;
    if (job.open_ranks > 0) LookAt(job, now);
  }
}

void AutoSaves::LookAt(const JobSnapshot& job, absl::Duration now) {
  Known& known = jobs_[job.job];
  if (known.attempts == 0 || known.attempt_key != job.attempt_key) {
    if (known.attempts > 0) known.alive_before += known.last_seen - known.first_seen;
    ++known.attempts;
    known.attempt_key = job.attempt_key;
    known.first_seen = now;
    known.cost.BeginAttempt();
    known.last_save.reset();
    known.captured.reset();
    known.committed.reset();
  }
  known.is_open = true;
  known.last_seen = now;
  if (job.newest_committed.has_value() && job.newest_committed->attempt == job.attempt &&
      known.captured == job.newest_committed->step) {
    if (known.committed != known.captured) known.commit = now - known.captured_begun;
    known.committed = known.captured;
  }
  if (!known.last_save.has_value()) return;  // no step yet
  const recovery::IntervalChoice choice = recovery::ChooseInterval(InputOf(job, known, now));
  known.sentence = choice.sentence;
  if (now - *known.last_save < choice.interval) return;
  const bool is_pending = known.captured != known.committed;
  if (is_pending && now - known.captured_begun < kCommitPatience) return;
  const absl::StatusOr<Step> due = world_.make_due(job.job, job.attempt_key);
  if (!due.ok()) {
    // Tried again at the next look: ranks that do not ask yet may do so later.
    absl::StrAppend(&known.sentence, " Not in effect: ", std::string(due.status().message()), ".");
    return;
  }
  known.last_save = now;
  known.cost.Due(Value(*due));
  LogDebug(absl::StrFormat("job %s: step %d is due: %s", job.job, Value(*due), choice.sentence));
}

recovery::IntervalInput AutoSaves::InputOf(const JobSnapshot& job, const Known& known,
                                           absl::Duration now) {
  recovery::IntervalInput input;
  if (job.run.has_value() && !job.run->is_over) {
    input = recovery::IntervalInputOf(job.run->settings, job.run->history, now, known.cost.step(),
                                      known.commit);
  } else {
    input.failures = known.attempts - 1;
    input.time_alive = known.alive_before + now - known.first_seen;
    input.failure_prior = recovery::Settings().failure_prior;
    input.step = known.cost.step();
    input.commit = known.commit;
  }
  if (known.cost.saves() > 0) input.stall = known.cost.stall();
  return input;
}

}  // namespace holdfast
