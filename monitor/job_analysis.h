// The analysis of one job, attempt after attempt, from the reports of its nodes: numbers nodes by
// their names, knows who is in which attempt, and keeps an Analyzer for the newest one. A pure
// function of its steps, as the Analyzer is: the agent calls it once a second, and a replayed
// recording (recording.h) calls it with the same steps and gets the same findings.
//
// Attempts have no numbers here: a report names its attempt by key and world size. One that was
// never heard of replaces the one before it; what still comes of a replaced one is late and
// ignored, until nothing has come of it for kReplacedMemory. A rank that had ended and runs again
// begins a new attempt under the same name.
#ifndef HOLDFAST_MONITOR_JOB_ANALYSIS_H_
#define HOLDFAST_MONITOR_JOB_ANALYSIS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "monitor/analyzer.h"
#include "monitor/node_report.h"
#include "monitor/thresholds.h"
#include "monitor/topology.h"

namespace holdfast::monitor {

// Limits of a job: reports beyond them are refused.
inline constexpr uint32_t kWorldSizeMax = 65'536;
inline constexpr size_t kJobBytesMax = 128;
inline constexpr size_t kAttemptKeyBytesMax = 255;
inline constexpr size_t kNodeBytesMax = 135;

// What a rank does in the program, as its layout says: ranks are compared only with their like.
struct RankRole {
  uint32_t stage = 0;
  uint32_t tensor_position = 0;
  friend bool operator==(const RankRole&, const RankRole&) = default;
};

// A second of a job.
struct JobStep {
  absl::Duration elapsed;           // as in Snapshot, in whole microseconds
  absl::Duration receiver_gap;      // the same
  std::vector<NodeReport> reports;  // in any order
  // Batches of what other witnesses say about the job, as EncodeTestimonies has them.
  std::vector<std::string> testimonies;
  // By rank, whenever they are known or change; empty: as before. Before the first all ranks count
  // as equal. Ignored where their number is not the world size.
  std::vector<RankRole> roles;
  // A topology document (topology.h), when it is known or changes; empty: as before. Before the
  // first no NIC is known. One that cannot be read counts as an unreadable report.
  std::string topology = {};
};

// OK, or kInvalidArgument: a name or a world size beyond the limits.
absl::Status CheckReport(const NodeReport& report);

// Threads: one at a time. Lifetime: owns all it refers to.
class JobAnalysis {
 public:
  static constexpr absl::Duration kReplacedMemory = absl::Seconds(60);
  static constexpr size_t kReplacedMax = 16;  // remembered; beyond, the oldest is forgotten

  JobAnalysis(const Thresholds& thresholds, std::string job);

  struct Result {
    // Findings have ids that no other finding of this job has, whatever its attempt.
    Analysis analysis;
    bool new_attempt = false;  // what was found before is of an attempt that is over
    bool ended = false;        // every rank has ended, and none is known to have failed
  };
  Result Step(JobStep step);

  const std::string& job() const { return job_; }
  const std::string& attempt_key() const { return attempt_.key; }
  // Of the attempt; while no rank has said it, one more than the greatest rank that reports.
  uint32_t world_size() const { return static_cast<uint32_t>(shape_.ranks.size()); }
  bool roles_known() const { return roles_.size() == shape_.ranks.size() && !roles_.empty(); }
  bool topology_given() const { return topology_.has_value(); }
  // Whether the topology says which NIC the rank has: not for a rank that has not said its local
  // rank, nor for those of a node that say the same one.
  bool IsPlaced(Rank rank) const { return !shape_.ranks[Value(rank)].port.nic.empty(); }

  struct Node {
    std::string name;
    absl::Duration last_report;  // as JobStep::elapsed
    uint64_t reports = 0;
    uint32_t ranks = 0;  // in its newest report, which is this one:
    uint64_t incarnation = 0;
    uint64_t sequence = 0;
  };
  const std::vector<Node>& nodes() const { return nodes_; }  // by number

  // Counted over all attempts.
  struct Refused {
    uint64_t late = 0;        // of a replaced attempt
    uint64_t unreadable = 0;  // no summary or testimony, or beyond the limits
    std::string why;          // of the last unreadable one
  };
  const Refused& refused() const { return refused_; }

  // Null before the first report.
  const Analyzer* analyzer() const { return analyzer_.get(); }

 private:
  struct AttemptName {
    std::string key;
    uint32_t world_size = 0;  // 0: nobody has said
    friend auto operator<=>(const AttemptName&, const AttemptName&) = default;
  };
  struct Arrived {
    NodeReport report;
    NodeSummary summary;
  };

  std::vector<Arrived> Decode(std::vector<NodeReport> reports);
  bool IsLate(const AttemptName& name, absl::Duration now);
  bool RunsAgain(const Arrived& arrived) const;
  void BeginAttempt(const AttemptName& name, absl::Duration now);
  void Place(const Arrived& arrived, absl::Duration now);
  void PlaceRanks(size_t rank_count);
  void ApplyRoles();
  void ApplyTopology();
  bool EveryRankEndedCleanly() const;

  const Thresholds thresholds_;
  const std::string job_;
  AttemptName attempt_;
  uint64_t attempt_count_ = 0;                      // of this name
  std::map<AttemptName, absl::Duration> replaced_;  // and when something last came of it
  std::vector<Node> nodes_;
  std::map<std::string, uint32_t> node_numbers_;
  std::vector<RankRole> roles_;
  std::optional<Topology> topology_;
  JobShape shape_;
  bool reshaped_ = false;
  std::unique_ptr<Analyzer> analyzer_;
  Refused refused_;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_JOB_ANALYSIS_H_
