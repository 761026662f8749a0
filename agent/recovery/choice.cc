#include "agent/recovery/choice.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/text.h"
#include "agent/recovery/trouble.h"

namespace holdfast::recovery {
namespace {

std::string StepText(const CheckpointRecord& record) {
  return absl::StrCat("step ", CountText(Value(record.facts.id.step)));
}

// Why it is not to be used whatever a person says; empty: it may be.
std::string WhyUnfit(const Settings& settings, const CheckpointRecord& record) {
  if (record.facts.marked_bad) return "marked bad";
  if (record.facts.non_finite) return "non-finite values";
  if (record.crashes >= settings.checkpoint_tries) {
    return absl::StrFormat("crashed %d times", record.crashes);
  }
  return "";
}

bool Approved(const History& history, const std::string& key) {
  return std::find(history.approved.begin(), history.approved.end(), key) != history.approved.end();
}

std::string KeyOf(const CheckpointRecord& record) {
  return absl::StrFormat("checkpoint:%d.%d", Value(record.facts.id.attempt),
                         Value(record.facts.id.step));
}

}  // namespace

std::string WhyUnusable(const History& history, const Gpu& gpu) {
  if (const Exclusion* const excluded = history.lemons.ExclusionOf(gpu, history.wall);
      excluded != nullptr) {
    return absl::StrCat("excluded: ", excluded->reason);
  }
  for (const std::string& node : history.nodes_gone) {
    if (gpu.node == node) return "its node is gone";
  }
  for (const History::Stuck& stuck : history.stuck_ranks) {
    if (IsSame(stuck.gpu, gpu)) return "a process on it does not die";
  }
  return "";
}

PlacementChoice ChoosePlacement(const Settings& settings, const History& history,
                                std::span<const Gpu> without) {
  PlacementChoice choice;
  std::vector<Gpu> usable;
  std::string left_out;
  for (const Gpu& gpu : history.gpus) {
    const bool left = std::any_of(without.begin(), without.end(),
                                  [&](const Gpu& other) { return IsSame(gpu, other); });
    const std::string why = left ? "suspected" : WhyUnusable(history, gpu);
    if (why.empty()) {
      usable.push_back(gpu);
    } else {
      absl::StrAppend(&left_out, left_out.empty() ? "" : ", ", Name(gpu, HomeOf(history)), " (",
                      why, ")");
    }
  }
  const std::string missing =
      absl::StrFormat("%d of %d GPUs can be used%s%s", usable.size(), history.gpus.size(),
                      left_out.empty() ? "" : ", not ", left_out);
  if (usable.size() >= history.world_size) {
    usable.resize(history.world_size);
    choice.placement = Placement{std::move(usable), history.layout};
    return choice;
  }
  std::string refused;
  for (auto layout = settings.layouts.rbegin(); layout != settings.layouts.rend(); ++layout) {
    if (layout->world_size == 0 || layout->world_size > usable.size() ||
        layout->world_size >= history.world_size) {
      continue;
    }
    if (layout->bytes_per_rank.has_value() && settings.rank_bytes_max.has_value() &&
        *layout->bytes_per_rank > *settings.rank_bytes_max) {
      absl::StrAppend(&refused,
                      absl::StrFormat("; %d ranks need %d bytes each, of %d", layout->world_size,
                                      *layout->bytes_per_rank, *settings.rank_bytes_max));
      continue;
    }
    usable.resize(layout->world_size);
    choice.placement = Placement{std::move(usable), layout->layout};
    choice.why_smaller = missing;
    return choice;
  }
  choice.why_not = absl::StrCat(
      missing, settings.layouts.empty() ? "; [elastic] declares no smaller layout" : "", refused);
  return choice;
}

RestoreChoice ChooseRestore(const Settings& settings, const History& history) {
  RestoreChoice choice;
  if (settings.launcher == Launcher::kOther) {
    choice.rule.emplace();  // its ranks take the newest
    if (!history.checkpoints.empty()) choice.rule->checkpoint = history.checkpoints.back().facts.id;
    return choice;
  }
  const auto pass_over = [&](const CheckpointRecord& record, const std::string& why) {
    absl::StrAppend(&choice.passed_over, choice.passed_over.empty() ? "" : ", ", StepText(record),
                    " (", why, ")");
  };
  const CheckpointRecord* doubtful = nullptr;  // the newest
  for (auto record = history.checkpoints.rbegin(); record != history.checkpoints.rend(); ++record) {
    std::string why = WhyUnfit(settings, *record);
    if (why.empty() && record->facts.under_anomaly && !Approved(history, KeyOf(*record))) {
      why = "captured under an anomaly";
      if (doubtful == nullptr) doubtful = &*record;
    }
    if (!why.empty()) {
      pass_over(*record, why);
      continue;
    }
    // What is still on its way to storage may be newer than what is known. Where the hardware was
    // in doubt that would be a checkpoint nobody has vouched for.
    const bool newest = choice.passed_over.empty() && !IsUnderAnomaly(history, history.now);
    choice.rule = RestoreRule{newest ? RestoreRule::Kind::kNewest : RestoreRule::Kind::kExactly,
                              record->facts.id};
    return choice;
  }
  if (history.checkpoints.empty()) {
    choice.rule = RestoreRule{};
  } else if (doubtful != nullptr) {
    choice.key = KeyOf(*doubtful);
    choice.question = absl::StrCat(
        "Restore ", StepText(*doubtful),
        ", which was captured under an anomaly? No other can be used: ", choice.passed_over, ".");
  } else if (Approved(history, "from-nothing")) {
    choice.rule = RestoreRule{RestoreRule::Kind::kNothing, std::nullopt};
  } else {
    choice.key = "from-nothing";
    choice.question =
        absl::StrCat("Begin from nothing? No checkpoint can be used: ", choice.passed_over, ".");
  }
  return choice;
}

LostWork LostWorkOf(const History& history, const RestoreRule& rule, absl::Duration onset) {
  LostWork lost;
  uint64_t step = 0;
  for (const RankRecord& rank : history.ranks) step = std::max(step, rank.step);
  const uint64_t from = rule.checkpoint.has_value() ? Value(rule.checkpoint->step) : 0;
  if (step > 0) lost.steps = step - std::min(step, from);
  std::optional<absl::Duration> since;
  for (const CheckpointRecord& record : history.checkpoints) {
    if (record.facts.id == rule.checkpoint) since = record.captured_at;
  }
  // Begun from the same place as this launch was: all that it did is lost.
  if (!since.has_value() && rule.checkpoint == history.restored) since = history.running_since;
  if (since.has_value()) lost.time = onset - std::min(onset, *since);
  return lost;
}

}  // namespace holdfast::recovery
