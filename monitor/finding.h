// Suspicions and verdicts: what the analysis says, with its evidence.
//
// A suspicion is early and triggers only what is free (stacks, dumps, a closer look); a verdict may
// trigger recovery. Who and why are separate: `suspects` says who, `fault` says why, and `scope`
// how far the path lets us see. A sentence says it all to somebody who was asleep a minute ago.
#ifndef HOLDFAST_MONITOR_FINDING_H_
#define HOLDFAST_MONITOR_FINDING_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"

namespace holdfast::monitor {

enum class Grade : uint8_t { kSuspicion, kVerdict };

// C4D's four, and the two that need no telemetry of collectives.
enum class Syndrome : uint8_t {
  kCommunicationHang,     // all entered, the operation does not finish
  kNonCommunicationHang,  // somebody never entered it
  kCommunicationSlow,
  kNonCommunicationSlow,
  kEnded,    // a process, a node or a GPU is gone
  kStartUp,  // the job never came together
};
inline constexpr size_t kSyndromes = 6;

// Ordered by how much is known: of two explanations of one incident the greater stays.
enum class FaultClass : uint8_t {
  kUnknown,       // a hang whose cause no telemetry shows
  kLateData,      // waits for its data
  kLateCompute,   // computes longer than its peers
  kPauseOverdue,  // a named pause beyond all patience
  kLink,          // one connection
  kSenderEnd,     // all that a rank sends
  kReceiverEnd,   // all that a rank receives
  kStarvedProxy,  // its proxy threads get no CPU
  kNeverEntered,  // stands outside of the operation that its peers are in
  kGpuHang,       // entered, and its GPU does nothing
  kDeadlock,      // the program waits for itself
  kMismatch,      // the ranks call different operations
  kNeverJoined,
  kStopped,     // SIGSTOP or a debugger
  kNodeSilent,  // the node says nothing and its peers wait for it
  kGpuFault,    // the driver has reported a fault of the GPU
  kDead,
};
inline constexpr size_t kFaultClasses = 17;

enum class Scope : uint8_t {
  kProcess,   // the process of the rank
  kGpu,       // its GPU, or the kernel on it
  kHost,      // its host: CPU, scheduling
  kRankLate,  // compute, data or host: nothing shows which
  kNode,
  kSenderNic,    // the sending end
  kReceiverNic,  // the receiving end
  kPath,         // the path between two ends that are both healthy elsewhere
  kSenderNicOrPath,
  kReceiverNicOrPath,
  kConnection,       // sending end, path or receiving end
  kProgram,          // the program, not the machines
  kBehindBlindRank,  // this rank or one that it waits for: it has no telemetry
  kCommunicator,     // some member
};
inline constexpr size_t kScopes = 14;

struct Suspect {
  Rank rank{};
  // For a connection: the receiving rank; else equal to `rank`.
  Rank peer{};
  friend bool operator==(const Suspect&, const Suspect&) = default;
};

struct Finding {
  std::string id;  // of the incident: the same from its first suspicion to its end
  Grade grade{};
  Syndrome syndrome{};
  FaultClass fault{};
  Scope scope{};
  // The likeliest first. For kUnknown those among whom the cause is, or none.
  std::vector<Suspect> suspects;
  double confidence = 0;  // 0 to 1
  std::string sentence;
  std::vector<std::string> evidence;
  std::string changes_mind;  // what would make this wrong
  absl::Duration since;      // on the receiver's clock: when the incident was opened

  // Of a standstill, for whoever acts on it; not told to people as such.
  uint64_t communicator = 0;  // that stands; 0: none, or several
  // What the program calls it ("dp"): named by whoever knows the layout, never by the analysis.
  std::string group;
  absl::Duration standing;  // for how long it had stood when it was seen last
  // Beyond it a busy suspect counts as hung, too: learned, or configured while nothing was.
  std::optional<absl::Duration> timeout;
};

std::string_view Name(Grade grade);
std::string_view Name(Syndrome syndrome);
std::string_view Name(FaultClass fault);
std::string_view Name(Scope scope);

// One JSON object, schema_version 1, with the members of `finding` under their names; durations in
// seconds; suspects as {"rank": n} or {"rank": n, "peer": m}.
std::string FindingJson(const Finding& finding);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_FINDING_H_
