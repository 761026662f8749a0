// The coordination store, as the engine sees it: who is the current attempt, and what its restore
// point is. An interface, because one node keeps it in files (agent/file_store.h) and a cluster
// will keep it in etcd.
//
// Every write here is a compare-and-set: a second writer of the same record loses and is told so.
// Attempt numbers only grow: next = max(store, every root) + 1, so that a lost store cannot go
// back.
#ifndef HOLDFAST_CHECKPOINT_COORDINATION_STORE_H_
#define HOLDFAST_CHECKPOINT_COORDINATION_STORE_H_

#include <compare>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"

namespace holdfast {

struct AttemptRecord {
  Attempt attempt{};
  std::string key;  // HOLDFAST_ATTEMPT_KEY; may be empty
  uint32_t world_size = 0;
  // HOLDFAST_RESTORE_FROM, the same of every rank: absolute; empty: none was named.
  std::string restore_from = {};
};

// A checkpoint of another job, in whatever root.
struct ForeignCheckpoint {
  std::string directory;  // absolute path of the checkpoint
  std::string job;
  std::string job_uuid;
  CheckpointId checkpoint;
  friend auto operator<=>(const ForeignCheckpoint&, const ForeignCheckpoint&) = default;
};

// What an attempt started from: a checkpoint of its own job, or of another one, which is no part of
// its lineage. Neither: from the beginning.
struct RestorePoint {
  std::optional<CheckpointId> checkpoint;
  std::optional<ForeignCheckpoint> foreign = std::nullopt;
  bool is_beginning() const { return !checkpoint.has_value() && !foreign.has_value(); }
  friend auto operator<=>(const RestorePoint&, const RestorePoint&) = default;
};

// Threads: calls block on storage and run on a WorkPool, one at a time per job.
// Errors: as in io/file_system.h; kDataLoss if a record is damaged.
class CoordinationStore {
 public:
  virtual ~CoordinationStore() = default;

  // The job's uuid, making it at the first call. Durable before it returns.
  virtual absl::StatusOr<std::string> JobUuid(const std::string& job) = 0;

  // The newest attempt; kNotFound if the job never had one.
  virtual absl::StatusOr<AttemptRecord> NewestAttempt(const std::string& job) = 0;

  // Makes `record.attempt` the newest, durably. kAlreadyExists if an attempt of that number or a
  // greater one exists: read again.
  virtual absl::Status BeginAttempt(const std::string& job, const AttemptRecord& record) = 0;

  // Records what `attempt` starts from, durably, once. If it is recorded already, returns what is
  // recorded, which may differ: the record wins.
  virtual absl::StatusOr<RestorePoint> DecideRestorePoint(const std::string& job, Attempt attempt,
                                                          const RestorePoint& proposed) = 0;
  // kNotFound if not decided.
  virtual absl::StatusOr<RestorePoint> GetRestorePoint(const std::string& job, Attempt attempt) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_COORDINATION_STORE_H_
