// What the next attempt gets: which GPUs and layout, and which checkpoint it begins from. Inside of
// agent/recovery/.
#ifndef HOLDFAST_AGENT_RECOVERY_CHOICE_H_
#define HOLDFAST_AGENT_RECOVERY_CHOICE_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"

namespace holdfast::recovery {

struct PlacementChoice {
  std::optional<Placement> placement;
  std::string why_not;      // without one
  std::string why_smaller;  // with fewer ranks than the job wants
};
// The first GPUs of the list that can be used, without those in `without`: as many as the job
// wants, else as many as the largest declared layout takes that fits.
PlacementChoice ChoosePlacement(const Settings& settings, const History& history,
                                std::span<const Gpu> without = {});
// Why the GPU cannot be used now; empty: it can.
std::string WhyUnusable(const History& history, const Gpu& gpu);

struct RestoreChoice {
  std::optional<RestoreRule> rule;
  // Without a rule: what a person must be asked.
  std::string key;
  std::string question;
  std::string passed_over;  // "step 1,200 (marked bad), step 1,000 (crashed twice)"
};
RestoreChoice ChooseRestore(const Settings& settings, const History& history);

// What is done once more if the rule is followed, of a launch whose health ended at `onset`.
struct LostWork {
  std::optional<uint64_t> steps;
  std::optional<absl::Duration> time;
};
LostWork LostWorkOf(const History& history, const RestoreRule& rule, absl::Duration onset);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_CHOICE_H_
