// What is kept of an incident before anything is stopped: a directory for people, for the next
// look, and for `holdfast incident save`. Made by several hands at once, because some answer late:
// each of the functions below writes files of its own.
//
//   summary.txt          what happened, when, to whom, and what could not be had; in plain words
//   incident.json        the same for programs; replaced as it goes on (recovery/incident_json.h)
//   status.json          what the agent says of itself: sessions, images, boards
//   environment.txt      the variables of the job that are on the allow-list
//   kernel.log           the last of the kernel's log
//   monitor.json         states, waits and findings, as `holdfast monitor` has them
//   monitor.hfmr         what the monitor was told: `holdfast monitor replay`
//   rank-R.stdout        the last of what the rank printed, kLogTailBytes at most; rank-R.stderr
//   rank-R.error.json    what the program has left (TORCHELASTIC_ERROR_FILE), if it has
//   rank-R.stacks        the native stacks of its threads; rank-R.python-stacks
//   rank-R.flight        the Flight Recorder's dump, as the process gave it: not to be unpickled
//   rank-R.flight.txt    the same for people
//
// Bounded: each of the functions writes kFilesBytesMax at most, and the newest kIncidentsMax
// directories are kept.
#ifndef HOLDFAST_AGENT_RUN_EVIDENCE_H_
#define HOLDFAST_AGENT_RUN_EVIDENCE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "agent/run/incident_archive.h"
#include "agent/run/run_recorder.h"
#include "agent/witness/waiting_processes.h"

namespace holdfast {

struct Evidence {
  static constexpr size_t kLogTailBytes = size_t{64} << 10;
  static constexpr size_t kFlightBytesMax = size_t{4} << 20;  // a greater dump is left out
  static constexpr size_t kFilesBytesMax = size_t{64} << 20;
  static constexpr size_t kIncidentsMax = 32;
  // For native stacks, and for what processes tell of themselves.
  static constexpr absl::Duration kWitnessDeadline = absl::Seconds(2);

  std::string directory;
  std::string summary;
  std::string status_json;
  std::vector<std::string> environment;  // "NAME=value", unfiltered
  std::string kernel_log;                // a path; empty: not read
  struct RankPlace {
    uint32_t rank = 0;
    std::string log_directory;  // empty: not known
    pid_t process = 0;          // 0: it does not live
  };
  std::vector<RankPlace> ranks;
};

// What could not be had, or written, and why: lines for people.
using Missing = std::vector<std::string>;

// What the node itself knows, into the directory, which is there; directories of older incidents
// go. Blocks for the disk, and for kWitnessDeadline at most besides. Threads: any, as the next.
Missing CollectFromNode(const Evidence& evidence);

// What processes told of themselves. Their answers are hostile.
Missing CollectAnswers(const std::string& directory, WaitingProcesses::Round round);

Missing CollectMonitor(const std::string& directory, const std::string& monitor_json,
                       const RunRecorder::Kept& recording);

// The last one: summary.txt, with what is missing at its end.
absl::Status WriteSummary(const Evidence& evidence, const Missing& missing);

// The greatest number of an incident's directory in `directory`; 0: there is none. Incidents of a
// job have numbers in a row whoever collects them: `holdfast run`, or the sidecar.
uint32_t NewestIncident(const std::string& directory);

// Only variables that are known to be no secrets, sorted, one a line; the others are counted.
std::string AllowedVariables(const std::vector<std::string>& environment);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_EVIDENCE_H_
