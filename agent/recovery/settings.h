// What a job may choose about its recovery: the tables [recovery] and [elastic] of a TOML file,
// as values. docs/CONFIGURATION.md repeats the keys, and a test compares the two.
#ifndef HOLDFAST_AGENT_RECOVERY_SETTINGS_H_
#define HOLDFAST_AGENT_RECOVERY_SETTINGS_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast::recovery {

enum class Mode : uint8_t {
  kObserve,  // collects evidence and says what it would do; a person does it
  kAsk,      // asks before it stops or starts anything
  kAct,      // acts by the default table (docs/RECOVERY.md), asks for the rest
};
// Who starts the ranks, and so chooses their GPUs and their checkpoint.
enum class Launcher : uint8_t {
  kWe,
  kOther,  // agent/run/sidecar.h: nothing of that is chosen here, and no GPU excluded
};
enum class SlowPolicy : uint8_t { kReport, kReplaceAtCheckpoint };
enum class LemonPolicy : uint8_t {
  kExclude,  // a GPU that an earlier job excluded is not used
  kAsk,      // a person is asked first
  kIgnore,
};

// A world size that the job may also run with, and in which layout.
struct ElasticLayout {
  uint32_t world_size = 0;
  std::string layout;  // as the trainer understands it; handed to it in HOLDFAST_LAYOUT
  // Of the greatest rank, by the planner (elastic.h). Not known: not judged.
  std::optional<uint64_t> bytes_per_rank;
};

struct Settings {
  Mode mode = Mode::kAct;
  Launcher launcher = Launcher::kWe;  // no key: whoever asks knows

  // ---- How often.
  uint32_t max_restarts = 5;  // of a run; those after a healthy attempt do not count
  uint32_t restarts_in_window = 3;
  absl::Duration restart_window = absl::Minutes(30);
  // Before the second restart in a row without a healthy attempt, doubled before each further one.
  absl::Duration pause_first = absl::Seconds(5);
  absl::Duration pause_max = absl::Minutes(5);
  // An attempt that has trained for so long was healthy.
  absl::Duration healthy_after = absl::Minutes(15);

  // ---- How long.
  absl::Duration hang_timeout = absl::Minutes(10);  // where the monitor has learned none
  absl::Duration start_wait = absl::Hours(1);       // from the start to the first new step
  absl::Duration evidence_wait = absl::Seconds(5);
  absl::Duration save_wait = absl::Minutes(1);     // for a last save
  absl::Duration stop_wait = absl::Seconds(5);     // from TERM to KILL
  absl::Duration kill_wait = absl::Seconds(30);    // from KILL on; then the process counts as stuck
  absl::Duration approval_wait = absl::Hours(24);  // while no rank runs; then 75
  absl::Duration capacity_wait = absl::Minutes(10);  // then 75

  // ---- GPUs.
  LemonPolicy lemons = LemonPolicy::kExclude;
  uint32_t hangs_to_exclude = 2;  // of one GPU within lemon_memory
  absl::Duration lemon_memory = absl::Hours(24);
  absl::Duration exclude_for = absl::Hours(168);
  uint32_t exclusions_max = 2;  // of a run, without a sign of the hardware

  // ---- Checkpoints and the program.
  uint32_t checkpoint_tries = 2;
  std::vector<int32_t> no_restart_codes = {2, 64, 93, 126, 127};

  // ---- Slowness.
  SlowPolicy slow = SlowPolicy::kReport;
  absl::Duration slow_horizon = absl::Hours(24);

  // ---- Interval of checkpoints (interval.h).
  absl::Duration failure_prior = absl::Hours(24);

  // ---- [elastic]
  std::vector<ElasticLayout> layouts;  // ascending by world size; empty: the job never shrinks
  std::optional<uint64_t> rank_bytes_max;
};

struct SettingsKey {
  const char* name;  // "recovery.mode"
  const char* default_text;
  const char* help;  // one sentence
};
std::span<const SettingsKey> SettingsKeys();
// The table in Markdown.
std::string SettingsTable();

// The tables of one TOML text; other tables and keys of it are not looked at. What is not given is
// as in Settings. Errors: kInvalidArgument: `where`, line, key, expected and found.
absl::StatusOr<Settings> ParseSettings(std::string_view toml, const std::string& where);

std::string_view Name(Mode mode);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_SETTINGS_H_
