// One process of `holdfast preflight`: who it is in the job, from the environment, and its run.
#ifndef HOLDFAST_PREFLIGHT_PREFLIGHT_H_
#define HOLDFAST_PREFLIGHT_PREFLIGHT_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/file_system.h"
#include "preflight/coordinator.h"
#include "preflight/node.h"

namespace holdfast::preflight {

// Rank 0 listens on the first free one of so many ports from MASTER_PORT on: torchrun's own store
// has the first.
inline constexpr uint16_t kPortCount = 8;
// A shorter token could be guessed (handshake.h).
inline constexpr size_t kTokenBytesMin = 16;
inline constexpr absl::Duration kMeasureForMin = absl::Seconds(1);
inline constexpr absl::Duration kMeasureForMax = absl::Seconds(600);

struct Place {
  uint32_t rank = 0;
  uint32_t node_count = 1;
  std::string master_host;
  uint16_t master_port = 0;
  std::string token = {};
  std::string host = {};  // what this node calls itself
};

// From torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; instead of the first two
// SLURM_PROCID and SLURM_STEP_NUM_TASKS, which srun sets; HOLDFAST_PREFLIGHT_TOKEN; HOLDFAST_NODE,
// else the host's name. `get`: as getenv(3). Errors: kInvalidArgument, naming the variable: one is
// absent or no number, or LOCAL_RANK, GROUP_RANK, LOCAL_WORLD_SIZE or SLURM_LOCALID say that there
// are several processes on a node.
absl::StatusOr<Place> ReadPlace(const std::function<const char*(const char*)>& get);

struct RunOptions {
  std::string disk_directory;  // empty: no disk is measured
  absl::Duration measure_for = absl::Seconds(30);
  absl::Duration join_within = absl::Seconds(60);
  double slow_ratio = kSlowRatio;
  std::function<void(const std::string&)> progress;  // called on a thread of rank 0
};

struct Result {
  Ending ending;
  std::optional<Report> report;  // on rank 0
};

// Blocks until it is over. The options that concern all (but disk_directory and join_within) are
// taken from rank 0. Errors, before anything is sent: kInvalidArgument (MASTER_ADDR is not loopback
// and there is no token, or it is too short), kNotFound (no address of MASTER_ADDR).
absl::StatusOr<Result> RunPreflight(FileSystem& file_system, const Place& place,
                                    const RunOptions& options);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_PREFLIGHT_H_
