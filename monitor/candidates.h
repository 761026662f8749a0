// What one look at the job suggests, before time decides (tracker.h): the analyses fill these.
#ifndef HOLDFAST_MONITOR_CANDIDATES_H_
#define HOLDFAST_MONITOR_CANDIDATES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/finding.h"
#include "monitor/job_state.h"

namespace holdfast::monitor {

struct Candidate {
  // The incident: its family and whom it is about. Two explanations of one incident share it.
  std::string key;
  // `grade` says what the evidence is good for now; id and since are the tracker's.
  Finding finding;
  // Of a standstill: for how long, and when it would be a verdict if one more witness agreed, or
  // two (testimony_book.h).
  absl::Duration standing = absl::ZeroDuration();
  absl::Duration verdict_with_one = absl::InfiniteDuration();
  absl::Duration verdict_with_two = absl::InfiniteDuration();
};

// Somebody is waited for, and that is in order: shown by `status`, never a finding.
struct WaitNote {
  enum class Reason : uint8_t { kBusy, kSection, kEnginePause, kImbalance };
  Reason reason{};
  Rank rank{};
  std::string sentence;
};

struct Candidates {
  std::vector<Candidate> found;
  std::vector<WaitNote> notes;
  // Every rank has ended, some so that nobody saw how, and others were inside an operation that
  // these had not entered: no good end, whether it is time to say so or not.
  bool ended_amid = false;
};

// Who stands still, by the wait-for graph. hang.cc.
void FindHangs(const JobState& state, Candidates& out);
// Processes that ended, and nodes that fell silent while others wait for them. ended.cc.
void FindEnded(const JobState& state, Candidates& out);
// Ranks that never appeared while the job starts. ended.cc.
void FindNeverJoined(const JobState& state, Candidates& out);

// Communicators in which something stands where its ranks called different operations. mismatch.cc.
struct Mismatch {
  uint64_t communicator = 0;
  std::vector<Rank> odd;  // the minority; all of them if there is none
  bool tie = false;       // no majority says who is right
  absl::Duration standing = absl::ZeroDuration();
  // "rank 0 called Broadcast of 8 bytes as operation 9 of ..., where 7 ranks called ..."
  std::string what;
};
std::vector<Mismatch> FindMismatches(const JobState& state);

// When even a rank that is busy counts as hung in the operations of a communicator.
struct HangTimeout {
  absl::Duration timeout;
  bool is_learned = false;  // else it is the configured one
};
HangTimeout HangTimeoutOf(const JobState& state, uint64_t communicator);

// Texts that several analyses use.
std::string RankName(const JobState& state, Rank rank);      // "rank 12 (node 3)", "rank 12"
std::string NodeName(const JobState& state, uint32_t node);  // "3", "gpu-07"; "": not known
std::string CommunicatorName(uint64_t id);                   // "communicator 1f3a"
std::string SecondsText(absl::Duration duration);            // "8 s"
// What the topology file calls what `scope` says of `suspect`: "NIC mlx5_2 of node n3"; "from NIC
// mlx5_2 of node n3 to NIC mlx5_2 of node n4". Empty: not known, or `scope` is of no NIC.
std::string NicsName(const JobState& state, Scope scope, const Suspect& suspect);
// Where they are plugged in, as a line of evidence: "rail 2, switch leaf-1 to switch leaf-4"; empty
// as above.
std::string PortsText(const JobState& state, Scope scope, const Suspect& suspect);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_CANDIDATES_H_
