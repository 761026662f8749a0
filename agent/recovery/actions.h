// What the policy asks for, as values. All of them may be carried out twice: after a restart of the
// agent those that may not have been carried out are asked for again.
#ifndef HOLDFAST_AGENT_RECOVERY_ACTIONS_H_
#define HOLDFAST_AGENT_RECOVERY_ACTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/events.h"
#include "agent/recovery/gpus.h"
#include "base/ids.h"

namespace holdfast::recovery {

// Boards, stacks, dumps, log tails. Answer with EvidenceCollected; without one the policy goes on
// at the deadline.
struct CollectEvidence {
  uint32_t incident = 0;
  Launch launch{};
  absl::Duration deadline;  // on the clock of Event::now, as all that follow
  std::vector<Rank> suspects;
  std::string why;
};

// Makes the next step due. The commit, or SaveFailed, is the answer; without one the policy goes on
// at the deadline.
struct RequestSave {
  Launch launch{};
  absl::Duration deadline;
  std::string why;
};

// TERM to the process trees of all ranks of the launch that live, at once; KILL at `kill_at` to
// what is left. Each end is told as RankExited.
struct StopRanks {
  Launch launch{};
  absl::Duration kill_at;
  std::string why;
};

// Which checkpoint the attempt is to begin from.
struct RestoreRule {
  enum class Kind : uint8_t {
    kNewest,   // as DESIGN section 8 says; `checkpoint`: what that is, as far as is known
    kExactly,  // `checkpoint`, and no newer one
    kNothing,  // from nothing, although there are checkpoints
  };
  Kind kind = Kind::kNewest;
  std::optional<CheckpointId> checkpoint;
  friend bool operator==(const RestoreRule&, const RestoreRule&) = default;
};

struct Placement {
  std::vector<Gpu> gpus;  // by rank; as many as ranks
  std::string layout;     // empty: the job's own
  uint32_t world_size() const { return static_cast<uint32_t>(gpus.size()); }
  friend bool operator==(const Placement&, const Placement&) = default;
};

// Fence first, then start: from the moment this is carried out nothing older than `launch` can
// publish. Ranks of this launch that have a shim already are left alone.
struct StartRanks {
  Launch launch{};
  uint32_t restart_count = 0;  // of the run: TORCHELASTIC_RESTART_COUNT
  Placement placement;
  RestoreRule restore;
  std::string why;
};

// The last one: end with this code.
struct ExitJob {
  int32_t code = 0;
  std::string why;
};

struct Ask {
  std::string id;  // for `holdfast approve ID` and `veto ID`
  std::string question;
};

struct Notice {
  std::string text;
};

// To be merged into the lemon list (LemonList::Mark, Exclude).
struct RecordLemon {
  Lemon lemon;
};
struct ForgetLemon {
  Gpu gpu;
};

using Action = std::variant<CollectEvidence, RequestSave, StopRanks, StartRanks, ExitJob, Ask,
                            Notice, RecordLemon, ForgetLemon>;

// One line for a log.
std::string Describe(const Action& action);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_ACTIONS_H_
