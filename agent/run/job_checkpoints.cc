// JobSupervisor: checkpoints. What the policy is told of them, and what the engine is told to
// restore.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/run/job_supervisor.h"

namespace holdfast {
namespace {

using recovery::CheckpointFacts;
using recovery::RestoreRule;

std::vector<CheckpointFacts> FactsOf(const std::vector<Engine::KnownCheckpoint>& known,
                                     const recovery::History& history) {
  std::vector<CheckpointFacts> facts;
  for (const Engine::KnownCheckpoint& one : known) {
    bool marked_bad = one.marked_bad;
    // Nobody has taken a mark back whose directory has gone.
    for (const recovery::CheckpointRecord& record : history.checkpoints) {
      marked_bad |= !one.on_storage && record.facts.id == one.id && record.facts.marked_bad;
    }
    facts.push_back({.id = one.id, .marked_bad = marked_bad});
  }
  return facts;
}

}  // namespace

void JobSupervisor::ReadCheckpoints() {
  if (std::exchange(reading_, true)) {
    read_again_ = true;
    return;
  }
  world_.engine.ReadCheckpoints(spec_.job,
                                [this, alive = std::weak_ptr<bool>(alive_)](
                                    absl::StatusOr<std::vector<Engine::KnownCheckpoint>> known) {
                                  if (alive.expired()) return;
                                  reading_ = false;
                                  CatalogRead(std::move(known));
                                  if (std::exchange(read_again_, false)) ReadCheckpoints();
                                });
}

void JobSupervisor::CatalogRead(absl::StatusOr<std::vector<Engine::KnownCheckpoint>> known) {
  if (is_over_) return;
  if (!known.ok()) {
    Say(absl::StrFormat("which checkpoints there are cannot be read: %s",
                        std::string(known.status().message())));
  }
  if (begun_.has_value()) {
    world_.loop.CancelTimer(begin_timer_);
    begin_timer_ = 0;
    if (known.ok()) {
      begun_->checkpoints = FactsOf(*known, history_);
    } else {
      // As far as is known from earlier runs.
      for (const recovery::CheckpointRecord& record : history_.checkpoints) {
        begun_->checkpoints.push_back(record.facts);
      }
    }
    // Whatever was said meanwhile was said of this run.
    events_.push_front(
        {world_.clock.Elapsed(), world_.clock.WallTime(), *std::exchange(begun_, std::nullopt)});
    return Pump();
  }
  if (known.ok()) Take(recovery::CheckpointsRead{FactsOf(*known, history_)});
}

// For the ranks of that launch, when they ask for a checkpoint.
void JobSupervisor::OrderRestore(recovery::Launch launch, const RestoreRule& rule) {
  std::optional<RestoreOrder> order;
  if (rule.kind != RestoreRule::Kind::kNewest) {
    order = RestoreOrder{AttemptKeyOf(spec_, launch), std::nullopt};
    if (rule.kind == RestoreRule::Kind::kExactly) order->checkpoint = rule.checkpoint;
  }
  world_.engine.SetRestoreOrder(spec_.job, std::move(order));
}

// The engine looks for itself, and later: a mark may have come since the policy chose.
void JobSupervisor::TellIfOlder(std::optional<CheckpointId> restored) {
  const std::optional<CheckpointId>& chosen = history_.restore_rule.checkpoint;
  if (!chosen.has_value() || (restored.has_value() && *chosen <= *restored)) return;
  Say(absl::StrFormat(
      "the ranks begin from %s: step %d was marked bad since, or is not there any more",
      restored.has_value() ? absl::StrCat("step ", Value(restored->step)) : "nothing of this job",
      Value(chosen->step)));
}

}  // namespace holdfast
