// For tests: reads what a job has on a simulated disk, without an engine, and compares it bit for
// bit with the definition of the state (engine_testing.h). A second opinion on the restore path: it
// shares only the planner and the readers of the format with it.
#ifndef HOLDFAST_CHECKPOINT_READBACK_TESTING_H_
#define HOLDFAST_CHECKPOINT_READBACK_TESTING_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/catalog.h"
#include "checkpoint/registration.h"
#include "checkpoint/verify.h"
#include "tests/support/sim_disk.h"

namespace holdfast {

class ReadBack {
 public:
  // For checkpoints of `world_size` ranks of SmallLayout.
  explicit ReadBack(uint32_t world_size);

  // The steps of all committed checkpoints of "/root/job", ascending by (attempt, step), each of
  // which was read completely and is the state after its step; nothing is damaged. Otherwise an
  // error that says what is wrong. All are on the current branch; kEach: each is the child of the
  // one before it. kAny: a save that was reported as failed may be there all the same, and was no
  // parent then.
  enum class Parents { kEach, kAny };
  absl::StatusOr<std::vector<CheckpointId>> CheckAll(SimDisk& disk,
                                                     Parents parents = Parents::kEach) const;

 private:
  absl::Status CheckOne(SimDisk& disk, const CatalogEntry& entry) const;

  std::vector<std::shared_ptr<const Registration>> targets_;  // of each rank
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_READBACK_TESTING_H_
