// What is kept of an incident before anything is stopped: a directory for people, and for the next
// look.
//
//   summary.txt       what happened, when, to whom, in plain words
//   status.json       what the agent says of itself: sessions, images, boards, findings
//   rank-R.stdout     the last of what the rank printed, kLogTailBytes at most; rank-R.stderr
//   rank-R.error.json what the program has left (TORCHELASTIC_ERROR_FILE), if it has
//   rank-R.stacks     the native stacks of its threads (holdfast-witness), or why there are none
#ifndef HOLDFAST_AGENT_RUN_EVIDENCE_H_
#define HOLDFAST_AGENT_RUN_EVIDENCE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace holdfast {

struct Evidence {
  static constexpr size_t kLogTailBytes = size_t{64} << 10;

  std::string directory;  // made; what is in it already is replaced
  std::string summary;
  std::string status_json;
  struct RankPlace {
    uint32_t rank = 0;
    std::string log_directory;
    pid_t process = 0;  // 0: it does not live
  };
  std::vector<RankPlace> ranks;
  absl::Duration stacks_deadline = absl::Seconds(2);
};

// Everything that can be had; the first error, if something could not be written. Blocks for the
// disk, and for `stacks_deadline` at most besides. Threads: any.
absl::Status Collect(const Evidence& evidence);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_EVIDENCE_H_
